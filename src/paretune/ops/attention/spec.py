"""The seam between a model and its attention: what a layer tells the function, and what its cache gives back.

Legend: B batch, H query heads, Hkv key/value heads, K new tokens, n visible keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """What is fixed for a layer."""

    scale: float  # scores are multiplied by it before the softmax
    window: int | None = None  # a query at position p sees the keys p - window + 1 .. p; None sees all before it


class Visible(NamedTuple):
    """The keys and values that the new queries may look at."""

    k: Tensor  # [B, Hkv, n, D]
    v: Tensor  # [B, Hkv, n, D]
    mask: Tensor | None  # bool [B or 1, 1, K, n], True where visible; None: see `is_causal`
    is_causal: bool  # with mask None: lower triangle of K x K; False: every key is visible to every query


class LayerCache(Protocol):
    """One layer's view of the cache."""

    def append(self, k_new: Tensor, v_new: Tensor, window: int | None) -> Visible: ...


AttentionFunction = Callable[[Tensor, Tensor, Tensor, LayerCache | None, AttentionSpec], Tensor]


def window_mask(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Who sees whom, by absolute positions.

    Args:
        query_positions: `[B, K]`.
        key_positions: `[B or 1, n]`; negative marks an empty slot.

    Returns:
        bool `[B, 1, K, n]`.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]  # (B, K, n)
    visible = (distance >= 0) & (key_positions[:, None, :] >= 0)
    if window is not None:
        visible = visible & (distance < window)
    return visible[:, None]


def visible(k_new: Tensor, v_new: Tensor, layer_cache: LayerCache | None, spec: AttentionSpec) -> Visible:
    """Stores the new keys and values and returns all that may be seen; without a cache, the new ones alone."""
    if layer_cache is not None:
        return layer_cache.append(k_new, v_new, spec.window)
    K = k_new.size(2)
    if spec.window is None or spec.window >= K:
        return Visible(k_new, v_new, None, is_causal=True)
    positions = torch.arange(K, device=k_new.device)[None]
    return Visible(k_new, v_new, window_mask(positions, positions, spec.window), is_causal=False)
