"""Intervals, tests and verdicts. Speed (`measure/`) and quality (`evaluate/`) draw the same ones.

Timings are in seconds and ratios are baseline / variant, so more than 1 is faster. Nothing here reads a
clock, and every random draw has a seed: the same samples give the same answer. A wrong argument is an error
of the program (`assert`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

FloatArray = NDArray[np.float64]
Verdict = Literal["faster", "slower", "indistinguishable", "undecided"]

N_DRAWS = 2000
LEVEL = 0.95
DELTA = 0.02
TREND_WINDOW = 8
MIN_BLOCKS = 6  # the least n at which a 95 % interval of a median exists: 2 * 0.5**6 <= 0.05 < 2 * 0.5**5

_DRAW_CELLS = 2_000_000  # bootstrap draws held at once: 16 MB of float64


@dataclass(frozen=True)
class Interval:
    """An estimate from `n` values and its bounds, in one unit. No information is (low, high) = (0, inf)."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | None]:
        """Strict JSON: a bound that does not exist (infinite or NaN) is None."""
        bounds = {"value": self.value, "low": self.low, "high": self.high}
        return {k: v if math.isfinite(v) else None for k, v in bounds.items()} | {"n": self.n}


def bootstrap(
    values: ArrayLike,
    statistic: Callable[..., Any],
    n_draws: int = N_DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap (Efron 1979), two-sided.

    Args:
        values: [n] or [n, ...]; the first axis is resampled, so a row may hold a sum and its count.
        statistic: `statistic(draws, axis=1)` maps [n_draws, n, ...] to [n_draws], such as `np.median` or
            `np.mean`.
        level: the coverage asked for. What is reached with few values is less: see `speed_ratio`,
            `upper_mean`.
    """
    data = np.asarray(values, dtype=np.float64)
    assert data.ndim >= 1 and len(data) >= 1, "bootstrap of nothing"
    draws = _bootstrap_draws(data, statistic, n_draws, seed)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(data[None], axis=1)[0]), float(low), float(high), len(data))


def _bootstrap_draws(data: FloatArray, statistic: Callable[..., Any], n_draws: int, seed: int) -> FloatArray:
    rng = np.random.default_rng(seed)
    chunk = max(1, _DRAW_CELLS // data.size)
    parts = []
    for start in range(0, n_draws, chunk):
        picks = rng.integers(0, len(data), size=(min(chunk, n_draws - start), len(data)))
        parts.append(np.asarray(statistic(data[picks], axis=1), dtype=np.float64))
    return np.concatenate(parts)


# --- speed ----------------------------------------------------------------------------------------


def speed_ratio(
    baseline_sec: ArrayLike,
    variant_sec: ArrayLike,
    level: float = LEVEL,
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> Interval:
    """How many times faster the variant is: exp(median over blocks of log(baseline / variant)).

    Both arrays are [n], seconds per unit of work, entry i from the same block. The interval is the wider of
    the bootstrap over blocks and the interval between two order statistics (the inverted sign test, exact
    binomial): the bootstrap of a median covers too little with few blocks. For the null of no difference
    the second is exact whatever the noise, because the scheduler draws the order inside each block at
    random. (0, inf) where n does not carry `level`, always so below `MIN_BLOCKS`.
    """
    logs = _log_ratios(baseline_sec, variant_sec)
    n = len(logs)
    if n == 0:
        return Interval(math.nan, 0.0, math.inf, 0)
    value = float(np.exp(np.median(logs)))
    rank = _order_rank(n, level)
    if rank is None or n < MIN_BLOCKS:
        return Interval(value, 0.0, math.inf, n)
    drawn = bootstrap(logs, np.median, n_draws, level, seed)
    low = min(drawn.low, float(logs[rank - 1]))
    high = max(drawn.high, float(logs[n - rank]))
    return Interval(value, math.exp(low), math.exp(high), n)


def _log_ratios(baseline_sec: ArrayLike, variant_sec: ArrayLike) -> FloatArray:
    """[n] log(baseline / variant), ascending."""
    baseline = np.asarray(baseline_sec, dtype=np.float64)
    variant = np.asarray(variant_sec, dtype=np.float64)
    assert baseline.ndim == 1 and baseline.shape == variant.shape, "timings are paired by block"
    both = np.concatenate([baseline, variant])
    assert np.isfinite(both).all() and (both > 0).all(), "a duration is finite and above zero"
    return np.sort(np.log(baseline) - np.log(variant))


@lru_cache(maxsize=4096)
def _order_rank(n: int, level: float) -> int | None:
    """The greatest r for which [x_(r), x_(n+1-r)] covers the median with probability >= level, or None."""
    rank = 0
    while rank < n // 2 and 2 * special.bdtr(rank, n, 0.5) <= 1 - level + 1e-12:
        rank += 1
    return rank or None


def verdict(ratio: Interval, delta: float = DELTA, resolution: float = 0.0) -> Verdict:
    """The word for a ratio (docs/measuring.md).

    Args:
        ratio: of `speed_ratio`.
        delta: the least gain that counts, as a fraction of 1.
        resolution: what this machine resolves now (`Blocks.aa_resolution`). No claim is smaller than it; an
            infinite one (too few A/A blocks) leaves everything undecided.
    """
    effective = max(delta, resolution)
    if not all(map(math.isfinite, (ratio.value, ratio.high, effective))):
        return "undecided"
    if ratio.low > 1 + effective:
        return "faster"
    if ratio.high < 1 - effective:
        return "slower"
    if ratio.low >= 1 - effective and ratio.high <= 1 + effective:
        return "indistinguishable"
    return "undecided"


def look_level(look_index: int, n_looks: int, level: float = LEVEL) -> float:
    """The level of the interval at one of `n_looks` planned looks, so that all of them together keep `level`.

    Bonferroni: looks at growing data are strongly correlated, so this is on the safe side, and it needs no
    distribution. A look forced early by the deadline counts as the next planned one.
    """
    assert 0 <= look_index < n_looks, f"look {look_index} of {n_looks} was not planned"
    return 1 - (1 - level) / n_looks


def looks(min_blocks: int, max_blocks: int, level: float = LEVEL) -> list[int]:
    """The numbers of blocks after which to look: about 1.5 times more each time, the last is `max_blocks`.

    Looks too early for an interval at their `look_level` to exist are left out: they cost level for nothing.
    """
    assert 1 <= min_blocks <= max_blocks
    first = min_blocks
    while True:
        schedule, n = [], first
        while n * 1.2 < max_blocks:  # a look just before the last one would tell nothing new
            schedule.append(n)
            n = math.ceil(n * 1.5)
        schedule.append(max_blocks)
        needed = MIN_BLOCKS
        while _order_rank(needed, look_level(0, len(schedule), level)) is None:
            needed += 1
        if first >= min(needed, max_blocks):
            return schedule
        first = min(needed, max_blocks)


def faster_p_value(baseline_sec: ArrayLike, variant_sec: ArrayLike, delta: float) -> float:
    """One-sided p-value of "the variant is at most 1 + delta times as fast", an exact sign test over blocks.

    The sign test rather than Wilcoxon's: that one assumes log ratios symmetric about their median, which
    the order drawn at random gives only where both sides are equal, while a spike of one side bends it. The
    sign test also agrees with the interval of `speed_ratio`. A tie counts against the variant. Data that
    was looked at k times needs k times the p-value, or a fresh measurement (which a winner
    gets anyway).
    """
    logs = _log_ratios(baseline_sec, variant_sec)
    n = len(logs)
    n_above = int((logs > math.log1p(delta)).sum())
    return float(special.bdtrc(n_above - 1, n, 0.5)) if n_above else 1.0


def holm(p_values: Sequence[float], alpha: float = 0.05) -> list[bool]:
    """Which hypotheses are rejected, in the order given, with a family-wise error of `alpha` (Holm 1979)."""
    assert all(0 <= p <= 1 for p in p_values), "a p-value lies in [0, 1]"
    rejected = [False] * len(p_values)
    for n_done, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] > alpha / (len(p_values) - n_done):
            break
        rejected[i] = True
    return rejected


# --- warm-up --------------------------------------------------------------------------------------


def has_trend(
    timings_sec: Sequence[float],
    k: int = TREND_WINDOW,
    alpha: float = 0.05,
    min_change: float = 0.01,
) -> bool:
    """Whether the last `k` timings still drift. Fewer than `k` timings: True, nothing shows that they do not.

    Two conditions. The order is unlikely without drift: exact Mann-Kendall test, `alpha` in each direction
    rather than split over both, for a false alarm costs one more slice while a miss costs the result. And
    the drift matters: the Theil-Sen slope, over the whole window, makes at least `min_change` of the median.
    1 % is half the least gain that counts; on a machine without noise any slope, however small, is
    "significant". One slow timing followed by a flat rest is not a trend: what follows is warm.
    """
    assert k >= 4, "no order of 3 values is unlikely enough"
    if len(timings_sec) < k:
        return True
    window = np.asarray(timings_sec[-k:], dtype=np.float64)
    first, second = np.triu_indices(k, 1)
    differences = window[second] - window[first]
    score = int(np.sign(differences).sum())
    if _mann_kendall_tail(k, abs(score)) > alpha:
        return False
    slope = float(np.median(differences / (second - first)))
    return abs(slope) * (k - 1) >= min_change * float(np.median(window))


@lru_cache(maxsize=256)
def _mann_kendall_tail(k: int, score: int) -> float:
    """P(S >= score) for k values in random order, S = concordant - discordant pairs (no ties)."""
    counts = [1]  # counts[i]: permutations with i inversions
    for size in range(2, k + 1):
        grown = [0] * (len(counts) + size - 1)
        for i, count in enumerate(counts):
            for shift in range(size):
                grown[i + shift] += count
        counts = grown
    most_inversions = (k * (k - 1) // 2 - score) // 2
    return sum(counts[: most_inversions + 1]) / math.factorial(k)


# --- percentiles and means ------------------------------------------------------------------------


def percentile_min_n(q: float) -> int:
    """The least n that carries the q-th percentile: 36 for p90, 72 for p95, 368 for p99.

    That is where the largest of n values lies above the true percentile with probability 1 - 0.025, so that
    its 95 % interval of order statistics has an upper end (for q < 50 a lower one): q**n <= 0.025.
    """
    assert 1 <= q <= 99.999, f"q is in percent, not {q}"
    share = max(q, 100 - q) / 100
    return math.ceil(math.log(0.025) / math.log(share))


def percentile(samples: ArrayLike, q: float) -> float | None:
    """The q-th percentile (q in percent, linear interpolation), None where n does not carry it."""
    values = np.asarray(samples, dtype=np.float64)
    if values.size < percentile_min_n(q):
        return None
    return float(np.percentile(values, q))


def upper_mean(
    values: ArrayLike,
    *,
    block: int = 1,
    level: float = LEVEL,
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> float:
    """One-sided upper bound of the mean, for the quality gate: the larger of a bootstrap and a t bound.

    Args:
        values: [n] differences, in the order of the text.
        block: how many neighbours form one unit of resampling (128 scored tokens); 1 where each value is a
            window or a document. A remainder is spread over the blocks.

    The bootstrap is the studentised one (Efron & Tibshirani 1993, 12.5), which follows skew where the
    percentile bootstrap is too narrow; t holds where the blocks are too few to resample. Needs two blocks.
    Coverage of the 95 % bound over 40 blocks: at least 94 % up to the skew of an exponential, 92 % for a
    lognormal of sigma 1.
    """
    data = np.asarray(values, dtype=np.float64)
    assert data.ndim == 1 and block >= 1 and np.isfinite(data).all(), "a list of finite numbers"
    m = len(data) // block
    assert m >= 2, f"a bound of the mean needs 2 blocks, there are {m}"
    means = np.array([part.mean() for part in np.array_split(data, m)])
    center = float(means.mean())
    error = float(means.std(ddof=1)) / math.sqrt(m)
    quantile = _student_t(level, m - 1)

    def student(draws: FloatArray, axis: int) -> FloatArray:
        errors = draws.std(axis=axis, ddof=1) / math.sqrt(m)
        distances = center - draws.mean(axis=axis)
        # A draw of one block m times has no spread and says nothing.
        return np.divide(distances, errors, out=np.zeros_like(errors), where=errors > 1e-9 * error)

    drawn = float(np.quantile(_bootstrap_draws(means, student, n_draws, seed), level))
    return float(data.mean()) + max(quantile, drawn) * error


@lru_cache(maxsize=256)
def _student_t(level: float, df: int) -> float:
    """The quantile of Student's t with `df` degrees of freedom."""
    assert 0 < level < 1 and df >= 1
    return float(special.stdtrit(df, level))


# --- the states of a host -------------------------------------------------------------------------


def bandwidth_states(
    bytes_per_sec: ArrayLike,
    *,
    min_ratio: float = 1.35,
    min_share: float = 0.15,
) -> list[int] | None:
    """Labels each value 0 (low) or 1 (high) where the values really have two modes, else None.

    The split is the one with the least absolute deviation (of the log) from the two medians, among those
    that leave `min_share` on each side; an outlier cannot claim a state of its own. It is believed where
    the medians are `min_ratio` apart and the middle third of the gap between them is nearly empty: at most
    5 % of the values, and significantly (1 %) fewer than the sixth that a flat distribution has there. So
    26 values are the least.
    """
    values = np.asarray(bytes_per_sec, dtype=np.float64)
    n = len(values)
    if n < 2:
        return None
    assert np.isfinite(values).all() and (values > 0).all(), "a bandwidth is finite and above zero"
    logs = np.log(values)
    ordered = np.sort(logs)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    least = max(1, math.ceil(min_share * n))
    cuts = np.arange(least, n - least + 1)
    if len(cuts) == 0:
        return None
    below = _deviation(sums, np.zeros_like(cuts), cuts)
    above = _deviation(sums, cuts, np.full_like(cuts, n))
    cut = int(cuts[np.argmin(below + above)])
    low, high = float(np.median(ordered[:cut])), float(np.median(ordered[cut:]))
    if high - low < math.log(min_ratio):
        return None
    third = (high - low) / 3
    n_between = int(((ordered > low + third) & (ordered < high - third)).sum())
    if n_between > 0.05 * n:
        return None
    p_flat = float(special.bdtr(n_between, n, 1 / 6))
    if p_flat > 0.01:
        return None
    is_high = logs > (low + high) / 2
    if min(is_high.mean(), 1 - is_high.mean()) < min_share:  # the cut had to take some from the other side
        return None
    return is_high.astype(int).tolist()


def _deviation(sums: FloatArray, start: NDArray[Any], stop: NDArray[Any]) -> FloatArray:
    """Sum of |x - median| over ordered[start:stop], many slices at once; sums[i] = sum of ordered[:i]."""
    half = (stop - start) // 2
    return np.asarray((sums[stop] - sums[stop - half]) - (sums[start + half] - sums[start]))
