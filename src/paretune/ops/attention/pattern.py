"""Which keys a query sees: sparse patterns as small objects, all causal.

Every pattern is written in one normal form: the query at position i sees the keys

    begin(i) .. i          its own neighbourhood, one unbroken run that ends at the query
    j with far(i, j)       keys before that run: a prefix, columns, random blocks

From it come the dense mask (for the reference), the block mask and the runs of keys (for kernels that skip), the keys
that decode has to keep (for the cache), and the share of the dense work that is left.

A pattern is also a text, for recipes, checkpoints and the command line: `causal`, `window:256`, `blocks:64`,
`strided:128`, `prefix:16`, `random:3x64@0` (3 blocks of 64 keys, seed 0), and unions of them with `+`. Positions are
absolute: strides and blocks count from the first token.

Sources: Child et al. 2019 (Sparse Transformer, arXiv:1904.10509), Beltagy et al. 2020 (Longformer, arXiv:2004.05150),
Zaheer et al. 2020 (BigBird, arXiv:2007.14062).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from paretune.errors import UsageError

QUERY_BLOCK = 64  # queries that kernels treat together: far keys are the same for all of them


class Kept(NamedTuple):
    """What decode has to keep of all that came before the next query: the first tokens and the last ones."""

    prefix: int
    window: int | None  # the last tokens, the query's own among them; None: everything


class Run(NamedTuple):
    """Keys `start` to `end` that a block of queries reads."""

    start: int
    end: int
    is_local: bool  # query i sees those from begin(i) on; else all of them (none later than itself, always)


@dataclass(frozen=True)
class Pattern:
    """Base of all forms. Positions are int64 tensors that broadcast; results broadcast likewise."""

    def begin(self, query: Tensor) -> Tensor:
        """The first key of the run that ends at the query; `query + 1` where there is no run."""
        return query + 1

    def far(self, query: Tensor, key: Tensor) -> Tensor:
        """Which keys are seen wherever they lie (later ones aside). Constant over each `QUERY_BLOCK` of queries."""
        return (key < 0) & (query < 0)  # nobody

    @property
    def kept(self) -> Kept:
        return Kept(0, None)

    @property
    def block(self) -> int | None:
        """What has to divide the context's length."""
        return None

    @property
    def largest_window(self) -> int:
        """The longest run, 0 where there is none; for the check against the context."""
        return 0

    @property
    def is_dense(self) -> bool:
        """Every query sees all keys before it, at any length."""
        return False

    # -- what follows from it

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """bool: who sees whom. A negative key position is an empty slot."""
        return (key <= query) & (key >= 0) & ((key >= self.begin(query)) | self.far(query, key))

    def mask(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """The dense mask: `[B, K]` and `[B or 1, n]` to bool `[B, 1, K, n]`, True where visible."""
        return self.visible(query_positions[:, :, None], key_positions[:, None, :])[:, None]

    def dense(self, n_tokens: int) -> Tensor:
        """bool `[n_tokens, n_tokens]`: a whole sequence."""
        at = torch.arange(n_tokens)
        return self.visible(at[:, None], at[None])

    def block_mask(self, n_tokens: int, block: int = QUERY_BLOCK) -> Tensor:
        """bool `[ceil(n / block), ceil(n / block)]`: where any query of a block sees any key of another."""
        n_blocks = -(-n_tokens // block)
        out = torch.zeros(n_blocks, n_blocks, dtype=torch.bool)
        keys = torch.arange(n_tokens)
        for i in range(n_blocks):
            queries = torch.arange(i * block, min((i + 1) * block, n_tokens))
            seen = self.visible(queries[:, None], keys[None]).any(0)
            out[i] = torch.nn.functional.pad(seen, (0, n_blocks * block - n_tokens)).view(n_blocks, block).any(1)
        return out

    def work_share(self, n_tokens: int) -> float:
        """Visible pairs of a query and a key over those of dense causal attention."""
        return sum(self.counts(n_tokens)) / (n_tokens * (n_tokens + 1) / 2)

    def counts(self, n_tokens: int) -> list[int]:
        """Keys that each query of a sequence sees."""
        out: list[int] = []
        keys = torch.arange(n_tokens)
        for start in range(0, n_tokens, QUERY_BLOCK):
            queries = torch.arange(start, min(start + QUERY_BLOCK, n_tokens))
            begins = self.begin(queries)
            far = torch.nn.functional.pad(self.far(queries[:1], keys).expand(n_tokens).cumsum(0), (1, 0))
            out += (queries - begins + 1 + far[begins]).tolist()
        return out

    def check(self, n_positions: int) -> None:
        """Refuses a pattern that makes no sense in a context of `n_positions`.

        Raises:
            UsageError: a window larger than the context, a block size that does not divide it, a query without keys.
        """
        for what, size in (("window", self.largest_window), ("prefix", self.kept.prefix)):
            if size > n_positions and size != self.block:
                raise UsageError(
                    f"pattern {self}: a {what} of {size} is larger than the context of {n_positions}",
                    f"Use {n_positions - 1} or less",
                )
        if self.block is not None and n_positions % self.block:
            raise UsageError(
                f"pattern {self}: blocks of {self.block} do not divide the context of {n_positions}",
                "Use a block size that divides it",
            )
        empty = next((i for i, n in enumerate(self.counts(n_positions)) if n == 0), None)
        if empty is not None:
            raise UsageError(f"pattern {self} leaves the query at position {empty} without keys", "Add a window to it")

    def __add__(self, other: Pattern) -> Pattern:
        parts = [p for x in (self, other) for p in (x.parts if isinstance(x, Union) else (x,))]
        return Union(tuple(parts))


@dataclass(frozen=True)
class Causal(Pattern):
    """Everything before the query."""

    def begin(self, query: Tensor) -> Tensor:
        return torch.zeros_like(query)

    @property
    def is_dense(self) -> bool:
        return True

    def __str__(self) -> str:
        return "causal"


@dataclass(frozen=True)
class Window(Pattern):
    """The last `size` keys, the query's own among them."""

    size: int

    def __post_init__(self) -> None:
        _at_least_one("window", self.size)

    def begin(self, query: Tensor) -> Tensor:
        return (query - self.size + 1).clamp(min=0)

    @property
    def kept(self) -> Kept:
        return Kept(0, self.size)

    @property
    def largest_window(self) -> int:
        return self.size

    def __str__(self) -> str:
        return f"window:{self.size}"


@dataclass(frozen=True)
class Blocks(Pattern):
    """The keys of the query's own block of `size` tokens (no block sees another: combine it)."""

    size: int

    def __post_init__(self) -> None:
        _at_least_one("block", self.size)

    def begin(self, query: Tensor) -> Tensor:
        return query // self.size * self.size

    @property
    def kept(self) -> Kept:
        return Kept(0, self.size)

    @property
    def block(self) -> int | None:
        return self.size

    @property
    def largest_window(self) -> int:
        return self.size

    def __str__(self) -> str:
        return f"blocks:{self.size}"


@dataclass(frozen=True)
class Strided(Pattern):
    """The keys at absolute positions 0, `stride`, 2 `stride`, ...: columns that every later query sees."""

    stride: int

    def __post_init__(self) -> None:
        _at_least_one("stride", self.stride)

    def far(self, query: Tensor, key: Tensor) -> Tensor:
        return (key % self.stride == 0) & (query >= 0)

    def __str__(self) -> str:
        return f"strided:{self.stride}"


@dataclass(frozen=True)
class Prefix(Pattern):
    """The first `size` keys: global tokens, which every later query sees."""

    size: int

    def __post_init__(self) -> None:
        _at_least_one("prefix", self.size)

    def far(self, query: Tensor, key: Tensor) -> Tensor:
        return (key < self.size) & (query >= 0)

    @property
    def kept(self) -> Kept:
        return Kept(self.size, 0)

    def __str__(self) -> str:
        return f"prefix:{self.size}"


@dataclass(frozen=True)
class Random(Pattern):
    """`n` blocks of `size` keys for each block of `size` queries, drawn from those before it, one from each n-th.

    The draw is arithmetic on the block's number and the seed: the same at every length, on every device.
    """

    n: int
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least_one("number of random blocks", self.n)
        _at_least_one("block", self.size)
        if self.size % QUERY_BLOCK:
            raise UsageError(f"random blocks have {self.size} keys", f"Use a multiple of {QUERY_BLOCK}")
        if not 0 <= self.seed < 2**20:
            raise UsageError(f"the seed of random blocks is {self.seed}, not below 2**20", "Use 0 to 1048575")

    def far(self, query: Tensor, key: Tensor) -> Tensor:
        of_query, of_key = query // self.size, key // self.size
        out = super().far(query, key)
        for t in range(self.n):
            low, high = of_query * t // self.n, of_query * (t + 1) // self.n
            drawn = low + _mixed(of_query, t, self.seed) % (high - low).clamp(min=1)
            out = out | ((of_key == drawn) & (high > low))
        return out

    @property
    def block(self) -> int | None:
        return self.size

    def __str__(self) -> str:
        return f"random:{self.n}x{self.size}@{self.seed}"


@dataclass(frozen=True)
class Union(Pattern):
    """What any of the parts sees."""

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        assert self.parts

    def begin(self, query: Tensor) -> Tensor:
        return functools.reduce(torch.minimum, [p.begin(query) for p in self.parts])

    def far(self, query: Tensor, key: Tensor) -> Tensor:
        return functools.reduce(torch.logical_or, [p.far(query, key) for p in self.parts])

    @property
    def kept(self) -> Kept:
        windows = [p.kept.window for p in self.parts]
        known = [w for w in windows if w is not None]
        return Kept(max(p.kept.prefix for p in self.parts), max(known) if len(known) == len(windows) else None)

    @property
    def block(self) -> int | None:
        blocks = [p.block for p in self.parts if p.block is not None]
        return math.lcm(*blocks) if blocks else None

    @property
    def largest_window(self) -> int:
        return max(p.largest_window for p in self.parts)

    @property
    def is_dense(self) -> bool:
        return any(p.is_dense for p in self.parts)

    def __str__(self) -> str:
        return "+".join(str(p) for p in self.parts)


CAUSAL = Causal()


_FORMS: dict[str, tuple[str, Callable[..., Pattern]]] = {
    "causal": (r"", lambda: CAUSAL),
    "window": (r":(\d+)", Window),
    "blocks": (r":(\d+)", Blocks),
    "strided": (r":(\d+)", Strided),
    "prefix": (r":(\d+)", Prefix),
    "random": (r":(\d+)x(\d+)(?:@(\d+))?", Random),
}


def parse(text: str) -> Pattern:
    """The pattern of a text such as `prefix:16+window:256`.

    Raises:
        UsageError: a part is not understood, or has an impossible number.
    """
    parts: list[Pattern] = []
    for word in text.split("+"):
        name = word.split(":")[0].strip()
        form = _FORMS.get(name)
        match = re.fullmatch(form[0], word.strip().removeprefix(name)) if form else None
        if form is None or match is None:
            raise UsageError(
                f"attention pattern {text!r}: {word.strip()!r} cannot be read",
                "Write causal, window:256, blocks:64, strided:128, prefix:16, random:3x64@0, or several with +",
            )
        parts.append(form[1](*(int(g) for g in match.groups() if g is not None)))
    return parts[0] if len(parts) == 1 else Union(tuple(parts))


def prefix_and_window(pattern: Pattern) -> tuple[int, int] | None:
    """The pattern as `(prefix, window)` if that is all it is, dense as (0, 0); None for the others."""
    if pattern.is_dense:
        return 0, 0
    parts = pattern.parts if isinstance(pattern, Union) else (pattern,)
    prefixes = [p.size for p in parts if isinstance(p, Prefix)]
    windows = [p.size for p in parts if isinstance(p, Window)]
    if not windows or len(prefixes) + len(windows) < len(parts):
        return None
    return max(prefixes, default=0), max(windows)


class Work(NamedTuple):
    """What a step has to do, in one head of one sequence."""

    n_keys: int  # positions of the cache that any of its queries sees
    n_pairs: int  # of a query and a key that it sees


@functools.lru_cache(maxsize=256)
def work(pattern: Pattern, start: int, n_tokens: int) -> Work:
    """Keys and pairs of the queries at positions `start` to `start + n_tokens`."""
    end = start + n_tokens
    if pattern.is_dense:
        return Work(end, n_tokens * start + n_tokens * (n_tokens + 1) // 2)
    keys, read, n_pairs, first = torch.arange(end), torch.zeros(end, dtype=torch.bool), 0, start
    while first < end:
        last = min(first // QUERY_BLOCK * QUERY_BLOCK + QUERY_BLOCK, end)  # far keys are the same within a block
        seen = pattern.visible(torch.arange(first, last)[:, None], keys[None])
        read |= seen.any(0)
        n_pairs += int(seen.sum())
        first = last
    return Work(int(read.sum()), n_pairs)


class QueryBlock(NamedTuple):
    """Queries `start` to `end` and the keys they read: in order, each once; what is not there is never touched."""

    start: int
    end: int
    runs: tuple[Run, ...]


@functools.lru_cache(maxsize=64)
def query_blocks(pattern: Pattern, start: int, n_tokens: int, block: int = QUERY_BLOCK) -> tuple[QueryBlock, ...]:
    """What the queries at positions `start` to `start + n_tokens` read, block by block.

    Args:
        block: queries a block; blocks begin at its multiples. With random blocks a divisor of `QUERY_BLOCK`.
    """
    out = []
    first = start
    while first < start + n_tokens:
        last = min(first // block * block + block, start + n_tokens)
        out.append(QueryBlock(first, last, _runs(pattern, torch.arange(first, last))))
        first = last
    return tuple(out)


def _runs(pattern: Pattern, queries: Tensor) -> tuple[Run, ...]:
    begins = pattern.begin(queries)
    low, sure, end = int(begins.min()), int(begins.max()), int(queries[-1]) + 1
    found: list[Run] = []
    if not _has_no_far(pattern):
        # Before the neighbourhood of any query, and among the keys that only some of them have in theirs.
        seen = pattern.far(queries[:1], torch.arange(sure)).expand(sure)
        found += [Run(a, b, False) for a, b in _stretches(seen[:low], 0)]
        if low < sure:
            cuts = [Run(a, b, False) for a, b in _stretches(seen[low:], low)]
            found += sorted(cuts + [Run(a, b, True) for a, b in _stretches(~seen[low:], low)])
    elif low < sure:
        found.append(Run(low, min(sure, end), True))
    if sure < end:
        found.append(Run(sure, end, False))
    return tuple(run for run in found if run.start < run.end)


def _has_no_far(pattern: Pattern) -> bool:
    parts = pattern.parts if isinstance(pattern, Union) else (pattern,)
    return all(isinstance(p, Causal | Window | Blocks) for p in parts)


def _stretches(flags: Tensor, offset: int) -> Sequence[tuple[int, int]]:
    """The runs of True in `flags[n]`, moved by `offset`."""
    edges = torch.diff(torch.nn.functional.pad(flags.to(torch.int8), (1, 1)))
    starts, ends = (edges == 1).nonzero().flatten() + offset, (edges == -1).nonzero().flatten() + offset
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _mixed(x: Tensor, t: int, seed: int) -> Tensor:
    """A number of 31 bits that looks random (the finaliser of MurmurHash, kept within int64)."""
    x = (x * 0x9E3779 + t * 0x85EBCA + seed * 0xC2B2AE + 0x27D4EB) & 0x7FFFFFFF
    for factor in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * factor) & 0x7FFFFFFF
    return x ^ (x >> 15)


def _at_least_one(what: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"an attention pattern with a {what} of {value}", "It has to be 1 or more")
