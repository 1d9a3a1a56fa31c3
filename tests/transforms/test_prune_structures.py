"""Structures that go for good: shapes, what is left, loading, every runner, what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from paretune.engine.load import load_recipe, prove
from paretune.engine.probe import observe
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.runners.native import NativeRunner
from paretune.errors import CheckpointError, NoEffectError, ParetuneError, UsageError
from paretune.model import checkpoint
from paretune.model.gguf import layout
from paretune.recipe import preset
from paretune.transforms.base import Context
from paretune.transforms.prune.columns import Columns
from paretune.transforms.prune.heads import Heads
from paretune.transforms.prune.layers import Layers
from paretune.transforms.prune.neurons import Neurons

CONTEXT = Context(calibration=torch.randint(0, 131, (8, 32), generator=torch.Generator().manual_seed(2)))
FAMILIES = ("gpt2", "llama")
KINDS = [
    Neurons(keep=0.5),
    Neurons(keep=0.5, by="magnitude"),
    Neurons(keep=0.5, by="taylor"),
    Neurons(keep=0.5, scope="global"),
    Heads(keep=0.5),
    Heads(keep=0.5, by="magnitude"),
    Heads(keep=0.5, by="taylor", scope="global"),
    Layers(keep=0.5),
    Layers(keep=0.5, by="magnitude"),
    Layers(keep=0.5, by="activation"),
    Layers(keep=0.5, by="taylor"),
    Columns(keep=0.67),
    Columns(keep=0.67, by="magnitude"),
    Columns(keep=0.67, by="taylor"),
]


@pytest.fixture(params=FAMILIES, scope="module")
def folder(request, tiny_factory):
    return tiny_factory(request.param)[2]


def native_logits(model, tokens):
    runner = NativeRunner(model)
    cache = runner.new_cache(tokens.size(0), tokens.size(1))
    return torch.cat([runner.forward(t, cache, "all") for t in tokens.split([15, 4, 1, 1, 1, 1], dim=1)], dim=1)


@pytest.mark.parametrize("transform", KINDS, ids=lambda t: t.title)
def test_tensors_shrink_and_load_again(folder, transform, tiny_tokens, tmp_path):
    model = transform.apply(checkpoint.load(folder), CONTEXT)
    logits = model(tiny_tokens)
    assert bool(torch.isfinite(logits).all())
    said = transform.verify(model, observe(EagerRunner(model)))
    assert "weights are left" in said[0]
    checkpoint.save(model, tmp_path)
    again = checkpoint.load(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(tiny_tokens), logits)
    assert transform.apply(again, Context()) is again and torch.equal(again(tiny_tokens), logits)
    assert torch.allclose(native_logits(again, tiny_tokens), logits, atol=2e-4, rtol=1e-3)
    dense = checkpoint.load(folder)
    with pytest.raises(NoEffectError, match="not pruned"):
        transform.verify(dense, observe(EagerRunner(dense)))


def test_what_goes_is_what_was_zero(folder, tiny_tokens):
    """Structures without effect are the ones that go, and their going changes nothing."""
    model = checkpoint.load(folder)
    family = model.family
    for i, dead in ((0, [1, 5]), (1, [0, 7])):
        reader = model.get_submodule(family.modules["down"].format(i=i)).weight.values
        heads = model.get_submodule(family.modules["o"].format(i=i)).weight.values
        D, sharers = model.config.head_dim, model.config.n_head // model.config.n_kv_head
        with torch.no_grad():
            for j in dead:
                reader[:, 16 * j : 16 * j + 16 if j < 5 else 16 * (j % 5) + 16] = 0
            heads[:, (1 - i) * sharers * D : (2 - i) * sharers * D] = 0
    logits = model(tiny_tokens)
    n = model.config.n_kv_head
    for by in ("activation", "magnitude", "taylor"):
        twin = checkpoint.load(folder)
        twin.load_state_dict(model.state_dict())
        made = Heads(keep=(n - 1) / n, by=by).apply(twin, CONTEXT)
        if by == "magnitude":  # the projections of a head that nobody reads have a size all the same
            continue
        assert torch.allclose(made(tiny_tokens), logits, atol=1e-4), by
        assert made.config.n_kv_head == n - 1


def test_activation_aware_neurons_are_nearer_than_the_smallest(folder, tiny_tokens):
    dense = checkpoint.load(folder)(tiny_tokens)
    errors = {
        by: float((Neurons(keep=0.6, by=by).apply(checkpoint.load(folder), CONTEXT)(tiny_tokens) - dense).norm())
        for by in ("activation", "magnitude")
    }
    assert errors["activation"] < errors["magnitude"], errors


def test_layers_keep_their_order(tiny, tiny_tokens):
    model, _, folder = tiny("llama", num_hidden_layers=5)
    made = Layers(keep=0.6).apply(checkpoint.load(folder), CONTEXT)
    names = [b.self_attn.q_proj.weight.values for b in made.layers]
    before = [b.self_attn.q_proj.weight.values for b in model.layers]
    places = [next(i for i, v in enumerate(before) if torch.equal(v, name)) for name in names]
    assert len(places) == 3 and places == sorted(places)
    assert made.config.n_layer == 3 and made.config.is_regular


def test_what_everybody_reads_stays_readable(tiny_llama_folder, tmp_path, tiny_tokens):
    """Layers that are pruned alike make a plain Llama: transformers gives the same logits."""
    transformers = pytest.importorskip("transformers")
    model = Neurons(keep=0.6).apply(Heads(keep=0.5).apply(checkpoint.load(tiny_llama_folder), CONTEXT), CONTEXT)
    checkpoint.save(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(tiny_tokens).logits, model(tiny_tokens), atol=1e-4)
    assert layout.to_metadata(model.config, "x")[0]["llama.feed_forward_length"] == model.config.n_inner


@pytest.mark.parametrize("transform", [Heads(keep=0.5), Neurons(keep=0.5, scope="global")], ids=lambda t: t.title)
def test_what_only_we_read_says_so(tiny, tmp_path, transform):
    _, _, folder = tiny("gpt2", n_layer=3)
    model = checkpoint.load(folder)
    with torch.no_grad():
        model.h[0].mlp.c_proj.weight.values.mul_(torch.linspace(0, 1, 192) ** 8)
    model = transform.apply(model, CONTEXT)
    assert not model.config.is_regular
    checkpoint.save(model, tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert entry["model_type"] == "paretune_gpt2" and len(entry["paretune_pruned"]["shapes"]) == 3
    with pytest.raises(ParetuneError, match=r"GPT-2 has no layers of different or pruned widths"):
        layout.to_metadata(model.config, "x")
    entry["paretune_pruned"]["shapes"][0] = [1, 2]
    (tmp_path / "config.json").write_text(json.dumps(entry), "utf-8")
    with pytest.raises(CheckpointError, match="shapes is no table of 3 rows"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (Heads(keep=0.05), "leaves none"),
        (Layers(keep=0.1), "leaves none"),
        (Neurons(keep=0.001), "leaves none"),
        (Columns(keep=0.01), "leaves none"),
    ],
    ids=lambda x: getattr(x, "title", ""),
)
def test_nothing_is_emptied(tiny_gpt2_folder, transform, words):
    assert words in str(transform.fits(checkpoint.read_config(tiny_gpt2_folder)))
    with pytest.raises(UsageError, match=words):
        transform.apply(checkpoint.load(tiny_gpt2_folder), CONTEXT)


def test_bad_input(tiny_gpt2_folder):
    with pytest.raises(UsageError, match="by is 'luck'"):
        Neurons(by="luck")
    with pytest.raises(UsageError, match="scope is"):
        Heads(scope="all")
    with pytest.raises(UsageError, match=r"keep is 1\.2"):
        Layers(keep=1.2)
    with pytest.raises(UsageError, match="calibration text too short"):
        Neurons().apply(checkpoint.load(tiny_gpt2_folder), Context(calibration=torch.zeros(1, 20, dtype=torch.int64)))
    with pytest.raises(NoEffectError, match="still there"):
        Neurons(keep=1.0).apply(checkpoint.load(tiny_gpt2_folder), CONTEXT)
    alibi = preset("alibi").transforms[0].changed(checkpoint.read_config(tiny_gpt2_folder))
    assert "slopes of ALiBi" in str(Heads().fits(alibi))


def test_an_error_leaves_the_model_as_it_was(tiny_gpt2_folder, tiny_tokens, monkeypatch):
    model = checkpoint.load(tiny_gpt2_folder)
    logits, config = model(tiny_tokens), model.config
    seen = []

    def fail(self, model, i, kept):
        seen.append(i)
        if i == 1:
            raise ParetuneError("no")
        return original(self, model, i, kept)

    original = Heads.cut_
    monkeypatch.setattr(Heads, "cut_", fail)
    with pytest.raises(ParetuneError, match="no"):
        Heads().apply(model, CONTEXT)
    assert seen == [0, 1] and model.config == config and torch.equal(model(tiny_tokens), logits)


@pytest.mark.parametrize(
    "structure", ["neurons(0.6)", "heads(0.5)", "layers(0.5)", "columns(0.67)", "neurons(0.5, scope=global)"]
)
@pytest.mark.parametrize("rest", ["native+int8", "int4", "native+gptq(group=32)"])
def test_composes_with_formats_and_runners(folder, structure, rest, tiny_tokens, tmp_path):
    recipe = preset(f"{structure}+{rest}")
    loaded = load_recipe(folder, recipe, ctx=CONTEXT)
    assert any("weights are left" in s for s in prove(loaded)[0])
    pruned = preset(structure).transforms[0].apply(checkpoint.load(folder), CONTEXT)
    exact = pruned(tiny_tokens)
    cache = loaded.runner.new_cache(2, 23)
    ours = loaded.runner.forward(tiny_tokens, cache, "all")
    assert float((ours - exact).norm() / exact.norm()) < (0.05 if "int8" in rest else 0.5)
    checkpoint.save(loaded.runner.model, tmp_path)
    again = load_recipe(tmp_path, recipe, ctx=CONTEXT)
    assert torch.equal(again.runner.forward(tiny_tokens, again.runner.new_cache(2, 23), "all"), ours)
