"""The key/value cache: pre-allocated, per-row lengths, rollback.

Per layer keys and values `[B, n_kv_head, capacity, head_dim]`; slot = absolute position. Rows may have different
lengths: what lies beyond a row's length is garbage that no query sees (its position is later than the query's) and that
the next token overwrites.

Legend: B batch, K tokens of this step, n visible slots, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paretune.errors import UsageError
from paretune.ops.attention.spec import Visible, window_mask


class LayerView:
    """One layer's keys and values, as its attention function sees them."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        shape = (cache.batch_size, cache.n_kv_head, cache.capacity, cache.head_dim)
        self.k = torch.zeros(shape, dtype=cache.dtype, device=cache.device)
        self.v = torch.zeros(shape, dtype=cache.dtype, device=cache.device)

    def append(self, k_new: Tensor, v_new: Tensor, window: int | None) -> Visible:
        """Stores `[B, Hkv, K, D]` at the rows' positions and returns what the new queries may see."""
        cache = self.cache
        if cache.static:
            slots = cache.positions
            self.k[cache.row_index, :, slots] = k_new.transpose(1, 2)
            self.v[cache.row_index, :, slots] = v_new.transpose(1, 2)
            return Visible(self.k, self.v, cache.mask(cache.capacity, window), is_causal=False)
        start, K = cache.start, k_new.size(2)
        if start is None:  # rows of different lengths
            self.k[cache.row_index, :, cache.positions] = k_new.transpose(1, 2)
            self.v[cache.row_index, :, cache.positions] = v_new.transpose(1, 2)
            n = cache.extent
            return Visible(self.k[:, :, :n], self.v[:, :, :n], cache.mask(n, window), is_causal=False)
        end = start + K
        self.k[:, :, start:end] = k_new
        self.v[:, :, start:end] = v_new
        k, v = self.k[:, :, :end], self.v[:, :, :end]
        if window is not None and end > window:
            return Visible(k, v, cache.mask(end, window), is_causal=False)
        if start == 0 or K == 1:
            return Visible(k, v, None, is_causal=K > 1)
        return Visible(k, v, cache.mask(end, window), is_causal=False)


class KVCache:
    """The cache of one batch.

    A step is `begin_(K)`, the model's forward, `commit_()`; the runner calls them. The host keeps a mirror of the
    lengths, so that no step reads the device back.

    Args:
        capacity: tokens each row can hold.
        static: always show all slots under a mask, so that shapes never change (compiled decode).
    """

    def __init__(
        self,
        *,
        n_layer: int,
        batch_size: int,
        n_kv_head: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        static: bool = False,
    ) -> None:
        assert batch_size >= 1 and capacity >= 1
        self.batch_size, self.n_kv_head, self.capacity, self.head_dim = batch_size, n_kv_head, capacity, head_dim
        self.dtype, self.device, self.static = dtype, torch.device(device), static
        self.layers = [LayerView(self) for _ in range(n_layer)]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)  # tokens held by each row
        self.row_index = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self.slots = torch.arange(capacity, device=device)[None]  # (1, capacity), the position stored in each slot
        self.positions = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)  # (B, K) of this step
        self.last = torch.zeros(batch_size, dtype=torch.int64, device=device)  # index of each row's last valid token
        self.start: int | None = 0  # common length of all rows before this step; None: they differ
        self.extent = 0  # slots that hold anything after this step
        self._host_lengths = [0] * batch_size
        self._staged: list[int] | None = None
        self._n_new: list[int] = [0] * batch_size
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    @property
    def host_lengths(self) -> tuple[int, ...]:
        """`lengths` without reading the device."""
        return tuple(self._host_lengths)

    @property
    def nbytes(self) -> int:
        return sum(view.k.nbytes + view.v.nbytes for view in self.layers)

    def stage_(self, n_new: Sequence[int]) -> None:
        """How many of the next step's K tokens are real in each row; the others are padding on the right."""
        assert len(n_new) == self.batch_size
        self._staged = list(n_new)

    def take_staged_(self, K: int) -> list[int]:
        """What `stage_` left for a step of K tokens, taken away; K a row where it left nothing.

        Raises:
            UsageError: the cache is too short for the whole step (before any part of it runs).
        """
        staged, self._staged = self._staged, None
        self._check_room(K)
        return staged or [K] * self.batch_size

    def _check_room(self, K: int) -> None:
        longest = max(self._host_lengths)
        if longest + K > self.capacity:
            raise UsageError(
                f"{longest} + {K} tokens do not fit into a cache of {self.capacity}",
                "Ask for fewer new tokens or a shorter prompt",
            )

    def begin_(self, K: int) -> None:
        """Fixes positions and visible extent of a step of K tokens.

        Raises:
            UsageError: the cache is too short.
        """
        self._check_room(K)
        longest = max(self._host_lengths)
        self._n_new = self._staged or [K] * self.batch_size
        self._staged = None
        assert all(0 <= n <= K for n in self._n_new)
        uniform = all(length == longest for length in self._host_lengths)
        self.start = longest if uniform else None
        self.extent = longest + K
        self._masks = {}
        steps = torch.arange(K, device=self.device)[None]
        self.positions = self.lengths[:, None] + steps  # (B, K)
        if all(n == K for n in self._n_new):
            self.last = torch.full_like(self.lengths, K - 1)
        else:
            self.last = torch.tensor([max(n, 1) - 1 for n in self._n_new], device=self.device)

    def commit_(self) -> None:
        """Counts the step's real tokens as held."""
        if all(n == self._n_new[0] for n in self._n_new):
            self.lengths += self._n_new[0]
        else:
            self.lengths += torch.tensor(self._n_new, device=self.device)
        self._host_lengths = [a + b for a, b in zip(self._host_lengths, self._n_new, strict=True)]

    def truncate_(self, lengths: Sequence[int] | int) -> None:
        """Forgets everything from position `lengths` on (rollback); the slots are overwritten later."""
        wanted = [lengths] * self.batch_size if isinstance(lengths, int) else list(lengths)
        assert all(0 <= w <= held for w, held in zip(wanted, self._host_lengths, strict=True))
        self._host_lengths = wanted
        self.lengths.copy_(torch.tensor(wanted))

    def take_last(self, x: Tensor) -> Tensor:
        """Each row's last valid position, `[B, K, C] -> [B, 1, C]`."""
        if x.size(1) == 1:
            return x
        return x[self.row_index, self.last[:, None]]

    def mask(self, n: int, window: int | None) -> Tensor:
        """bool `[B, 1, K, n]`, made once a step and shared by the layers."""
        if self.static:  # inside a compiled graph: no state may be kept between calls
            return window_mask(self.positions, self.slots, window)
        key = (n, window)
        if key not in self._masks:
            self._masks[key] = window_mask(self.positions, self.slots[:, :n], window)
        return self._masks[key]
