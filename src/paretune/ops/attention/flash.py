"""The flash-attn package (Dao 2023, arXiv:2307.08691), where it is installed: GPUs, 16 bits, windows and ALiBi."""

from __future__ import annotations

import importlib.util
import re

import torch
from torch import Tensor

from paretune.errors import UsageError
from paretune.ops.attention import sdpa
from paretune.ops.attention.pattern import Pattern, prefix_and_window
from paretune.ops.attention.spec import AttentionSpec, LayerCache

KERNEL = "flash_attn"
RECOMPUTES = True  # the backward pass computes the scores again instead of keeping them
FIRST_WITH_SLOPES = (2, 4)  # the version in which its function takes ALiBi's slopes


def requires(device: str) -> str | None:
    """Why this form cannot run on `device`, or None."""
    if not device.startswith("cuda"):
        return "the flash-attn package is for CUDA GPUs"
    if not importlib.util.find_spec("flash_attn"):
        return "the flash-attn package is not installed"
    import flash_attn

    version = getattr(flash_attn, "__version__", "unknown")
    major, minor, *_ = [*(int(n) for n in re.findall(r"\d+", version)), 0, 0]
    return None if (major, minor) >= FIRST_WITH_SLOPES else f"the flash-attn package is {version}, older than 2.4"


def fits(pattern: Pattern) -> str | None:
    """Why this form has no such pattern, or None."""
    limits = prefix_and_window(pattern)
    return f"flash-attn has no {pattern} attention" if limits is None or limits[0] else None


def attention(q: Tensor, k_new: Tensor, v_new: Tensor, layer_cache: LayerCache | None, spec: AttentionSpec) -> Tensor:
    """Arguments and result as in `reference.attention`; 16-bit dtypes, dense or window patterns, with or without ALiBi.

    Rows of unequal length and ring caches, whose keys are not in order, go through `sdpa` with a mask.

    Raises:
        UsageError: the pattern or the dtype is none that the package knows.
    """
    start = 0 if layer_cache is None else layer_cache.in_order_from
    if start is None:
        return sdpa.attention(q, k_new, v_new, layer_cache, spec)
    if reason := fits(spec.pattern):
        raise UsageError(reason, "Use a recipe with attention(flex) or sdpa")
    window = (prefix_and_window(spec.pattern) or (0, 0))[1]
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise UsageError(f"flash-attn does not support {q.dtype}", "Add the transform `precision` to the recipe")
    from flash_attn import flash_attn_func

    k, v = k_new, v_new
    if layer_cache is not None:
        k, v = layer_cache.append(k_new, v_new, spec.pattern)[:2]
    out = flash_attn_func(
        *(t.transpose(1, 2) for t in (q, k, v)),  # its layout is (B, K, H, D)
        softmax_scale=spec.scale,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
        alibi_slopes=None if spec.slopes is None else torch.tensor(spec.slopes, device=q.device),
    )
    return out.transpose(1, 2)
