"""Layer by layer losses, and the mixes that are chosen from them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from paretune.errors import NoRecipeError, UsageError
from paretune.evaluate.sensitivity import LayerFormat, choose, measure
from paretune.model.layers import Embedding, Linear
from paretune.recipe import Recipe
from paretune.transforms.base import Context
from paretune.transforms.groups import Groups

OPTIONS = [Groups(bits=4, group=64, head_bits=4), Groups(bits=8, group=64, head_bits=8)]


def test_measured_one_layer_at_a_time(tiny):
    model = tiny("gpt2", n_embd=64)[0]
    windows = torch.randint(0, 131, (4, 32))
    before = {n: m.weight for n, m in model.named_modules() if isinstance(m, Linear | Embedding)}
    table = measure(model, windows, OPTIONS)
    assert all(model.get_submodule(n).weight is w for n, w in before.items())
    assert len(table) == 2 * 10  # 8 layers, the tied ends and the positions
    exact = torch.log_softmax(model(windows, None, "all").flatten(0, 1), -1)
    name = "h.1.mlp.c_fc"
    Groups(bits=4, group=64, include=name).apply(model, Context())
    ours = torch.log_softmax(model(windows, None, "all").flatten(0, 1), -1)
    entry = next(e for e in table if e.layer == name and e.option == 0)
    torch.testing.assert_close(entry.kl, float(F.kl_div(ours, exact, reduction="batchmean", log_target=True)))
    assert entry.n_bytes == model.get_submodule(name).weight.stored_bytes
    for name in {e.layer for e in table}:
        four, eight = (next(e for e in table if (e.layer, e.option) == (name, o)) for o in (0, 1))
        assert eight.kl < 0.1 * four.kl and eight.n_bytes > 1.8 * four.n_bytes


def table_of(losses):
    """Layers of 100 bytes in the small format, 200 in the other, which loses nothing."""
    return [
        entry
        for i, kl in enumerate(losses)
        for entry in (LayerFormat(f"l{i}", 0, kl, 100), LayerFormat(f"l{i}", 1, 0.0, 200))
    ]


def test_the_cheapest_mix_within_a_loss():
    losses = [5.0, 0.5, 3.0, 0.1]
    for target in (0.0, 0.1, 0.6, 3.7, 8.7):
        mix = choose(table_of(losses), OPTIONS, max_kl=target)
        assert mix.kl <= target
        # All layers cost the same here, so the greedy way is the best one: as few large ones as can be.
        least = min(
            sum(large)
            for large in itertools.product([0, 1], repeat=4)
            if sum(kl for kl, is_large in zip(losses, large, strict=True) if not is_large) <= target + 1e-12
        )
        assert mix.n_bytes == 400 + 100 * least
    with pytest.raises(NoRecipeError, match="is allowed"):
        choose([LayerFormat("a", 0, 1.0, 1)], OPTIONS, max_kl=0.5)


def test_the_best_mix_within_a_size():
    mix = choose(table_of([5.0, 0.5, 3.0]), OPTIONS, max_bytes=400)
    assert (mix.n_bytes, mix.kl) == (400, 3.5)
    mix = choose(table_of([5.0, 0.5, 3.0]), OPTIONS, max_bytes=599)
    assert (mix.n_bytes, mix.kl) == (500, 0.5)
    with pytest.raises(NoRecipeError, match="the smallest mix has 300 bytes"):
        choose(table_of([5.0, 0.5, 3.0]), OPTIONS, max_bytes=299)
    for both in ({}, {"max_kl": 1.0, "max_bytes": 1}):
        with pytest.raises(UsageError, match="one target"):
            choose(table_of([1.0]), OPTIONS, **both)


def test_a_mix_is_a_recipe_that_does_what_it_says(tiny):
    model = tiny("llama", hidden_size=64, intermediate_size=128)[0]
    windows = torch.randint(0, 131, (4, 32))
    table = measure(model, windows, OPTIONS)
    smallest = sum(e.n_bytes for e in table if e.option == 0)
    mix = choose(table, OPTIONS, max_bytes=int(smallest * 1.3))
    recipe = Recipe.from_dict(Recipe(mix.transforms).to_dict())
    exact = torch.log_softmax(model(windows, None, "all").flatten(0, 1), -1)
    recipe.apply(model, Context())
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, Linear | Embedding)}
    assert sum(w.stored_bytes for w in weights.values()) == mix.n_bytes <= smallest * 1.3
    ours = torch.log_softmax(model(windows, None, "all").flatten(0, 1), -1)
    measured = float(F.kl_div(ours, exact, reduction="batchmean", log_target=True))
    assert 0.4 < measured / mix.kl < 2.5  # losses nearly add up
