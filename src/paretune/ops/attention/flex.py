"""FlexAttention (`torch.nn.attention.flex_attention`): the pattern as a mask function, ALiBi as a change of the score.

Compiled, blocks of 128 that nobody sees are skipped, on GPUs and CPUs; PyTorch's CPU form is forward only and needs a
C++ compiler. Uncompiled it would be a dense matrix, so it never runs that way.

Legend: B batch, H heads, K new tokens, n visible keys.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paretune import native_build
from paretune.errors import UsageError
from paretune.ops.attention import sdpa
from paretune.ops.attention.pattern import Pattern
from paretune.ops.attention.spec import AttentionSpec, LayerCache

KERNEL = "Torch-Compiled Region"
RECOMPUTES = True  # the backward pass computes the scores again instead of keeping them
COMPILES_FOR_EACH_LENGTH = "FlexAttention is compiled anew for each length; a request would wait for it"
BLOCK = 128  # queries and keys that are skipped together
MOST_SHAPES = 32  # that are compiled for in one process


def requires(device: str) -> str | None:
    """Why this form cannot run on `device`, or None."""
    if device == "cpu":
        reason = native_build.unavailable_reason()
        return None if reason is None else f"FlexAttention on a CPU has to be compiled: {reason}"
    return None


def trains(device: str) -> str | None:
    """Why this form has no gradients on `device`, or None."""
    return "PyTorch's FlexAttention has no gradients on a CPU" if device == "cpu" else None


def attention(q: Tensor, k_new: Tensor, v_new: Tensor, layer_cache: LayerCache | None, spec: AttentionSpec) -> Tensor:
    """Arguments and result as in `reference.attention`; exact up to the order of additions.

    Whole sequences and the first prompt on a cache; each new number of blocks of 128 is compiled for (tens of seconds
    on a CPU). Later steps, whose few queries skip little, go through `sdpa`.

    Raises:
        UsageError: gradients are asked for on a CPU; more than `MOST_SHAPES` shapes in one process.
    """
    start = 0 if layer_cache is None else layer_cache.in_order_from
    if start != 0 or q.size(2) == 1:
        return sdpa.attention(q, k_new, v_new, layer_cache, spec)
    k, v = k_new, v_new
    if layer_cache is not None:
        k, v = layer_cache.append(k_new, v_new, spec.pattern)[:2]
    wants_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if wants_gradients and (reason := trains(q.device.type)):
        raise UsageError(reason, "Train with a recipe that has sdpa attention, or on a GPU")
    # Tokens are added at the end up to a whole block, so that nearby lengths share a compiled form. Exact: patterns are
    # causal, so no real query sees them, and what they give is cut off.
    K = q.size(2)
    padded = -(-K // BLOCK) * BLOCK
    q, k, v = (F.pad(t, (0, 0, 0, padded - K)) for t in (q, k, v))
    slopes = None if spec.slopes is None else _slopes(spec.slopes, q.device)

    def score(value: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return value - slopes[h] * (query - key)  # type: ignore[index]

    # Beyond the limit PyTorch would run the dense uncompiled form without a word.
    with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, fail_on_recompile_limit_hit=True):
        try:
            out: Tensor = _compiled()(
                q,
                k,
                v,
                score_mod=None if slopes is None else score,
                block_mask=_block_mask(spec.pattern, padded, str(q.device)),
                scale=spec.scale,
                enable_gqa=q.size(1) != k.size(1),
            )
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise UsageError(
                f"FlexAttention is compiled for each shape, and {MOST_SHAPES} in one process is the limit; "
                f"a batch of {q.size(0)} with {K} tokens would be one more",
                "Use a recipe with attention(native) or sdpa",
            ) from error
    return out[:, :, :K]


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=16)
def _slopes(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(slopes, device=device)


@functools.lru_cache(maxsize=16)
def _block_mask(pattern: Pattern, n_tokens: int, device: str) -> Any:
    """Which blocks of 128 x 128 any query sees; in each of them the pattern decides pair by pair."""
    from torch.nn.attention.flex_attention import BlockMask

    n = -(-n_tokens // BLOCK)
    any_seen = pattern.block_mask(n_tokens, BLOCK)
    counts, order = any_seen.sum(1, dtype=torch.int32), any_seen.int().argsort(dim=1, descending=True, stable=True)

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pattern.visible(query, key)

    return BlockMask.from_kv_blocks(
        counts.to(device)[None, None],
        order.to(torch.int32).to(device)[None, None, :, :n],
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(n_tokens, n_tokens),
    )
