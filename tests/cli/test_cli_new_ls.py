"""`paretune new` and `paretune ls`."""

from __future__ import annotations

import json

import pytest
import torch

from paretune import registry
from paretune.cli import app as cli
from paretune.model import checkpoint
from paretune.recipe import ALIASES, preset

TINY = {"model_type": "gpt2", "vocab_size": 9000, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.delenv("PARETUNE_DEBUG", raising=False)

    def call(*arguments: str):
        code = cli.run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


@pytest.fixture
def tiny_config(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def tree(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("hf", [TINY, LLAMA])
def test_a_new_model_generates(command, tmp_path, hf):
    (tmp_path / "shape.json").write_text(json.dumps(hf))
    code, out, err = command("new", tmp_path / "shape.json", "-o", tmp_path / "made", "--random")
    assert code == 0 and not err
    assert "random parameters (seed 0), fp32" in out and "tokenizer of pocket" in out
    code, out, err = command("generate", tmp_path / "made", "-p", "Once", "--max-new-tokens", "5", "--json")
    assert code == 0, err
    assert len(json.loads(out)["tokens"]) == 5
    assert tree(tmp_path) == ["made", "shape.json"], "nothing temporary is left"
    assert "generation_config.json" not in tree(tmp_path / "made"), "it would name pocket's end token"


def test_the_same_seed_makes_the_same_weights(command, tmp_path, tiny_config):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert command("new", tiny_config, "-o", tmp_path / name, "--random", "--seed", seed)[0] == 0
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c


def test_positions_and_dtype(command, tmp_path, tiny_config):
    out = tmp_path / "made"
    flags = ["--random", "--n_positions", "128", "--dtype", "bf16"]
    assert command("new", tiny_config, "-o", out, *flags)[0] == 0
    assert checkpoint.read_config(out).n_positions == 128
    assert next(checkpoint.load(out).parameters()).dtype == torch.bfloat16


def test_a_size_is_the_published_shape(command, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(checkpoint, "new", lambda config, seed: made.append(config) or torch.nn.Linear(1, 1))
    monkeypatch.setattr(checkpoint, "save", lambda model, folder, tokenizer: None)
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("new", "gpt2", "-o", "made", "--random")
    assert code == 0 and "124,439,808" in out
    assert (made[0].n_layer, made[0].n_embd, made[0].vocab_size) == (12, 768, 50257)


def test_a_folder_gives_its_shape_and_its_tokenizer(command, tmp_path, pocket_folder):
    code, out, _ = command("new", "pocket-draft", "-o", tmp_path / "made", "--random", "--dtype", "fp16")
    assert code == 0 and "its own tokenizer" in out
    theirs = checkpoint.read_config(checkpoint.resolve("pocket-draft"))
    assert checkpoint.read_config(tmp_path / "made") == theirs
    assert (tmp_path / "made" / "tokenizer.json").read_bytes() == (pocket_folder / "tokenizer.json").read_bytes()


def test_force_replaces_a_model_and_nothing_else(command, tmp_path, tiny_config):
    out = tmp_path / "made"
    assert command("new", tiny_config, "-o", out, "--random")[0] == 0
    code, _, err = command("new", tiny_config, "-o", out, "--random", "--seed", "1")
    assert code == 1 and "exists already" in err
    assert command("new", tiny_config, "-o", out, "--random", "--seed", "1", "--force")[0] == 0
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "diary.txt").write_text("dear diary")
    code, _, err = command("new", tiny_config, "-o", mine, "--random", "--force")
    assert code == 2 and "is not a model folder" in err and tree(mine) == ["diary.txt"]


def test_the_working_folder_itself(command, tmp_path, tiny_config, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = command("new", tiny_config, "-o", ".", "--random")
    assert code == 0, err
    assert "config.json" in tree(tmp_path / "empty")


def refused(command, tmp_path, *arguments):
    before = tree(tmp_path)
    code, out, err = command("new", *arguments)
    assert not out and err.count("\n") == 1 and err.startswith("paretune: error: ")
    assert tree(tmp_path) == before, "a half-written folder is left"
    return code, err


def test_what_new_refuses(command, tmp_path, tiny_config):
    out = tmp_path / "made"
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "mamba.json").write_text('{"model_type": "mamba"}')
    for expected, said, arguments in [
        (2, "random weights only", [tiny_config, "-o", out]),
        (2, "'gpt3' is neither a size, a file nor a folder", ["gpt3", "-o", out, "--random"]),
        (1, "is not valid JSON", [tmp_path / "broken.json", "-o", out, "--random"]),
        (1, "'mamba' is not supported", [tmp_path / "mamba.json", "-o", out, "--random"]),
        (1, "has no config.json", [tmp_path, "-o", out, "--random"]),
        (2, "unknown dtype 'int3'", [tiny_config, "-o", out, "--random", "--dtype", "int3"]),
        (2, "'--n-positions'", [tiny_config, "-o", out, "--random", "--n-positions", "0"]),
        (1, "a part of the path is a file", [tiny_config, "-o", tiny_config / "made", "--random"]),
        (1, "exists already", [tiny_config, "-o", tiny_config, "--random"]),
        (2, "is not a model folder", [tiny_config, "-o", tiny_config, "--random", "--force"]),
    ]:
        code, err = refused(command, tmp_path, *arguments)
        assert code == expected and said in err, err


def test_a_tokenizer_that_does_not_fit(command, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(TINY | {"vocab_size": 100}))
    flags = [tmp_path / "small.json", "-o", tmp_path / "made", "--random"]
    code, err = refused(command, tmp_path, *flags, "--tokenizer-from", "pocket")
    assert code == 2 and "8,192 tokens, the model's vocabulary 100" in err
    code, out, _ = command("new", *flags)
    assert code == 0 and "no tokenizer" in out


def test_room_is_checked_before_the_work(command, tmp_path, tiny_config, monkeypatch):
    flags = [tiny_config, "-o", tmp_path / "made", "--random"]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        code, err = refused(command, tmp_path, *flags)
        assert code == 1 and "GB of disk" in err
    monkeypatch.setattr("paretune.hardware.available_memory_bytes", lambda: 1000)
    code, err = refused(command, tmp_path, *flags)
    assert code == 1 and "GB of memory" in err


def test_a_disk_that_fills_up_leaves_nothing(command, tmp_path, tiny_config, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, err = refused(command, tmp_path, tiny_config, "-o", tmp_path / "made", "--random")
    assert code == 1 and "No space left" in err and "Free some space" in err


def test_ls_names_everything(command):
    found = json.loads(command("ls", "--json")[1])
    names = {key: [entry["name"] for entry in value] for key, value in found.items() if isinstance(value, list)}
    assert names["transforms"] == registry.TRANSFORMS.names() and names["runners"] == registry.RUNNERS.names()
    assert names["attention_functions"] == registry.ATTENTION.names()
    assert names["weight_formats"] == registry.FORMATS.names()
    assert names["studies"] == registry.STUDIES.names() and names["configs"] == list(ALIASES)
    assert names["axes"][-4:] == ["runner", "cache", "speculate", "threads"] and len(names["configs"]) <= 12
    assert names["embedded_models"] == list(checkpoint.EMBEDDED)
    assert all(entry["what"] for key in names for entry in found[key])


def test_every_term_that_ls_names_can_be_asked_for(command):
    examples = {"PATTERN": "window:32", "FORM": "flex", "DTYPE": "bf16", "N": "2", "SETTING=VALUE": ""}
    found = json.loads(command("ls", "--json")[1])
    for axis in found["axes"]:
        for term in axis["what"].split(", "):
            word = term.rstrip("*")
            for placeholder, value in examples.items():
                word = word.replace(f"({placeholder})", f"({value})")
            assert preset(word), term


def test_ls_says_what_works_on_a_device(command, monkeypatch):
    from paretune import hardware

    support = {
        "fp32": hardware.DtypeSupport(True, False, 1.0, 1.0, ""),
        "bf16": hardware.DtypeSupport(True, True, 0.9, 0.5, "bf16 is emulated here"),
        "fp16": hardware.DtypeSupport(False, False, 0.0, 0.0, "fp16 does not work here"),
    }
    monkeypatch.setattr(hardware, "dtype_support", lambda device="cpu": support)
    reasons = lambda name, device="cpu": None if support[name].works else support[name].reason  # noqa: E731
    monkeypatch.setattr(hardware, "dtype_failure", reasons)
    code, out, _ = command("ls", "--device", "cpu", "--json")
    assert code == 0
    found = json.loads(out)
    precision = next(e for e in found["transforms"] if e["name"] == "precision")
    assert precision["verdicts"] == [
        {"name": "bf16", "state": "emulated", "reason": "bf16 is emulated here"},
        {"name": "fp16", "state": "cannot", "reason": "fp16 does not work here"},
    ]
    assert all(e["verdicts"] for section in ("transforms", "attention_functions", "runners") for e in found[section])
    flash = next(e for e in found["attention_functions"] if e["name"] == "flash_attn")
    assert flash["verdicts"][0]["state"] == "cannot" and "CUDA" in flash["verdicts"][0]["reason"]
    states = {e["name"]: e["verdicts"][0]["state"] for e in found["configs"]}
    assert states["baseline"] == "works"
    page = command("ls", "--device", "cpu")[1]
    assert "fp16: cannot on cpu (fp16 does not work here)" in page


def test_ls_of_a_device_that_is_not_there(command):
    code, out, err = command("ls", "--device", "tpu")
    assert (code, out) == (2, "") and "there is no device 'tpu'" in err
