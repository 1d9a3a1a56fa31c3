"""A family is one file and one registration: one that nothing else knows goes the whole way through the house.

The toy stands in `tests/extending/toys/toy_family.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from toys.toy_family import PlainModel, Toy, ToyModel

from paretune import hardware, native_build
from paretune.cli.ls import collect
from paretune.engine.generate import generate, naive_generate
from paretune.engine.load import load_recipe
from paretune.engine.quantize import quantize
from paretune.errors import CheckpointError, ParetuneError, UsageError
from paretune.hardware.devices import device_profile
from paretune.measure import profile as measure
from paretune.measure import profile_blocks, profile_facts
from paretune.measure.peers import catalogue
from paretune.measure.predict import Sizes, predict
from paretune.measure.profile_parts import BY_KEY
from paretune.measure.profile_steps import Step
from paretune.model import checkpoint, families
from paretune.model.config import ModelConfig
from paretune.model.families.base import Family
from paretune.model.gguf import save as gguf
from paretune.model.layers import Linear
from paretune.recipe import preset
from paretune.registry import FAMILIES, Registry
from paretune.transforms.folding import fold_, folds_of
from paretune.transforms.int8 import Int8

HF = {"model_type": "toy", "vocab_size": 101, "context": 48, "depth": 2, "heads": 4, "width": 32, "residual_scale": 0.5}
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(FAMILIES, "_own", dict(FAMILIES._own))
    FAMILIES.register("toy", "toys.toy_family:Toy")
    FAMILIES.register("plain-toy", "toys.toy_family:PlainToy")


def save_toy(folder, **changes):
    """A folder of a random toy whose norms and biases are not those of initialisation."""
    model = checkpoint.new(ModelConfig.from_hf(HF | changes), seed=1)
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.15)
    checkpoint.save(model, folder)
    return model


@pytest.fixture
def toy(tmp_path):
    """`(model, folder)`."""
    folder = tmp_path / "toy"
    folder.mkdir()
    return save_toy(folder), folder


def test_its_config_is_read_and_written():
    config = ModelConfig.from_hf(HF)
    assert (config.family, config.n_inner, config.option("residual_scale")) == ("toy", 128, 0.5)
    assert config.to_hf() == HF and not config.gated_mlp and config.longest == 48
    fresh = replace(config, hf={}).to_hf()
    assert fresh["architectures"] == ["ToyForCausalLM"] and ModelConfig.from_hf(fresh) == config
    longer = config.with_positions(96)
    assert longer.hf["context"] == 96 and ModelConfig.from_hf(longer.to_hf()).n_positions == 96
    hash(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "c.json: 5 heads do not divide the width"),
        ({"width": None}, "c.json has a wrong value: width is None"),
        ({"residual_scale": -1}, "residual_scale is -1, not a finite number above 0"),
        ({"activation": "mish"}, "activation 'mish' is not supported"),
        ({"model_type": "toys"}, "model_type 'toys' is not supported"),
    ],
)
def test_a_wrong_config_is_one_clear_line(changes, message):
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hf(HF | changes, "c.json")
    assert message in caught.value.cause and "\n" not in str(caught.value)


def test_a_missing_entry_is_named():
    with pytest.raises(CheckpointError, match="has no entry 'heads'"):
        ModelConfig.from_hf({k: v for k, v in HF.items() if k != "heads"})


def test_it_is_saved_and_loaded_under_its_own_names(toy):
    from safetensors.torch import load_file

    model, folder = toy
    stored = load_file(folder / "model.safetensors")
    assert {"toy.wte.weight", "toy.h.1.ln_2.weight"} <= set(stored) and "toy.h.1.ln_2.bias" not in stored
    assert stored["toy.h.0.mlp.c_fc.weight"].shape == (32, 128)  # declared as [in, out]
    assert stored["toy.h.0.attn.c_attn.weight"].shape == (96, 32)
    again = checkpoint.load(folder)
    tokens = torch.tensor([PROMPT])
    assert again.config == model.config and isinstance(again, ToyModel)
    assert torch.equal(again(tokens), model(tokens))
    assert again.lm_head.weight is again.wte.weight
    other = checkpoint.build(replace(model.config, own=(("residual_scale", 1.0),)))
    other.load_state_dict(model.state_dict(), assign=True)
    assert not torch.allclose(other(tokens), model(tokens), atol=1e-3)  # the option is heard


def test_it_generates(toy):
    model, folder = toy
    runner = load_recipe(folder, preset("baseline")).runner
    made = generate(runner, [PROMPT, PROMPT[:3]], 9, ignore_eos=True)
    with torch.inference_mode():
        for row, prompt in zip(made.generations, (PROMPT, PROMPT[:3]), strict=True):
            assert row.tokens == naive_generate(model, prompt, 9)[0]


def test_a_profile_takes_it_apart(toy, monkeypatch):
    for name, value in (("QUICK_SLICE_SEC", 0.0), ("QUICK_BLOCKS", 1), ("WARM_UP_SEC", 0.0), ("MAX_WARM_UP_SEC", 0.0)):
        monkeypatch.setattr(profile_blocks, name, value)
    monkeypatch.setattr(measure, "QUICK_KERNELS", (0.0, 3))
    monkeypatch.setattr(hardware, "BandwidthProbe", lambda threads: lambda: 1e10)
    monkeypatch.setattr(profile_facts, "_WATCH_SEC", 0.0)
    bandwidth = {"bytes_per_sec": 1e10, "kind": "native", "samples": [], "state": "high"}
    ceilings = hardware.Ceilings(
        device="cpu",
        kind="native",
        threads=2,
        read_bandwidth=tuple({"bytes": n, "threads": t, **bandwidth} for n in (1 << 20, 1 << 28) for t in (1, 2)),
        matrix_rates={"fp32": 1e11, "bf16": 2e11},
    )
    before = torch.get_num_threads()
    loaded = load_recipe(toy[1], preset("eager_attn"))
    try:
        result = measure.take_apart(loaded, Step(loaded, "decode", 7, 2), ceilings, quick=True)
    finally:
        torch.set_num_threads(before)
    parts = {row["part"]: row for row in result["parts"]}
    named = {part for boundary in Toy.boundaries for part in boundary[1:]}
    assert named <= set(parts) and {"scores", "softmax", "values", "cache_append"} <= set(parts)
    assert parts["residual_1"]["title"] == "Scaled residual 1"
    assert parts["residual_2"]["title"] == BY_KEY["residual_2"].title
    assert [row["layer"] for row in result["layers"]] == [0, 1]


def test_it_is_predicted(toy):
    model, _ = toy
    sizes = Sizes.of(model.config)
    assert sizes.n_operators == 2 * 17 + 5
    read = sum(p.numel() for p in model.parameters()) - model.wpe.weight.values.numel()
    assert sizes.n_weights == read  # a decode step looks one position up; the embedding is the head
    bare = replace(model.config, alibi=True, has_positions=False)  # no table of positions to look up in
    assert Sizes.of(bare).n_weights == read
    assert all(row["predicted_sec"] > 0 for row in predict(model.config, device_profile("laptop-cpu"), 20))


def test_it_is_quantised(toy, tmp_path):
    model, folder = toy
    out = tmp_path / "out"
    quantize(folder, [Int8()], out)
    small, tokens = checkpoint.load(out), torch.tensor([PROMPT])
    assert small.h[0].attn.c_attn.weight.format == "int8_rows" and small.config == model.config
    exact = model(tokens)
    assert 0 < (small(tokens) - exact).norm() < 0.05 * exact.norm()


def test_its_folds_change_nothing(toy):
    """What AWQ scales: the logits stay, the weights do not."""
    model, _ = toy
    tokens = torch.tensor([PROMPT])
    exact = model(tokens)
    folds = [fold for i in range(2) for fold in folds_of(model, f"h.{i}")]
    assert len(folds) == 6
    for fold in folds:
        reader = model.get_submodule(fold.readers[0])
        assert isinstance(reader, Linear)
        before = reader.weight.values.clone()
        fold_(model, fold, torch.empty(reader.weight.in_features).uniform_(0.1, 10))
        assert not torch.allclose(reader.weight.values, before, rtol=0.05)
    assert_close(model(tokens), exact, atol=1e-4, rtol=1e-4)


def test_native_code_says_that_it_has_no_form_of_it(toy):
    with pytest.raises(UsageError, match="native code has no toy models") as caught:
        load_recipe(toy[1], preset("native"))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(native_build.unavailable_reason() is not None, reason="no compiler")
def test_a_sibling_that_lowers_runs_in_native_code(tmp_path):
    model = save_toy(tmp_path, model_type="plain-toy", residual_scale=1.0)
    assert isinstance(model, PlainModel)
    loaded = load_recipe(tmp_path, preset("native"))
    cache, tokens = loaded.runner.new_cache(1, 16), torch.tensor([PROMPT])
    assert_close(loaded.runner.forward(tokens, cache, "all"), model(tokens), atol=1e-4, rtol=1e-4)
    assert loaded.runner.n_native_steps == 1


def test_gguf_refuses_what_declares_no_form(toy, tmp_path):
    with pytest.raises(ParetuneError) as caught:
        gguf.save(toy[1], tmp_path / "toy.gguf")
    assert str(caught.value).startswith("llama.cpp has no toy models") and "\n" not in str(caught.value)
    assert not (tmp_path / "toy.gguf").exists()


def test_peers_are_not_measured_with_it(toy):
    engine = catalogue.engines_of("llama.cpp")[1][0]
    assert catalogue.refusal(engine, toy[0].config, 8) == "llama.cpp is not measured with toy models"


def test_it_is_listed():
    found = {entry["name"]: entry["what"] for entry in collect()["model_families"]}
    assert found["toy"].startswith("A kin of GPT-2")
    assert found["gpt2"].startswith("GPT-2") and found["llama"] != found["mistral"]


# ---- what a declaration has to be -------------------------------------------------------------------


def test_what_is_not_declared_is_named():
    class Half(Toy):
        pass

    class Bare(Family):
        name = "bare"

        def read(self, hf, where):
            raise NotImplementedError

        def write(self, config):
            raise NotImplementedError

    assert Half().name == "toy"
    with pytest.raises(AssertionError, match="Bare does not declare architecture, n_positions_key, model, positions"):
        Bare()


def test_a_family_is_called_as_it_is_registered():
    FAMILIES.register("tory", "toys.toy_family:Toy")
    with pytest.raises(AssertionError, match="registered as 'tory' and calls itself 'toy'"):
        families.get("tory")
    with pytest.raises(UsageError, match="Did you mean 'toy'"):
        families.get("tooy")


def test_a_broken_family_of_another_package_takes_none_away(monkeypatch):
    monkeypatch.setattr(FAMILIES, "_others", {"broken": "nowhere_at_all:Broken"})
    monkeypatch.setattr(FAMILIES, "_broken", {})
    assert "broken" in FAMILIES.names()
    assert {"gpt2", "llama", "mistral"} <= {family.name for family in families.every()}
    assert checkpoint.published("gpt2").n_layer == 12
    assert FAMILIES.broken["broken"].startswith("cannot be imported: ModuleNotFoundError")


@pytest.mark.parametrize("name", Registry.names(FAMILIES))
def test_every_declaration_holds_on_the_tree(name):
    """Modules, boundaries, parts and folds that a family names are there."""
    changes = {"n_layer": 2, "n_embd": 48, "n_head": 4, "n_positions": 32}
    changes |= {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    family = families.get(name)
    config = ModelConfig.from_hf(
        {"model_type": name, "vocab_size": 64, "max_position_embeddings": 32, "hidden_act": "silu", **changes}
    )
    model = checkpoint.build(config)
    assert model.family is family
    paths = {module.format(i=1) for module in family.modules.values()}
    assert paths <= {path for path, _ in model.named_modules()}
    assert {family.role_of(f"{path}.weight") for path in paths} == set(family.modules)
    assert family.role_of("something.else.weight") is None
    for end, begins, ends in family.boundaries:
        assert begins in BY_KEY and ends in BY_KEY
        assert any(path == end or path.endswith(f".{end}") for path, _ in model.named_modules())
    assert set(family.titles) <= set(BY_KEY)
    assert len(model.get_submodule(family.stack)) == 2
    assert hasattr(model.get_submodule(f"{family.stack}.0.{family.attention}"), "attention")
    for fold in family.folds(config, f"{family.stack}.1"):
        width = {model.get_submodule(reader).weight.in_features for reader in fold.readers}
        assert len(width) == 1 and model.get_submodule(fold.source) is not None
    fresh = replace(config, hf={}).to_hf()
    assert ModelConfig.from_hf(fresh) == config and fresh["architectures"] == [family.architecture]
