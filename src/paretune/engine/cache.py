"""The key/value cache: pre-allocated, per-row lengths, rollback, rows that come and go.

Per layer keys and values `[B, n_kv_head, n_slots, head_dim]`, int8 ones with a scale per head and position, 4-bit ones
(uint8) two numbers a byte with a scale and a minimum for each 32 of a head. Rows may have different lengths: what lies
beyond a row's length is garbage that no query sees (its position is later than the query's) and that the next token
overwrites. A row is admitted and evicted while others run; a step goes over the rows that have new tokens in it, so one
without any costs nothing.

Slot = absolute position, unless the model forgets (`Kept`): then the first `prefix` positions have slots of their own
and all later ones share a ring of the window and the largest step, `prefix + position % ring`: the memory is the same
however long the text is, and rolling a step back is exact.

Legend: B rows of the cache, A rows of this step, K its tokens, n visible slots, D head dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paretune.engine import cache_formats
from paretune.engine.cache_formats import INT4
from paretune.errors import UsageError
from paretune.ops.attention.pattern import Kept, Pattern
from paretune.ops.attention.spec import LayerCache, Visible

RING_STEP = 256  # tokens a step may have on a ring; longer ones go in pieces
RING_UNIT = 256  # rings are multiples of it: native code reads so many positions in one stretch


class LayerView(LayerCache):
    """One layer's keys and values, as its attention function sees them."""

    # Of an int8 cache fp32 [B, n_kv_head, n_slots]; of a 4-bit one fp16 [B, n_kv_head, n_slots, groups, 2], the minimum
    # beside the scale.
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def __init__(self, cache: KVCache, n_kv_head: int) -> None:
        self.cache = cache
        shape = (cache.batch_size, n_kv_head, cache.n_slots, cache.head_dim)
        kind: dict[str, Any] = {"dtype": torch.float32, "device": cache.device}
        scales: tuple[int, ...] = shape[:3]
        if cache.dtype == INT4:
            cache_formats.check_int4(cache.head_dim)
            kind["dtype"], scales = torch.float16, (*scales, cache_formats.groups_of(cache.head_dim), 2)
            shape = (*shape[:3], cache.head_dim // 2)
        self.k = torch.zeros(shape, dtype=cache.dtype, device=cache.device)
        self.v = torch.zeros(shape, dtype=cache.dtype, device=cache.device)
        if cache.dtype in (torch.int8, INT4):
            self.k_scale, self.v_scale = torch.zeros(scales, **kind), torch.zeros(scales, **kind)

    @property
    def in_order_from(self) -> int | None:
        return None if self.cache.ring else self.common_start

    @property
    def common_start(self) -> int | None:
        return None if self.cache.static else self.cache.start

    @property
    def prefix_and_ring(self) -> tuple[int, int]:
        return self.cache.prefix, self.cache.ring

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.k, self.v, self.k_scale, self.v_scale) if t is not None)

    def append(self, k_new: Tensor, v_new: Tensor, pattern: Pattern) -> Visible:
        cache, dtype = self.cache, k_new.dtype
        self._store(k_new, self.k, self.k_scale)
        self._store(v_new, self.v, self.v_scale)
        n = cache.n_slots if cache.static or cache.ring else cache.extent
        k, v = self._load(n, dtype)
        query, key = cache.positions, cache.key_positions[:, :n]
        start, K = cache.start, k_new.size(2)
        window = n if pattern.is_dense else pattern.kept.window or 0
        # Rows of one length that see all there is: no mask, except among the new tokens themselves.
        if not (cache.static or cache.ring) and start is not None and n <= window and (start == 0 or K == 1):
            return Visible(k, v, None, K > 1, query, key)
        return Visible(k, v, cache.mask(n, pattern), False, query, key)

    def _store(self, new: Tensor, values: Tensor, scales: Tensor | None) -> None:
        cache = self.cache
        scale = None
        if scales is not None:
            encode = cache_formats.quantize_groups if cache.dtype == INT4 else cache_formats.quantize_heads
            new, scale = encode(new)
        if cache.static or cache.ring or cache.start is None:
            slots = cache.slot_index
            values[cache.row_index, :, slots] = new.transpose(1, 2)
            if scales is not None and scale is not None:
                scales[cache.row_index, :, slots] = scale.transpose(1, 2)
            return
        end = cache.start + new.size(2)
        values[cache.rows, :, cache.start : end] = new
        if scales is not None and scale is not None:
            scales[cache.rows, :, cache.start : end] = scale

    def _load(self, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = self.cache.rows
        k, v = self.k[rows, :, :n], self.v[rows, :, :n]
        if self.k_scale is None or self.v_scale is None:
            # A cache in fewer bits than the model computes in.
            return (k, v) if k.dtype == dtype else (k.to(dtype), v.to(dtype))
        k_scale, v_scale = self.k_scale[rows, :, :n], self.v_scale[rows, :, :n]
        if self.cache.dtype == INT4:
            decode = cache_formats.dequantize_groups
            return decode(k, k_scale).to(dtype), decode(v, v_scale).to(dtype)
        return (k.float() * k_scale[..., None]).to(dtype), (v.float() * v_scale[..., None]).to(dtype)


class KVCache:
    """The cache of one batch.

    A step is `begin_(K)`, the model's forward on the tokens of `rows`, `commit_()`; the runner calls them. The host
    keeps a mirror of the lengths, so that no step reads the device back. In a new cache all rows are taken, as a batch
    that begins and ends together wants it.

    Args:
        n_kv_head: of every layer, or of each.
        capacity: tokens each row can hold.
        dtype: of what is stored; PyTorch code gets it back in the dtype of the new keys.
        static: always show all slots of all rows under a mask, so that shapes never change (compiled decode).
        kept: what decode has to keep; a window that is short for the capacity makes a ring.
    """

    def __init__(
        self,
        *,
        n_layer: int,
        batch_size: int,
        n_kv_head: int | Sequence[int],
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        static: bool = False,
        kept: Kept | None = None,
    ) -> None:
        assert batch_size >= 1 and capacity >= 1
        self.batch_size, self.capacity, self.head_dim = batch_size, capacity, head_dim
        heads = [n_kv_head] * n_layer if isinstance(n_kv_head, int) else list(n_kv_head)
        self.n_kv_head = max(heads, default=0)  # of the widest layer
        self.dtype, self.device, self.static = dtype, torch.device(device), static
        self.ring = self.prefix = 0
        self.window = 0 if kept is None or kept.window is None else kept.window
        if kept is not None and kept.window is not None:
            ring = -(-(kept.window + RING_STEP) // RING_UNIT) * RING_UNIT
            if kept.prefix + ring < capacity:
                self.ring, self.prefix = ring, kept.prefix
        self.n_slots = self.prefix + self.ring or capacity
        self.layers = [LayerView(self, n) for n in heads]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)  # tokens held by each row
        self._every_row = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self.row_index = self._every_row  # (A, 1)
        self.rows: slice | Tensor = slice(None)  # `row_index`, as what takes these rows of a tensor
        self.n_rows = batch_size  # A
        self.slots = torch.arange(self.n_slots, device=device)[None]  # (1, n_slots)
        self.key_positions = self.slots  # (A or 1, n_slots): the position in each slot, negative where there is none
        self.positions = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)  # (A, K) of this step
        self.slot_index = self.positions  # (A, K) where they are stored
        self.last = torch.zeros(
            batch_size, dtype=torch.int64, device=device
        )  # (A,) index of each row's last valid token
        self.start: int | None = 0  # common length of the step's rows before it; None: they differ
        self.extent = 0  # slots that hold anything after this step
        self._host_lengths = [0] * batch_size
        self._is_free = [False] * batch_size
        self._written = [-1] * batch_size  # the last position that was ever stored, padding included
        self._staged: list[int] | None = None
        self._n_new: list[int] = [0] * batch_size
        self._masks: dict[tuple[int, Pattern], Tensor] = {}

    @property
    def host_lengths(self) -> tuple[int, ...]:
        """`lengths` without reading the device."""
        return tuple(self._host_lengths)

    @property
    def max_step(self) -> int:
        """Tokens that a step may have."""
        return RING_STEP if self.ring else self.capacity

    @property
    def nbytes(self) -> int:
        return sum(view.nbytes for view in self.layers)

    @property
    def free_rows(self) -> list[int]:
        """Rows that nobody holds: they take no part in steps."""
        return [row for row, is_free in enumerate(self._is_free) if is_free]

    def admit_(self, row: int) -> None:
        """Takes a free row for a new sequence, which begins at position 0."""
        assert self._is_free[row], f"row {row} is taken"
        self._is_free[row] = False

    def evict_(self, row: int) -> None:
        """Forgets a row and frees it. What is admitted next overwrites its slots and sees nothing of them."""
        assert not self._is_free[row], f"row {row} is free"
        self._is_free[row], self._host_lengths[row], self._written[row] = True, 0, -1
        self.lengths[row] = 0

    def clear_(self) -> None:
        """Forgets and frees all rows."""
        self._is_free, self._host_lengths = [True] * self.batch_size, [0] * self.batch_size
        self._written = [-1] * self.batch_size
        self.lengths.zero_()

    def first_layers(self, n_layer: int) -> KVCache:
        """A cache of the first layers alone: what is stored is shared, lengths are its own. A step on it is forgotten
        by `follow_`, for the next step of the whole cache overwrites it."""
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers[:n_layer]]
        for layer in other.layers:
            layer.cache = other
        other.lengths = self.lengths.clone()
        other.follow_(self)
        return other

    def follow_(self, other: KVCache) -> None:
        """Takes the lengths, and which rows are free, from the cache whose first layers it has."""
        assert self.layers[0].k is other.layers[0].k, "these caches share nothing"
        self.lengths.copy_(other.lengths)
        self._host_lengths, self._is_free = list(other._host_lengths), list(other._is_free)
        self._written, self._staged = list(other._written), None

    def stage_(self, n_new: Sequence[int]) -> None:
        """How many of the next step's K tokens are real in each row; the others are padding on the right. A row with
        none has no part in the step: its logits are zeros."""
        assert len(n_new) == self.batch_size
        assert not any(n and is_free for n, is_free in zip(n_new, self._is_free, strict=True)), (
            "a free row has no tokens"
        )
        self._staged = list(n_new)

    def count_rows(self) -> int:
        """Rows that the next step goes over."""
        if self.static or (self._staged is None and not any(self._is_free)):
            return self.batch_size
        return sum(n > 0 for n in self._new_tokens(1)) or self.batch_size

    def _new_tokens(self, K: int) -> list[int]:
        """Real tokens of each row in the next step."""
        return self._staged or [0 if is_free else K for is_free in self._is_free]

    def take_staged_(self, K: int) -> list[int]:
        """What `stage_` left for a step of K tokens, taken away; K a row where it left nothing.

        Raises:
            UsageError: the cache is too short for the whole step (before any part of it runs).
        """
        n_new = self._new_tokens(K)
        self._check_room(K, self._lengths_of(self._rows_of(n_new)))
        self._staged = None
        return n_new

    def _rows_of(self, n_new: Sequence[int]) -> list[int] | None:
        """Rows that a step goes over; None: all of them (also where none has a token: then nothing is kept)."""
        if self.static or all(n_new):
            return None
        return [row for row, n in enumerate(n_new) if n] or None

    def _lengths_of(self, rows: Sequence[int] | None) -> list[int]:
        return self._host_lengths if rows is None else [self._host_lengths[row] for row in rows]

    def _check_room(self, K: int, lengths: Sequence[int]) -> None:
        longest = max(lengths)
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
        n_new = self._new_tokens(K)
        rows = self._rows_of(n_new)
        held = self._lengths_of(rows)
        self._check_room(K, held)
        assert self.max_step >= K, f"a step of {K} tokens on a ring for {self.max_step}: send it in pieces"
        assert all(0 <= n <= K for n in n_new)
        self._n_new, self._staged = n_new, None
        self._choose_rows(rows)
        longest = max(held)
        uniform = all(length == longest for length in held)
        self.start = longest if uniform else None
        self.extent = longest + K
        self._masks = {}
        lengths = self.step_lengths
        self.positions = lengths[:, None].clone() if K == 1 else lengths[:, None] + torch.arange(K, device=self.device)
        self.slot_index = self.positions
        if self.ring:
            at = self.positions
            self.slot_index = torch.where(at < self.prefix, at, self.prefix + at % self.ring)
            # The latest position that shares the slot; those of the prefix are not in the ring.
            last = at[:, -1:]
            key = last - (last - (self.slots - self.prefix)) % self.ring
            key = torch.where(key < self.prefix, torch.full_like(key, -1), key)
            self.key_positions = torch.where(self.slots < self.prefix, self.slots, key)
            for row, n in zip(range(self.batch_size) if rows is None else rows, held, strict=True):
                self._written[row] = max(self._written[row], n + K - 1)
        of_step = n_new if rows is None else [n_new[row] for row in rows]
        if all(n == K for n in of_step):
            self.last = torch.full_like(lengths, K - 1)
        else:
            self.last = torch.tensor([max(n, 1) - 1 for n in of_step], device=self.device)

    def _choose_rows(self, rows: list[int] | None) -> None:
        if rows is None:
            self.rows, self.row_index, self.n_rows = slice(None), self._every_row, self.batch_size
        elif rows[-1] - rows[0] + 1 == len(rows):  # neighbours are a view, nothing is copied
            self.rows = slice(rows[0], rows[-1] + 1)
            self.row_index, self.n_rows = self._every_row[self.rows], len(rows)
        else:
            self.rows = torch.tensor(rows, device=self.device)
            self.row_index, self.n_rows = self.rows[:, None], len(rows)

    @property
    def step_lengths(self) -> Tensor:
        """`lengths` of the step's rows, `[A]`."""
        return self.lengths if self.n_rows == self.batch_size else self.lengths[self.rows]

    def of_step(self, x: Tensor) -> Tensor:
        """The step's rows of `x`, `[B, ..] -> [A, ..]`."""
        return x if self.n_rows == self.batch_size else x[self.rows]

    def of_cache(self, x: Tensor) -> Tensor:
        """The opposite of `of_step`; what is of no row of the step is zero."""
        if self.n_rows == self.batch_size:
            return x
        out = x.new_zeros(self.batch_size, *x.shape[1:])
        out[self.rows] = x
        return out

    def commit_(self) -> None:
        """Counts the step's real tokens as held."""
        if all(n == self._n_new[0] for n in self._n_new):
            self.lengths += self._n_new[0]
        else:
            self.lengths += torch.tensor(self._n_new, device=self.device)
        self._host_lengths = [a + b for a, b in zip(self._host_lengths, self._n_new, strict=True)]

    def truncate_(self, lengths: Sequence[int] | int) -> None:
        """Forgets everything from position `lengths` on (rollback); the slots are overwritten later.

        Raises:
            UsageError: a ring no longer holds what came before (it does for the last step, and for a start again).
        """
        if isinstance(lengths, int):
            wanted = [0 if is_free else lengths for is_free in self._is_free]
        else:
            wanted = list(lengths)
        assert all(0 <= w <= held for w, held in zip(wanted, self._host_lengths, strict=True))
        for row, n in enumerate(wanted if self.ring else ()):
            if n <= self.prefix:
                self._written[row] = -1
            elif max(self.prefix, n - self.window + 1) <= self._written[row] - self.ring:
                raise UsageError(
                    f"a ring of {self.ring} tokens cannot go back from {self._written[row] + 1} to {n}",
                    "Start the sequence again",
                )
        self._host_lengths = wanted
        self.lengths.copy_(torch.tensor(wanted))

    def take_last(self, x: Tensor) -> Tensor:
        """Each row's last valid position, `[A, K, C] -> [A, 1, C]`."""
        if x.size(1) == 1:
            return x
        return x[self._every_row[: self.n_rows], self.last[:, None]]

    def mask(self, n: int, pattern: Pattern) -> Tensor:
        """bool `[A, 1, K, n]`, made once a step and shared by the layers."""
        if self.static:  # inside a compiled graph: no state may be kept between calls
            return pattern.mask(self.positions, self.key_positions)
        key = (n, pattern)
        if key not in self._masks:
            self._masks[key] = pattern.mask(self.positions, self.key_positions[:, :n])
        return self._masks[key]
