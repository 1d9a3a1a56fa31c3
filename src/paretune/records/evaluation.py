"""What is known of a variant's quality beside the baseline's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from paretune.records.record import Record, null_is

_NAN, _INF, _NONE = null_is(math.nan), null_is(math.inf), null_is(None)


@dataclass(frozen=True)
class PhaseFidelity(Record):
    """One phase of a comparison. Increases are fractions (0.01 is 1 %), KL(baseline || variant) in nats.

    A variant whose losses are not all finite has a perplexity of NaN and an upper bound of infinity.
    """

    n_tokens: int
    n_blocks: int
    baseline_perplexity: float = field(metadata=_NAN)
    perplexity: float = field(metadata=_NAN)
    ppl_increase: float = field(metadata=_NAN)
    ppl_increase_upper: float = field(metadata=_INF)
    n_top1_agree: int
    top1_agreement: float
    n_kl: int
    kl_mean: float | None = field(metadata=_NONE)
    n_not_finite: int


@dataclass(frozen=True)
class Fidelity(Record):
    """Variant against baseline.

    Attributes:
        perplexity, baseline_perplexity: over the scored tokens of both phases.
        phase: the worse phase, the one with the higher upper bound. It is gated: passing it passes both.
        ppl_increase, ppl_increase_upper: of that phase; the upper one is the one-sided 95 % bound.
        kl_mean, kl_p99, top1_agreement: over both phases; None where nothing (or too little) was kept.
        within_bound: `ppl_increase_upper <= max_ppl_increase`, on enough text and with finite losses. Without
            a bound: True unless a loss is not finite.
        too_little_text: under 40 blocks in a phase; no bound can be passed then.
        identical: all losses are bit-equal.
        reason: one line that says why `within_bound` is what it is.
    """

    protocol: str
    perplexity: float = field(metadata=_NAN)
    baseline_perplexity: float = field(metadata=_NAN)
    ppl_increase: float = field(metadata=_NAN)
    ppl_increase_upper: float = field(metadata=_INF)
    max_ppl_increase: float | None
    kl_mean: float | None = field(metadata=_NONE)
    kl_p99: float | None = field(metadata=_NONE)
    top1_agreement: float
    n_windows: int
    phase: str
    within_bound: bool
    too_little_text: bool
    identical: bool
    reason: str
    prefill: PhaseFidelity
    decode: PhaseFidelity
