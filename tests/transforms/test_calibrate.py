"""What calibration text shows of each layer's inputs, against the formula."""

from __future__ import annotations

import itertools

import pytest
import torch

from paretune.errors import ParetuneError
from paretune.model.layers import Linear
from paretune.ops.weights import rounding
from paretune.ops.weights.dense import Dense
from paretune.transforms import calibrate
from paretune.transforms.base import Context
from paretune.transforms.calibrate import STRIP, SecondMoments, blocks_of, walk
from paretune.transforms.gptq import GPTQ


def linear(n_out, n_in):
    return Linear(Dense(torch.randn(n_out, n_in)))


@pytest.mark.parametrize("width", [3, STRIP, STRIP + 1, 2 * STRIP + 70])
def test_second_moments_are_those_of_all_inputs(width):
    """Several batches, whole and symmetric whatever the strips are; layers that read one tensor share them."""
    layers = {"a": linear(4, width), "b": linear(5, width), "c": linear(2, 4)}
    moments = SecondMoments(layers)
    seen = []
    for _ in range(3):
        moments.forget_input()
        x = torch.randn(2, 11, width) * torch.rand(width)
        seen.append(x.flatten(0, 1).double())
        layers["c"](layers["a"](x))
        layers["b"](x)
    moments.close()
    inputs = torch.cat(seen)
    expected = 2 / len(inputs) * (inputs.T @ inputs)
    for name in ("a", "b"):
        # fp32 sums of 66 products.
        torch.testing.assert_close(moments.of(name).double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(moments.of(name), moments.of(name).T)
    assert moments.of("c").shape == (4, 4)
    torch.testing.assert_close(moments.mean_sizes("a").double(), inputs.abs().mean(0), rtol=1e-4, atol=1e-6)


def test_inputs_that_are_not_finite_are_refused():
    layers = {"a": linear(4, 8)}
    moments = SecondMoments(layers)
    layers["a"](torch.full((2, 8), torch.inf))
    with pytest.raises(ParetuneError, match="not finite"):
        moments.of("a")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_walk_leaves_out_the_last_product_and_sees_the_same_bits(tiny, family, monkeypatch):
    """Inputs of every layer of every block, against passes that go to their end; in three batches."""
    tokens = torch.randint(0, 97, (6, 12), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(calibrate, "TOKENS_AT_ONCE", 24)
    ran: list[str] = []

    def moments_of(stops):
        model = tiny(family, vocab_size=97)[0]
        monkeypatch.setattr(calibrate, "SecondMoments", lambda layers, **options: SecondMoments(layers, stops=stops))
        for name, layer in model.named_modules():
            if isinstance(layer, Linear):
                layer.register_forward_hook(lambda *args, name=name: ran.append(name))
        found = {}
        walk(model, tokens, lambda b, layers, m: found.update({n: m.of(n) for n in layers}), lambda line: None)
        return found, [name for name, _ in blocks_of(model)]

    (whole, blocks), n_whole = moments_of(False), len(ran)
    short, _ = moments_of(True)
    assert whole.keys() == short.keys() and all(torch.equal(whole[n], short[n]) for n in whole)
    assert n_whole - (len(ran) - n_whole) == 3 * len(blocks), "one product a batch and block"


def test_layers_that_read_one_tensor_are_solved_once(tiny, monkeypatch):
    """The same integers as with a factor for each: queries, keys and values share one, and so do gate and up."""
    tokens = torch.randint(0, 97, (40, 16), generator=torch.Generator().manual_seed(0))
    solver, made = rounding.solver, []
    monkeypatch.setattr(rounding, "solver", lambda h, **options: made.append(1) or solver(h, **options))
    results = []
    for shared in (True, False):
        if not shared:
            numbers = itertools.count()
            monkeypatch.setattr(SecondMoments, "inputs_of", lambda moments, name, n=numbers: next(n))
        model = GPTQ().apply(tiny("llama", vocab_size=97)[0], Context(calibration=tokens))
        results.append({n: m.weight.integers() for n, m in model.named_modules() if isinstance(m, Linear)})
    n_blocks = len(blocks_of(model))
    assert len(made) == (4 + 7) * n_blocks
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
