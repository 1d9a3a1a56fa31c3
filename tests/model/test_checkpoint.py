"""Folders in and out, bit for bit; and every way to be wrong, each in one line with a cure."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from paretune.errors import EXIT_FAILURE, EXIT_USAGE, CheckpointError, ParetuneError, UsageError
from paretune.model import checkpoint
from paretune.model.config import ModelConfig, RopeScaling

FAMILIES = ["gpt2", "llama", "mistral"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def folder_of(tiny_gpt2_folder, tiny_llama_folder, tiny_mistral_folder, tmp_path):
    """`folder_of(family)`: a copy of the tiny model that the test may damage."""
    sources = {"gpt2": tiny_gpt2_folder, "llama": tiny_llama_folder, "mistral": tiny_mistral_folder}

    def copy(family: str = "gpt2") -> Path:
        return Path(shutil.copytree(sources[family], tmp_path / family))

    return copy


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    """`change(tensors)` mutates the dictionary; it may also return a new one."""
    path = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    tensors = change(tensors) or tensors
    save_file(tensors, path, metadata={"format": "pt"})


def shards(folder: Path, keep_single: bool = False) -> list[Path]:
    """Rewrites the folder as several shards with an index."""
    auto = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if not keep_single:
        (folder / "model.safetensors").unlink()
    auto.save_pretrained(folder, max_shard_size="30KB")
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) >= 3
    return found


def parameters(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def assert_same(a, b) -> None:
    """The same parameters, bit for bit and in the same dtype."""
    a, b = parameters(a), parameters(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def refused(folder: Path | str, *words: str, kind=CheckpointError, exit_code=EXIT_FAILURE) -> ParetuneError:
    """The folder is refused in one line that holds `words`, with a cure."""
    with pytest.raises(ParetuneError) as caught:
        checkpoint.load(folder if isinstance(folder, Path) else checkpoint.resolve(folder))
    error = caught.value
    assert type(error) is kind
    assert error.exit_code == exit_code
    text = str(error)
    assert "\n" not in text
    assert error.cure and text.endswith(error.cure)
    for word in words:
        assert word in text
    return error


# ---- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_to_paretune_to_transformers(folder_of, tmp_path, family):
    """Every stored tensor comes back bit-equal under the same name, and transformers loads the result."""
    source = folder_of(family)
    target = tmp_path / "saved"
    target.mkdir()
    checkpoint.save(checkpoint.load(source), target)
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    old, new = (json.loads((f / "config.json").read_text()) for f in (source, target))
    assert old == new
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.randint(0, 131, (1, 12))
    with torch.inference_mode():
        torch.testing.assert_close(hf(tokens).logits, checkpoint.load(target)(tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_config_is_read_by_transformers(tmp_path, family):
    """`new` then `save`: a config that was never a file still describes the model to transformers."""
    common = {"vocab_size": 101, "n_positions": 32, "n_layer": 2, "n_head": 4, "n_embd": 32, "head_dim": 8}
    common |= {"n_inner": 50, "norm_eps": 1e-5, "initializer_range": 0.2, "eos_token_ids": (1,)}
    own = {
        "gpt2": {
            "n_kv_head": 4,
            "activation": "gelu_tanh",
            "tied_head": True,
            "attn_bias": True,
            "mlp_bias": True,
        },
        "llama": {
            "n_kv_head": 2,
            "activation": "silu",
            "tied_head": False,
            "attn_bias": True,
            "rope_theta": 300.0,
        },
        "mistral": {"n_kv_head": 1, "activation": "silu", "tied_head": True, "sliding_window": 5},
    }[family]
    model = checkpoint.new(ModelConfig(family=family, **common, **own), seed=3)
    checkpoint.save(model, tmp_path)
    again = checkpoint.load(tmp_path)
    assert again.config == model.config
    assert_same(model, again)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, 101, (1, 20))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), hf(tokens).logits)


@pytest.mark.parametrize("scaling", [RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0, 1.0, 4.0, 16)], ids=str)
def test_fresh_config_keeps_its_rope_scaling(tmp_path, scaling):
    shape = {"vocab_size": 101, "n_positions": 64, "n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    shape |= {"head_dim": 16, "n_inner": 50, "activation": "silu", "norm_eps": 1e-5, "tied_head": True}
    model = checkpoint.new(ModelConfig(family="llama", rope_scaling=scaling, **shape))
    checkpoint.save(model, tmp_path)
    assert checkpoint.load(tmp_path).config.rope_scaling == scaling
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(hf.model.rotary_emb.inv_freq.float(), model._rope)


def test_every_activation_survives_a_fresh_config(tmp_path):
    shape = {"vocab_size": 11, "n_positions": 8, "n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 8}
    shape |= {"head_dim": 4, "n_inner": 9, "norm_eps": 1e-5, "tied_head": True}
    for family in ("gpt2", "llama"):
        for activation in ("gelu_tanh", "gelu", "quick_gelu", "relu", "silu"):
            bias = {"attn_bias": family == "gpt2", "mlp_bias": family == "gpt2"}
            config = ModelConfig(family=family, activation=activation, **shape, **bias)
            assert ModelConfig.from_hf(config.to_hf()).activation == activation


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_dtype_as_stored_and_cast(folder_of, tmp_path, family, stored):
    folder = folder_of(family)
    edit_tensors(folder, lambda tensors: {n: t.to(stored) for n, t in tensors.items()})
    kept = checkpoint.load(folder)
    assert {p.dtype for p in kept.parameters()} == {stored}
    for cast in DTYPES:
        model = checkpoint.load(folder, cast)
        for name, p in parameters(model).items():
            assert torch.equal(p, parameters(kept)[name].to(cast))
    target = tmp_path / "saved"
    target.mkdir()
    checkpoint.save(kept, target)
    assert_same(kept, checkpoint.load(target))
    assert json.loads((target / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_equals_single(folder_of, family):
    folder = folder_of(family)
    single = checkpoint.load(folder)
    shards(folder)
    assert len(checkpoint.weight_files(folder)) >= 3
    assert_same(single, checkpoint.load(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_and_without_prefix(folder_of, family):
    """Checkpoints of the bare model (GPT2Model) have no `transformer.`."""
    folder = folder_of(family)
    model = checkpoint.load(folder)
    prefix = model.family.stored_prefix
    assert any(n.startswith(prefix) for n in load_file(folder / "model.safetensors"))
    edit_tensors(folder, lambda tensors: {n.removeprefix(prefix): t for n, t in tensors.items()})
    assert not any(n.startswith(prefix) for n in load_file(folder / "model.safetensors"))
    assert_same(model, checkpoint.load(folder))


def test_bare_model_of_transformers(folder_of, tmp_path):
    folder = folder_of()
    model = checkpoint.load(folder)
    bare = transformers.GPT2Model.from_pretrained(folder)
    bare.save_pretrained(tmp_path / "bare")
    assert "wte.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    assert_same(model, checkpoint.load(tmp_path / "bare"))


def test_saving_over_the_folder_it_was_loaded_from(folder_of):
    folder = folder_of()
    before = load_file(folder / "model.safetensors")
    before = {name: t.clone() for name, t in before.items()}
    model = checkpoint.load(folder)
    checkpoint.save(model, folder, tokenizer_from=None)
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert_same(model, checkpoint.load(folder))


def test_tokenizer_files_travel(folder_of, tmp_path, pocket_folder):
    target = tmp_path / "saved"
    target.mkdir()
    checkpoint.save(checkpoint.load(folder_of()), target, tokenizer_from=pocket_folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (target / name).read_bytes() == (pocket_folder / name).read_bytes()


def test_saving_with_the_tokenizer_of_the_same_folder(folder_of, pocket_folder):
    folder = folder_of()
    shutil.copy(pocket_folder / "tokenizer.json", folder)
    checkpoint.save(checkpoint.load(folder), folder, tokenizer_from=folder)
    assert (folder / "tokenizer.json").read_bytes() == (pocket_folder / "tokenizer.json").read_bytes()


def test_save_into_a_missing_folder_is_one_line(folder_of, tmp_path):
    model = checkpoint.load(folder_of())
    with pytest.raises(ParetuneError, match="cannot write") as caught:
        checkpoint.save(model, tmp_path / "absent")
    assert "\n" not in str(caught.value) and caught.value.cure
    with pytest.raises(ParetuneError, match="cannot write"):
        checkpoint.save(model, tmp_path / "absent", tokenizer_from=checkpoint.resolve("pocket"))


# ---- what old exporters add or leave out ----------------------------------------------------------


def test_old_mask_buffers_are_ignored(folder_of):
    folder = folder_of()
    model = checkpoint.load(folder)

    def add(tensors):
        for i in range(2):
            tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
            tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(folder, add)
    assert_same(model, checkpoint.load(folder))


def test_old_rotary_buffers_are_ignored(folder_of):
    folder = folder_of("llama")
    model = checkpoint.load(folder)
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    assert_same(model, checkpoint.load(folder))


@pytest.mark.parametrize("prefixed", [True, False])
def test_only_the_head_of_a_tied_pair_is_stored(folder_of, prefixed):
    folder = folder_of()
    model = checkpoint.load(folder)

    def move(tensors):
        tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
        return tensors if prefixed else {n.removeprefix("transformer."): t for n, t in tensors.items()}

    edit_tensors(folder, move)
    again = checkpoint.load(folder)
    assert_same(model, again)
    assert again.lm_head.weight is again.wte.weight


def test_both_of_a_tied_pair_are_stored(folder_of):
    folder = folder_of()
    model = checkpoint.load(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    again = checkpoint.load(folder)
    assert_same(model, again)
    assert again.lm_head.weight is again.wte.weight


@pytest.mark.parametrize(
    "change",
    [lambda t: t + 1e-3, lambda t: t.bfloat16(), lambda t: t[:100].clone()],
    ids=["values", "dtype", "shape"],
)
def test_differing_tied_pair(folder_of, change):
    folder = folder_of()
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": change(t["transformer.wte.weight"])}))
    refused(folder, "lm_head.weight", "wte.weight", "tie_word_embeddings")


def test_untied_head_has_to_be_there(folder_of):
    folder = folder_of()
    edit_config(folder, tie_word_embeddings=False)
    refused(folder, "lm_head.weight", "missing")


# ---- tensors that do not fit ----------------------------------------------------------------------

GPT2_TENSORS = [
    "wte.weight",
    "wpe.weight",
    "h.0.ln_1.weight",
    "h.1.attn.c_attn.weight",
    "h.1.attn.c_attn.bias",
]
GPT2_TENSORS += ["h.0.mlp.c_proj.weight", "ln_f.bias"]
LLAMA_TENSORS = ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"]
LLAMA_TENSORS += ["lm_head.weight", "model.layers.0.mlp.gate_proj.weight"]
EVERY = [("gpt2", f"transformer.{n}") for n in GPT2_TENSORS] + [("llama", n) for n in LLAMA_TENSORS]


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_missing_tensor_is_named(folder_of, family, name):
    folder = folder_of(family)
    edit_tensors(folder, lambda t: {n: v for n, v in t.items() if n != name})
    refused(folder, name, "missing")


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_misshaped_tensor_is_named(folder_of, family, name):
    folder = folder_of(family)
    edit_tensors(folder, lambda t: t.update({name: t[name][:-1].clone()}))
    refused(folder, name, "shape")


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_integer_tensor_is_named(folder_of, family, name):
    folder = folder_of(family)
    edit_tensors(folder, lambda t: t.update({name: t[name].to(torch.int8)}))
    refused(folder, name, "int8")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "transformer.h.2.ln_1.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.scales"),
        ("gpt2", "score.weight"),
        ("llama", "model.layers.0.self_attn.q_proj.bias"),
        ("llama", "model.layers.0.self_attn.q_proj.qweight"),
        ("mistral", "model.layers.0.block_sparse_moe.gate.weight"),
    ],
)
def test_extra_tensor_is_named(folder_of, family, name):
    folder = folder_of(family)
    edit_tensors(folder, lambda t: t.update({name: torch.ones(3)}))
    refused(folder, name, "does not belong")


def test_transposed_weight_is_refused(folder_of):
    """c_fc stored [out, in], as a Linear would, is not [in, out]."""
    folder = folder_of()
    name = "transformer.h.0.mlp.c_fc.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name].t().contiguous()}))
    refused(folder, name, "shape")


# ---- files that are damaged -----------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 8, 200, 0.5, -1])
def test_truncated_safetensors(folder_of, keep):
    folder = folder_of()
    path = folder / "model.safetensors"
    data = path.read_bytes()
    n = int(len(data) * keep) if isinstance(keep, float) else keep
    path.write_bytes(data[:n])
    refused(folder, "model.safetensors", "truncated or damaged")


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 500,
        b"garbage" * 100,
        struct.pack("<Q", 12) + b'{"a": broken',
        struct.pack("<Q", 2**60) + b"{}",
    ],
    ids=["zeros", "text", "bad header", "huge header"],
)
def test_garbage_safetensors(folder_of, data):
    folder = folder_of()
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, "model.safetensors", "truncated or damaged")


def test_truncated_shard_is_named(folder_of):
    folder = folder_of()
    second = shards(folder)[1]
    second.write_bytes(second.read_bytes()[:-10])
    refused(folder, second.name, "truncated or damaged")


def test_missing_shard_is_named(folder_of):
    folder = folder_of()
    last = shards(folder)[-1]
    last.unlink()
    refused(folder, last.name, "missing")


WEIGHT_MAPS = ["null", "[]", "{}", '{"a": 3}', '{"a": ["b"]}', '{"a": "x", "b": 3}']


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "{}", "\udcff", *(f'{{"weight_map": {m}}}' for m in WEIGHT_MAPS)],
)
def test_damaged_index(folder_of, text):
    folder = folder_of()
    shards(folder)
    path = folder / "model.safetensors.index.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    error = refused(folder)
    assert "index.json" in str(error) or "shard" in str(error)


def test_index_may_not_point_out_of_the_folder(folder_of):
    folder = folder_of()
    first = shards(folder)[0]
    outside = folder.parent / "outside.safetensors"
    shutil.move(first, outside)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace(first.name, "../outside.safetensors"))
    refused(folder, "index.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickle_is_refused(folder_of, name):
    folder = folder_of()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04K\x01.")
    refused(folder, name, "pickle", "safetensors")


def test_no_weights_at_all(folder_of):
    folder = folder_of()
    (folder / "model.safetensors").unlink()
    refused(folder, "no model.safetensors")


# ---- config.json ----------------------------------------------------------------------------------


def test_no_config(folder_of):
    folder = folder_of()
    (folder / "config.json").unlink()
    refused(folder, "config.json", str(folder))


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "\udcff\udcfe", '{"model_type": "gpt2",}'])
def test_bad_json(folder_of, text):
    folder = folder_of()
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "config.json", "not valid JSON")


@pytest.mark.parametrize("text", ["[]", "3", '"gpt2"', "null"])
def test_config_is_not_an_object(folder_of, text):
    folder = folder_of()
    (folder / "config.json").write_text(text)
    refused(folder, "config.json", "not a JSON object")


@pytest.mark.parametrize("architecture", ["bert", "mixtral", "", None, 3, ["gpt2"], {"a": 1}])
def test_unknown_architecture(folder_of, architecture):
    folder = folder_of()
    edit_config(folder, model_type=architecture)
    refused(folder, "model_type", repr(architecture), "gpt2, llama, mistral")


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gpt2", "activation_function", "gelu_11"),
        ("gpt2", "activation_function", None),
        ("gpt2", "activation_function", ["gelu"]),
        ("llama", "hidden_act", "xielu"),
        ("llama", "hidden_act", 3),
    ],
)
def test_unknown_activation(folder_of, family, key, value):
    folder = folder_of(family)
    edit_config(folder, **{key: value})
    error = refused(folder, "config.json")
    assert "activation" in str(error) or "wrong type" in str(error)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "su"])
@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling", "type"])
def test_unknown_rope_scaling(folder_of, kind, style):
    folder = folder_of("llama")
    key = "type" if style == "type" else "rope_type"
    scaling = {key: kind, "factor": 2.0, "rope_theta": 10000.0}
    edit_config(folder, rope_parameters=None)
    edit_config(folder, **{"rope_scaling" if style == "type" else style: scaling})
    refused(folder, kind, "rope scaling")


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": "twice"},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": -2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
        {"rope_type": ["linear"]},
        ["linear"],
        "linear",
        3,
    ],
    ids=str,
)
def test_damaged_rope_scaling(folder_of, scaling):
    folder = folder_of("llama")
    edit_config(folder, rope_parameters=None, rope_scaling=scaling)
    refused(folder, "config.json")
    edit_config(folder, rope_parameters=scaling, rope_scaling=None)
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"load_in_4bit": True},
        "awq",
        ["fp8"],
    ],
    ids=str,
)
def test_foreign_quantization(folder_of, quantization):
    folder = folder_of()
    edit_config(folder, quantization_config=quantization)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    refused(folder, "quantised", repr(method), "original weights")


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"formats": None},
        {"formats": ["h.0"]},
        {"formats": {"h.0.mlp.c_fc.weight": "int1_magic"}},
        {"formats": {"h.9.mlp.c_fc.weight": "dense"}},
        {"formats": {"h.0.ln_1.weight": "dense"}},
        {"formats": {"h.0.mlp.c_fc.weight": 8}},
        {"formats": {"h.0.mlp.c_fc.weight": "int8_rows"}},
    ],
    ids=str,
)
def test_damaged_quantization_of_our_own(folder_of, own):
    folder = folder_of()
    edit_config(folder, quantization_config={"quant_method": "paretune", **own})
    refused(folder)


GPT2_SHAPES = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
LLAMA_SHAPES = ["vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers"]
LLAMA_SHAPES += ["num_attention_heads", "num_key_value_heads", "intermediate_size"]
SHAPES = [("gpt2", k) for k in GPT2_SHAPES] + [("llama", k) for k in LLAMA_SHAPES]


@pytest.mark.parametrize(("family", "key"), SHAPES)
@pytest.mark.parametrize("value", ["twelve", "2", [2], {"a": 1}, -4, 0, math.inf, math.nan, 2.5, True], ids=str)
def test_config_value_of_the_wrong_type_or_sign(folder_of, family, key, value):
    folder = folder_of(family)
    edit_config(folder, **{key: value})
    refused(folder, "config.json")


@pytest.mark.parametrize(("family", "key"), [s for s in SHAPES if s[1] != "num_key_value_heads"])
def test_config_value_is_missing(folder_of, family, key):
    folder = folder_of(family)
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    config.pop("n_ctx", None)
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "config.json")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"n_inner": -3}),
        ("gpt2", {"n_inner": "wide"}),
        ("gpt2", {"n_head": 5}),  # 48 is no multiple
        ("gpt2", {"layer_norm_epsilon": "small"}),
        ("gpt2", {"tie_word_embeddings": "false"}),
        ("gpt2", {"scale_attn_weights": "no"}),
        ("gpt2", {"eos_token_id": "end"}),
        ("gpt2", {"eos_token_id": ["end"]}),
        ("gpt2", {"bos_token_id": "start"}),
        ("gpt2", {"add_cross_attention": True}),
        ("llama", {"num_key_value_heads": 3}),
        ("llama", {"head_dim": 13}),
        ("llama", {"head_dim": "wide"}),
        ("llama", {"rms_norm_eps": "small"}),
        ("llama", {"rope_parameters": {"rope_theta": "hot"}}),
        ("llama", {"rope_parameters": {"rope_theta": -1.0}}),
        ("mistral", {"sliding_window": "wide"}),
        ("mistral", {"sliding_window": 0}),
        ("mistral", {"sliding_window": -4}),
    ],
    ids=str,
)
def test_other_config_values(folder_of, family, changes):
    folder = folder_of(family)
    edit_config(folder, **changes)
    refused(folder, "config.json")


def test_config_of_another_model(folder_of):
    folder = folder_of()
    edit_config(folder, n_layer=3)
    refused(folder, "transformer.h.2.", "missing")
    edit_config(folder, n_layer=1)
    refused(folder, "transformer.h.1.", "does not belong")


# ---- names ----------------------------------------------------------------------------------------


def test_path_is_a_file(folder_of):
    path = folder_of() / "config.json"
    refused(str(path), "is a file", kind=UsageError, exit_code=EXIT_USAGE)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent-model", "a/b/c", "", "../absent"])
def test_absent_folder(name):
    refused(name, "no folder", kind=UsageError, exit_code=EXIT_USAGE)


@pytest.mark.parametrize("name", ["absent-model", "nobody/absent-model", "not a hub id", "a\nb", "gpt2:"])
def test_absent_hub_id_offline(name):
    error = refused(name, "hub", kind=UsageError, exit_code=EXIT_USAGE)
    assert "pocket" in error.cure


@pytest.mark.parametrize("name", ["pocket", "pocket-draft"])
def test_embedded_names_resolve(name):
    folder = checkpoint.resolve(name)
    assert checkpoint.read_config(folder).vocab_size == 8192
    assert checkpoint.weight_files(folder) == [folder / "model.safetensors"]


def test_local_folder_resolves(folder_of):
    folder = folder_of()
    assert checkpoint.resolve(str(folder)) == folder


def test_dtype_names():
    assert checkpoint.dtype_of("bf16") is checkpoint.dtype_of("bfloat16") is torch.bfloat16
    assert checkpoint.dtype_of("fp16") is checkpoint.dtype_of("half") is torch.float16
    assert checkpoint.dtype_of("float32") is torch.float32
    with pytest.raises(UsageError, match=r"'fp8'.*bf16") as caught:
        checkpoint.dtype_of("fp8")
    assert caught.value.exit_code == EXIT_USAGE


def test_unknown_size_lists_the_known():
    with pytest.raises(UsageError, match="gpt2-medium"):
        checkpoint.published("gpt2-huge")
