"""The attention functions against the formula in plain loops, and against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from paretune.ops.attention import flash, flex, native, reference, sdpa
from paretune.ops.attention.pattern import CAUSAL, Window
from paretune.ops.attention.spec import AttentionSpec, LayerCache, Visible
from paretune.registry import ATTENTION

FUNCTIONS = {"eager": reference.attention, "sdpa": sdpa.attention}
LENGTHS = [1, 2, 63, 127]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def inputs(B=2, H=4, Hkv=4, K=5, n=None, D=8, dtype=torch.float32):
    """Queries of K tokens; keys and values of n (default K)."""
    n = K if n is None else n
    shapes = [(B, H, K, D), (B, Hkv, n, D), (B, Hkv, n, D)]
    return [torch.randn(s).to(dtype) for s in shapes]


def naive(q, k, v, spec, visible=None):
    """One query at a time in fp64. `visible(b, i, j)`; default causal within the window."""
    if visible is None:
        dense = spec.pattern.dense(q.size(2)).tolist()

        def visible(b, i, j):
            return dense[i][j]

    B, H, K, D = q.shape
    group = H // k.size(1)
    out = torch.zeros(B, H, K, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            keys, values = k[b, h // group].tolist(), v[b, h // group].double()
            for i in range(K):
                seen = [j for j in range(len(keys)) if visible(b, i, j)]
                query = q[b, h, i].tolist()
                scores = [spec.scale * sum(x * y for x, y in zip(query, keys[j], strict=True)) for j in seen]
                weights = [math.exp(score - max(scores)) for score in scores]
                out[b, h, i] = torch.tensor(weights, dtype=torch.float64) / sum(weights) @ values[seen]
    return out


class FixedCache(LayerCache):
    """A layer cache that gives back what it was given."""

    common_start = in_order_from = None
    prefix_and_ring = (0, 0)

    def __init__(self, k, v, mask=None, is_causal=False):
        self.visible, self.asked = Visible(k, v, mask, is_causal), []

    def append(self, k_new, v_new, pattern):
        self.asked.append((k_new, v_new, pattern))
        return self.visible


def test_the_registry_names_exactly_these():
    assert {name: ATTENTION.get(name) for name in ATTENTION.names() if name in FUNCTIONS} == FUNCTIONS


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(("H", "Hkv"), [(2, 2), (4, 2), (3, 1)])
def test_equals_the_formula(name, T, H, Hkv):
    q, k, v = inputs(B=1, H=H, Hkv=Hkv, K=T)
    spec = AttentionSpec(scale=0.3)
    got = FUNCTIONS[name](q, k, v, None, spec)
    assert got.shape == q.shape and got.dtype == q.dtype
    assert_close(got.double(), naive(q, k, v, spec), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("T", [1, 2, 63])
@pytest.mark.parametrize("window", [1, 2, 7, 62, 63, 200])
def test_window_equals_the_formula(name, T, window):
    q, k, v = inputs(B=1, H=2, Hkv=1, K=T)
    spec = AttentionSpec(scale=0.5, pattern=within(window))
    assert_close(FUNCTIONS[name](q, k, v, None, spec).double(), naive(q, k, v, spec), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scale_is_used(name):
    q, k, v = inputs(K=9)
    a, b = (FUNCTIONS[name](q, k, v, None, AttentionSpec(scale=s)) for s in (0.1, 1.0))
    assert (a - b).abs().max() > 0.05
    assert_close(b, FUNCTIONS[name](q * 10, k, v, None, AttentionSpec(scale=0.1)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("Hkv", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 5])
def test_sdpa_equals_eager(dtype, T, Hkv, window):
    """Within the dtype's tolerance, and no further from fp32 than twice the reference in the same dtype."""
    q, k, v = inputs(Hkv=Hkv, K=T, D=16, dtype=dtype)
    spec = AttentionSpec(scale=0.25, pattern=within(window))
    fast, slow = sdpa.attention(q, k, v, None, spec), reference.attention(q, k, v, None, spec)
    assert fast.dtype == slow.dtype == dtype
    assert_close(fast, slow, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    exact = reference.attention(q.double(), k.double(), v.double(), None, spec)
    assert (fast - exact).abs().max() <= 2 * (slow - exact).abs().max() + 1e-6


def within(window):
    return CAUSAL if window is None else Window(window)


def window_mask(query_positions, key_positions, window):
    return within(window).mask(query_positions, key_positions)


PER_ROW = torch.tensor([[3, 4, 5], [0, 1, 2], [6, 7, 8]])  # 3 new tokens a row, 9 slots


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("Hkv", [1, 2, 4])
def test_positions_per_row(name, window, Hkv):
    """Rows of unequal length in one batch: each sees its own past, never the slots after it."""
    q, k, v = inputs(B=3, Hkv=Hkv, K=3, n=9)
    mask = window_mask(PER_ROW, torch.arange(9)[None], window)
    assert mask.shape == (3, 1, 3, 9) and mask.dtype == torch.bool
    spec = AttentionSpec(scale=0.4, pattern=within(window))
    cache = FixedCache(k, v, mask)
    new = torch.randn(3, Hkv, 3, 8)
    got = FUNCTIONS[name](q, new, new, cache, spec)

    def visible(b, i, j):
        distance = PER_ROW[b, i].item() - j
        return distance >= 0 and (window is None or distance < window)

    assert_close(got.double(), naive(q, k, v, spec, visible), atol=1e-5, rtol=1e-5)
    [(k_new, v_new, asked)] = cache.asked  # stored once, with the layer's window
    assert k_new is new and v_new is new and asked == within(window)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_mask_and_not_causal_sees_everything(name):
    """Decoding at K = 1 with a cache that is exactly full."""
    q, k, v = inputs(K=1, n=6, Hkv=2)
    spec = AttentionSpec(scale=0.4)
    got = FUNCTIONS[name](q, k[:, :, :1], v[:, :, :1], FixedCache(k, v), spec)
    assert_close(got.double(), naive(q, k, v, spec, lambda b, i, j: True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("poison", [1e4, -1e4])
def test_a_masked_key_has_zero_weight(name, dtype, K, poison):
    """Not even exp(0) = 1 over the sum, nor a rounding of it: hidden keys and values leave no bit behind."""
    q, k, v = inputs(B=3, Hkv=2, K=K, n=9, dtype=dtype)
    positions = PER_ROW[:, :K]
    mask = window_mask(positions, torch.arange(9)[None], window=4)
    spec = AttentionSpec(scale=0.4, pattern=Window(4))
    before = FUNCTIONS[name](q, k[:, :, :K], v[:, :, :K], FixedCache(k, v, mask), spec)
    hidden = ~mask.any(2, keepdim=True).transpose(2, 3)  # (B, 1, n, 1): slots no query of the row sees
    assert hidden.any((1, 2, 3)).all() and not hidden.all((1, 2, 3)).any()
    k2, v2 = (torch.where(hidden, torch.full_like(t, poison), t) for t in (k, v))
    after = FUNCTIONS[name](q, k2[:, :, :K], v2[:, :, :K], FixedCache(k2, v2, mask), spec)
    assert torch.equal(before, after)
    k3, v3 = (torch.where(hidden, t, t + 1) for t in (k, v))  # while a visible one does leave a mark
    seen = FUNCTIONS[name](q, k3[:, :, :K], v3[:, :, :K], FixedCache(k3, v3, mask), spec)
    assert not torch.equal(before, seen)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("window", [None, 3])
def test_future_and_expired_keys_have_zero_weight_without_a_cache(name, window):
    q, k, v = inputs(K=12, Hkv=2)
    spec = AttentionSpec(scale=0.4, pattern=within(window))
    before = FUNCTIONS[name](q, k, v, None, spec)
    for j in (0, 5, 11):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, j], v2[:, :, j] = 50.0, -70.0
        changed = (FUNCTIONS[name](q, k2, v2, None, spec) != before).any(-1).any(0).any(0)
        assert changed.tolist() == [i >= j and (window is None or i - j < window) for i in range(12)]


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(("H", "Hkv"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 4])
def test_gradients_are_equal(T, H, Hkv, window):
    tensors = inputs(H=H, Hkv=Hkv, K=T, D=16)
    spec = AttentionSpec(scale=0.25, pattern=within(window))
    weight = torch.randn(2, H, T, 16)
    gradients = {}
    for name, function in FUNCTIONS.items():
        q, k, v = (t.clone().requires_grad_() for t in tensors)
        (function(q, k, v, None, spec) * weight).sum().backward()
        gradients[name] = (q.grad, k.grad, v.grad)
    assert gradients["eager"][2].abs().max() > 0.1
    if T > 1:
        assert gradients["eager"][0].abs().max() > 0.01
    for a, b in zip(gradients["eager"], gradients["sdpa"], strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_window_mask_by_hand():
    mask = window_mask(torch.tensor([[2, 3]]), torch.tensor([[0, 1, 2, 3, -1]]), window=2)
    assert mask[0, 0].int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
    mask = window_mask(torch.tensor([[2, 3]]), torch.tensor([[0, 1, 2, 3, -1]]), window=None)
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_empty_slots_of_a_ring_are_hidden():
    """A ring buffer's slots are out of order and may be empty (negative position)."""
    mask = window_mask(torch.tensor([[5], [1]]), torch.tensor([[4, 5, 2, 3], [0, 1, -1, -1]]), window=3)
    assert mask[:, 0, 0].int().tolist() == [[1, 1, 0, 1], [1, 1, 0, 0]]


def test_reference_softmax_runs_in_fp32():
    """In bf16 a row of 4,096 equal scores must still weigh 1 in all."""
    n = 4096
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, n, 4)
    v = torch.ones(1, 1, n, 4)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    got = reference.attention(q, k[:, :, :1], v[:, :, :1], FixedCache(k, v), AttentionSpec(scale=1.0))
    assert_close(got, torch.ones_like(got), atol=1e-2, rtol=0)


PROPERTIES = {
    "common_start": property(lambda self: 0),
    "in_order_from": property(lambda self: 0),
    "prefix_and_ring": property(lambda self: (0, 0)),
    "append": lambda self, k_new, v_new, pattern: Visible(k_new, v_new, None, True),
}


@pytest.mark.parametrize("missing", PROPERTIES)
def test_a_wrapper_has_the_whole_protocol(missing):
    """A wrapper that forgets the ring would show kernels the wrong keys: it cannot be made."""
    type("Whole", (LayerCache,), PROPERTIES)()
    part = {name: member for name, member in PROPERTIES.items() if name != missing}
    with pytest.raises(TypeError, match=missing):
        type("Wrapper", (LayerCache,), part)()


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        (native.attention, "common_start"),
        (native.attention, "prefix_and_ring"),
        (flash.attention, "in_order_from"),
        (flex.attention, "in_order_from"),
    ],
)
def test_kernels_assume_nothing_about_a_cache(function, missing):
    """Nor does a kernel go on without what it asks for."""
    part = {name: member for name, member in PROPERTIES.items() if name != missing}
    cache = type("Wrapper", (), part)()
    with pytest.raises(AttributeError, match=f"Wrapper.*{missing}"):
        function(*inputs(K=3), cache, AttentionSpec(scale=1.0))
