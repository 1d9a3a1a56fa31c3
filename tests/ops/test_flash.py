"""The flash-attn form against the formula, with a stand-in of the same layout and meaning for the package."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from paretune.engine.cache import KVCache
from paretune.errors import UsageError
from paretune.ops.attention import alibi, flash, reference
from paretune.ops.attention.pattern import Kept, parse
from paretune.ops.attention.spec import AttentionSpec

H, D, LENGTH = 4, 8, 21
TOLERANCE = 2e-3  # results of about 1 rounded to fp16


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """As flash-attn documents it from 2.4 on: [B, T, H, D], query i of Tq stands at i + Tk - Tq among the keys."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert q.size(2) % k.size(2) == 0 and k.shape == v.shape and dropout_p == softcap == 0
    at = torch.arange(q.size(1))[:, None] + k.size(1) - q.size(1)
    key = torch.arange(k.size(1))[None]
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros(q.size(1), k.size(1), dtype=torch.bool)
    if left >= 0:
        hidden |= key < at - left
    if right >= 0:
        hidden |= key > at + right
    k, v = (t.float().repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
    scale = q.size(3) ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k) * scale
    if alibi_slopes is not None:
        assert alibi_slopes.dtype == torch.float32 and alibi_slopes.shape == (q.size(2),)
        scores = scores - alibi_slopes[:, None, None] * (at - key).abs()
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0)  # an empty row gives zeros
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).to(q.dtype)


@pytest.fixture
def calls(monkeypatch):
    """Queries and keys of each call of the package."""
    seen = []

    def counted(q, k, v, *rest, **options):
        seen.append((q.size(1), k.size(1)))
        return flash_attn_func(q, k, v, *rest, **options)

    package = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.flash_attn_func = counted
    package.__version__ = "2.8.3"
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return seen


def inputs(Hkv, n_tokens=LENGTH, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch_size, heads, n_tokens, D, generator=generator).half() for heads in (H, Hkv, Hkv)]


def new_cache(Hkv, dtype, capacity=LENGTH, kept=None):
    shape = {"n_layer": 1, "batch_size": 2, "n_kv_head": Hkv, "capacity": capacity, "head_dim": D}
    return KVCache(**shape, dtype=dtype, kept=kept)


def steps(form, tensors, spec, cache, sizes):
    """The sequence on a cache, step by step."""
    out, start = [], 0
    for K in sizes:
        cache.begin_(K)
        q, k, v = (t[:, :, start : start + K] for t in tensors)
        out.append(form.attention(q, k, v, cache.layers[0], spec))
        cache.commit_()
        start += K
    return torch.cat(out, dim=2)


@pytest.mark.parametrize("Hkv", [4, 2, 1])
@pytest.mark.parametrize("pattern", ["causal", "window:5", "window:1", "window:100"])
@pytest.mark.parametrize("has_alibi", [False, True])
def test_equals_the_reference(calls, Hkv, pattern, has_alibi):
    spec = AttentionSpec(0.4, parse(pattern), alibi.slopes(H) if has_alibi else None)
    tensors = inputs(Hkv)
    exact = [t.float() for t in tensors]  # the same numbers without rounding
    wanted = reference.attention(*exact, None, spec)
    got = flash.attention(*tensors, None, spec)
    assert got.dtype == torch.float16
    assert_close(got.float(), wanted, atol=TOLERANCE, rtol=TOLERANCE)
    # A prompt, decode, several tokens behind others (where the corner of the causal mask matters), decode.
    sizes = (9, 1, 1, 8, 1, 1)
    got = steps(flash, tensors, spec, new_cache(Hkv, torch.float16), sizes)
    assert_close(got.float(), wanted, atol=TOLERANCE, rtol=TOLERANCE)
    held = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert calls == [(LENGTH, LENGTH), *zip(sizes, held, strict=True)]


@pytest.mark.parametrize("pattern", ["prefix:2+window:5", "strided:4+window:3", "blocks:4", "window:5+random:1x64"])
def test_a_pattern_that_the_package_does_not_know_is_refused(calls, pattern):
    cache = new_cache(H, torch.float16)
    cache.begin_(LENGTH)
    for layer_cache in (None, cache.layers[0]):
        with pytest.raises(UsageError, match=r"flash-attn has no .* attention.*attention\(flex\) or sdpa"):
            flash.attention(*inputs(H), layer_cache, AttentionSpec(0.4, parse(pattern)))
    assert calls == [] and not cache.layers[0].k.any()  # and nothing half done


def test_fp32_is_refused(calls):
    with pytest.raises(UsageError, match=r"does not support torch.float32.*transform `precision`"):
        flash.attention(*(t.float() for t in inputs(H)), None, AttentionSpec(0.4))
    assert calls == []


def test_keys_out_of_order_go_under_a_mask(calls):
    """Rows of unequal length, and a ring that has come round: the package knows neither."""
    spec = AttentionSpec(0.4, parse("window:5"), alibi.slopes(H))
    tensors = inputs(2)
    found = []
    for form, dtype in ((flash, torch.float16), (reference, torch.float32)):
        cache = new_cache(2, dtype)
        given = [t.to(dtype) for t in tensors]
        steps(form, given, spec, cache, [9])
        cache.truncate_([4, 9])
        cache.begin_(3)
        found.append(form.attention(*(t[:, :, 9:12] for t in given), cache.layers[0], spec).float())
    assert_close(*found, atol=TOLERANCE, rtol=TOLERANCE)
    assert calls == [(9, 9)]
    long = inputs(2, 600)
    cache = new_cache(2, torch.float16, 600, Kept(0, 5))
    assert cache.ring
    got = steps(flash, long, spec, cache, (256, 256, 87, 1))
    wanted = reference.attention(*(t.float() for t in long), None, spec)
    assert_close(got.float(), wanted, atol=TOLERANCE, rtol=TOLERANCE)
    assert len(calls) == 1


def test_where_it_runs(calls, monkeypatch):
    assert "for CUDA GPUs" in (flash.requires("cpu") or "")
    assert flash.requires("cuda") is None and flash.requires("cuda:1") is None
    monkeypatch.setattr(sys.modules["flash_attn"], "__version__", "2.3.6")
    assert "2.3.6, older than 2.4" in (flash.requires("cuda") or "")
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.setattr(sys, "path", [])
    assert "not installed" in (flash.requires("cuda") or "")
