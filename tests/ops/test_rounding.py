"""GPTQ, searched scales and HQQ: against the formulas in float64, and better than nearest where they claim it."""

from __future__ import annotations

import pytest
import torch

from paretune.errors import ParetuneError
from paretune.ops.weights import rounding
from paretune.ops.weights.int_groups import IntGroups


def gptq(w, h, bits, group, *, minimum=False, **options):
    return rounding.gptq(w, rounding.solver(h, **options), bits, group, minimum=minimum)


def correlated(n, n_in):
    """Inputs as layers see them: few directions carry most, a few inputs are large."""
    x = torch.randn(n, 12) @ torch.randn(12, n_in) + 0.3 * torch.randn(n, n_in)
    x[:, 5] *= 8
    return x


def moments(x):
    return 2 / x.size(0) * (x.T @ x)


def loss(weight, w, x):
    return float((x @ (weight.dequantize() - w).T).square().sum() / (x @ w.T).square().sum())


def textbook(w, h, scale, minimum, lowest, bits, group, order, damping):
    """GPTQ as its paper's equations have it: after each column, the inverse is conditioned on it (OBQ), in float64."""
    w, h = w.double().clone(), h.double().clone()
    h += torch.eye(len(h), dtype=torch.float64) * damping * h.diagonal().mean()
    inverse = torch.linalg.inv(h)
    out = torch.zeros_like(w)
    for k in order.tolist():
        s, b = scale[:, k // group].double(), minimum[:, k // group].double()
        q = rounding.integers(w[:, k], s, b, bits, lowest)
        out[:, k] = q
        error = (w[:, k] - ((q - lowest) * s + b)) / inverse[k, k]
        w -= error[:, None] * inverse[k][None]
        w[:, k] = (q - lowest) * s + b
        inverse -= inverse[:, k : k + 1] @ inverse[k : k + 1] / inverse[k, k]
        inverse[k, k] = 1  # done; its row and column are zeros
    return out


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("minimum", [True, False])
def test_gptq_equals_the_equations(act_order, minimum):
    n_in, group = 192, 64  # more than one block of columns
    w, x = torch.randn(24, n_in), correlated(1500, n_in)
    h = moments(x)
    got = gptq(w, h.clone(), 4, group, minimum=minimum, act_order=act_order, damping=0.05)
    order = torch.argsort(h.diagonal(), descending=True) if act_order else torch.arange(n_in)
    low = torch.zeros_like(got.scale) if got.minimum is None else got.minimum
    expected = textbook(w, h, got.scale, low, got.lowest, 4, group, order, 0.05)
    # A sum that lies on the edge of two integers may fall to the other one in fp32, and moves those after it.
    assert float((got.integers() == expected).double().mean()) > 0.99


@pytest.mark.parametrize("n_in", [1, 31, 72, 100, 127, 129])
@pytest.mark.parametrize("minimum", [True, False])
def test_gptq_of_any_width_equals_the_equations(minimum, n_in):
    """The last group is shorter; more than one block of columns where there are more than 128."""
    w, x = torch.randn(24, n_in), torch.randn(1500, n_in) @ torch.randn(n_in, n_in)
    h, group = moments(x), 64
    got = gptq(w, h.clone(), 4, group, minimum=minimum, damping=0.05)
    order = torch.argsort(h.diagonal(), descending=True)
    low = torch.zeros_like(got.scale) if got.minimum is None else got.minimum
    expected = textbook(w, h, got.scale, low, got.lowest, 4, group, order, 0.05)
    assert got.in_features == n_in and float((got.integers() == expected).double().mean()) > 0.99


@pytest.mark.parametrize("n_in", [1, 31, 72, 100, 127, 129])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_short_group_is_searched_as_a_group_of_its_own(bits, n_in):
    """And so is the rest of HQQ: as if its inputs stood alone."""
    w, importance = torch.randn(9, n_in), torch.ones(n_in)
    whole = n_in // 32 * 32
    parts = [part for part in (slice(0, whole), slice(whole, n_in)) if part.start < part.stop]
    for minimum in (False, True):
        alone = [rounding.search_scales(w[:, part], importance[part], bits, 32, minimum) for part in parts]
        scale, low = rounding.search_scales(w, importance, bits, 32, minimum)
        assert torch.equal(scale, torch.cat([a[0] for a in alone], dim=1))
        assert low is None or torch.equal(low, torch.cat([a[1] for a in alone], dim=1))
    made = torch.cat([rounding.hqq(w[:, part], bits, 32).dequantize() for part in parts], dim=1)
    assert torch.equal(rounding.hqq(w, bits, 32).dequantize(), made)


@pytest.mark.parametrize("minimum", [True, False])
def test_gptq_halves_the_error_of_nearest(minimum):
    w, x = torch.randn(64, 256), correlated(4000, 256)
    nearest = IntGroups.quantize(w, 4, 64, minimum=minimum)
    got = gptq(w, moments(x), 4, 64, minimum=minimum)
    assert (got.bits, got.group, got.stored_bytes) == (4, 64, nearest.stored_bytes)
    assert loss(got, w, x) < 0.5 * loss(nearest, w, x)
    # On text of another kind it is no disaster.
    other = torch.randn(4000, 256)
    assert loss(got, w, other) < 4 * loss(nearest, w, other)


def test_inputs_that_are_never_seen_are_rounded_to_nearest():
    w, x = torch.randn(16, 128), correlated(1000, 128)
    x[:, [3, 77]] = 0
    got = gptq(w, moments(x), 4, 64)
    s = got.scale.float().repeat_interleave(64, dim=1)
    nearest = rounding.integers(w, s, torch.zeros(1), 4, 0)
    assert torch.equal(got.integers()[:, [3, 77]].float(), nearest[:, [3, 77]])
    assert not torch.equal(got.integers().float(), nearest)


def test_moments_without_an_inverse():
    """One direction only: the damping makes up for it. What is not positive at all is an error, not a wrong answer."""
    x = torch.randn(200, 1) @ torch.randn(1, 64)
    assert torch.isfinite(gptq(torch.randn(8, 64), moments(x), 4, 64).dequantize()).all()
    with pytest.raises(ParetuneError, match="cannot be inverted"):
        gptq(torch.randn(8, 64), -1e3 * torch.ones(64, 64) + torch.eye(64), 4, 64)


def test_searched_scales_are_never_worse():
    w, importance = torch.randn(40, 128), torch.rand(128) ** 4
    for minimum in (False, True):
        found = rounding.nearest_weighted(w, importance, 4, 32, minimum, 16)
        plain = IntGroups.quantize(w, 4, 32, minimum=minimum)

        def error(weight):
            return float(((weight.dequantize() - w).square() * (importance / importance.mean() + 1e-3)).sum())

        assert error(found) < 0.95 * error(plain)


def test_hqq_makes_the_median_error_smaller():
    """Heavy tails: nearest spreads its levels for the outliers, HQQ moves its minima for the many."""
    w = torch.distributions.StudentT(3.0).sample((64, 256))
    nearest, found = IntGroups.quantize(w, 4, 64, minimum=True), rounding.hqq(w, 4, 64)
    assert found.stored_bytes == nearest.stored_bytes and found.minimum is not None

    def size(weight):
        return float((weight.dequantize() - w).abs().pow(0.7).mean())

    assert size(found) < size(nearest)


@pytest.mark.parametrize("make", [lambda w: rounding.hqq(w, 4, 64), lambda w: gptq(w, torch.eye(128), 4, 64)])
def test_zero_rows_and_large_numbers(make):
    w = torch.randn(5, 128)
    w[1] = 0
    assert (make(w).dequantize()[1] == 0).all()
    with pytest.raises(ParetuneError, match="too large for fp16 scales"):
        make(w * 1e7)


def test_hqq_refuses_nan():
    w = torch.randn(5, 128)
    w[1, 2] = torch.nan
    with pytest.raises(ParetuneError, match="NaN"):
        rounding.hqq(w, 4, 64)
