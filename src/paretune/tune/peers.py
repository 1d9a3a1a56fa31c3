"""Other engines beside the winner: one interleaved measurement in fresh processes once the search has decided.

A plan cannot run another engine, so a peer never becomes the plan. What it does is told: that it is faster, slower or
the same, what it does to perplexity on the windows of the confirmation, or why it was not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune import clock, hardware
from paretune.errors import ParetuneError
from paretune.evaluate.fidelity import Scores, text_hash_of
from paretune.measure import bench as measure
from paretune.measure.peers import envs
from paretune.measure.peers.catalogue import Engine, engines_of
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
_WHAT = {"tpot": "decodes a token", "ttft": "gives its first token", "throughput": "produces tokens"}
_KINDS = {"tpot": "time per output token", "ttft": "time to the first token", "throughput": "output tokens per second"}
_PHASES = {"tpot": "decode", "ttft": "prefill", "throughput": "throughput"}


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
        said += f"; peers are compared in {_KINDS['tpot']} only, not in {goal.objective}"
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
) -> dict[str, Any]:
    """Measures the baseline, the winner and the peers of the goal side by side; Ctrl-C ends it early, not the run.

    Args:
        windows: the windows of the confirmation, int64 `[N, T]`, on which peers are scored; None: they are not.
        baseline_nll: the baseline's losses there, nats, `[N, T - 1]` (`peer_quality.losses_of`); None: those of the
            confirmation, or scored here where it left none.

    Returns:
        `rows`, one a peer, measured or with its cause; `measured`: how it was done.
    """
    compared = _timed(out, folder, say)
    about = dict(compared["measured"])
    rows = [{**peer_quality.unknown("it was not scored"), **row} for row in compared["rows"]]
    engines = [e for e, row in zip(_engines(out.goal), rows, strict=True) if row["verdict"] is not None]
    found: dict[str, dict[str, Any]] = {}
    if windows is not None and engines:
        try:
            found = _scored(out, engines, windows, baseline_nll, say)
        except KeyboardInterrupt:
            about["interrupted"] = True
            found = {e.name: peer_quality.unknown("scoring was interrupted") for e in engines} | _known(out)
        except ParetuneError as error:  # of the baseline: an engine's own is in its row
            found = {e.name: peer_quality.unknown(f"the baseline could not be scored: {error.cause}") for e in engines}
    return {"rows": [row | found.get(row["engine"], {}) for row in rows], "measured": about}


def _engines(goal: Goal) -> list[Engine]:
    return engines_of(",".join(goal.engines))[1] if goal.engines else []


def _known(out: Outcome) -> dict[str, dict[str, Any]]:
    """What was scored to the end, by engine, in earlier runs too."""
    lines = out.race.journal.all("peer_quality")
    return {line["engine"]: line["result"] for line in lines if line["result"]["keeps_bound"] is not None}


def _scored(
    out: Outcome,
    engines: list[Engine],
    windows: torch.Tensor,
    baseline_nll: np.ndarray | None,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
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
        on_result=lambda name, result: out.race.journal.record("peer_quality", engine=name, result=result),
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


def _timed(out: Outcome, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The rows and how they were measured, quality aside."""
    goal, journal = out.goal, out.race.journal
    name, recipe = chosen(out)
    kind = goal.sample_kind
    about: dict[str, Any] = {
        "reference": recipe.name,
        "kind": kind,
        "timing_sec": timing_sec(goal),
        "elapsed_sec": 0.0,
        "interrupted": False,
        "too_noisy": False,
        "aa_half_width": None,
        "reference_sec": None,
        "baseline_sec": None,
        "samples_file": SAMPLES,
        "definitions": DEFINITIONS,
    }
    engines = _engines(goal)

    def absent(status: str, cause: str) -> dict[str, Any]:
        return {"rows": [_row({"config": e.name, "status": status, "cause": cause}, kind) for e in engines],
                "measured": about}  # fmt: skip

    if out.kind == "interrupted":
        return absent("not_reached", "the search was interrupted before it")
    known = journal.find("peers", reference=recipe.hash)
    if known and all(row["status"] == "measured" for row in known["rows"]):
        return {"rows": known["rows"], "measured": known["measured"]}
    if len(gone := missing(goal)) == len(engines):  # nothing to start the others for
        return {"rows": [_row({"config": e.name, "status": "failed", "cause": gone[e.name]}, kind) for e in engines],
                "measured": about}  # fmt: skip
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
        about |= {"interrupted": True, "elapsed_sec": clock.now() - started}
        return absent("not_reached", "the comparison was interrupted")
    except ParetuneError as error:
        about |= {"elapsed_sec": clock.now() - started}
        return absent("failed", f"the comparison failed: {error.cause}")
    rows = {row["config"]: row for row in result["rows"] if row["role"] != "twin"}
    widths = [entry["half_width"] for entry in result["aa"] if entry["half_width"] is not None]
    seconds = {n: _seconds(rows[n], kind) if n in rows else None for n in (name, BASELINE)}
    about |= {
        "elapsed_sec": clock.now() - started,
        "too_noisy": result["too_noisy"],
        "aa_half_width": max(widths, default=None),
        "reference_sec": seconds[name],
        "baseline_sec": seconds[BASELINE],
    }
    told = [_row(rows[engine.name], kind) for engine in engines]
    if rows[name]["status"] != "measured":  # nothing to compare with
        for row in told:
            if row["status"] == "measured":
                row |= {"status": "failed", "cause": f"{recipe.name} failed beside it: {rows[name]['cause']}"}
    journal.record("peers", reference=recipe.hash, rows=told, measured=about)
    return {"rows": told, "measured": about}


def _seconds(row: dict[str, Any], kind: str) -> float | None:
    """Median seconds of the unit that was timed: a token, or the first one."""
    if kind == "throughput":
        rate = row.get("throughput_tokens_per_sec")
        return 1 / rate if rate else None
    return row.get(f"{kind}_sec")


def _row(row: dict[str, Any], kind: str) -> dict[str, Any]:
    """A peer as the report has it, from its row of `bench`: the other way round, the winner over the peer."""
    phase = _PHASES[kind]
    value, low, high = (row.get(f"{phase}_speedup{end}") for end in ("", "_low", "_high"))
    checked = {k.removeprefix("agreement_"): v for k, v in row.items() if k.startswith("agreement_")}
    compared = row["status"] == "measured" and value
    return {
        "engine": row["config"],
        "format": row["config"].partition(":")[2],
        "version": row.get("engine_version"),
        "status": row["status"],
        "cause": row["cause"] or None,
        "kind": kind,
        "seconds": _seconds(row, kind),
        "ratio": {"value": _inverse(value), "low": _inverse(high), "high": _inverse(low)} if compared else None,
        "verdict": row.get(f"{phase}_verdict") or "undecided" if compared else None,
        "agreement": checked if any(v is not None for v in checked.values()) else None,
        "rss_peak_bytes": row.get("rss_peak_bytes"),
        "notes": list(row.get("notes") or ()),
        **peer_quality.unknown("it was not scored"),
    }


def _inverse(value: float | None) -> float | None:
    return 1 / value if value and math.isfinite(value) else None


def sentences(goal: Goal, peers: dict[str, Any] | None) -> list[str]:
    """What became of each peer, in plain words."""
    if not peers:
        return []
    ours, said = peers["measured"]["reference"], []
    for row in peers["rows"]:
        said += _about(row, ours, goal)
    if goal.in_bytes:
        said.append(f"Peers are compared in {_KINDS['tpot']} only, not in {goal.objective}.")
    if peers["measured"]["too_noisy"]:
        said.append("This machine was too noisy while the peers were measured to judge them.")
    return said


def _quality(row: dict[str, Any], goal: Goal) -> str:
    """What it does to perplexity, and whether that is within the bound of the goal."""
    bound = f"your perplexity bound of {goal.max_ppl_increase * 100:g} %"
    if row["keeps_bound"] is None:
        return f"Whether it keeps {bound} is not known: {row['quality_reason']}."
    if row["ppl_increase_upper"] is None:
        return f"It does not keep {bound}: {row['quality_reason']}."
    change = (
        f"its perplexity on the text of the confirmation is {row['perplexity']:.4g}, {row['ppl_increase']:+.2%} "
        f"against the baseline and with 95 % confidence at most {row['ppl_increase_upper']:+.2%}"
    )
    if row["keeps_bound"]:
        return f"It keeps {bound}: {change}."
    if row["ppl_increase"] <= goal.max_ppl_increase:
        return f"It is not shown to keep {bound}: {change}."
    return f"It does not keep {bound}: {change}."


def _about(row: dict[str, Any], ours: str, goal: Goal) -> list[str]:
    engine, verdict = row["engine"], row["verdict"]
    if verdict is None:
        return [f"{engine} was not compared: {(row['cause'] or 'it was not measured').rstrip('.')}."]
    ratio = row["ratio"]
    what = _WHAT[row["kind"]]
    against = f"{engine} {what} {1 / ratio['value']:.2f} times as fast as {ours} {_interval(ratio, flip=True)}"
    quality = _quality(row, goal)
    if verdict == "indistinguishable":
        return [f"{engine} and {ours}: no difference beyond noise. {against}.", quality]
    if verdict == "slower":
        return [f"{engine} is slower: {ours} {what} {ratio['value']:.2f} times as fast {_interval(ratio)}.", quality]
    if verdict != "faster":
        return [f"{engine} against {ours} is undecided: {against}.", quality]
    agreement = row["agreement"] or {}
    error, same = agreement.get("logits_rel_rms"), agreement.get("top1_share")
    measured = "with a logit error that was not measured" if error is None else f"with a logit error of {error:.2%}"
    top = "" if same is None else f" (the same most likely token at {same:.1%} of the positions)"
    return [
        f"{engine} {'is faster' if row['keeps_bound'] is False else 'won'}: {against}.",
        f"It computes in the format {row['format']}, {measured} against our fp32{top}.",
        quality,
        f"A plan cannot run {engine.partition(':')[0]}: this plan runs the best of our own recipes, {ours}.",
    ]


def _interval(ratio: dict[str, Any], flip: bool = False) -> str:
    low, high = ratio["low"], ratio["high"]
    if flip:
        low, high = _inverse(high), _inverse(low)
    if low is None or high is None:
        return "(too few samples for an interval)"
    return f"(95 % interval {low:.2f} to {high:.2f}, in fresh processes)"
