"""Calibration windows, and that recipes which need them get them."""

from __future__ import annotations

import pytest
import torch

from paretune import native_build
from paretune.engine import calibration
from paretune.engine.load import load_recipe
from paretune.errors import UsageError
from paretune.model.layers import Embedding, Linear
from paretune.recipe import Recipe
from paretune.registry import ATTENTION
from paretune.transforms.attention import Attention
from paretune.transforms.gptq import GPTQ

EXACT = ATTENTION.get("sdpa")


def test_windows_of_a_text(pocket_folder):
    text = " ".join(f"word{i}" for i in range(3000))
    windows = calibration.from_text(pocket_folder, text, 6, 64)
    assert windows.shape == (6, 64) and len({tuple(w.tolist()) for w in windows}) == 6
    assert torch.equal(windows, calibration.from_text(pocket_folder, text, 6, 64))
    assert not torch.equal(windows, calibration.from_text(pocket_folder, text, 6, 64, seed=1))
    with pytest.raises(UsageError, match="calibration text too short: 3 tokens"):
        calibration.from_text(pocket_folder, "one two three", 6, 64)


def test_what_a_model_writes_follows_its_distribution(tiny):
    """The second token's frequencies against the probabilities, for one first token."""
    model = tiny("gpt2", vocab_size=5)[0]
    windows = calibration.from_model(model, 3000, 3)
    assert windows.shape == (3000, 3) and int(windows.max()) < 5
    assert torch.equal(windows, calibration.from_model(model, 3000, 3))
    first = windows[windows[:, 0] == 2]
    expected = model(torch.tensor([[2]]), None, "all")[0, 0].softmax(-1)
    found = torch.bincount(first[:, 1], minlength=5) / len(first)
    # Four standard deviations of a frequency.
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / len(first)).sqrt() + 1e-9).all()


needs_native = pytest.mark.skipif(native_build.unavailable_reason() is not None, reason="no C++ compiler")


@needs_native
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_native_writer_leaves_the_model_alone(tiny, family, monkeypatch):
    """The same weights, objects and bits, tied ones tied; and it writes what the eager runner writes."""
    model = tiny(family, vocab_size=97)[0]
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    holders = {name: m.weight for name, m in model.named_modules() if isinstance(m, Linear | Embedding)}
    runner, reason = calibration._writer(model)
    assert runner.name == "native" and reason == ""
    windows = calibration.from_model(model, 50, 12)
    for name, m in model.named_modules():
        assert name not in holders or m.weight is holders[name]
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[name] is value and torch.equal(value, copy) for name, (value, copy) in before.items())
    monkeypatch.setattr(calibration.hardware, "available_memory_bytes", lambda: 0)  # no room for a copy
    said = []
    eager = calibration.from_model(model, 50, 12, say=said.append)
    (line,) = said
    assert "written by PyTorch" in line and "more than half of the 0 GB free" in line and "\n" not in line
    # Logits differ by rounding alone (1e-6), so a draw that falls between two tokens is rare.
    assert (windows == eager).float().mean() > 0.95


def test_what_native_code_cannot_run_is_written_by_pytorch(tiny):
    model = tiny("gpt2")[0]
    for block in model.h:
        block.attn.attention = lambda *args: EXACT(*args)
    said = []
    assert calibration.from_model(model, 3, 4, say=said.append).shape == (3, 4)
    assert len(said) == 1 and "written by PyTorch" in said[0]


def test_tokens_are_drawn_from_the_distribution():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.1, 0.4, 0.0])
    n = 20_000
    drawn = calibration._draw(probabilities.log().expand(n, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (n, 1)
    found = torch.bincount(drawn.flatten(), minlength=6) / n
    assert (found[probabilities == 0] == 0).all()
    # Four standard deviations of a frequency.
    assert ((found - probabilities).abs() <= 4 * (probabilities * (1 - probabilities) / n).sqrt()).all()


def test_a_recipe_that_needs_calibration_loads_by_itself(tiny):
    folder = tiny("gpt2", n_embd=64)[2]
    loaded = load_recipe(folder, Recipe((Attention("sdpa"), GPTQ())), check=False)
    assert loaded.runner.model.h[0].attn.c_attn.weight.format == "int_groups"


@needs_native
def test_who_wrote_the_text_is_in_what_is_loaded_quantised_and_reported(tiny, tmp_path, monkeypatch):
    from paretune.engine.quantize import quantize
    from paretune.measure.worker import Trial

    folder = tiny("gpt2", n_embd=64)[2]
    recipe = Recipe((Attention("sdpa"), GPTQ()))
    request = {"folder": str(folder), "recipe": recipe.to_dict(), "workload": {"input_len": 8, "output_len": 4}}
    request["is_checked"] = True
    assert load_recipe(folder, recipe, check=False).notes == ()
    monkeypatch.setattr(calibration.hardware, "available_memory_bytes", lambda: 0)
    (note,) = load_recipe(folder, recipe, check=False).notes
    assert "written by PyTorch" in note
    assert Trial().load(request)["notes"] == [note]
    said = []
    made = quantize(folder, [GPTQ()], tmp_path / "out", say=said.append)
    assert note in said and made.to_json()["notes"] == [note]
