"""Beyond the trained length: negative log-likelihood by position, up to several times the context.

Learned positions end where their table ends and refuse; ALiBi and windows go on (Press et al. 2022, arXiv:2108.12409).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from paretune import stats
from paretune.engine.runners.base import Runner
from paretune.evaluate.perplexity import block_means

STEP_TOKENS = 512  # tokens in one forward step: bounds the scores that a masked form holds


@dataclass(frozen=True)
class Stretch:
    """The tokens at positions `begin` to `end` of all windows.

    Attributes:
        perplexity: None where the model refuses these positions; `cause` says why.
        low, high: 95 %, over windows; None with fewer than two.
    """

    begin: int
    end: int
    perplexity: float | None
    low: float | None
    high: float | None
    n_tokens: int
    cause: str = ""

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def by_position(
    runner: Runner,
    tokens: Sequence[int],
    trained_len: int,
    *,
    factor: int = 4,
    per_context: int = 2,
    max_windows: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[Stretch]:
    """Perplexity of each stretch of `trained_len / per_context` positions, over windows of `factor * trained_len`.

    A token at position p has seen the p tokens before it in its window. A model that has no such positions is scored on
    those that it has, in windows of the same beginnings; the others say that it refuses.
    """
    length = factor * trained_len
    longest = min(_longest(runner), length)
    n_windows = min(max_windows, len(tokens) // length)
    edges = [i * trained_len // per_context for i in range(factor * per_context + 1)]
    losses = np.full((n_windows, length - 1), np.nan)
    for w in range(n_windows):
        begin = w * length
        window = torch.tensor(tokens[begin : begin + longest])
        losses[w, : longest - 1] = losses_of(runner, window)
        if progress:
            progress(w + 1, n_windows)
    out = []
    for begin, end in pairwise(edges):
        part = losses[:, max(0, begin - 1) : end - 1]  # the loss of the token at position p stands at p - 1
        cause = "" if end <= longest else f"refused: positions end at {longest}"
        if cause or not n_windows:
            out.append(Stretch(begin, end, None, None, None, 0, cause or "too little text"))
            continue
        means = part.mean(axis=1)
        interval = stats.bootstrap(means, np.mean) if n_windows > 1 else None
        low, high = (math.exp(interval.low), math.exp(interval.high)) if interval else (None, None)
        out.append(Stretch(begin, end, math.exp(float(means.mean())), low, high, part.size))
    return out


def beyond(
    runner: Runner, tokens: Sequence[int], trained_len: int, *, factor: int = 4, max_windows: int = 8
) -> dict[str, float | None] | None:
    """What the far positions cost: perplexity of the last `trained_len` tokens of windows of `factor * trained_len`.

    Held against the very same tokens in windows of `trained_len` of their own, which have less before them: stretches
    of one window hold different texts, so they do not compare. The first token of such a window has no loss. At most
    `max_windows * (factor + 1) * trained_len` tokens are computed.

    Returns:
        `change`: relative change of perplexity, far over near (above 0: worse far out); `low`, `high`: 95 %, bootstrap
        over blocks of about 128 tokens, paired, None with a single block; `n_tokens` compared. None where the model
        refuses such positions or the text is shorter than one window.
    """
    assert factor >= 2 and trained_len >= 2
    length = factor * trained_len
    n_windows = min(max_windows, len(tokens) // length)
    if _longest(runner) < length or n_windows < 1:
        return None
    rows = []
    for w in range(n_windows):
        window = torch.tensor(tokens[w * length : (w + 1) * length])
        far = losses_of(runner, window)[1 - trained_len :]
        rows.append(far - losses_of(runner, window[-trained_len:]))
    blocks = block_means(np.stack(rows))
    interval = stats.bootstrap(blocks, np.mean)
    low, high = (math.expm1(x) if len(blocks) > 1 else None for x in (interval.low, interval.high))
    change = math.expm1(float(np.mean(rows, dtype=np.float64)))
    return {"change": change, "low": low, "high": high, "n_tokens": n_windows * (trained_len - 1)}


def _longest(runner: Runner) -> int:
    """Positions that the model has."""
    return int(getattr(runner.config, "longest", runner.config.n_positions))


def losses_of(runner: Runner, window: torch.Tensor) -> np.ndarray:
    """Nats of tokens 1 .. n-1 of one window, fed in steps through the runner's own cache."""
    n = len(window) - 1
    cache = runner.new_cache(1, n)
    found = []
    for start in range(0, n, STEP_TOKENS):
        step = window[start : min(start + STEP_TOKENS, n)]
        logits = runner.forward(step[None].to(runner.device), cache, "all")[0].float()
        targets = window[start + 1 : start + 1 + len(step)].to(runner.device)
        found.append(F.cross_entropy(logits, targets, reduction="none").cpu().numpy())
    return np.concatenate(found)
