"""Quality of a variant against the baseline, through the plan's own runner, prefill and decode apart.

`score` runs in each configuration's process; `compare` compares two saved `Scores` (docs/measuring.md).
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretune import files, stats
from paretune.errors import ParetuneError, UsageError
from paretune.evaluate import perplexity as ppl
from paretune.evaluate.perplexity import BLOCK_TOKENS, MIN_BLOCKS, TOO_LITTLE_TEXT, Progress, Runner
from paretune.records.evaluation import Fidelity, PhaseFidelity

PHASES = ("prefill", "decode")
_KEPT_BYTES = 128 * 2**20  # a phase's log-probabilities kept for the KL
_LOWEST_LOG_PROB = -60000.0  # stands for -inf: within fp16, and exp() of it is 0
_FORMAT = 1


@dataclass(frozen=True)
class PhaseScores:
    """What one phase gave. N windows of S scored tokens; P kept positions.

    Attributes:
        nll: -log p(token), nats, float32 [N, S].
        top1: the most likely id at each scored position, int32 [N, S].
        kept: the positions whose distributions are kept, flat indices into [N * S], sorted, int64 [P].
        log_probs: their log-probabilities, [P, V], fp32 where that fits in 128 MiB, else fp16.
    """

    nll: np.ndarray
    top1: np.ndarray
    kept: np.ndarray
    log_probs: np.ndarray


@dataclass(frozen=True)
class Scores:
    """One configuration's scores on a set of windows; two with the same `text_hash` are comparable."""

    protocol: str
    text_hash: str
    prefill: PhaseScores
    decode: PhaseScores

    def save(self, path: str | Path) -> None:
        """Writes one `.npz` file, whole or not at all."""
        arrays: dict[str, Any] = {"format": _FORMAT, "protocol": self.protocol, "text_hash": self.text_hash}
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
                    raise ValueError("written by another version")
                names = PhaseScores.__annotations__
                parts = [PhaseScores(**{name: f[f"{phase}_{name}"] for name in names}) for phase in PHASES]
                return cls(str(f["protocol"]), str(f["text_hash"]), *parts)
        except OSError as error:
            raise ParetuneError(f"cannot read the scores {path}: {error.strerror or error}", cure) from None
        except (KeyError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile):
            raise ParetuneError(f"{path} is not a whole file of scores of this version", cure) from None


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
        cause = f"text too short: {tokens.numel()} tokens, one window needs {window_len}"
        raise ParetuneError(cause, "Use a longer text or shorter windows")
    return tokens[: n * window_len].reshape(n, window_len)


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of neighbouring runs of windows as those of all of them, in order.

    Two configurations whose parts were cut at the same windows stay comparable.

    Raises:
        ParetuneError: the parts were scored by different protocols or kept different distributions.
    """
    assert parts, "nothing was scored"
    if len(parts) == 1:
        return parts[0]
    if len({part.protocol for part in parts}) > 1:
        raise ParetuneError("parts of one text were scored by different protocols", "Score the text again")
    phases: dict[str, PhaseScores] = {}
    for phase in PHASES:
        each: list[PhaseScores] = [getattr(part, phase) for part in parts]
        if len({(p.log_probs.shape[1:], p.log_probs.dtype) for p in each}) > 1:
            raise ParetuneError("parts of one text kept different distributions", "Score the text again")
        before = np.cumsum([0] + [p.nll.size for p in each[:-1]])
        phases[phase] = PhaseScores(
            nll=np.concatenate([p.nll for p in each]),
            top1=np.concatenate([p.top1 for p in each]),
            kept=np.concatenate([p.kept + offset for p, offset in zip(each, before, strict=True)]),
            log_probs=np.concatenate([p.log_probs for p in each]),
        )
    text_hash = hashlib.sha256("".join(part.text_hash for part in parts).encode()).hexdigest()
    return Scores(parts[0].protocol, text_hash, **phases)


def ppl_increase_lower(baseline: Scores, variant: Scores, level: float = 0.98) -> float:
    """What the perplexity rises by at least, as a fraction: the one-sided lower bound, both phases together.

    For turning a candidate away early: where this lies over the limit, more text will not bring it back under. It
    accepts nothing. `inf` where the variant's losses are not finite, `-inf` below two blocks.
    """
    _check_comparable(baseline, variant)
    blocks: list[np.ndarray] = []
    for phase in PHASES:
        b, v = getattr(baseline, phase).nll, getattr(variant, phase).nll
        if not np.isfinite(v).all():
            return math.inf
        blocks.append(ppl.block_means(v.astype(np.float64) - b.astype(np.float64)))
    losses = np.concatenate(blocks)
    if losses.size < 2:
        return -math.inf
    return ppl.safe_exp(-stats.upper_mean(-losses, level=level)) - 1


def text_hash_of(windows: torch.Tensor) -> str:
    """What tells one set of windows, int64 on the CPU, from another: `Scores.text_hash`."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


class _Recorder:
    """Collects one phase while it runs. Losses stay on the device until the end, kept rows do not."""

    def __init__(self, n: int, s: int, vocab_size: int, keep: int, seed: int, device: Any) -> None:
        self.nll = torch.empty((n, s), dtype=torch.float32, device=device)
        self.top1 = torch.empty((n, s), dtype=torch.int32, device=device)
        n_kept = max(0, min(keep, n * s, _KEPT_BYTES // (2 * vocab_size)))
        dtype = torch.float32 if n_kept * vocab_size * 4 <= _KEPT_BYTES else torch.float16
        # A function of shapes and seed only, so that every configuration keeps the same positions.
        self.kept = np.sort(np.random.default_rng(seed).choice(n * s, size=n_kept, replace=False))
        self.log_probs = torch.empty((n_kept, vocab_size), dtype=dtype)
        slot = torch.full((n * s,), -1, dtype=torch.int64)
        slot[torch.from_numpy(self.kept)] = torch.arange(n_kept)
        self.slot = slot.reshape(n, s)

    def put(self, rows: slice, columns: slice, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Scores logits [B, K, V] against targets [B, K] into cells [rows, columns]."""
        flat = logits.reshape(-1, logits.shape[-1])
        self.nll[rows, columns] = ppl.token_nll(flat, targets.reshape(-1)).reshape(targets.shape)
        self.top1[rows, columns] = flat.argmax(dim=-1).reshape(targets.shape).to(torch.int32)
        slots = self.slot[rows, columns].reshape(-1)
        wanted = (slots >= 0).nonzero().squeeze(-1)
        for part in wanted.split(64):  # 64 rows of 50,257 in fp32: 13 MB
            log_probs = torch.log_softmax(flat[part.to(flat.device)].float(), dim=-1)
            self.log_probs[slots[part]] = log_probs.clamp(min=_LOWEST_LOG_PROB).to("cpu", self.log_probs.dtype)

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
    """Scores windows the way generation runs: half of each prefilled at once, the rest fed token by token.

    With H = T // 2, the prefill of tokens [0, H) scores targets 1..H (H a window) and the decode steps, fed
    the text's own tokens H..T-2, score targets H+1..T-1 (T-1-H a window). Only token 0 has no score. T = 257
    gives two halves of exactly 128, T = 256 gives 128 and 127.

    Memory: logits [batch_size, H, V] in the runner's dtype, up to 256 MiB of kept log-probabilities, 50 MiB.

    Args:
        windows: token ids, int64 [N, T], T >= 4 (`windows_of`).
        keep_positions: positions whose whole distribution is kept for the KL, half of them in each phase,
            drawn with `seed` (the same for every configuration); fewer where fp16 would exceed 256 MiB.
        batch_size: windows at a time; give the plan's own, since numerics can depend on it. The last batch is
            filled up with copies, so that every step has the same shape.
        text_name: what the text is, for the protocol id.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 4:
        raise UsageError(f"cannot score windows of shape {list(windows.shape)}", "Give [N >= 1, T >= 4]")
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is not positive", "Use 1 or more")
    windows = windows.to("cpu", torch.int64)
    n, length = windows.shape
    half = length // 2
    n_scored = {"prefill": half, "decode": length - 1 - half}
    batch_size = min(batch_size, n)
    cache = runner.new_cache(batch_size, length - 1)  # the last token is a target only
    device = cache.lengths.device
    recorders: dict[str, _Recorder] = {}
    for start in range(0, n, batch_size):
        index = torch.arange(start, start + batch_size).clamp(max=n - 1)
        tokens = windows[index].to(device)  # [B, T]
        rows = slice(start, min(start + batch_size, n))
        n_real = rows.stop - rows.start
        if start:
            ppl.empty_cache(cache)
        logits = runner.forward(tokens[:, :half], cache, logits="all")
        if not recorders:  # the vocabulary as the runner gives it is known from here on
            recorders = {
                phase: _Recorder(n, s, logits.shape[-1], keep_positions // 2, seed, device)
                for phase, s in n_scored.items()
            }
        recorders["prefill"].put(rows, slice(0, half), logits[:n_real], tokens[:n_real, 1 : half + 1])
        for j in range(n_scored["decode"]):
            logits = runner.forward(tokens[:, half + j : half + j + 1], cache, logits="last")
            target = tokens[:n_real, half + j + 1 : half + j + 2]
            recorders["decode"].put(rows, slice(j, j + 1), logits[:n_real], target)
        if progress is not None:
            progress(rows.stop, n)
    return Scores(
        protocol=f"{text_name}/win{length}/prefill{half}+decode{n_scored['decode']}/token",
        text_hash=text_hash_of(windows),
        **{phase: recorder.scores() for phase, recorder in recorders.items()},
    )


def compare(baseline: Scores, variant: Scores, max_ppl_increase: float | None = None) -> Fidelity:
    """Compares paired scores and gates the worse phase on its one-sided upper bound.

    Args:
        max_ppl_increase: the bound as a fraction (0.01 is 1 %), or None for no bound.

    Raises:
        ParetuneError: scored on different text, windows or vocabularies, or the baseline gives NaN.
    """
    _check_comparable(baseline, variant)
    pairs = {phase: (getattr(baseline, phase), getattr(variant, phase)) for phase in PHASES}
    kls = {phase: ppl.kl_divergence(b.log_probs, v.log_probs) for phase, (b, v) in pairs.items()}
    parts = {phase: _compare_phase(b, v, kls[phase]) for phase, (b, v) in pairs.items()}
    # Both phases must hold: a bad variant passes both 95 % bounds with 5 % probability at most.
    worse = max(PHASES, key=lambda phase: (parts[phase].n_not_finite, parts[phase].ppl_increase_upper))
    n_blocks = min(p.n_blocks for p in parts.values())
    within, reason = _gate(worse, parts[worse], n_blocks, max_ppl_increase)
    kl = np.concatenate(list(kls.values()))
    return Fidelity(
        protocol=variant.protocol,
        perplexity=_perplexity(*(v.nll for _, v in pairs.values())),
        baseline_perplexity=_perplexity(*(b.nll for b, _ in pairs.values())),
        ppl_increase=parts[worse].ppl_increase,
        ppl_increase_upper=parts[worse].ppl_increase_upper,
        max_ppl_increase=max_ppl_increase,
        kl_mean=float(kl.mean()) if kl.size else None,
        kl_p99=stats.percentile(kl, 99),
        top1_agreement=sum(p.n_top1_agree for p in parts.values()) / sum(p.n_tokens for p in parts.values()),
        n_windows=baseline.prefill.nll.shape[0],
        phase=worse,
        within_bound=within,
        too_little_text=n_blocks < MIN_BLOCKS,
        identical=all(np.array_equal(b.nll, v.nll) for b, v in pairs.values()),
        reason=reason,
        **parts,
    )


def _check_comparable(baseline: Scores, variant: Scores) -> None:
    cure = "Score both on the same windows with the same settings"
    if (baseline.text_hash, baseline.protocol) != (variant.text_hash, variant.protocol):
        raise ParetuneError(f"different text was scored: {baseline.protocol} and {variant.protocol}", cure)
    for phase in PHASES:
        b, v = getattr(baseline, phase), getattr(variant, phase)
        if b.log_probs.shape != v.log_probs.shape or not np.array_equal(b.kept, v.kept):
            shapes = f"{list(b.log_probs.shape)} and {list(v.log_probs.shape)}"
            raise ParetuneError(f"baseline and variant kept different distributions: {shapes}", cure)
        if not np.isfinite(b.nll).all():
            raise ParetuneError(f"the baseline gives NaN or infinity in {phase}", "Use float32 for it")


def paired_increase(baseline_nll: np.ndarray, nll: np.ndarray) -> tuple[float, float]:
    """The increase of perplexity and its one-sided 95 % upper bound, as fractions (0.01 is 1 %).

    Args:
        baseline_nll, nll: losses of the same tokens, nats, `[N windows, S tokens]`; the baseline's are finite.

    Returns:
        (NaN, infinity) where a loss is not finite; the bound alone is infinite where there is one block of text.
    """
    if not np.isfinite(nll).all():
        return math.nan, math.inf
    difference = nll.astype(np.float64) - baseline_nll.astype(np.float64)
    mean = float(difference.mean())
    blocks = ppl.block_means(difference)
    if blocks.size < 2:  # one block has no spread to bound anything with
        return ppl.safe_exp(mean) - 1, math.inf
    margin = stats.upper_mean(blocks, level=0.95) - float(blocks.mean())
    return ppl.safe_exp(mean) - 1, ppl.safe_exp(mean + margin) - 1


def _compare_phase(b: PhaseScores, v: PhaseScores, kl: np.ndarray) -> PhaseFidelity:
    n_not_finite = int((~np.isfinite(v.nll)).sum())
    increase, upper = paired_increase(b.nll, v.nll)
    agree = int((b.top1 == v.top1).sum())
    return PhaseFidelity(
        n_tokens=b.nll.size,
        n_blocks=ppl.count_blocks(*b.nll.shape),
        baseline_perplexity=_perplexity(b.nll),
        perplexity=_perplexity(v.nll),
        ppl_increase=increase,
        ppl_increase_upper=upper,
        n_top1_agree=agree,
        top1_agreement=agree / b.nll.size,
        n_kl=kl.size,
        kl_mean=float(kl.mean()) if kl.size else None,
        n_not_finite=n_not_finite,
    )


def _gate(worse: str, p: PhaseFidelity, n_blocks: int, limit: float | None) -> tuple[bool, str]:
    """(within_bound, reason)."""
    if p.n_not_finite:
        where = f"{p.n_not_finite} of {p.n_tokens} tokens in {worse}"
        return False, f"the variant gives NaN or infinity at {where}"
    if limit is None:
        return True, "no bound was set"
    if n_blocks < MIN_BLOCKS:
        what = f"{n_blocks} blocks of {BLOCK_TOKENS} tokens, a bound needs {MIN_BLOCKS}"
        return False, f"{TOO_LITTLE_TEXT}: {what}"
    within = p.ppl_increase_upper <= limit
    change = f"{p.ppl_increase:+.2%}, with 95 % confidence at most {p.ppl_increase_upper:+.2%}"
    return within, f"{worse}: perplexity {change}, {'within' if within else 'over'} the bound of {limit:+.2%}"


def _perplexity(*losses: np.ndarray) -> float:
    return ppl.safe_exp(sum(float(x.sum(dtype=np.float64)) for x in losses) / sum(x.size for x in losses))
