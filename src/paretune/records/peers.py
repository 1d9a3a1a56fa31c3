"""What `tune` says of other engines beside its winner."""

from __future__ import annotations

from dataclasses import dataclass, field

from paretune.records.bench import Agreement, Status
from paretune.records.record import Record, flat
from paretune.stats import Verdict


@dataclass(frozen=True)
class Ratio(Record):
    """A ratio and its interval; None: there is none."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class PeerQuality(Record):
    """What an engine does to the text of the confirmation.

    Args:
        ppl_increase: over the baseline, a fraction; `ppl_increase_upper`: its one-sided 95 % bound.
        n_windows: that were scored.
        keeps_bound: None where it is not known.
        quality_reason: one clause that says why.
    """

    perplexity: float | None = None
    baseline_perplexity: float | None = None
    ppl_increase: float | None = None
    ppl_increase_upper: float | None = None
    n_windows: int | None = None
    keeps_bound: bool | None = None
    quality_reason: str

    @classmethod
    def unknown(cls, reason: str) -> PeerQuality:
        """Where nothing was measured, with the reason as a clause."""
        return cls(quality_reason=reason)


@dataclass(frozen=True, kw_only=True)
class PeerRow(Record):
    """One engine beside the winner.

    Args:
        kind: what was timed; `seconds` are those of its unit.
        ratio: seconds of the engine / seconds of the winner: above 1 the winner is faster.
        verdict: of the engine against the winner; None: not compared, `cause` says why.
        quality: its keys stand among these.
    """

    quality: PeerQuality | None = field(default=None, metadata=flat(""))
    engine: str
    format: str
    version: str | None
    status: Status
    cause: str | None
    kind: str
    seconds: float | None
    ratio: Ratio | None
    verdict: Verdict | None
    agreement: Agreement | None
    rss_peak_bytes: int | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PeersMeasured(Record):
    """How the engines were compared. `reference`: the name of the recipe that the plan runs."""

    reference: str
    kind: str
    timing_sec: float
    elapsed_sec: float = 0.0
    interrupted: bool = False
    too_noisy: bool = False
    aa_half_width: float | None = None
    reference_sec: float | None = None
    baseline_sec: float | None = None
    samples_file: str
    definitions: dict[str, str]


@dataclass(frozen=True)
class Comparison(Record):
    """The engines of a goal, one row each, and how they were measured."""

    rows: list[PeerRow]
    measured: PeersMeasured
