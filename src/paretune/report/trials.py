"""The tables of `tune`: a row a candidate, a row a peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from paretune.records.peers import PeerRow
from paretune.records.tune import TrialStatus, TuneResult, TuneTrial
from paretune.report.tables import STATUS_WORDS, Column
from paretune.report.units import NOT_MEASURED, format_percent, format_ratio, format_sec, number, plain

Role = Literal["", "baseline", "chosen", "best so far"]


@dataclass(frozen=True)
class TrialRow:
    """One candidate as it is shown. None: not measured.

    Args:
        judgement: what became of it, in words; `cause`: why it was not taken, empty where it measured well.
        loss: its place on the axis of quality: the baseline and what is proven lossless are at zero.
    """

    id: str
    name: str
    role: Role
    status: TrialStatus
    judgement: str
    cause: str
    guarantee: str | None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    n_blocks: int | None = None
    tpot_sec: float | None = None
    ttft_sec: float | None = None
    weights_bytes: int | None = None
    kv_cache_bytes: int | None = None
    activation_peak_bytes: int | None = None
    rss_peak_bytes: int | None = None
    perplexity: float | None = None
    ppl_increase: float | None = None
    ppl_increase_upper: float | None = None
    kl_mean: float | None = None
    top1_agreement: float | None = None
    within_bound: bool | None = None
    load_sec: float | None = None
    compile_sec: float | None = None
    break_even_tokens: float | None = None
    mbu: float | None = None

    @property
    def loss(self) -> float | None:
        if self.ppl_increase is None and (self.role == "baseline" or self.guarantee == "lossless"):
            return 0.0
        return self.ppl_increase

    @property
    def is_taken(self) -> bool:
        return self.role in ("chosen", "best so far")


def role_of(result: TuneResult, trial: TuneTrial) -> Role:
    """Baseline, chosen, or the best so far of a search that has chosen nothing; empty for all others."""
    if trial.id == result.baseline_id:
        return "baseline"
    if trial.id == result.winner_id:
        return "chosen" if result.outcome == "winner" else "best so far"
    return ""


def trial_rows(result: TuneResult) -> list[TrialRow]:
    """One row per trial: the winner, then by speed-up, then what failed, was excluded, was not reached."""
    order = {"measured": 1, "failed": 2, "invalid": 2, "excluded": 3, "not_reached": 4}

    def key(row: TrialRow) -> tuple[int, float, str]:
        return 0 if row.is_taken else order[row.status], -(row.speedup or 0.0), row.name

    return sorted((_trial_row(result, trial) for trial in result.trials), key=key)


def _trial_row(result: TuneResult, trial: TuneTrial) -> TrialRow:
    role, found = role_of(result, trial), trial.measured
    row: dict[str, Any] = {
        "id": trial.id,
        "name": plain(trial.name),
        "role": role,
        "status": trial.status,
        "judgement": plain(trial.standing.word),
        "cause": plain(trial.reason or trial.standing.why),
        "guarantee": trial.label,
    }
    if found is None:
        return TrialRow(**row)
    speedup, quality, memory = found.speedup, found.quality, found.memory
    if quality is not None:
        row |= {
            "perplexity": number(quality.perplexity),
            "ppl_increase": number(quality.ppl_increase),
            "ppl_increase_upper": number(quality.ppl_increase_upper),
            "kl_mean": quality.kl_mean,
            "top1_agreement": quality.top1_agreement,
            "within_bound": quality.within_bound,
        }
    return TrialRow(
        **row,
        # The baseline is the unit of this scale.
        speedup=speedup.value if speedup else 1.0 if role == "baseline" else None,
        speedup_low=speedup.low if speedup else None,
        speedup_high=speedup.high if speedup else None,
        n_blocks=speedup.n_blocks if speedup else None,
        tpot_sec=found.tpot_sec,
        ttft_sec=found.ttft_sec,
        weights_bytes=memory.weights_bytes,
        kv_cache_bytes=memory.kv_cache_bytes,
        activation_peak_bytes=memory.activation_peak_bytes,
        rss_peak_bytes=memory.rss_peak_bytes,
        load_sec=found.load_sec,
        compile_sec=found.compile_sec,
        break_even_tokens=found.break_even_tokens,
        mbu=found.mbu,
    )


def _speed_cell(row: TrialRow) -> str:
    if row.role == "baseline" and row.speedup is not None:
        return f"{format_ratio(row.speedup)} (reference)"
    return format_ratio(row.speedup, row.speedup_low, row.speedup_high)


def _quality_cell(row: TrialRow) -> str:
    if row.role == "baseline":
        return "none (reference)"
    if row.ppl_increase is None:
        return "none (lossless)" if row.guarantee == "lossless" else NOT_MEASURED
    middle, upper = (format_percent(v, signed=True) for v in (row.ppl_increase, row.ppl_increase_upper))
    return middle if row.ppl_increase_upper is None or upper == middle else f"{middle}, at most {upper}"


def _guarantee_cell(row: TrialRow) -> str:
    if row.guarantee == "bounded" and row.within_bound is False:
        return "none"  # "bounded" would promise what the measurement refuted
    return row.guarantee or "-"


TRIAL_COLUMNS: tuple[Column, ...] = (
    Column("name", "Candidate", numeric=False, term="Baseline"),
    Column("judgement", "Result", numeric=False),
    Column("speedup", "Speed-up", _speed_cell, term="Speed-up"),
    Column("tpot_sec", "TPOT", term="TPOT"),
    Column("ttft_sec", "TTFT", term="TTFT"),
    Column("weights_bytes", "Weights", term="Weights"),
    Column("rss_peak_bytes", "Peak memory", term="Peak memory"),
    Column("ppl_increase", "Quality loss", _quality_cell, term="Quality loss"),
    Column("guarantee", "Guarantee", _guarantee_cell, numeric=False, term="Guarantee"),
    Column("cause", "Cause", lambda row: row.cause or "-", numeric=False),
)

EXCLUDED_COLUMNS: tuple[Column, ...] = (TRIAL_COLUMNS[0], Column("cause", "Why it cannot win", numeric=False))

# What fits on a terminal; the file beside it and the report hold the rest.
SHORT_COLUMNS: tuple[Column, ...] = (
    *(c for c in TRIAL_COLUMNS if c.key in ("name", "judgement", "speedup", "tpot_sec")),
    Column("ppl_increase_upper", "Loss at most", term="Quality loss"),
    TRIAL_COLUMNS[-1],
)


# --- the peers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeerLine:
    """One engine beside the plan as it is shown. `ratio`: the plan's speed over it."""

    engine: str
    judgement: str
    seconds: float | None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    top1_share: float | None = None
    logits_rel_rms: float | None = None
    perplexity: float | None = None
    ppl_increase_upper: float | None = None
    keeps_bound: str = "-"
    version: str | None = None
    cause: str = ""


def peer_lines(result: TuneResult) -> list[PeerLine]:
    """What the plan runs, the baseline, then one row a peer; none where no peer was asked for."""
    measured = result.peers_measured
    if not result.peers or measured is None:
        return []
    ours, base = measured.reference_sec, measured.baseline_sec
    rows = [PeerLine(f"{plain(measured.reference)} (ours)", "the plan", ours)]
    if base is not None and base != ours:
        rows.append(PeerLine("baseline (ours)", "-", base, base / ours if ours else None))
    return [*rows, *map(_peer_line, result.peers)]


def _peer_line(peer: PeerRow) -> PeerLine:
    ratio, agreement, quality = peer.ratio, peer.agreement, peer.quality
    status = "not reached" if peer.status == "not_reached" else plain(peer.status)
    return PeerLine(
        engine=plain(peer.engine),
        judgement=STATUS_WORDS.get(str(peer.verdict), status),
        seconds=peer.seconds,
        ratio=ratio.value if ratio else None,
        ratio_low=ratio.low if ratio else None,
        ratio_high=ratio.high if ratio else None,
        top1_share=agreement.top1_share if agreement else None,
        logits_rel_rms=agreement.logits_rel_rms if agreement else None,
        perplexity=quality.perplexity if quality else None,
        ppl_increase_upper=quality.ppl_increase_upper if quality else None,
        keeps_bound={True: "yes", False: "no", None: "not known"}[quality.keeps_bound if quality else None],
        version=peer.version,
        cause=plain(peer.cause or ""),
    )


def _share_cell(key: str) -> Callable[[PeerLine], str]:
    return lambda row: "-" if getattr(row, key) is None else format_percent(getattr(row, key))


def _peer_ratio_cell(row: PeerLine) -> str:
    return "-" if row.ratio is None else format_ratio(row.ratio, row.ratio_low, row.ratio_high)


PEER_COLUMNS: tuple[Column, ...] = (
    Column("engine", "Engine", numeric=False),
    Column("judgement", "Against the plan", numeric=False),
    Column("ratio", "Plan's speed over it", _peer_ratio_cell),
    Column("seconds", "Time", lambda row: "-" if row.seconds is None else format_sec(row.seconds)),
    Column("top1_share", "Same top token", _share_cell("top1_share")),
    Column("logits_rel_rms", "Logit error", _share_cell("logits_rel_rms")),
    Column("perplexity", "Perplexity", lambda row: "-" if row.perplexity is None else f"{row.perplexity:.4g}"),
    Column("ppl_increase_upper", "Loss at most", _share_cell("ppl_increase_upper")),
    Column("keeps_bound", "Keeps the bound", lambda row: plain(row.keeps_bound), numeric=False),
    Column("version", "Version", lambda row: plain(row.version or "-"), numeric=False),
    Column("cause", "Cause", lambda row: row.cause or "-", numeric=False),
)
