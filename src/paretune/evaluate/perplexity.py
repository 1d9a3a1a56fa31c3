"""Rolling-window perplexity through a runner, with its protocol as an id, bits per byte and an interval.

The protocol is the one that Hugging Face documents for fixed-length models
(https://huggingface.co/docs/transformers/perplexity): windows of `context` tokens advance by `stride`, and a
token is scored in the first window that reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch

from paretune import stats
from paretune.errors import ParetuneError, UsageError

BLOCK_TOKENS = 128  # one resampling unit: neighbouring tokens are far from independent
_JOINED_TOKENS = 120  # so that 4 windows of 31 or 2 of 63 tokens are a block, as 4 of 32 are
MIN_BLOCKS = 40  # fewer: "too little text"
TOO_LITTLE_TEXT = "too little text"
PIECE_ROWS = 256  # tokens whose logits are there at once, where the runner's numbers allow: 50 MB of 49,152 each
_SLICE_ELEMENTS = 2**22  # logits widened to fp32 at a time: 16 MiB, and two such temporaries

Progress = Callable[[int, int], None]
"""Called as progress(windows done, windows in all)."""


class Runner(Protocol):
    """The part of the runner protocol (docs/architecture.md) that quality needs.

    `same_bits_at_any_width`: a token's logits depend on neither the batch nor the width of its step.
    """

    same_bits_at_any_width: ClassVar[bool]

    def new_cache(self, batch_size: int, capacity: int, /) -> Any: ...

    def forward(self, tokens: torch.Tensor, cache: Any, /, logits: Literal["last", "all"] = ...) -> torch.Tensor: ...


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) are shown; tokens [first_scored, end) are scored."""

    begin: int
    end: int
    first_scored: int


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one text under one protocol.

    Attributes:
        protocol: `<text>/ctx<context>/stride<stride>/token`.
        nll_per_token: mean negative log-likelihood of the scored tokens, nats.
        bits_per_byte: nats of all scored tokens / ln 2 / bytes of the whole text; compares across tokenizers.
        n_tokens_unscored: tokens of the text that no window scores (they have no context); their bytes count.
        n_blocks: blocks of 128 scored tokens (a remainder is spread over them) behind the interval.
        low, high: 95 % block-bootstrap interval of the perplexity; None under 40 blocks.
        note: what keeps a number from being there, or "".
    """

    protocol: str
    perplexity: float
    nll_per_token: float
    bits_per_byte: float
    n_tokens_scored: int
    n_tokens_unscored: int
    n_windows: int
    n_blocks: int
    low: float | None
    high: float | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data; a number that is not finite is None (strict JSON has no NaN) and `note` says so."""
        return {
            "protocol": self.protocol,
            "perplexity": finite_or_none(self.perplexity),
            "nll_per_token": finite_or_none(self.nll_per_token),
            "bits_per_byte": finite_or_none(self.bits_per_byte),
            "n_tokens_scored": self.n_tokens_scored,
            "n_tokens_unscored": self.n_tokens_unscored,
            "n_windows": self.n_windows,
            "n_blocks": self.n_blocks,
            "interval": None if self.low is None else [finite_or_none(self.low), finite_or_none(self.high)],
            "note": self.note,
        }


def rolling_windows(n_tokens: int, context: int, stride: int) -> list[Window]:
    """The windows that score a text, in text order; each token is scored at most once.

    The first window scores all its tokens but the first. A later one scores the tokens that no earlier one
    showed (`stride` of them, fewer at the end), with the `context - stride` before them as context. With
    stride == context there is no such context, so the first token of every window stays unscored, as in the
    Hugging Face loop. A window that would score nothing (a single left-over token) is left out.
    """
    windows = []
    shown = 0
    for begin in range(0, n_tokens, stride):
        end = min(begin + context, n_tokens)
        first_scored = max(shown, begin + 1)
        if first_scored < end:
            windows.append(Window(begin, end, first_scored))
        shown = end
    return windows


def perplexity(
    runner: Runner,
    token_ids: torch.Tensor | Sequence[int],
    *,
    context: int,
    stride: int,
    n_bytes: int,
    text_name: str = "text",
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Perplexity:
    """Scores `token_ids` in rolling windows, each one prefill of the runner, in pieces where that changes no bit.

    Differs from the Hugging Face loop in one thing: that loop weights a window's mean loss by one token too
    few where the window has context; here each scored token weighs the same.

    Memory: logits [batch_size, context, V] in the runner's dtype (of `PIECE_ROWS` tokens where it goes in pieces), plus
    about 50 MiB.

    Args:
        token_ids: the whole text, [n_tokens].
        context: tokens a window shows; at most what the model's positions allow.
        stride: tokens a window advances; stride == context is the non-overlapping protocol.
        n_bytes: length of the same text in UTF-8, for bits per byte.
        text_name: what the text is, for the protocol id, e.g. `wikitext2-raw/test`.

    Raises:
        UsageError: a context, stride or batch size that makes no sense.
        ParetuneError: the text has fewer than `context` tokens.
    """
    if context < 2:
        raise UsageError(f"--context {context} leaves no token to score", "Use 2 or more")
    if not 1 <= stride <= context:
        raise UsageError(f"--stride {stride} is not in 1..{context}", "A stride above --context skips tokens")
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is not positive", "Use 1 or more")
    if n_bytes < 1:
        raise UsageError(f"a text of {n_bytes} bytes has no bits per byte", "Give the length of the text in bytes")
    tokens = torch.as_tensor(token_ids, dtype=torch.int64).reshape(-1).cpu()
    n_tokens = tokens.numel()
    if n_tokens < context:
        raise ParetuneError(
            f"the text {text_name} has {n_tokens} tokens, fewer than one window of {context}",
            f"Use a longer text, or --context {n_tokens} or smaller" if n_tokens >= 2 else "Use a longer text",
        )

    windows = rolling_windows(n_tokens, context, stride)
    nll = np.concatenate(_score_windows(runner, tokens, windows, batch_size, progress))
    mean = float(nll.mean())
    low, high, n_blocks, note = _interval(nll)
    return Perplexity(
        protocol=f"{text_name}/ctx{context}/stride{stride}/token",
        perplexity=safe_exp(mean),
        nll_per_token=mean,
        bits_per_byte=float(nll.sum()) / math.log(2) / n_bytes,
        n_tokens_scored=nll.size,
        n_tokens_unscored=n_tokens - nll.size,
        n_windows=len(windows),
        n_blocks=n_blocks,
        low=low,
        high=high,
        note=note,
    )


@torch.no_grad()
def _score_windows(
    runner: Runner, tokens: torch.Tensor, windows: list[Window], batch_size: int, progress: Progress | None
) -> list[np.ndarray]:
    """Negative log-likelihoods (float64) of each window's scored tokens, in text order."""
    out: list[np.ndarray] = []
    cache: Any = None
    cache_rows = 0
    for batch in _batches(windows, batch_size):
        shown = torch.stack([tokens[w.begin : w.end] for w in batch])  # [B, K]
        if cache_rows != len(batch):
            cache, cache_rows = runner.new_cache(len(batch), shown.shape[1]), len(batch)
        else:  # one cache for all: a runner with static shapes or graphs stays with its buffers
            empty_cache(cache)
        shown = shown.to(cache.lengths.device)
        first = min(w.first_scored - 1 - w.begin for w in batch)  # position whose logits score the first token
        losses = torch.empty(len(batch), shown.shape[1] - 1, device=shown.device)  # of the token after each position
        for start, logits in _logits(runner, shown, cache, first):
            end = start + logits.shape[1]
            for row, rows in enumerate(logits):
                losses[row, start:end] = token_nll(rows, shown[row, start + 1 : end + 1])
        for row, w in enumerate(batch):
            out.append(losses[row, w.first_scored - 1 - w.begin : w.end - 1 - w.begin].double().cpu().numpy())
        if progress is not None:
            progress(len(out), len(windows))
    return out


def _logits(runner: Runner, shown: torch.Tensor, cache: Any, first: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(position, logits [B, k, V] from it on) of all positions but those before `first` and the last one."""
    n_rows, last = shown.shape[0], shown.shape[1] - 1
    if not runner.same_bits_at_any_width:
        yield first, runner.forward(shown, cache, logits="all")[:, first:last]
        return
    if first:  # of the context the head is not asked
        runner.forward(shown[:, :first], cache, logits="last")
    step = max(1, PIECE_ROWS // n_rows)
    for start in range(first, last, step):
        yield start, runner.forward(shown[:, start : min(start + step, last)], cache, logits="all")


def _batches(windows: list[Window], batch_size: int) -> list[list[Window]]:
    """Groups of up to `batch_size` windows of one length (only the last window can be shorter)."""
    full = windows[0].end - windows[0].begin
    ragged = windows[-1:] if windows[-1].end - windows[-1].begin < full else []
    whole = windows[: len(windows) - len(ragged)]
    batches = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
    return batches + ([ragged] if ragged else [])


def _interval(nll: np.ndarray) -> tuple[float | None, float | None, int, str]:
    """(low, high, n_blocks, note) of the perplexity from token losses in text order."""
    n_blocks = count_blocks(1, nll.size)
    if not np.isfinite(nll).all():
        return None, None, n_blocks, f"the model gives NaN or infinity at {(~np.isfinite(nll)).sum()} tokens"
    if n_blocks < MIN_BLOCKS:
        return None, None, n_blocks, TOO_LITTLE_TEXT
    interval = stats.bootstrap(block_means(nll[None]), np.mean)
    return safe_exp(interval.low), safe_exp(interval.high), n_blocks, ""


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target) in nats, float32 [R], of logits [R, V] and targets [R].

    Rows are widened to fp32 a slice at a time: a second copy of all logits would be the peak of the run.
    """
    n_rows, vocab_size = logits.shape
    step = max(1, _SLICE_ELEMENTS // vocab_size)
    out = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    for i in range(0, n_rows, step):
        log_probs = torch.log_softmax(logits[i : i + step].float(), dim=-1)
        out[i : i + step] = -log_probs.gather(-1, targets[i : i + step, None]).squeeze(-1)
    return out


def kl_divergence(baseline: np.ndarray, variant: np.ndarray) -> np.ndarray:
    """KL(baseline || variant) in nats, float64 [P], of log-probabilities [P, V].

    Both are normalised again: what fp16 rounding leaves is then of second order (about 1e-6), not of first.
    """
    out = np.empty(baseline.shape[0])
    for i in range(0, baseline.shape[0], 64):
        p = torch.log_softmax(torch.from_numpy(baseline[i : i + 64]).float(), dim=-1)
        q = torch.log_softmax(torch.from_numpy(variant[i : i + 64]).float(), dim=-1)
        out[i : i + 64] = (p.exp() * (p - q)).sum(-1).clamp(min=0.0).double().numpy()
    return out


def count_blocks(n: int, s: int) -> int:
    """How many blocks `block_means` makes of n windows of s tokens.

    Half of a window of 256 has 127 decode tokens and counts as one; short windows are joined, to 120 or more.
    """
    per_window = (s + 1) // BLOCK_TOKENS
    return n * per_window if per_window else max(1, n // math.ceil(_JOINED_TOKENS / s))


def block_means(x: np.ndarray) -> np.ndarray:
    """Means over blocks of about 128 neighbouring tokens, float64 [n_blocks], of x [N windows, S tokens].

    A long half-window is cut into blocks of nearly one size, short ones are joined; no token is left out.
    """
    n, s = x.shape
    n_blocks = count_blocks(n, s)
    if (s + 1) // BLOCK_TOKENS:
        parts = np.array_split(x, n_blocks // n, axis=1)
        return np.stack([part.mean(axis=1, dtype=np.float64) for part in parts], axis=1).reshape(-1)
    return np.array([part.mean(dtype=np.float64) for part in np.array_split(x, n_blocks, axis=0)])


def empty_cache(cache: Any) -> None:
    """Forgets all rows of a cache and keeps its buffers."""
    cache.truncate_([0] * cache.lengths.shape[0])


def safe_exp(x: float) -> float:
    """exp(x) that is infinite where `math.exp` raises."""
    return math.exp(x) if x < 700 or math.isnan(x) else math.inf


def finite_or_none(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None
