"""A recipe that cannot be applied to a model is refused by every verb before a weight is read."""

from __future__ import annotations

import shutil

import pytest
import torch

from paretune import hardware
from paretune.cli.app import run
from paretune.engine import generate as engine_generate
from paretune.evaluate import fidelity
from paretune.model import checkpoint

RECIPE = """
[engine]
runner = "native"
[[transforms]]
name = "fp8"
"""
WITHOUT_GRADIENTS = """
[[transforms]]
name = "attention"
form = "flex"
"""


@pytest.fixture(autouse=True)
def _threads_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were read, or work was begun")

    monkeypatch.setattr(checkpoint, "load", refuse)
    monkeypatch.setattr(fidelity, "score", refuse)
    monkeypatch.setattr(engine_generate, "generate", refuse)
    monkeypatch.setattr(hardware, "ceilings", refuse)


@pytest.fixture
def folder(tmp_path, tiny, pocket_folder):
    """Heads of 13 numbers, 64 positions, a tokenizer."""
    _, _, made = tiny("gpt2", n_embd=39, n_head=3)
    target = tmp_path / "model"
    shutil.copytree(made, target)
    shutil.copy(pocket_folder / "tokenizer.json", target)
    return target


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    assert run([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("kv4", "a 4-bit cache needs an even head size, not 13"),
        ("window256", "a window of 256 is larger than the context of 64"),
        ("recipe.toml", "native code has no weight format fp8"),
    ],
)
@pytest.mark.parametrize(
    "verb",
    [
        ["generate", "--prompt", "x"],
        ["eval", "--quiet"],
        ["profile", "--phase", "decode", "--input-len", "8", "--quiet"],
    ],
    ids=lambda v: v[0],
)
def test_verbs_that_run_a_recipe(capsys, folder, nothing_is_loaded, verb, config, why, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    config = str(tmp_path / config) if config.endswith(".toml") else config
    said = refused(capsys, verb[0], folder, "--config", config, *verb[1:])
    assert f"cannot run here: {why}" in said or f"pattern window:256: {why}" in said
    assert "Choose another --config" in said


@pytest.mark.parametrize(
    ("config", "why"),
    [("window256", "larger than the context of 64"), ("flex.toml", "FlexAttention has no gradients on a CPU")],
)
def test_train(capsys, folder, nothing_is_loaded, tmp_path, config, why):
    """Before the text is encoded, too."""
    (tmp_path / "flex.toml").write_text(WITHOUT_GRADIENTS)
    config = str(tmp_path / config) if config.endswith(".toml") else config
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("words " * 500)
    said = refused(capsys, "train", folder, "--text", text, "--config", config, "-o", out, "--device", "cpu", "--quiet")
    assert why in said and not out.exists()


def test_quantize(capsys, folder, nothing_is_loaded, tmp_path):
    """A pattern that names no layer is known from the config."""
    out = tmp_path / "out"
    said = refused(capsys, "quantize", folder, "--format", "int8", "--exclude", "blocks.*", "-o", out)
    assert "'blocks.*' matches no layer (names look like " in said and "--exclude" in said
    assert not out.exists()
