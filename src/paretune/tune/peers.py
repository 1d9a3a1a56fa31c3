"""Other engines beside the winner: one interleaved measurement in fresh processes once the search has decided.

A plan cannot run another engine, so a peer never becomes the plan. What it does is told: that it is faster, slower or
the same, or why it was not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune import clock
from paretune.errors import ParetuneError
from paretune.measure import bench as measure
from paretune.measure.peers import envs
from paretune.measure.peers.catalogue import engines_of
from paretune.tune.outcome import baseline_recipe
from paretune.tune.race import BASELINE

if TYPE_CHECKING:
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
    "agreement": "with our fp32 eager on random tokens; not the perplexity bound of the goal",
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
        "converting for each engine takes its own time besides"
    )
    if goal.in_bytes:
        said += f"; peers are compared in {_KINDS['tpot']} only, not in {goal.objective}"
    return said


def missing(goal: Goal) -> dict[str, str]:
    """Causes by name of the engines that cannot even be started here."""
    causes = {}
    for engine in engines_of(",".join(goal.engines))[1] if goal.engines else ():
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


def compare(out: Outcome, folder: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measures the baseline, the winner and the peers of the goal side by side; Ctrl-C ends it early, not the run.

    Returns:
        `rows`, one a peer, measured or with its cause; `measured`: how it was done.
    """
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
    engines = engines_of(",".join(goal.engines))[1]

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
    compared = [row for row in peers["rows"] if row["verdict"]]
    if compared and not any(row["verdict"] == "faster" for row in compared):
        said.append(f"{_not_held(goal, len(compared) > 1)}.")
    return said


def _not_held(goal: Goal, many: bool = False) -> str:
    limit = f"your perplexity bound of {goal.max_ppl_increase * 100:g} %"
    who = "The peers were" if many else "The peer was"
    return f"{who} held to agreement with our fp32 on random tokens, not to {limit}"


def _about(row: dict[str, Any], ours: str, goal: Goal) -> list[str]:
    engine, verdict = row["engine"], row["verdict"]
    if verdict is None:
        return [f"{engine} was not compared: {(row['cause'] or 'it was not measured').rstrip('.')}."]
    ratio = row["ratio"]
    what = _WHAT[row["kind"]]
    against = f"{engine} {what} {1 / ratio['value']:.2f} times as fast as {ours} {_interval(ratio, flip=True)}"
    if verdict == "indistinguishable":
        return [f"{engine} and {ours}: no difference beyond noise. {against}."]
    if verdict == "slower":
        return [f"{engine} is slower: {ours} {what} {ratio['value']:.2f} times as fast {_interval(ratio)}."]
    if verdict != "faster":
        return [f"{engine} against {ours} is undecided: {against}."]
    agreement = row["agreement"] or {}
    error, same = agreement.get("logits_rel_rms"), agreement.get("top1_share")
    quality = "with a logit error that was not measured" if error is None else f"with a logit error of {error:.2%}"
    top = "" if same is None else f" (the same most likely token at {same:.1%} of the positions)"
    return [
        f"{engine} won: {against}.",
        f"It computes in the format {row['format']}, {quality} against our fp32{top}.",
        f"It was held to that agreement, not to your perplexity bound of {goal.max_ppl_increase * 100:g} %: "
        "whether it keeps the bound is not known.",
        f"A plan cannot run {engine.partition(':')[0]}: this plan runs the best of our own recipes, {ours}.",
    ]


def _interval(ratio: dict[str, Any], flip: bool = False) -> str:
    low, high = ratio["low"], ratio["high"]
    if flip:
        low, high = _inverse(high), _inverse(low)
    if low is None or high is None:
        return "(too few samples for an interval)"
    return f"(95 % interval {low:.2f} to {high:.2f}, in fresh processes)"
