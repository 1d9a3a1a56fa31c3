"""What `tune` found, in plain words: the sentences of the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paretune import stats
from paretune.records.judge import judge_bytes
from paretune.records.peers import Comparison
from paretune.records.tune import Ratio, TrialMeasured, TuneResult, TuneTrial
from paretune.report import peers, regimes

SIDE_LOSS = 1.3  # a single sample each: smaller differences may be noise
_WHAT = {
    "tpot": "decodes a token",
    "ttft": "gives its first token",
    "throughput": "produces tokens",
    "memory": "runs in memory",
    "size": "stores its weights",
}


def sentences(result: TuneResult, notes: Sequence[str] = (), winner_notes: Sequence[str] = ()) -> list[str]:
    """The verdict.

    Args:
        notes: what the search has to say besides.
        winner_notes: what the user should know of the winner.
    """
    goal, half_width = result.goal, math.inf if result.aa is None else result.aa.half_width
    winner, base = result.winner, result.baseline
    said: list[str] = []
    if winner and winner.measured and base and base.measured:
        said += _of_winner(result, winner, winner.measured, base.measured)
        said += [note if note.endswith(".") else note + "." for note in winner_notes]
    elif result.too_noisy:
        said.append(
            f"The baseline against itself differs by up to {half_width * 100:.0f} %: "
            "this machine is too noisy now to judge anything."
        )
    elif result.outcome == "interrupted":
        said.append("The run was interrupted before anything was shown to beat the baseline: it is kept so far.")
        said += not_taken(result)
    elif not _compared(result) or (not goal.in_bytes and math.isinf(half_width)):
        said.append("The budget was too short to judge any candidate: the baseline is kept. Allow more with --budget.")
    elif others := not_taken(result):
        said += ["The baseline is kept, although others were faster.", *others]
    elif result.outcome == "baseline":
        said.append("Nothing that keeps the quality beat the baseline beyond noise: keep it.")
        if undecided := _undecided(result, half_width):
            best = max(undecided, key=lambda t: _gain(result, t))
            said.append(
                f"{best.name} looks {_gain(result, best):.2f} times as fast, but that is not "
                "proved: allow more with --budget."
            )
    if result.outcome == "none":
        said.append(f"No recipe reaches the requested speed-up of {goal.min_speedup:g} within the quality bound.")
    compared = None if result.peers_measured is None else Comparison(result.peers, result.peers_measured)
    return [
        *said,
        *notes,
        *regimes.sentences(result.regimes),
        *peers.sentences(compared, goal.max_ppl_increase, goal.objective),
    ]


def _of_winner(result: TuneResult, winner: TuneTrial, ours: TrialMeasured, theirs: TrialMeasured) -> list[str]:
    goal, confirmed, what = result.goal, result.confirmation, _WHAT[result.goal.objective]
    said = []
    if goal.in_bytes:
        said.append(f"{winner.name} {what} {_gain(result, winner):.2f} times smaller than the baseline.")
        if confirmed:
            speed = confirmed.speedup
            said.append(f"Its decode speed is {speed.value:.2f} times the baseline's ({speed.verdict}).")
    else:
        ratio: Ratio | None = confirmed.speedup if confirmed else ours.speedup
        assert ratio is not None, "the baseline is no winner"
        said.append(
            f"{winner.name} {what} {ratio.value:.2f} times as fast as the baseline "
            f"(95 % interval {ratio.low:.2f} to {ratio.high:.2f}"
            + (", in fresh processes)." if confirmed else ", not confirmed yet).")
        )
    quality = confirmed.quality if confirmed else ours.quality
    if winner.label == "lossless":
        said.append("It is lossless: it gives the tokens of the reference, which was checked before it was timed.")
    elif quality is not None:
        said.append(
            f"Perplexity changes by {quality.ppl_increase * 100:+.2f} %, at most "
            f"{quality.ppl_increase_upper * 100:+.2f} %; you allowed {goal.max_ppl_increase * 100:g} %."
        )
    w, b = ours.memory.weights_bytes, theirs.memory.weights_bytes
    if w != b:
        said.append(f"Its weights take {w / 1e6:.1f} MB instead of {b / 1e6:.1f} MB.")
    return said + _other_phase(result, ours, theirs)


def _other_phase(result: TuneResult, ours: TrialMeasured, theirs: TrialMeasured) -> list[str]:
    """What the winner costs in the phase that was not asked for; taken once each, so only a large change is told."""
    told = []
    for kind, what, sec, base_sec in (
        ("ttft", "the first token", ours.ttft_sec, theirs.ttft_sec),
        ("tpot", "each later token", ours.tpot_sec, theirs.tpot_sec),
    ):
        if ours is not theirs and kind != result.goal.sample_kind and sec > SIDE_LOSS * base_sec:
            told.append(f"But {what} takes {sec / base_sec:.1f} times as long ({sec * 1e3:.3g} ms).")
    return told


def _compared(result: TuneResult) -> list[TuneTrial]:
    """Candidates that were measured beside the baseline."""
    # The deadline may have cut a first block before the baseline's turn: that compares with nothing.
    return [t for t in result.trials if t.measured and t.measured.speedup and t.measured.speedup.value is not None]


def _gain(result: TuneResult, trial: TuneTrial) -> float:
    """How many times better than the baseline: speed, or bytes where the objective is in bytes."""
    base, ours = result.baseline, trial.measured
    assert base is not None and base.measured is not None and ours is not None
    if result.goal.in_bytes:
        return result.goal.bytes_of(base.measured.memory) / result.goal.bytes_of(ours.memory)
    assert ours.speedup is not None and ours.speedup.value is not None, "it is one of `_compared`"
    return ours.speedup.value


def _verdict(result: TuneResult, trial: TuneTrial) -> stats.Verdict:
    assert trial.measured is not None and trial.measured.speedup is not None, "it is one of `_compared`"
    return judge_bytes(_gain(result, trial)) if result.goal.in_bytes else trial.measured.speedup.verdict


def not_taken(result: TuneResult, most: int = 3) -> list[str]:
    """What was surely faster and why it is not the plan, the fastest first."""
    told = []
    faster = [t for t in _compared(result) if _verdict(result, t) == "faster"]
    for trial in sorted(faster, key=lambda t: -_gain(result, t))[:most]:
        why = f": {trial.standing.why}" if trial.standing.why else ""
        what = "times smaller" if result.goal.in_bytes else "times as fast"
        told.append(
            f"{trial.name} was {_gain(result, trial):.2f} {what} and was not taken ({trial.standing.word}{why})."
        )
    return told


def _undecided(result: TuneResult, half_width: float) -> list[TuneTrial]:
    """Candidates that look faster and were neither shown to be nor turned away."""
    if result.goal.in_bytes:
        return []
    least = half_width if math.isfinite(half_width) else stats.DELTA
    turned_away = ("over the quality limit", "did not hold")
    open_ = [t for t in _compared(result) if t.standing.word not in turned_away]
    return [t for t in open_ if _gain(result, t) > 1 + least and _verdict(result, t) == "undecided"]
