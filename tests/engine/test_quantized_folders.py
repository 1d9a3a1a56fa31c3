"""Quantised folders: the small bits on the disk, the same bits back, whatever runs them; nothing half-written."""

from __future__ import annotations

import json

import pytest
import torch

from paretune.engine.load import load_recipe
from paretune.engine.quantize import quantize
from paretune.errors import CheckpointError, NoEffectError, ParetuneError, UsageError
from paretune.files import ensure_folder
from paretune.model import checkpoint
from paretune.model.stored import StoredTensors
from paretune.recipe import EngineOptions, Recipe, preset
from paretune.registry import FORMATS
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.formats import formats, transforms_of

# No group divides 72, 100 or 288; all of Llama's widths are no multiples of 16 either. Mistral's are whole groups.
WIDE = {
    "gpt2": {"n_embd": 72},
    "llama": {"hidden_size": 72, "intermediate_size": 100},
    "mistral": {"hidden_size": 64, "intermediate_size": 128},
}
FAMILIES = tuple(WIDE)
CASES = [
    (f, name) for f in FAMILIES for name in formats() if f == "gpt2" or name in ("int8", "int4", "nf4", "gptq", "awq")
]


@pytest.fixture(scope="module")
def written(tiny_factory, tmp_path_factory):
    """`written(family, format) -> (source, what quantize said)`, each made once."""
    made = {}

    def get(family, name):
        if (family, name) not in made:
            source = tiny_factory(family, **WIDE[family])[2]
            out = tmp_path_factory.mktemp("quantised") / name
            made[family, name] = source, quantize(source, transforms_of(name), out)
        return made[family, name]

    return get


def logits_of(runner, tokens):
    """A prefill of most of the tokens and single steps for the rest: `[B, n, V]`."""
    cache = runner.new_cache(tokens.size(0), tokens.size(1))
    pieces = [runner.forward(tokens[:, :17], cache, "last")]
    pieces += [runner.forward(tokens[:, i : i + 1], cache, "last") for i in range(17, tokens.size(1))]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize(("family", "name"), CASES)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_folder_gives_the_logits_of_its_recipe(written, tiny_tokens, family, name, batch_size):
    """Save and load, with a cache and in a batch: bit-equal to the recipe applied to the original."""
    source, made = written(family, name)
    tokens = tiny_tokens[:batch_size]
    ours = load_recipe(made.folder, preset("baseline"), check=False).runner
    theirs = load_recipe(source, Recipe((Attention("sdpa"), *made.transforms)), check=False).runner
    assert torch.equal(logits_of(ours, tokens), logits_of(theirs, tokens))
    plain = load_recipe(source, preset("baseline"), check=False).runner
    assert not torch.equal(logits_of(ours, tokens), logits_of(plain, tokens))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_bits_on_disk_are_the_small_ones(written, family, name):
    source, made = written(family, name)
    files = checkpoint.weight_files(made.folder)
    stored = StoredTensors(files)
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "paretune" and config["transforms"][0]["name"] == made.transforms[0].name
    by_name = {layer.names[0]: layer for layer in made.layers}
    assert {n.removesuffix(".weight") for n in config["formats"]} == {n for n, x in by_name.items() if not x.reason}
    model = checkpoint.load(source)
    for layer in made.layers:
        kept = [n for n in stored if f".{layer.names[0]}.weight" in f".{n}".replace(model.family.stored_prefix, "")]
        assert sum(stored[n].nbytes for n in kept) == layer.n_bytes
        assert layer.reason or not any(n.endswith(f"{layer.names[0]}.weight") for n in kept), "a dense copy is kept"
    assert sum(stored[n].nbytes for n in list(stored)) == made.vector_bytes + sum(x.n_bytes for x in made.layers)
    assert made.n_bytes == sum(f.stat().st_size for f in files)
    assert made.n_parameters == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert "read again, bit-equal" in made.proof[0]


def test_a_width_that_the_int8_kernel_does_not_take_is_said(written):
    """PyTorch's kernel takes 16 inputs at once: where no layer has as many, that is no missing effect."""
    _, made = written("llama", "int8")
    assert any("no layer goes through aten::_weight_int8pack_mm" in line for line in made.proof)
    _, made = written("gpt2", "int8")  # whose second MLP layer has 288
    assert any("aten::_weight_int8pack_mm ran" in line for line in made.proof)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_native_code_runs_the_folder(written, tiny_tokens, family, cache_dtype):
    """The packed form is the same numbers: near eager's, inputs rounded to 16 bits aside."""
    native = pytest.importorskip("paretune.engine.runners.native")
    if native.NativeRunner.requires("cpu"):
        pytest.skip(native.NativeRunner.requires("cpu"))
    _, made = written(family, "int4")
    tokens = tiny_tokens[:1]
    eager = Recipe((Attention("sdpa"),))
    exact = logits_of(load_recipe(made.folder, eager, check=False).runner, tokens)
    recipe = Recipe((Attention("sdpa"),), EngineOptions(runner="native", cache_dtype=cache_dtype))
    ours = logits_of(load_recipe(made.folder, recipe, check=False).runner, tokens)
    error = float((ours - exact).norm() / exact.norm())
    assert error < (2e-2 if cache_dtype else 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_compiled_folder_gives_the_same(written, tiny_tokens, name):
    _, made = written("gpt2", name)
    eager = Recipe((Attention("sdpa"),))
    compiled = Recipe((Attention("sdpa"),), EngineOptions(runner="compile"))
    exact = logits_of(load_recipe(made.folder, eager, check=False).runner, tiny_tokens[:, :20])
    ours = logits_of(load_recipe(made.folder, compiled, check=False).runner, tiny_tokens[:, :20])
    torch.testing.assert_close(ours, exact, atol=1e-3, rtol=1e-3)  # fused sums in another order


def test_what_is_left_keeps_its_dtype(tiny, tmp_path):
    model, _, _ = tiny("gpt2", **WIDE["gpt2"])
    checkpoint.save(model.half(), ensure_folder(tmp_path / "half"))
    made = quantize(tmp_path / "half", transforms_of("int8", head_bits=0), tmp_path / "out")
    again = checkpoint.load(made.folder)
    assert again.wte.weight.values.dtype == torch.float16 == again.ln_f.weight.dtype
    assert {x.names for x in made.layers if x.reason} == {("wte", "lm_head"), ("wpe",)}
    # In fp32, as a CPU runs it, all is fp32 and the stored numbers are the same.
    wide = checkpoint.load(made.folder, torch.float32)
    assert wide.h[0].attn.c_attn.weight.compute_dtype == torch.float32
    assert torch.equal(wide.h[0].attn.c_attn.weight.q, again.h[0].attn.c_attn.weight.q)


def test_names(tiny, tmp_path):
    _, _, folder = tiny("gpt2", **WIDE["gpt2"])
    filters = {"include": ("h.*", "lm_head"), "exclude": ("h.1.mlp.*",)}
    made = quantize(folder, transforms_of("int8", **filters), tmp_path / "out")
    left = {x.names: x.reason for x in made.layers if x.reason}
    assert left == {
        ("wpe",): "excluded by name",
        ("h.1.mlp.c_fc",): "excluded by name",
        ("h.1.mlp.c_proj",): "excluded by name",
    }
    formats = json.loads((made.folder / "config.json").read_text())["quantization_config"]["formats"]
    assert "wte.weight" in formats, "a tied pair is chosen by either name"
    checkpoint.load(made.folder)


def test_group_size_and_head(tiny, tmp_path):
    _, _, folder = tiny("llama", **WIDE["llama"])
    made = quantize(folder, transforms_of("int4", group_size=64, head_bits=0), tmp_path / "out")
    model = checkpoint.load(made.folder)
    assert model.layers[0].mlp.up_proj.weight.group == 64 and model.layers[0].mlp.up_proj.weight.bits == 4
    assert model.lm_head.weight.format == "dense"


def refused(folder, out, error, match, name="int8", calibration_text=None, **options):
    with pytest.raises(error, match=match):
        quantize(folder, transforms_of(name, **options), out, calibration_text=calibration_text)
    assert not out.exists() and [p for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")] == []


def test_bad_input_leaves_nothing(written, tiny, tmp_path):
    out = tmp_path / "out"
    _, made = written("gpt2", "int8")
    refused(made.folder, out, UsageError, "quantised already.*rounded twice")
    narrow = tiny("gpt2")[2]
    refused(narrow, out, UsageError, "'blocks.*' matches no layer.*mlp", exclude=("blocks.*",))
    refused(narrow, out, NoEffectError, "no layer was quantised", exclude=("*",))
    model, _, _ = tiny("gpt2")
    model.h[1].mlp.c_fc.weight.values.data[3, 4] = float("nan")
    checkpoint.save(model, ensure_folder(tmp_path / "nan"))
    refused(tmp_path / "nan", out, ParetuneError, "NaN or infinity")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ParetuneError, match="exists already"):
        quantize(narrow, transforms_of("int8"), tmp_path / "full")
    assert (tmp_path / "full" / "mine").exists()


def test_calibration_text(tiny, tmp_path, pocket_folder):
    import shutil

    _, _, folder = tiny("gpt2", **WIDE["gpt2"], vocab_size=8192)
    shutil.copyfile(pocket_folder / "tokenizer.json", folder / "tokenizer.json")
    refused(folder, tmp_path / "out", UsageError, "int8 needs no calibration text", calibration_text="x")
    refused(folder, tmp_path / "out", UsageError, "calibration text too short", "gptq", calibration_text="Once")
    text = "Once upon a time there was a small wooden boat on a wide lake, and nobody rowed it. " * 200
    for name, given in (("a", text), ("b", text), ("c", None)):
        quantize(folder, transforms_of("gptq"), tmp_path / name, calibration_text=given)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c


def test_a_zero_row_stays_zero(tiny, tmp_path):
    model, _, _ = tiny("gpt2", **WIDE["gpt2"])
    model.h[0].mlp.c_fc.weight.values.data[5] = 0
    checkpoint.save(model, ensure_folder(tmp_path / "zero"))
    for name in ("int8", "int4", "llm_int8", "nf4", "fp8"):
        made = quantize(tmp_path / "zero", transforms_of(name), tmp_path / name)
        row = checkpoint.load(made.folder).h[0].mlp.c_fc.weight.dequantize()[5]
        assert torch.isfinite(row).all() and float(row.abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("int9",), "unknown format 'int9'.*Did you mean 'int"),
        (("int8", 64), "--group-size 64 does not apply to int8"),
        (("q8_0", 64), "--group-size 64 does not apply to q8_0"),
        (("int4", 48), "group is 48"),
        (("int8", None, 4), "--head 4 does not apply to int8"),
        (("int4", None, 5), "--head 5 does not apply to int4.*8, 4, 0"),
    ],
)
def test_settings_that_a_format_does_not_have(arguments, match):
    with pytest.raises(UsageError, match=match):
        transforms_of(*arguments)


def test_a_damaged_quantised_folder_is_named(written, tmp_path):
    import shutil

    _, made = written("gpt2", "q4_0")
    shutil.copytree(made.folder, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    del config["quantization_config"]["formats"]["h.0.mlp.c_fc.weight"]
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"h\.0\.mlp\.c_fc"):
        checkpoint.load(tmp_path / "copy")


def test_a_format_that_could_not_be_read_again_is_not_written(tiny_gpt2_folder, tmp_path, monkeypatch):
    """As where a package registers its transform and forgets the class of its weights."""
    transforms = transforms_of("int8")
    model = transforms[0].apply(checkpoint.load(tiny_gpt2_folder), Context())
    monkeypatch.delitem(FORMATS._own, "int8_rows")
    with pytest.raises(UsageError, match=r"'int8_rows' could be written and not read again.*paretune\.formats"):
        quantize(tiny_gpt2_folder, transforms, tmp_path / "out")
    with pytest.raises(UsageError, match="not read again"):  # whoever writes a folder
        checkpoint.save(model, tmp_path)
    assert not list(tmp_path.iterdir())
