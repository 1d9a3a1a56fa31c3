"""FlexAttention against the formula: uncompiled here, where it is quick; compiled in a slow test."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.testing import assert_close

from paretune import native_build
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import UsageError
from paretune.ops.attention import alibi, flex, reference
from paretune.ops.attention.pattern import parse
from paretune.ops.attention.spec import AttentionSpec
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.mechanism import Mechanism

PATTERNS = (
    "causal",
    "window:5",
    "window:200",
    "strided:8+window:3",
    "prefix:70+window:100",
    "prefix:3+window:70+random:2x64@5",
    "blocks:64+strided:16",
)


@pytest.fixture
def calls(monkeypatch):
    """FlexAttention without its compiler; the list holds what it was asked."""
    from torch.nn.attention.flex_attention import flex_attention

    seen = []

    def uncompiled(q, k, v, **options):
        seen.append((q.size(2), options))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is slow
            return flex_attention(q, k, v, **options)

    monkeypatch.setattr(flex, "_compiled", lambda: uncompiled)
    return seen


def inputs(H, Hkv, K, D):
    return [torch.randn(2, heads, K, D) for heads in (H, Hkv, Hkv)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("has_alibi", [False, True])
def test_equals_the_reference(calls, pattern, has_alibi):
    for H, Hkv, K, D in ((4, 2, 130, 16), (2, 2, 257, 13), (3, 1, 2, 8)):
        spec = AttentionSpec(0.3, parse(pattern), alibi.slopes(H) if has_alibi else None)
        tensors = inputs(H, Hkv, K, D)
        with torch.no_grad():
            got = flex.attention(*tensors, None, spec)
        assert_close(got, reference.attention(*tensors, None, spec), atol=2e-5, rtol=1e-5)
    assert [n for n, _ in calls] == [256, 384, 128]  # whole blocks: nearby lengths share a compiled form
    assert all((options["score_mod"] is not None) == has_alibi for _, options in calls)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_blocks_that_are_skipped_are_those_that_nobody_sees(pattern):
    found = flex._block_mask(parse(pattern), 450, "cpu")
    assert torch.equal(found.to_dense()[0, 0].bool(), parse(pattern).block_mask(450, 128))


@pytest.mark.parametrize(
    "mechanism", [{"alibi": True}, {"pattern": "prefix:3+window:40"}, {"pattern": "window:5+strided:4"}], ids=str
)
@torch.inference_mode()
def test_models_prefill_and_decode(calls, tiny, mechanism):
    model, _, _ = tiny("gpt2", n_positions=160)
    model = Mechanism(**mechanism).apply(model, Context())
    tokens = torch.randint(0, 131, (2, 150))
    wanted = model(tokens, None, "all")
    runner = EagerRunner(Attention("flex").apply(model, Context()))
    assert_close(runner.model(tokens, None, "all"), wanted, atol=3e-5, rtol=1e-4)
    before = len(calls)
    cache = runner.new_cache(2, 150)
    got = [runner.forward(part, cache, "all") for part in tokens.split([140, 1, 1, 8], dim=1)]
    assert_close(torch.cat(got, dim=1), wanted, atol=3e-5, rtol=1e-4)
    # The prompt alone: later steps, whose few queries skip little, go another way.
    assert [n for n, _ in calls[before:]] == [256] * model.config.n_layer


def test_there_are_no_gradients_on_a_cpu(calls):
    tensors = [t.requires_grad_() for t in inputs(2, 2, 20, 8)]
    with pytest.raises(UsageError, match="no gradients on a CPU"):
        flex.attention(*tensors, None, AttentionSpec(0.3))


@torch.no_grad()
def test_more_shapes_than_the_limit_is_a_refusal(monkeypatch):
    """PyTorch's own error, from a compiler that does nothing: the message has the cause and the cure."""

    def same(q, k, v, **options):
        return q + 0

    compiled = torch.compile(same, dynamic=False, backend="eager")
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(flex, "MOST_SHAPES", 1)
    spec = AttentionSpec(0.3)
    for K in (2, 100, 128):  # one shape
        tensors = inputs(2, 2, K, 8)
        assert torch.equal(flex.attention(*tensors, None, spec), tensors[0])
    with pytest.raises(
        UsageError, match=r"1 in one process.* 2 with 130 tokens.* Use a recipe with attention\(native\) or sdpa"
    ):
        flex.attention(*inputs(2, 2, 130, 8), None, spec)


@pytest.mark.slow
@pytest.mark.skipif(native_build.unavailable_reason() is not None, reason="no C++ compiler")
@pytest.mark.parametrize(("pattern", "has_alibi"), [("causal", True), ("prefix:3+window:70", False)])
@torch.no_grad()
def test_compiled_equals_the_reference(pattern, has_alibi):
    spec = AttentionSpec(0.3, parse(pattern), alibi.slopes(4) if has_alibi else None)
    tensors = inputs(4, 2, 300, 16)
    assert_close(flex.attention(*tensors, None, spec), reference.attention(*tensors, None, spec), atol=2e-5, rtol=1e-5)
