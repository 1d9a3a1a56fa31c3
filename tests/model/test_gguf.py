"""GGUF files: written, read back to the same bits, and held against the `gguf` package and transformers."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import struct

import gguf
import numpy as np
import pytest
import torch

from paretune.engine.quantize import quantize
from paretune.errors import CheckpointError, ParetuneError, UsageError
from paretune.files import ensure_folder
from paretune.model import checkpoint
from paretune.model.gguf import blocks, container, vocabulary
from paretune.model.gguf.load import convert, folder_of
from paretune.model.gguf.save import FORMATS, save
from paretune.model.tokenizer import Tokenizer
from paretune.ops.weights.dense import Dense
from paretune.ops.weights.int8_rows import Int8Rows
from paretune.ops.weights.int_groups import IntGroups
from paretune.transforms.formats import transforms_of

WIDE = {"gpt2": {"n_embd": 64}, "llama": {"hidden_size": 64, "intermediate_size": 96}}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ODD = {
    "gpt2": {"tie_word_embeddings": False},
    "llama": {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 32, "rope_parameters": LLAMA3},
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))


def imported(path):
    return checkpoint.load(checkpoint.resolve(str(path)))


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("wanted", [None, *FORMATS])
@pytest.mark.parametrize("family", WIDE)
def test_there_and_back(tiny_factory, tiny, tiny_tokens, tmp_path, family, wanted, odd):
    """The logits of what comes back are those of the same rounding in place."""
    model, _, folder = tiny(family, **WIDE[family], **ODD[family]) if odd else tiny_factory(family, **WIDE[family])
    made = save(folder, tmp_path / "x.gguf", wanted)
    assert made.n_bytes == (tmp_path / "x.gguf").stat().st_size
    again = imported(tmp_path / "x.gguf")
    assert again.config.tied_head == model.config.tied_head and again.config.n_layer == 2
    ours, exact = again.float()(tiny_tokens), model(tiny_tokens)
    if wanted in (None, "F32"):
        assert torch.equal(ours, exact)
        assert set(made.how) == {blocks.EXACT}
    else:
        error = float((ours - exact).norm() / exact.norm())
        assert 0 < error < {"F16": 2e-3, "BF16": 2e-2, "Q8_0": 4e-2, "Q4_0": 0.4, "Q4_1": 0.4}[wanted]


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "int4", "int8_groups", "hqq"])
@pytest.mark.parametrize("family", WIDE)
def test_quantised_layers_keep_their_bits(tiny_factory, tmp_path, family, name):
    folder = tiny_factory(family, **WIDE[family])[2]
    # HQQ has minima everywhere, which blocks have in 4 bits alone, and in groups of 32.
    made = transforms_of(name, 32, 4) if name == "hqq" else transforms_of(name)
    quantised = quantize(folder, made, tmp_path / "quantised").folder
    for wanted in (None, "Q8_0"):  # what is in blocks is not rounded again
        path = tmp_path / f"{wanted}.gguf"
        assert set(save(quantised, path, wanted).how) == {blocks.EXACT}
        before, after = checkpoint.load(quantised).state_dict(), imported(path).state_dict()
        assert set(before) == set(after)
        assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("group", [64, 128])
def test_wider_groups_repeat_their_scale(group):
    weight = IntGroups.quantize(torch.randn(5, 256), 4, group)
    encoded = blocks.plan(weight, None, "x")
    assert encoded.how == blocks.EXACT
    again = blocks.decode(encoded.make(), encoded.type_name, torch.float32)
    assert again.group == 32 and torch.equal(again.dequantize(), weight.dequantize())


def test_int8_rows_keep_their_integers():
    weight = Int8Rows.quantize(torch.randn(7, 64))
    encoded = blocks.plan(weight, None, "x")
    assert (encoded.type_name, encoded.how) == ("Q8_0", "scales rounded to fp16")
    again = blocks.decode(encoded.make(), "Q8_0", torch.float32)
    assert torch.equal(again.q, weight.q)
    torch.testing.assert_close(again.dequantize(), weight.dequantize(), rtol=2**-11, atol=1e-7)  # fp16 scales


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16", "F32"])
def test_blocks_are_those_of_the_gguf_package(type_name):
    x = torch.randn(6, 96) * torch.logspace(-2, 2, 6)[:, None]
    raw = blocks.plan(Dense(x), type_name, "x").make()
    kind = gguf.GGMLQuantizationType[type_name]
    assert np.array_equal(raw.numpy(), gguf.quantize(x.numpy(), kind).view(np.uint8).reshape(6, -1))
    theirs = gguf.dequantize(raw.numpy(), kind).reshape(6, -1)
    ours = blocks.decode(raw, type_name, torch.float32).dequantize().float()
    assert np.array_equal(ours.numpy(), theirs)


def readable_types():
    """Every type that the package dequantises, asked of the package itself."""
    found = []
    for kind, (_, n_bytes) in gguf.GGML_QUANT_SIZES.items():
        with contextlib.suppress(NotImplementedError):
            gguf.dequantize(np.zeros((1, n_bytes), np.uint8), kind)
            found.append(kind)
    return found


def random_blocks(kind, n_rows, width, generator):
    """Random bytes of a type, uint8 `[rows, bytes of a row]`, each block drawn again until its numbers are finite."""
    per_block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = generator.integers(0, 256, (n_rows * width // per_block, n_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        while (bad := ~np.isfinite(gguf.dequantize(raw, kind)).all(axis=1)).any():
            raw[bad] = generator.integers(0, 256, (int(bad.sum()), n_bytes), dtype=np.uint8)
    return raw.reshape(n_rows, -1)


def write_llama(path, kind, generator, width=256):
    """A Llama of one layer by the package's own writer, its matrices random blocks. Gives them by name."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, width),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, width),
        (writer.add_head_count, 4),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    names = ["token_embd", *(f"blk.0.{n}" for n in ("attn_q", "attn_k", "attn_v", "attn_output"))]
    names += [f"blk.0.ffn_{n}" for n in ("gate", "up", "down")]
    matrices = {f"{name}.weight": random_blocks(kind, width, width, generator) for name in names}
    for name, raw in matrices.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return matrices


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", readable_types(), ids=lambda kind: kind.name)
def test_every_type_stands_for_the_numbers_of_the_gguf_package(tmp_path, kind, dense):
    """Bit for bit, from a file of the package's writer to the loaded model."""
    matrices = write_llama(tmp_path / "x.gguf", kind, np.random.default_rng(0))
    notes = convert(container.Reader(tmp_path / "x.gguf"), ensure_folder(tmp_path / "out"), dense=dense)
    model = checkpoint.load(tmp_path / "out")
    holders = {"token_embd": model.embedding}
    block = model.get_submodule("layers.0")
    holders |= {f"blk.0.attn_{n}": block.get_submodule(f"self_attn.{n}_proj") for n in "qkv"}
    holders |= {"blk.0.attn_output": block.get_submodule("self_attn.o_proj")}
    holders |= {f"blk.0.ffn_{n}": block.get_submodule(f"mlp.{n}_proj") for n in ("gate", "up", "down")}
    for name, holder in holders.items():
        theirs = gguf.dequantize(matrices[f"{name}.weight"], kind)
        if name in ("blk.0.attn_q", "blk.0.attn_k"):  # llama.cpp's order of rotary rows, undone as transformers does
            theirs = theirs.reshape(4, -1, 2, 256).swapaxes(1, 2).reshape(256, 256)
        ours = holder.weight.dequantize()
        assert np.array_equal(ours.float().numpy(), theirs), name
        if dense:
            assert ours.dtype == torch.float32 and holder.weight.format == "dense"
    kept = {**dict.fromkeys(blocks.BITS, "int_groups"), **dict.fromkeys(blocks.DENSE, "dense")}
    if not dense and kind.name in kept:
        assert {holder.weight.format for holder in holders.values()} == {kept[kind.name]}
    is_said = any(f"of {kind.name} were read as the fp32 numbers" in note for note in notes)
    assert is_said == (not dense and kind.name not in kept)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    generator = np.random.default_rng(0)
    raw = write_llama(tmp_path / "x.gguf", gguf.GGMLQuantizationType.Q4_K, generator)["blk.0.ffn_up.weight"].tobytes()
    data = (tmp_path / "x.gguf").read_bytes()
    at = data.index(raw)
    (tmp_path / "inf.gguf").write_bytes(data[:at] + np.float16(np.inf).tobytes() + data[at + 2 :])
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight holds NaN or infinity"):
        checkpoint.resolve(str(tmp_path / "inf.gguf"))


@pytest.mark.parametrize("wanted", [None, "Q8_0"])
@pytest.mark.parametrize("family", WIDE)
def test_the_gguf_package_reads_our_file(tiny_factory, tmp_path, family, wanted):
    save(tiny_factory(family, **WIDE[family])[2], tmp_path / "x.gguf", wanted)
    theirs, ours = gguf.GGUFReader(tmp_path / "x.gguf"), container.Reader(tmp_path / "x.gguf")
    assert {f for f in theirs.fields if not f.startswith("GGUF.")} == set(ours.metadata)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert field.contents() == ours.metadata[name]
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for t in theirs.tensors:
        assert t.tensor_type.name == ours.tensors[t.name].type_name
        assert tuple(reversed(t.shape.tolist())) == ours.tensors[t.name].shape
        assert np.array_equal(t.data.view(np.uint8).reshape(-1), ours.raw(t.name).view(-1).numpy())


@pytest.mark.parametrize("wanted", [None, "Q8_0"])
@pytest.mark.parametrize("model_name", ["pocket", "tinystories"])
@pytest.mark.realdata
def test_transformers_reads_our_file(data_dir, pocket_folder, tmp_path, model_name, wanted):
    """Its own reader of names, permuted rows, blocks and vocabulary: the same logits and the same tokens."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder = pocket_folder if model_name == "pocket" else data_dir / "tinystories_656k"
    save(folder, tmp_path / "x.gguf", wanted)
    with torch.device("meta"):
        shape = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    read = load_gguf_checkpoint(str(tmp_path / "x.gguf"), return_tensors=True, model_to_load=shape)
    theirs = transformers.AutoModelForCausalLM.from_config(shape.config).float().eval()
    left = theirs.load_state_dict({k: v.float() for k, v in read["tensors"].items()}, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}  # tied
    ours = imported(tmp_path / "x.gguf").float()
    tokens = torch.randint(0, 2000, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=2e-4, rtol=1e-4)  # another order of sums


@pytest.mark.realdata
@pytest.mark.parametrize("whole", [True, False])
def test_the_tokenizer_comes_along(data_dir, pocket_folder, tmp_path, whole):
    """From the whole tokenizer in the file, and as llama.cpp's own files have to be read, without it."""
    text = (
        "Once upon a time, there were 3 dragons; they'd said: \u201cna\u00efve caf\u00e9\u201d!\n\nThe end  \U0001f600."
    )
    for folder in (pocket_folder, data_dir / "tinystories_656k"):
        path = tmp_path / f"{folder.name}.gguf"
        save(folder, path, "F16")
        reader = container.Reader(path)
        if not whole:
            del reader.metadata[vocabulary.WHOLE]
        out = ensure_folder(tmp_path / folder.name)
        assert convert(reader, out) == []
        before, after = Tokenizer(folder), Tokenizer(out)
        assert after.encode(text) == before.encode(text)
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))


def test_a_file_is_read_once(tiny_factory, tmp_path, capsys):
    save(tiny_factory("gpt2", **WIDE["gpt2"])[2], tmp_path / "x.gguf")
    first = folder_of(tmp_path / "x.gguf")
    assert "x.gguf was read into" in capsys.readouterr().err
    assert folder_of(tmp_path / "x.gguf") == first and not capsys.readouterr().err
    save(tiny_factory("gpt2", **WIDE["gpt2"])[2], tmp_path / "x.gguf", "Q8_0")
    assert folder_of(tmp_path / "x.gguf") != first, "another file of that name"


def test_a_tied_matrix_that_is_there_twice(tiny_factory, tmp_path):
    """As older converters write GPT-2."""
    _, _, folder = tiny_factory("gpt2", **WIDE["gpt2"])
    save(folder, tmp_path / "x.gguf")
    reader = container.Reader(tmp_path / "x.gguf")
    reader.tensors["output.weight"] = reader.tensors["token_embd.weight"]
    convert(reader, ensure_folder(tmp_path / "out"))
    assert checkpoint.load(tmp_path / "out").config.tied_head


# --- bad input ----------------------------------------------------------------------------------------------------


def test_what_llama_cpp_cannot_express(tiny, tmp_path):
    for changes, match in (
        ({"activation_function": "relu"}, "no activation relu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "divides scores by sqrt"),
    ):
        with pytest.raises(ParetuneError, match=match):
            save(tiny("gpt2", **changes)[2], tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="blocks of 32 do not divide the 48 inputs of wte"):
        save(tiny("gpt2")[2], tmp_path / "x.gguf", "Q8_0")
    with pytest.raises(UsageError, match="unknown GGUF format 'Q5_K'"):
        save(tiny("gpt2")[2], tmp_path / "x.gguf", "Q5_K")
    assert list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*.tmp")) == []


def test_a_sliding_window_cuts_the_context(tiny_mistral_folder, tmp_path):
    made = save(tiny_mistral_folder, tmp_path / "x.gguf")
    assert container.Reader(tmp_path / "x.gguf").metadata["llama.context_length"] == 8
    assert any("no sliding window" in note for note in made.notes)


@pytest.mark.parametrize("n_bytes", [0, 3, 20, 200, -1])
def test_a_truncated_file_is_named(tiny_factory, tmp_path, n_bytes):
    save(tiny_factory("llama", **WIDE["llama"])[2], tmp_path / "x.gguf")
    data = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:n_bytes])
    with pytest.raises(CheckpointError, match=r"cut\.gguf is (not a GGUF file|truncated or damaged)"):
        checkpoint.resolve(str(tmp_path / "cut.gguf"))
    assert not (tmp_path / "cache" / "gguf").exists() or not list((tmp_path / "cache" / "gguf").iterdir())


def test_random_headers_are_refused(tmp_path):
    """Whatever the bytes say, it is one line of ours."""
    generator = np.random.default_rng(0)
    for i in range(60):
        junk = generator.integers(0, 256 if i % 2 else 12, 400, dtype=np.uint8).tobytes()
        (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, i % 3, 1 + i % 4) + junk)
        with pytest.raises(CheckpointError):
            checkpoint.resolve(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda r: r.metadata.update({"general.architecture": "mamba"}),
            "architecture 'mamba' is not read.*gpt2, llama",
        ),
        (lambda r: r.metadata.update({"llama.expert_count": 8}), "mixture of experts"),
        (lambda r: r.metadata.update({"llama.rope.scaling.type": "yarn"}), "rope scaling 'yarn'"),
        (lambda r: r.metadata.pop("llama.block_count"), "no entry llama.block_count"),
        (lambda r: r.metadata.update({"llama.block_count": 3}), r"blk\.2\.attn_q\.weight is missing"),
        (lambda r: r.metadata.update({"llama.block_count": 1}), r"blk\.1\..* does not belong"),
        (lambda r: r.metadata.update({"llama.feed_forward_length": 64}), r"ffn_gate.*has shape"),
        (lambda r: r.tensors.pop("token_embd.weight"), "no tensor token_embd.weight"),
    ],
)
def test_files_that_are_not_read(tiny_factory, tmp_path, change, match):
    save(tiny_factory("llama", **WIDE["llama"])[2], tmp_path / "x.gguf")
    reader = container.Reader(tmp_path / "x.gguf")
    change(reader)
    with pytest.raises(CheckpointError, match=match):
        convert(reader, ensure_folder(tmp_path / "out"))


def test_types_that_cannot_be_read_are_named(tiny_factory, tmp_path):
    save(tiny_factory("llama", **WIDE["llama"])[2], tmp_path / "x.gguf")
    data = (tmp_path / "x.gguf").read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 16
    assert struct.unpack("<I", data[at : at + 4]) == (0,)
    for number, what in (
        (9, "is stored as Q8_1, which is not read"),
        (24, "is stored as I8, which"),
        (99, "is of type 99"),
    ):
        (tmp_path / f"{number}.gguf").write_bytes(data[:at] + struct.pack("<I", number) + data[at + 4 :])
        with pytest.raises(CheckpointError, match=re.escape(f"blk.0.ffn_up.weight {what}")):
            checkpoint.resolve(str(tmp_path / f"{number}.gguf"))


@pytest.fixture
def pocket_gguf(pocket_folder, tmp_path):
    """`pocket` as llama.cpp's own files are: without the whole tokenizer of Hugging Face."""
    save(pocket_folder, tmp_path / "x.gguf", "F16")
    reader = container.Reader(tmp_path / "x.gguf")
    del reader.metadata[vocabulary.WHOLE]
    return reader


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("tokens", 3, "tokens is not a list of str"),
        ("tokens", ["a", 1], "tokens is not a list of str"),
        ("merges", ["a b c"], "merges has a line that is not two tokens"),
        ("token_type", [1.0], "token_type is not a list of int"),
        ("token_type", [1], "token_type has 1 elements for 8,192 tokens"),
        ("eos_token_id", 8192, "eos_token_id is 8192, not one of 8,192 tokens"),
        ("eos_token_id", "2", "eos_token_id is '2'"),
        ("eot_token_id", -1, "eot_token_id is -1"),
        ("pre", 7, "pre is not text"),
    ],
)
def test_entries_of_a_tokenizer_are_checked(pocket_gguf, tmp_path, key, value, match):
    pocket_gguf.metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(CheckpointError, match=re.escape(match)):
        convert(pocket_gguf, ensure_folder(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == [], "refused before the work"


def test_a_turn_may_have_an_end_of_its_own(pocket_gguf, tmp_path):
    pocket_gguf.metadata |= {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 5}
    convert(pocket_gguf, ensure_folder(tmp_path / "out"))
    assert checkpoint.read_config(tmp_path / "out").eos_token_ids == (3, 5)


def test_digits_one_by_one(pocket_folder, tmp_path):
    """The splitting rule `smollm`: out by name and in again; the oracle is the tokenizer as it was before."""
    folder = shutil.copytree(pocket_folder, tmp_path / "digits")
    whole = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = [{"type": "Digits", "individual_digits": True}, level]
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": split}
    (folder / "tokenizer.json").write_text(json.dumps(whole), "utf-8")
    save(folder, tmp_path / "x.gguf", "F16")
    reader = container.Reader(tmp_path / "x.gguf")
    assert reader.metadata["tokenizer.ggml.pre"] == "smollm"
    del reader.metadata[vocabulary.WHOLE]
    convert(reader, ensure_folder(tmp_path / "out"))
    text = "In 1984,  12 of   345 said \u00bd\u0665 -7.25e10"
    plain, before, after = (Tokenizer(f).encode(text) for f in (pocket_folder, folder, tmp_path / "out"))
    assert after == before != plain
