"""From the outcome of a search to what is written: the result of the report, `trials.jsonl`, the plan."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from paretune import stats
from paretune.engine.load import load_recipe
from paretune.engine.plan import PLAN_FILE, SCHEMA_VERSION
from paretune.evaluate.fidelity import Fidelity
from paretune.files import ensure_folder, write_json, write_text
from paretune.measure import explain, roofline
from paretune.measure.environment import header
from paretune.model import checkpoint
from paretune.ops.attention.pattern import parse
from paretune.recipe import Recipe
from paretune.records.judge import judge
from paretune.records.record import to_json
from paretune.report import peers, regimes
from paretune.tune.outcome import Outcome, Standing, baseline_recipe
from paretune.tune.race import BASELINE, TWIN, TrialState

SIDE_LOSS = 1.3  # a single sample each: smaller differences may be noise
INSTANT_SEC = 1.0  # a conversion that takes longer is stored with the plan
STATUSES = ("measured", "failed", "invalid", "excluded", "not_reached")
RATE_OF = {None: "fp32", "bf16": "bf16", "fp16": "fp16"}


def result_of(out: Outcome) -> dict[str, Any]:
    """The dict that `report.html` shows and `report.json` holds."""
    goal, race = out.goal, out.race
    blocks = race.measured()
    aa = blocks.ratio(BASELINE, TWIN) if BASELINE in blocks.subjects else None
    trials = [_trial(out, state) for id, state in race.trials.items() if id != TWIN and not id.startswith("confirm")]
    known = {state.recipe.hash for state in race.trials.values()}
    trials += [_left_out(out, c.id, c.recipe) for c in out.space.legal if c.id not in known]
    counts = {s: sum(t["status"] == s for t in trials) for s in STATUSES}
    ceilings = out.ceilings
    states = blocks.by_state(BASELINE, TWIN) if BASELINE in blocks.subjects else None
    result: dict[str, Any] = {
        **header(seed=goal.seed),
        "kind": "tune",
        "model": {
            "name": out.model_name,
            "family": out.config.family,
            "n_parameters": _n_parameters(out),
            "n_layer": out.config.n_layer,
            "n_embd": out.config.n_embd,
            "vocab_size": out.config.vocab_size,
        },
        "goal": goal.to_json(),
        "outcome": out.kind,
        "too_noisy": out.too_noisy,
        "winner_id": out.winner,
        "baseline_id": BASELINE,
        "aa": None if aa is None or not math.isfinite(aa.high) else {**_interval(aa), "half_width": out.resolution},
        "bandwidth": {
            "sweep": [
                {"bytes": r["bytes"], "bytes_per_sec": r["bytes_per_sec"], "n_threads": r["threads"]}
                for r in (ceilings.read_bandwidth if ceilings else ())
            ],
            "states": _states(out) if states else None,
        },
        "matrix_rates": dict(ceilings.matrix_rates) if ceilings else {},
        "elapsed_sec": race.journal.elapsed_sec,
        "space": {
            "n_legal": len(out.space.legal) + 1,
            "n_illegal": len(out.space.illegal),
            "n_measured": counts["measured"],
            "n_failed": counts["failed"] + counts["invalid"],
            "n_excluded": counts["excluded"],
            "n_not_reached": counts["not_reached"],
            "illegal": [{"name": n, "reason": r} for n, r in out.space.illegal],
        },
        "trials": trials,
        "confirmation": out.confirmation,
        "n_repeated_slices": blocks.n_repeated,
        "samples_file": "samples.jsonl",
        "peers": [to_json(row) for row in out.peers.rows] if out.peers else [],
        "peers_measured": to_json(out.peers.measured) if out.peers else None,
        "regimes": to_json(out.regimes) if out.regimes else None,
    }
    result["again"] = result["command"]
    result["verdict"] = sentences(out, result)
    return result


def _left_out(out: Outcome, id: str, recipe: Recipe) -> dict[str, Any]:
    """The row of a candidate that was never started."""
    standing = out.standing(id)
    row = {"id": id, "name": recipe.name, "recipe": recipe.to_dict(), "standing": dataclasses.asdict(standing)}
    return row | _unmeasured(standing)


def _unmeasured(standing: Standing) -> dict[str, Any]:
    """Status and reason of a candidate without a measurement."""
    if standing.word in ("excluded", "over the quality limit"):
        return {"status": "excluded", "reason": standing.why}
    return {"status": "not_reached", "reason": standing.why or "the run ended before it was measured"}


def _trial(out: Outcome, state: TrialState) -> dict[str, Any]:
    blocks = out.race.measured()
    row: dict[str, Any] = {
        "id": state.id,
        "name": state.recipe.name,
        "recipe": state.recipe.to_dict(),
        "status": "measured",
        "reason": None,
        "label": _label(state.recipe, out.qualities.get(state.id)),
        "standing": dataclasses.asdict(out.standing(state.id)),
    }
    if state.failure:
        return row | {"status": state.failure_kind, "reason": state.failure}
    if state.facts is None or state.id not in blocks.subjects:
        return row | _unmeasured(out.standing(state.id))
    facts = state.facts
    median = float(_median(blocks.values(state.id)))
    times = dict(facts["side_sec"]) | ({out.goal.sample_kind: median} if out.goal.sample_kind != "throughput" else {})
    speed = blocks.ratio(BASELINE, state.id)
    by_state = blocks.by_state(BASELINE, state.id)
    quality = out.qualities.get(state.id)
    row |= {
        "speedup": None
        if state.id == BASELINE
        else {
            **_interval(speed),
            "n_blocks": speed.n,
            "verdict": judge(speed, out.resolution),
            "by_state": {k: _finite(by_state[i].value) for i, k in enumerate(("low", "high"))} if by_state else None,
        },
        "tpot_sec": times["tpot"],
        "ttft_sec": times["ttft"],
        "throughput_tokens_per_sec": 1 / median if out.goal.sample_kind == "throughput" else None,
        "memory": facts["memory"],
        "quality": quality.to_json() if quality else None,
        "load_sec": facts["load_sec"],
        "compile_sec": facts["compile_sec"],
        "break_even_tokens": _break_even(out, state, times["tpot"]),
        "proof": facts["proof"] + facts["notes"],
        "warm_settled": facts.get("warm_settled"),
        **_limits(out, state, times),
    }
    return row


def _limits(out: Outcome, state: TrialState, times: dict[str, float]) -> dict[str, Any]:
    """MBU, MFU, the sentence that says what bounds the phase of the objective, and the explanations of `profile`."""
    if out.ceilings is None or state.facts is None:
        return {"mbu": None, "mfu": None, "bound_by": None, "tpot_roofline_sec": None, "explanations": []}
    goal, config, facts = out.goal, out.config, state.facts
    rate = out.ceilings.matrix_rates.get(RATE_OF[state.recipe.dtype])
    # What a step must read: the weights but for the embedding rows that are not looked up, and the keys and values.
    pattern = parse(facts.get("attention_pattern", "causal"))
    kv = facts["kv_bytes_per_token"] * roofline.keys_seen(pattern, goal.input_len + 8)
    n_bytes = roofline.decode_bytes(facts["step_weights_bytes"], int(kv))
    bandwidth = out.ceilings.bandwidth_at(n_bytes)
    prefill = roofline.prefill_flops(config, goal.input_len, pattern=pattern) * goal.batch_size
    is_prefill = goal.objective == "ttft"
    sec = times["ttft" if is_prefill else "tpot"]
    seen = round(roofline.keys_seen(pattern, goal.input_len))
    flops = prefill if is_prefill else roofline.decode_flops(config, seen) * goal.batch_size
    phase = "prefill" if is_prefill else "decode"
    _, sentence = roofline.bound_by(phase, sec, n_bytes, flops, bandwidth, rate)  # type: ignore[arg-type]
    explanations = out.explanations.get(state.id)
    if explanations is None:  # what the rules say of a trial that was not profiled
        known = {
            "phase": phase,
            "device": goal.device,
            "recipe": state.recipe.to_dict(),
            "ceilings": out.ceilings.to_json(),
            "facts": facts.get("threads"),
            "whole": {
                "sec": sec,
                "dtype": RATE_OF[state.recipe.dtype],
                "bytes_per_weight": facts.get("bytes_per_weight"),
                "needed_bytes": n_bytes,
                "needed_flops": flops,
                "mbu": roofline.mbu(n_bytes, sec, bandwidth),
                "mfu": roofline.mfu(flops, sec, rate) if rate else None,
                "bound_by": sentence,
            },
        }
        explanations = [e.to_json() for e in explain.explain(known)]
    return {
        "mbu": roofline.mbu(n_bytes, times["tpot"], bandwidth),
        "mfu": roofline.mfu(prefill, times["ttft"], rate) if rate else None,
        "bound_by": sentence,
        "tpot_roofline_sec": n_bytes / bandwidth,  # a prediction: the least that these bytes take here
        "explanations": explanations,
    }


def _break_even(out: Outcome, state: TrialState, tpot_sec: float) -> float | None:
    """Output tokens after which extra load and compile time is paid back; None where it never is."""
    base = out.race.trials[BASELINE]
    if state.facts is None or base.facts is None or state is base:
        return None
    blocks = out.race.measured()
    base_tpot = base.facts["side_sec"]["tpot"]
    if out.goal.sample_kind == "tpot":
        base_tpot = float(_median(blocks.values(BASELINE)))
    extra = sum(state.facts[k] - base.facts[k] for k in ("load_sec", "compile_sec"))
    gain = base_tpot - tpot_sec
    if gain <= 0:
        return None
    return max(0.0, extra / gain)


def sentences(out: Outcome, result: dict[str, Any]) -> list[str]:
    """The verdict in plain words."""
    goal = out.goal
    said: list[str] = []
    what = {
        "tpot": "decodes a token",
        "ttft": "gives its first token",
        "throughput": "produces tokens",
        "memory": "runs in memory",
        "size": "stores its weights",
    }[goal.objective]
    base = out.race.trials.get(BASELINE)
    if out.winner and base and base.facts:
        winner = out.race.trials[out.winner]
        assert winner.facts is not None
        confirmed = out.confirmation
        if goal.in_bytes:
            ratio = out.ratio(out.winner).value
            said.append(f"{winner.recipe.name} {what} {ratio:.2f} times smaller than the baseline.")
            if confirmed:
                s = confirmed["speedup"]
                said.append(f"Its decode speed is {s['value']:.2f} times the baseline's ({s['verdict']}).")
        else:
            s = confirmed["speedup"] if confirmed else result_speed(out, out.winner)
            said.append(
                f"{winner.recipe.name} {what} {s['value']:.2f} times as fast as the baseline "
                f"(95 % interval {s['low']:.2f} to {s['high']:.2f}"
                + (", in fresh processes)." if confirmed else ", not confirmed yet).")
            )
        if not winner.recipe.changes_numbers:
            said.append("It is lossless: it gives the tokens of the reference, which was checked before it was timed.")
        else:
            q = confirmed["quality"] if confirmed else out.qualities[out.winner].to_json()
            said.append(
                f"Perplexity changes by {q['ppl_increase'] * 100:+.2f} %, surely less than "
                f"{q['ppl_increase_upper'] * 100:+.2f} %; you allowed {goal.max_ppl_increase * 100:g} %."
            )
        w, b = winner.facts["weights_bytes"], base.facts["weights_bytes"]
        if w != b:
            said.append(f"Its weights take {w / 1e6:.1f} MB instead of {b / 1e6:.1f} MB.")
        said += _other_phase(out, winner, base)
        for note in winner.facts["notes"]:
            said.append(note if note.endswith(".") else note + ".")
    elif out.too_noisy:
        said.append(
            f"The baseline against itself differs by up to {out.resolution * 100:.0f} %: "
            "this machine is too noisy now to judge anything."
        )
    elif out.kind == "interrupted":
        said.append("The run was interrupted before anything was shown to beat the baseline: it is kept so far.")
        said += _not_taken(out)
    elif not out.rows() or (not out.goal.in_bytes and math.isinf(out.resolution)):
        said.append("The budget was too short to judge any candidate: the baseline is kept. Allow more with --budget.")
    elif not_taken := _not_taken(out):
        said += ["The baseline is kept, although others were faster.", *not_taken]
    elif out.kind == "baseline":
        said.append("Nothing that keeps the quality beat the baseline beyond noise: keep it.")
        if open_ := _undecided(out):
            best = max(open_, key=lambda i: out.ratio(i).value)
            said.append(
                f"{out.race.trials[best].recipe.name} looks {out.ratio(best).value:.2f} times as fast, but that is not "
                "proved: allow more with --budget."
            )
    if out.kind == "none":
        said.append(f"No recipe reaches the asked speed-up of {goal.min_speedup:g} within the quality bound.")
    return (
        said
        + out.notes
        + regimes.sentences(out.regimes)
        + peers.sentences(out.peers, goal.max_ppl_increase, goal.objective)
    )


def _other_phase(out: Outcome, winner: TrialState, base: TrialState) -> list[str]:
    """What the winner costs in the phase that was not asked for; taken once each, so only a large change is told."""
    if winner is base or winner.facts is None or base.facts is None:
        return []
    told = []
    for kind, what in (("ttft", "the first token"), ("tpot", "each later token")):
        ours, theirs = winner.facts["side_sec"][kind], base.facts["side_sec"][kind]
        if kind != out.goal.sample_kind and ours > SIDE_LOSS * theirs:
            told.append(f"But {what} takes {ours / theirs:.1f} times as long ({ours * 1e3:.3g} ms).")
    return told


def _not_taken(out: Outcome, most: int = 3) -> list[str]:
    """What was surely faster and why it is not the plan, the fastest first."""
    told = []
    faster = [i for i in out.rows() if out.verdict(i) == "faster"]
    for id in sorted(faster, key=lambda i: -out.ratio(i).value)[:most]:
        standing, name = out.standing(id), out.race.trials[id].recipe.name
        why = f": {standing.why}" if standing.why else ""
        what = "times smaller" if out.goal.in_bytes else "times as fast"
        told.append(f"{name} was {out.ratio(id).value:.2f} {what} and was not taken ({standing.word}{why}).")
    return told


def _undecided(out: Outcome) -> list[str]:
    """Candidates that look faster and were neither shown to be nor turned away."""
    if out.goal.in_bytes:
        return []
    least = out.resolution if math.isfinite(out.resolution) else stats.DELTA
    ids = [i for i in out.rows() if i not in out.rejected and i not in out.refused]
    return [i for i in ids if out.ratio(i).value > 1 + least and out.verdict(i) == "undecided"]


def result_speed(out: Outcome, id: str) -> dict[str, Any]:
    return _interval(out.race.measured().ratio(BASELINE, id))


def write(out: Outcome, folder: Path, again: str = "", is_stored: bool = False) -> dict[str, Any]:
    """Writes `plan.json`, `trials.jsonl`, `report.html` and `report.json`, each whole or not at all.

    Args:
        is_stored: the converted model lies there already, from a moment ago.
    """
    from paretune.report.html import write_report  # matplotlib and jinja2 only when a report is written

    ensure_folder(folder)
    result = result_of(out)
    if again:
        result["again"] = again
    chosen = out.race.trials[out.winner] if out.winner else out.race.trials.get(BASELINE)
    recipe = chosen.recipe if chosen else baseline_recipe(out)
    if out.goal.threads and not recipe.engine.threads:  # the plan runs as it was measured
        recipe = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, threads=out.goal.threads))
    if is_stored:
        inside = "model" if (folder / "model").is_dir() else None
    else:
        inside = _store_checkpoint(out, chosen, recipe, folder)
    write_text(folder / "trials.jsonl", "".join(json.dumps(t, allow_nan=False) + "\n" for t in result["trials"]))
    write_json(folder / "report.json", result)
    write_report(result, folder / "report.html")
    name_or_path = out.model_name
    if not checkpoint.is_named(name_or_path) and Path(name_or_path).expanduser().is_dir():
        name_or_path = str(Path(name_or_path).expanduser().resolve())
    plan = {k: result[k] for k in ("created", "command", "seed", "versions", "hardware")} | {
        "schema_version": SCHEMA_VERSION,
        "kind": "plan",
        "model": {"source": name_or_path, "folder": inside, **result["model"]},
        "goal": result["goal"],
        "outcome": result["outcome"],
        "verdict": result["verdict"],
        "recipe": recipe.to_dict(),
        "confirmation": result["confirmation"],
        "dispatch": out.regimes.table if out.regimes else None,
    }
    write_json(folder / PLAN_FILE, plan)  # last: a folder with a plan is complete
    return result


def _store_checkpoint(out: Outcome, chosen: TrialState | None, recipe: Recipe, folder: Path) -> str | None:
    """Stores the converted model where converting it again would keep a user waiting."""
    target = folder / "model"
    shutil.rmtree(target, ignore_errors=True)
    base = out.race.trials.get(BASELINE)
    if not (chosen and chosen.facts and base and base.facts and recipe.changes_numbers):
        return None
    if recipe.changes_mechanism:  # it is not applied to what it made, and is instant
        return None
    if chosen.facts["load_sec"] - base.facts["load_sec"] < INSTANT_SEC:
        return None
    temporary = folder / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        plain = Recipe(recipe.transforms)
        model = load_recipe(out.model_folder, plain, out.goal.device).runner.model
        checkpoint.save(model, temporary, tokenizer_from=out.model_folder)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return "model"


def _label(recipe: Recipe, quality: Fidelity | None) -> str | None:
    """Equality proven, quality measured within the bound, other weights, or nothing that could be promised."""
    if not recipe.changes_numbers:
        return "lossless"
    if recipe.changes_weights:
        return "changed weights" if quality else None
    return "bounded" if quality and quality.within_bound else None


def _interval(interval: stats.Interval) -> dict[str, Any]:
    return {k: _finite(v) for k, v in (("value", interval.value), ("low", interval.low), ("high", interval.high))} | {
        "n_blocks": interval.n
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _median(values: Any) -> float:
    return float(torch.tensor(values).median())


def _states(out: Outcome) -> dict[str, float] | None:
    """Median bandwidth of the two states of the host, bytes/s."""
    probes = [p for s in out.race.journal.samples for p in (s.bandwidth_before, s.bandwidth_after) if p is not None]
    labels = stats.bandwidth_states(probes)
    if labels is None:
        return None
    return {
        name: _median([p for p, label in zip(probes, labels, strict=True) if label == i])
        for i, name in enumerate(("low", "high"))
    }


def _n_parameters(out: Outcome) -> int:
    model = checkpoint.build(out.config)
    return sum({id(p): p.numel() for p in model.parameters()}.values())
