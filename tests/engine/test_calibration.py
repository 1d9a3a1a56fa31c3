"""Calibration windows, and that recipes which need them get them."""

from __future__ import annotations

import pytest
import torch

from paretune.engine import calibration
from paretune.engine.load import load_recipe
from paretune.errors import UsageError
from paretune.recipe import Recipe
from paretune.transforms.attention import Attention
from paretune.transforms.gptq import GPTQ


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


def test_a_recipe_that_needs_calibration_loads_by_itself(tiny):
    folder = tiny("gpt2", n_embd=64)[2]
    loaded = load_recipe(folder, Recipe((Attention("sdpa"), GPTQ())), check=False)
    assert loaded.runner.model.h[0].attn.c_attn.weight.format == "int_groups"
