"""Other engines beside the winner: one interleaved measurement in fresh processes once the search has decided.

A plan cannot run another engine, so a peer never becomes the plan. What it does is told: that it is faster, slower or
the same, what it does to perplexity on the windows of the confirmation, or why it was not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from paretune import clock, hardware
from paretune.errors import ParetuneError
from paretune.evaluate.fidelity import Scores, text_hash_of
from paretune.measure import bench as measure
from paretune.measure.peers import envs
from paretune.measure.peers.catalogue import Engine, engines_of
from paretune.records.bench import PHASES, BenchRow, Status
from paretune.records.peers import Comparison, PeerQuality, PeerRow, PeersMeasured, Ratio
from paretune.records.record import from_json, to_json
from paretune.report.peers import KINDS, inverse
from paretune.tune import peer_quality
from paretune.tune.outcome import baseline_recipe
from paretune.tune.race import BASELINE

if TYPE_CHECKING:
    import numpy as np
    import torch

    from paretune.recipe import Recipe
    from paretune.tune.goal import Goal
    from paretune.tune.outcome import Outcome

SAMPLES = "peers.jsonl"
SHARE, LEAST_EACH_SEC = 0.15, 10.0  # timing: of the budget, and at least for each process, warm-up included
N_OURS = 3  # the winner, again, and the baseline
SEED_STEP = 2000  # fresh prompts: neither those of the search nor of the confirmation (+1000)
DEFINITIONS = {
    "ratio": "seconds of the peer / seconds of the winner: above 1 the winner is faster",
    "verdict": "of the peer against the winner: faster, slower, indistinguishable, undecided",
    "agreement": "with our fp32 eager on text that the model wrote itself",
    "ppl_increase": "of the peer over the baseline, on the windows of the confirmation, each shown whole (prefill); "
    "ppl_increase_upper is the one-sided 95 % bound",
    "keeps_bound": "ppl_increase_upper is within the goal's bound; null where it is not known (quality_reason)",
}


def timing_sec(goal: Goal) -> float:
    """How long the peers are timed at most, on top of the budget."""
    return max(SHARE * goal.budget_sec, LEAST_EACH_SEC * (N_OURS + len(goal.engines)))


def announcement(goal: Goal) -> str:
    """What the comparison takes, before it starts."""
    said = (
        f"up to {timing_sec(goal):.0f} s of timing on top of the budget; starting, checking and, the first time, "
        "converting for each engine takes its own time besides, and so does scoring each on text"
    )
    if goal.in_bytes:
        said += f"; peers are compared in {KINDS['tpot']} only, not in {goal.objective}"
    return said


def missing(goal: Goal) -> dict[str, str]:
    """Causes by name of the engines that cannot even be started here."""
    causes = {}
    for engine in _engines(goal):
        try:
            envs.command(engine.peer)
        except ParetuneError as error:
            causes[engine.name] = str(error)
    return causes


def chosen(out: Outcome) -> tuple[str, Recipe]:
    """(name in the measurement, recipe) of what the plan runs."""
    if out.winner and out.winner != BASELINE:
        return "winner", out.race.trials[out.winner].recipe
    return BASELINE, baseline_recipe(out)


def compare(
    out: Outcome,
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
    *,
    windows: torch.Tensor | None = None,
    baseline_nll: np.ndarray | None = None,
) -> Comparison:
    """Measures the baseline, the winner and the peers of the goal side by side; Ctrl-C ends it early, not the run.

    Args:
        windows: the windows of the confirmation, int64 `[N, T]`, on which peers are scored; None: they are not.
        baseline_nll: the baseline's losses there, nats, `[N, T - 1]` (`peer_quality.losses_of`); None: those of the
            confirmation, or scored here where it left none.

    Returns:
        `rows`, one a peer, measured or with its cause; `measured`: how it was done.
    """
    compared = _timed(out, folder, say)
    engines = [e for e, row in zip(_engines(out.goal), compared.rows, strict=True) if row.verdict is not None]
    found: dict[str, PeerQuality] = {}
    interrupted = compared.measured.interrupted
    if windows is not None and engines:
        try:
            found = _scored(out, engines, windows, baseline_nll, say)
        except KeyboardInterrupt:
            interrupted = True
            found = {e.name: PeerQuality.unknown("scoring was interrupted") for e in engines} | _known(out)
        except ParetuneError as error:  # of the baseline: an engine's own is in its row
            reason = f"the baseline could not be scored: {error.cause}"
            found = {e.name: PeerQuality.unknown(reason) for e in engines}
    rows = [replace(row, quality=found.get(row.engine, row.quality)) for row in compared.rows]
    return Comparison(rows, replace(compared.measured, interrupted=interrupted))


def _engines(goal: Goal) -> list[Engine]:
    return engines_of(",".join(goal.engines))[1] if goal.engines else []


def _known(out: Outcome) -> dict[str, PeerQuality]:
    """What was scored to the end, by engine, in earlier runs too."""
    lines = out.race.journal.all("peer_quality")
    found = {line["engine"]: from_json(PeerQuality, line["result"], "the journal") for line in lines}
    return {engine: quality for engine, quality in found.items() if quality.keeps_bound is not None}


def _scored(
    out: Outcome,
    engines: list[Engine],
    windows: torch.Tensor,
    baseline_nll: np.ndarray | None,
    say: Callable[[str], None],
) -> dict[str, PeerQuality]:
    """Results of `peer_quality` by engine; what is known is not scored again."""
    known = _known(out)
    left = [engine for engine in engines if engine.name not in known]
    if not left:
        return known
    threads = hardware.set_threads(out.goal.threads)["threads"]
    if baseline_nll is None:
        baseline_nll = _confirmed_losses(out, windows)
    if baseline_nll is None:
        say("scoring the baseline on the text of the confirmation")
        baseline_nll = peer_quality.baseline_losses(out.model_folder, baseline_recipe(out), windows, threads)
    return known | peer_quality.measure(
        out.model_folder,
        left,
        windows,
        baseline_nll,
        out.goal.max_ppl_increase,
        threads=threads,
        say=say,
        on_result=lambda name, result: out.race.journal.record("peer_quality", engine=name, result=to_json(result)),
    )


def _confirmed_losses(out: Outcome, windows: torch.Tensor) -> np.ndarray | None:
    """The baseline's losses on these very windows, where this run scored them: by itself or by a lossless form."""
    text_hash = text_hash_of(windows)
    for line in out.race.journal.all("scored"):
        state = out.race.trials.get(line["trial"])
        path = out.race.scores_path(line["trial"], line["split"], line["start"], line["stop"])
        if state is None or state.recipe.changes_numbers or not path.is_file():
            continue
        scores = Scores.load(path)
        if scores.text_hash == text_hash:
            return peer_quality.losses_of(scores)
    return None


def _timed(out: Outcome, folder: Path, say: Callable[[str], None]) -> Comparison:
    """The rows and how they were measured, quality aside."""
    goal, journal = out.goal, out.race.journal
    name, recipe = chosen(out)
    kind = goal.sample_kind
    about = PeersMeasured(
        reference=recipe.name,
        kind=kind,
        timing_sec=timing_sec(goal),
        samples_file=SAMPLES,
        definitions=DEFINITIONS,
    )
    engines = _engines(goal)

    def absent(status: Status, causes: Mapping[str, str]) -> Comparison:
        return Comparison([_absent(e.name, kind, status, causes[e.name]) for e in engines], about)

    def all_absent(status: Status, cause: str) -> Comparison:
        return absent(status, {e.name: cause for e in engines})

    if out.kind == "interrupted":
        return all_absent("not_reached", "the search was interrupted before it")
    if line := journal.find("peers", reference=recipe.hash):
        known = from_json(Comparison, {key: line[key] for key in ("rows", "measured")}, "the journal")
        if all(row.status == "measured" for row in known.rows):
            return known
    if len(gone := missing(goal)) == len(engines):  # nothing to start the others for
        return absent("failed", gone)
    say(f"comparing {recipe.name} with {', '.join(goal.engines)}: {announcement(goal)}")
    configs = [(name, recipe)] + ([(BASELINE, baseline_recipe(out))] if name != BASELINE else [])
    started = clock.now()
    try:
        result = measure.bench(
            out.model_folder,
            configs,
            input_lens=(goal.input_len,),
            output_lens=(goal.output_len,),
            batch_sizes=(goal.batch_size,),
            baseline=name,
            kinds=(kind,),
            budget_sec=timing_sec(goal),
            loading_counts=False,
            seed=goal.seed + SEED_STEP,
            device=goal.device,
            threads=goal.threads,
            on_progress=say,
            sample_log=folder / SAMPLES,
            engines=engines,
        )
    except KeyboardInterrupt:
        about = replace(about, interrupted=True, elapsed_sec=clock.now() - started)
        return all_absent("not_reached", "the comparison was interrupted")
    except ParetuneError as error:
        about = replace(about, elapsed_sec=clock.now() - started)
        return all_absent("failed", f"the comparison failed: {error.cause}")
    rows = {row.config: row for row in result.rows if row.role != "twin"}
    about = replace(
        about,
        elapsed_sec=clock.now() - started,
        too_noisy=result.too_noisy,
        aa_half_width=result.widest,
        reference_sec=_seconds(rows[name], kind),
        baseline_sec=_seconds(rows[BASELINE], kind) if BASELINE in rows else None,
    )
    told = [_row(rows[engine.name], kind) for engine in engines]
    if rows[name].status != "measured":  # nothing to compare with
        cause = f"{recipe.name} failed beside it: {rows[name].cause}"
        told = [replace(row, status="failed", cause=cause) if row.status == "measured" else row for row in told]
    compared = Comparison(told, about)
    journal.record("peers", reference=recipe.hash, **to_json(compared))
    return compared


def _seconds(row: BenchRow, kind: str) -> float | None:
    """Median seconds of the unit that was timed: a token, or the first one."""
    if kind == "throughput":
        rate = row.throughput_tokens_per_sec
        return 1 / rate if rate else None
    return row.ttft_sec if kind == "ttft" else row.tpot_sec


def _absent(engine: str, kind: str, status: Status, cause: str) -> PeerRow:
    """A peer that was not measured."""
    return PeerRow(
        engine=engine,
        format=engine.partition(":")[2],
        version=None,
        status=status,
        cause=cause or None,
        kind=kind,
        seconds=None,
        ratio=None,
        verdict=None,
        agreement=None,
        rss_peak_bytes=None,
        quality=PeerQuality.unknown("it was not scored"),
    )


def _row(row: BenchRow, kind: str) -> PeerRow:
    """A peer as the report has it, from its row of `bench`: the other way round, the winner over the peer."""
    told = replace(
        _absent(row.config, kind, row.status, row.cause),
        version=row.engine_version,
        seconds=_seconds(row, kind),
        agreement=row.agreement,
        rss_peak_bytes=row.rss_peak_bytes,
        notes=list(row.notes),
    )
    phase = row.phase(PHASES[kind])
    if row.status == "measured" and phase is not None and phase.speedup:
        assert phase.verdict != "baseline", "a peer is measured beside ours"
        ratio = Ratio(*(inverse(v) for v in (phase.speedup, phase.speedup_high, phase.speedup_low)))
        told = replace(told, ratio=ratio, verdict=phase.verdict or "undecided")
    return told
