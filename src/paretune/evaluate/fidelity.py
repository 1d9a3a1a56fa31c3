"""Quality of a variant against the baseline, through the plan's own runner, prefill and decode apart (measuring.md).

`score` runs in each configuration's process; `compare` lays two saved `Scores` side by side, paired token by token.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from paretune import files, stats
from paretune.errors import ParetuneError, UsageError
from paretune.evaluate.perplexity import (
    BLOCK_TOKENS,
    MIN_BLOCKS,
    Progress,
    Runner,
    empty_cache,
    finite_or_none,
    safe_exp,
    token_nll,
)

PHASES = ("prefill", "decode")
TIE_MARGIN = 1e-4  # top-1/top-2 logit margin under which a divergence is a tie (measuring.md, Quality 6)
P99_SAMPLES = 368  # a 99th percentile needs as many (measuring.md, Speed 7)
_BOUND_LEVEL = 0.95
_KEPT_BYTES = 256 * 2**20  # log-probabilities kept for the KL, in fp16
_LOWEST_LOG_PROB = -60000.0  # stands for -inf: within fp16, and exp() of it is 0
_FORMAT = 1


@dataclass(frozen=True)
class PhaseScores:
    """What one phase gave. N windows of S scored tokens; P kept positions.

    Attributes:
        nll: -log p(token), nats, float32 [N, S].
        top1: the most likely id at each scored position, int32 [N, S].
        kept: the positions whose distributions are kept, flat indices into [N * S], sorted, int64 [P].
        log_probs: their log-probabilities, [P, V], fp32 where that fits in 256 MiB, else fp16.
    """

    nll: np.ndarray
    top1: np.ndarray
    kept: np.ndarray
    log_probs: np.ndarray


@dataclass(frozen=True)
class Scores:
    """One configuration's scores on a set of windows; two of them with the same `text_hash` are comparable."""

    protocol: str
    text_hash: str
    prefill: PhaseScores
    decode: PhaseScores

    def save(self, path: str | Path) -> None:
        """Writes one `.npz` file, whole or not at all."""
        arrays: dict[str, Any] = {
            "format": np.array(_FORMAT),
            "protocol": np.array(self.protocol),
            "text_hash": np.array(self.text_hash),
        }
        for phase in PHASES:
            part: PhaseScores = getattr(self, phase)
            arrays |= {f"{phase}_{name}": getattr(part, name) for name in PhaseScores.__annotations__}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        files.write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Reads what `save` wrote (never pickled objects).

        Raises:
            ParetuneError: the file is missing, is damaged or has another format.
        """
        cure = "Score this configuration again"
        try:
            with np.load(path, allow_pickle=False) as f:
                if int(f["format"]) != _FORMAT:
                    raise ParetuneError(f"{path} has scores of format {int(f['format'])}, not {_FORMAT}", cure)
                parts = [
                    PhaseScores(**{name: f[f"{phase}_{name}"] for name in PhaseScores.__annotations__})
                    for phase in PHASES
                ]
                return cls(str(f["protocol"]), str(f["text_hash"]), *parts)
        except OSError as error:
            raise ParetuneError(f"cannot read the scores {path}: {error.strerror or error}", cure) from None
        except (KeyError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile):
            raise ParetuneError(f"{path} is not a whole file of scores", cure) from None


def windows_of(token_ids: torch.Tensor | Sequence[int], window_len: int) -> torch.Tensor:
    """Cuts a text into non-overlapping windows, int64 [N, window_len]; the rest is dropped.

    Raises:
        UsageError: a window too short to have a scored token in both halves.
        ParetuneError: the text is shorter than one window.
    """
    if window_len < 4:
        raise UsageError(f"a window of {window_len} tokens has no two halves to score", "Use 4 or more")
    tokens = torch.as_tensor(token_ids, dtype=torch.int64).reshape(-1)
    n = tokens.numel() // window_len
    if n < 1:
        raise ParetuneError(
            f"text too short: {tokens.numel()} tokens, one window needs {window_len}",
            "Use a longer text or shorter windows",
        )
    return tokens[: n * window_len].reshape(n, window_len)


class _Recorder:
    """Collects one phase while it runs. What the device computes stays there until the end; kept rows do not."""

    def __init__(self, n: int, s: int, vocab_size: int, kept: np.ndarray, dtype: torch.dtype, device: Any) -> None:
        self.nll = torch.empty((n, s), dtype=torch.float32, device=device)
        self.top1 = torch.empty((n, s), dtype=torch.int32, device=device)
        self.kept = kept
        self.log_probs = torch.empty((kept.size, vocab_size), dtype=dtype)
        self.slot = torch.full((n * s,), -1, dtype=torch.int64)
        self.slot[torch.from_numpy(kept)] = torch.arange(kept.size)
        self.slot = self.slot.reshape(n, s)

    def put(self, rows: slice, columns: slice, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Scores logits [B, K, V] against targets [B, K] into cells [rows, columns]."""
        flat = logits.reshape(-1, logits.shape[-1])
        self.nll[rows, columns] = token_nll(flat, targets.reshape(-1)).reshape(targets.shape)
        self.top1[rows, columns] = flat.argmax(dim=-1).reshape(targets.shape).to(torch.int32)
        slots = self.slot[rows, columns].reshape(-1)
        wanted = (slots >= 0).nonzero().squeeze(-1)
        for part in wanted.split(64):  # 64 rows of 50,257 in fp32: 13 MB
            log_probs = torch.log_softmax(flat[part.to(flat.device)].float(), dim=-1).clamp(min=_LOWEST_LOG_PROB)
            self.log_probs[slots[part]] = log_probs.to("cpu", self.log_probs.dtype)

    def scores(self) -> PhaseScores:
        return PhaseScores(self.nll.cpu().numpy(), self.top1.cpu().numpy(), self.kept, self.log_probs.numpy())


@torch.no_grad()
def score(
    runner: Runner,
    windows: torch.Tensor,
    *,
    keep_positions: int = 2048,
    seed: int = 0,
    batch_size: int = 1,
    text_name: str = "text",
    progress: Progress | None = None,
) -> Scores:
    """Scores windows the way generation runs: the first half prefilled at once, the second half fed token by token.

    With H = T // 2, the prefill of tokens [0, H) scores targets 1..H (H tokens a window); the decode steps, fed the
    text's own tokens H..T-2, score targets H+1..T-1 (T - 1 - H a window). Only token 0 has no score. T = 257 gives
    two halves of exactly 128; T = 256 gives 128 and 127.

    Memory: the logits [batch_size, H, V] in the runner's dtype, up to 256 MiB of kept log-probabilities, 32 MiB.

    Args:
        windows: token ids, int64 [N, T], T >= 4 (`windows_of`).
        keep_positions: positions whose whole distribution is kept for the KL, half of them in each phase, drawn
            with `seed` (the same ones for every configuration); fewer where fp16 would exceed 256 MiB.
        batch_size: windows at a time; give the plan's own, since numerics can depend on it. The last batch is
            filled up with copies so that every step has the same shape.
        text_name: what the text is, for the protocol id.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 4:
        raise UsageError(f"windows of shape {list(windows.shape)} cannot be scored", "Give [N, T], N >= 1, T >= 4")
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is not positive", "Use 1 or more")
    windows = windows.to("cpu", torch.int64)
    n, length = windows.shape
    half = length // 2
    n_scored = {"prefill": half, "decode": length - 1 - half}
    batch_size = min(batch_size, n)
    cache = runner.new_cache(batch_size, length)
    device = cache.lengths.device
    recorders: dict[str, _Recorder] = {}
    for start in range(0, n, batch_size):
        index = torch.arange(start, start + batch_size).clamp(max=n - 1)
        tokens = windows[index].to(device)  # [B, T]
        rows = slice(start, min(start + batch_size, n))
        n_real = rows.stop - rows.start
        if start:
            empty_cache(cache)
        logits = runner.forward(tokens[:, :half], cache, logits="all")
        if not recorders:  # the vocabulary as the runner gives it is known from here on
            recorders = _recorders(n, n_scored, logits.shape[-1], keep_positions, seed, logits.device)
        recorders["prefill"].put(rows, slice(0, half), logits[:n_real], tokens[:n_real, 1 : half + 1])
        for j in range(n_scored["decode"]):
            logits = runner.forward(tokens[:, half + j : half + j + 1], cache, logits="last")
            target = tokens[:n_real, half + j + 1 : half + j + 2]
            recorders["decode"].put(rows, slice(j, j + 1), logits[:n_real], target)
        if progress is not None:
            progress(rows.stop, n)
    return Scores(
        protocol=f"{text_name}/win{length}/prefill{half}+decode{length - 1 - half}/token",
        text_hash=hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        **{phase: recorder.scores() for phase, recorder in recorders.items()},
    )


def _recorders(
    n: int, n_scored: dict[str, int], vocab_size: int, keep_positions: int, seed: int, device: Any
) -> dict[str, _Recorder]:
    """One recorder a phase, with the seeded positions to keep: a function of shapes and seed only."""
    n_kept = max(0, min(keep_positions, _KEPT_BYTES // (2 * vocab_size)))
    dtype = torch.float32 if n_kept * vocab_size * 4 <= _KEPT_BYTES else torch.float16
    rng = np.random.default_rng(seed)
    out = {}
    for phase in PHASES:
        total = n * n_scored[phase]
        kept = np.sort(rng.choice(total, size=min(total, n_kept // 2), replace=False)).astype(np.int64)
        out[phase] = _Recorder(n, n_scored[phase], vocab_size, kept, dtype, device)
    return out


@dataclass(frozen=True)
class PhaseFidelity:
    """One phase of a comparison. Increases are fractions (0.01 is 1 %); KL in nats, KL(baseline || variant)."""

    n_tokens: int
    n_blocks: int
    baseline_perplexity: float
    perplexity: float
    ppl_increase: float
    ppl_increase_upper: float
    n_top1_agree: int
    top1_agreement: float
    n_kl: int
    kl_mean: float | None
    n_not_finite: int


@dataclass(frozen=True)
class Fidelity:
    """Variant against baseline.

    Attributes:
        perplexity, baseline_perplexity: over the scored tokens of both phases.
        phase: the worse phase, the one with the higher upper bound; it alone is gated, so passing it passes both.
        ppl_increase, ppl_increase_upper: of that phase; the upper one is the one-sided 95 % bound.
        kl_mean, kl_p99, top1_agreement: over both phases; None where nothing (or too little) was kept.
        within_bound: `ppl_increase_upper <= max_ppl_increase` on enough text with finite losses. Without a bound,
            True unless the variant gives NaN.
        too_little_text: under 40 blocks in a phase; no bound can be passed then.
        identical: all losses are bit-equal.
        reason: one line that says why `within_bound` is what it is.
    """

    protocol: str
    perplexity: float
    baseline_perplexity: float
    ppl_increase: float
    ppl_increase_upper: float
    max_ppl_increase: float | None
    kl_mean: float | None
    kl_p99: float | None
    n_kl: int
    top1_agreement: float
    n_top1_agree: int
    n_tokens: int
    n_windows: int
    phase: str
    within_bound: bool
    too_little_text: bool
    identical: bool
    reason: str
    prefill: PhaseFidelity
    decode: PhaseFidelity

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite are None."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return finite_or_none(value) if isinstance(value, float) else value

        return plain(asdict(self))


def compare(baseline: Scores, variant: Scores, max_ppl_increase: float | None = None) -> Fidelity:
    """Compares paired scores and gates the worse phase on its one-sided upper bound.

    Args:
        max_ppl_increase: the bound as a fraction (0.01 is 1 %), or None for no bound.

    Raises:
        ParetuneError: the two were scored on different text, windows or vocabularies, or the baseline gives NaN.
    """
    _check_comparable(baseline, variant)
    parts: dict[str, PhaseFidelity] = {}
    kls: list[np.ndarray] = []
    for phase in PHASES:
        parts[phase], kl = _compare_phase(getattr(baseline, phase), getattr(variant, phase))
        kls.append(kl)
    # Both phases must hold. Testing the higher of two 95 % bounds keeps the error of passing a bad variant at 5 %.
    worse = max(PHASES, key=lambda phase: parts[phase].ppl_increase_upper)
    too_little = any(p.n_blocks < MIN_BLOCKS for p in parts.values())
    within, reason = _gate(worse, parts, too_little, max_ppl_increase)
    n_tokens = sum(p.n_tokens for p in parts.values())
    agree = sum(p.n_top1_agree for p in parts.values())
    kl = np.concatenate(kls)
    finite = all(p.n_not_finite == 0 for p in parts.values())
    pairs = [(getattr(baseline, phase).nll, getattr(variant, phase).nll) for phase in PHASES]
    return Fidelity(
        protocol=variant.protocol,
        perplexity=_perplexity([v for _, v in pairs]) if finite else math.nan,
        baseline_perplexity=_perplexity([b for b, _ in pairs]),
        ppl_increase=parts[worse].ppl_increase,
        ppl_increase_upper=parts[worse].ppl_increase_upper,
        max_ppl_increase=max_ppl_increase,
        kl_mean=float(kl.mean()) if kl.size else None,
        kl_p99=float(np.quantile(kl, 0.99)) if kl.size >= P99_SAMPLES else None,
        n_kl=kl.size,
        top1_agreement=agree / n_tokens,
        n_top1_agree=agree,
        n_tokens=n_tokens,
        n_windows=baseline.prefill.nll.shape[0],
        phase=worse,
        within_bound=within,
        too_little_text=too_little,
        identical=all(np.array_equal(b, v) for b, v in pairs),
        reason=reason,
        prefill=parts["prefill"],
        decode=parts["decode"],
    )


def _check_comparable(baseline: Scores, variant: Scores) -> None:
    cure = "Score both on the same windows with the same settings"
    if baseline.text_hash != variant.text_hash or baseline.protocol != variant.protocol:
        raise ParetuneError(
            f"baseline ({baseline.protocol}) and variant ({variant.protocol}) were scored on different text", cure
        )
    for phase in PHASES:
        b, v = getattr(baseline, phase), getattr(variant, phase)
        if b.log_probs.shape != v.log_probs.shape or not np.array_equal(b.kept, v.kept):
            raise ParetuneError(
                f"baseline and variant kept other distributions: {b.log_probs.shape} and {v.log_probs.shape}", cure
            )
        if not np.isfinite(b.nll).all():
            raise ParetuneError(
                f"the baseline gives NaN or infinity in {phase}", "Use another dtype for the baseline, e.g. float32"
            )


def _compare_phase(b: PhaseScores, v: PhaseScores) -> tuple[PhaseFidelity, np.ndarray]:
    """The comparison of one phase, and its KL at each kept position, float64 [P]."""
    difference = v.nll.astype(np.float64) - b.nll.astype(np.float64)
    n_not_finite = int((~np.isfinite(v.nll)).sum())
    if n_not_finite:
        n_blocks, increase, upper, perplexity = _n_blocks(*difference.shape), math.nan, math.inf, math.nan
    else:
        blocks = block_means(difference)
        n_blocks, perplexity = blocks.size, _perplexity([v.nll])
        mean = float(difference.mean())
        # One block has no spread to bound anything with; max() only guards against the last bit.
        bound = max(mean, stats.upper_mean(blocks, _BOUND_LEVEL)) if n_blocks > 1 else math.inf
        increase, upper = safe_exp(mean) - 1, safe_exp(bound) - 1
    agree = int((b.top1 == v.top1).sum())
    kl = kl_divergence(b.log_probs, v.log_probs)
    result = PhaseFidelity(
        n_tokens=difference.size,
        n_blocks=n_blocks,
        baseline_perplexity=_perplexity([b.nll]),
        perplexity=perplexity,
        ppl_increase=increase,
        ppl_increase_upper=upper,
        n_top1_agree=agree,
        top1_agreement=agree / difference.size,
        n_kl=kl.size,
        kl_mean=float(kl.mean()) if kl.size else None,
        n_not_finite=n_not_finite,
    )
    return result, kl


def _gate(
    worse: str, parts: dict[str, PhaseFidelity], too_little: bool, limit: float | None
) -> tuple[bool, str]:
    """(within_bound, reason)."""
    p = parts[worse]
    if p.n_not_finite:
        return False, f"the variant gives NaN or infinity at {p.n_not_finite} of {p.n_tokens} tokens in {worse}"
    if limit is None:
        return True, "no bound was set"
    if too_little:
        n = min(part.n_blocks for part in parts.values())
        return False, f"too little text: {n} blocks of {BLOCK_TOKENS} tokens, a bound needs {MIN_BLOCKS}"
    within = p.ppl_increase_upper <= limit
    return within, (
        f"{worse}: perplexity {p.ppl_increase:+.2%}, at most {p.ppl_increase_upper:+.2%} with 95 % confidence, "
        f"{'within' if within else 'over'} the bound of {limit:+.2%}"
    )


def _n_blocks(n: int, s: int) -> int:
    """How many blocks `block_means` makes of [n, s]. 127 tokens (half of a window of 256) count as one."""
    per_window = (s + 1) // BLOCK_TOKENS
    return n * per_window if per_window else max(1, n // math.ceil(BLOCK_TOKENS / s))


def block_means(x: np.ndarray) -> np.ndarray:
    """Means over blocks of about 128 neighbouring tokens, float64 [n_blocks], of x [N windows, S tokens].

    A long half-window is cut into blocks, short ones are joined; no token is left out. Sizes differ by a few
    tokens at most, so each block is weighted by its size, and the mean of the blocks is the mean of the tokens.
    """
    n, s = x.shape
    n_blocks = _n_blocks(n, s)
    if (s + 1) // BLOCK_TOKENS:
        sums = np.stack([part.sum(axis=1) for part in np.array_split(x, n_blocks // n, axis=1)], axis=1)
    else:
        sums = np.array([part.sum() for part in np.array_split(x, n_blocks, axis=0)])
    return sums.reshape(-1) * (n_blocks / x.size)


def kl_divergence(baseline: np.ndarray, variant: np.ndarray) -> np.ndarray:
    """KL(baseline || variant) in nats, float64 [P], of log-probabilities [P, V].

    Both are normalised again: what fp16 rounding leaves is then of second order (about 1e-6 nats), not of first.
    """
    out = np.empty(baseline.shape[0])
    for i in range(0, baseline.shape[0], 64):
        p = torch.log_softmax(torch.from_numpy(baseline[i : i + 64]).float(), dim=-1)
        q = torch.log_softmax(torch.from_numpy(variant[i : i + 64]).float(), dim=-1)
        out[i : i + 64] = (p.exp() * (p - q)).sum(-1).clamp(min=0.0).double().numpy()
    return out


def _perplexity(losses: list[np.ndarray]) -> float:
    total = sum(float(x.sum(dtype=np.float64)) for x in losses)
    return safe_exp(total / sum(x.size for x in losses))


@dataclass(frozen=True)
class Exactness:
    """Two greedy continuations of one prompt.

    Attributes:
        first_divergence: index of the first token that differs (or that only one has); None where equal.
        margin: the reference's top-1 minus top-2 logit there.
    """

    verdict: Literal["equal", "tie", "different"]
    first_divergence: int | None
    margin: float | None
    n_equal: int

    def to_json(self) -> dict[str, Any]:
        margin = finite_or_none(self.margin)
        return {**asdict(self), "margin": margin}


def exactness(
    reference_tokens: Sequence[int], variant_tokens: Sequence[int], margins: Sequence[float]
) -> Exactness:
    """Bit-equal tokens, a divergence at a tie, or different. After a divergence the contexts differ: no more is said.

    Args:
        margins: the reference's top-1/top-2 logit margin at each of its tokens, [len(reference_tokens)].
    """
    reference, other = [int(t) for t in reference_tokens], [int(t) for t in variant_tokens]
    assert len(margins) >= len(reference), f"{len(margins)} margins for {len(reference)} tokens"
    shorter = min(len(reference), len(other))
    at = next((i for i in range(shorter) if reference[i] != other[i]), shorter)
    if at == len(reference) == len(other):
        return Exactness("equal", None, None, at)
    if at == shorter:  # one stopped early: the length is fixed, so no tie explains it
        return Exactness("different", at, None, at)
    margin = float(margins[at])
    return Exactness("tie" if margin < TIE_MARGIN else "different", at, margin, at)
