"""The seam between a model and its attention: what a layer tells the function, and what its cache gives back.

Legend: B batch, H query heads, Hkv key/value heads, K new tokens, n visible keys, D head dimension.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from paretune.ops.attention.pattern import CAUSAL, Pattern


@dataclass(frozen=True)
class AttentionSpec:
    """What is fixed for a layer."""

    scale: float  # scores are multiplied by it before the softmax
    pattern: Pattern = CAUSAL  # which keys a query sees
    slopes: tuple[float, ...] | None = None  # ALiBi: scores of head h fall by slopes[h] for each token of distance


class Visible(NamedTuple):
    """The keys and values that the new queries may look at."""

    k: Tensor  # [B, Hkv, n, D]
    v: Tensor  # [B, Hkv, n, D]
    mask: Tensor | None  # bool [B or 1, 1, K, n], True where visible; None: see `is_causal`
    is_causal: bool  # with mask None: lower triangle of K x K; False: every key is visible to every query
    query_positions: Tensor | None = None  # [B or 1, K]; None: the last K of 0 .. n - 1
    key_positions: Tensor | None = None  # [B or 1, n]; None: 0 .. n - 1


class LayerCache(Protocol):
    """One layer's view of the cache: all that an attention function may ask of it.

    What implements or wraps one inherits from it, so that a member that is missing is an error when the object is made.
    The properties hold for the step at hand, before and after its `append`.
    """

    @property
    @abstractmethod
    def common_start(self) -> int | None:
        """Position of this step's first token where all rows of the step share it; else None."""

    @property
    @abstractmethod
    def in_order_from(self) -> int | None:
        """`common_start` where the keys that `append` gives back lie in the order of their positions; else None."""

    @property
    @abstractmethod
    def prefix_and_ring(self) -> tuple[int, int]:
        """Positions from `prefix` on share `ring` slots behind the first ones; ring 0: slots are positions."""

    @abstractmethod
    def append(self, k_new: Tensor, v_new: Tensor, pattern: Pattern) -> Visible:
        """Stores `[B, Hkv, K, D]` at the rows' positions and returns what the new queries may see."""


AttentionFunction = Callable[[Tensor, Tensor, Tensor, LayerCache | None, AttentionSpec], Tensor]


def visible(k_new: Tensor, v_new: Tensor, layer_cache: LayerCache | None, spec: AttentionSpec) -> Visible:
    """Stores the new keys and values and returns all that may be seen; without a cache, the new ones alone."""
    if layer_cache is not None:
        return layer_cache.append(k_new, v_new, spec.pattern)
    K = k_new.size(2)
    if spec.pattern.is_dense or (spec.pattern.kept.window or 0) >= K:
        return Visible(k_new, v_new, None, is_causal=True)
    positions = torch.arange(K, device=k_new.device)[None]
    return Visible(k_new, v_new, spec.pattern.mask(positions, positions), is_causal=False)


def positions_of(seen: Visible, K: int) -> tuple[Tensor, Tensor]:
    """Positions of the K queries and of the keys, `[B or 1, K]` and `[B or 1, n]`."""
    n, device = seen.k.size(2), seen.k.device
    query, key = seen.query_positions, seen.key_positions
    if query is None:
        query = torch.arange(n - K, n, device=device)[None]
    if key is None:
        key = torch.arange(n, device=device)[None]
    return query, key


def alibi_bias(seen: Visible, K: int, slopes: tuple[float, ...]) -> Tensor:
    """What ALiBi adds to the scores, `-slope * distance`: fp32 `[B or 1, H, K, n]` (anything at hidden keys)."""
    query, key = positions_of(seen, K)
    distance = (query[:, :, None] - key[:, None, :]).float()  # (B, K, n)
    return -torch.tensor(slopes, device=distance.device)[:, None, None] * distance[:, None]
