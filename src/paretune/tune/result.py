"""From the outcome of a search to what is written: the result of the report, `trials.jsonl`, the plan."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from paretune import stats
from paretune.engine.load import load_recipe
from paretune.engine.plan import PLAN_FILE
from paretune.files import ensure_folder, write_text
from paretune.measure import environment, explain, roofline
from paretune.measure.grid import n_parameters
from paretune.model import checkpoint
from paretune.ops.attention.pattern import parse
from paretune.recipe import Recipe
from paretune.records import record
from paretune.records.evaluation import Fidelity
from paretune.records.judge import judge
from paretune.records.plan import PlanFile, PlanModel
from paretune.records.trial import TrialFacts
from paretune.records.tune import (
    Illegal,
    Resolution,
    Standing,
    States,
    SweepPoint,
    TrialMeasured,
    TrialSpeedup,
    TrialStatus,
    TuneBandwidth,
    TuneModel,
    TuneResult,
    TuneSpace,
    TuneTrial,
)
from paretune.report import verdict
from paretune.tune.outcome import Outcome, baseline_recipe
from paretune.tune.race import BASELINE, TWIN, TrialState

INSTANT_SEC = 1.0  # a conversion that takes longer is stored with the plan
RATE_OF = {None: "fp32", "bf16": "bf16", "fp16": "fp16"}


def result_of(out: Outcome) -> TuneResult:
    """What `report.html` shows and `report.json` holds."""
    goal, race = out.goal, out.race
    trials = [_trial(out, state) for id, state in race.trials.items() if id != TWIN and not id.startswith("confirm")]
    known = {state.recipe.hash for state in race.trials.values()}
    trials += [_left_out(out, c.id, c.recipe) for c in out.space.legal if c.id not in known]
    head = environment.head(seed=goal.seed)
    result = TuneResult(
        **vars(head),
        model=TuneModel(
            name=out.model_name,
            family=out.config.family,
            n_parameters=n_parameters(out.config),
            n_layer=out.config.n_layer,
            n_embd=out.config.n_embd,
            vocab_size=out.config.vocab_size,
        ),
        goal=goal,
        outcome=out.kind,
        too_noisy=out.too_noisy,
        winner_id=out.winner,
        baseline_id=BASELINE,
        aa=_resolution(out),
        bandwidth=_bandwidth(out),
        matrix_rates=dict(out.ceilings.matrix_rates) if out.ceilings else {},
        elapsed_sec=race.journal.elapsed_sec,
        space=_space(out, Counter(t.status for t in trials)),
        trials=trials,
        confirmation=out.confirmation,
        n_repeated_slices=race.measured().n_repeated,
        samples_file="samples.jsonl",
        peers=out.peers.rows if out.peers else [],
        peers_measured=out.peers.measured if out.peers else None,
        regimes=out.regimes,
        again=head.command,
        verdict=[],
    )
    facts = race.trials[out.winner].facts if out.winner else None
    said = verdict.sentences(result, out.notes, facts.notes if facts else ())
    return dataclasses.replace(result, verdict=said)


def _space(out: Outcome, n: Mapping[str, int]) -> TuneSpace:
    return TuneSpace(
        n_legal=len(out.space.legal) + 1,
        n_illegal=len(out.space.illegal),
        n_measured=n["measured"],
        n_failed=n["failed"] + n["invalid"],
        n_excluded=n["excluded"],
        n_not_reached=n["not_reached"],
        illegal=[Illegal(name, reason) for name, reason in out.space.illegal],
    )


def _resolution(out: Outcome) -> Resolution | None:
    """The baseline against itself; None while too few blocks say."""
    blocks = out.race.measured()
    if BASELINE not in blocks.subjects:
        return None
    aa = blocks.ratio(BASELINE, TWIN)
    return Resolution(*_figures(aa), out.resolution) if math.isfinite(aa.high) else None


def _bandwidth(out: Outcome) -> TuneBandwidth:
    rows = out.ceilings.read_bandwidth if out.ceilings else ()
    blocks = out.race.measured()
    states = blocks.by_state(BASELINE, TWIN) if BASELINE in blocks.subjects else None
    sweep = [SweepPoint(row["bytes"], row["bytes_per_sec"], row["threads"]) for row in rows]
    return TuneBandwidth(sweep, _states(out) if states else None)


def _left_out(out: Outcome, id: str, recipe: Recipe) -> TuneTrial:
    """The row of a candidate that was never started."""
    standing = out.standing(id)
    status, reason = _unmeasured(standing)
    return TuneTrial(id=id, name=recipe.name, recipe=recipe.to_dict(), status=status, reason=reason, standing=standing)


def _unmeasured(standing: Standing) -> tuple[TrialStatus, str]:
    """Status and reason of a candidate without a measurement."""
    if standing.word in ("excluded", "over the quality limit"):
        return "excluded", standing.why
    return "not_reached", standing.why or "the run ended before it was measured"


def _trial(out: Outcome, state: TrialState) -> TuneTrial:
    standing = out.standing(state.id)
    row = TuneTrial(
        id=state.id,
        name=state.recipe.name,
        recipe=state.recipe.to_dict(),
        status="measured",
        label=_label(state.recipe, out.qualities.get(state.id)),
        standing=standing,
    )
    if state.failure:
        return dataclasses.replace(row, status=state.failure_kind, reason=state.failure)
    if state.facts is None or state.id not in out.race.measured().subjects:
        status, reason = _unmeasured(standing)
        return dataclasses.replace(row, status=status, reason=reason)
    return dataclasses.replace(row, measured=_measured(out, state, state.facts))


def _measured(out: Outcome, state: TrialState, facts: TrialFacts) -> TrialMeasured:
    blocks, kind = out.race.measured(), out.goal.sample_kind
    median = _median(blocks.values(state.id))
    tpot_sec = median if kind == "tpot" else facts.side_sec.tpot
    ttft_sec = median if kind == "ttft" else facts.side_sec.ttft
    speedup = None
    if state.id != BASELINE:
        speed, by_state = blocks.ratio(BASELINE, state.id), blocks.by_state(BASELINE, state.id)
        states = States(*(_finite(by_state[i].value) for i in (0, 1))) if by_state else None
        speedup = TrialSpeedup(*_figures(speed), judge(speed, out.resolution), states)
    return TrialMeasured(
        speedup=speedup,
        tpot_sec=tpot_sec,
        ttft_sec=ttft_sec,
        throughput_tokens_per_sec=1 / median if kind == "throughput" else None,
        memory=facts.memory,
        quality=out.qualities.get(state.id),
        load_sec=facts.load_sec,
        compile_sec=facts.compile_sec,
        break_even_tokens=_break_even(out, state, tpot_sec),
        proof=facts.proof + facts.notes,
        warm_settled=facts.warm_settled,
        **_limits(out, state, facts, tpot_sec, ttft_sec),
    )


def _limits(out: Outcome, state: TrialState, facts: TrialFacts, tpot_sec: float, ttft_sec: float) -> dict[str, Any]:
    """MBU, MFU, the sentence that says what bounds the phase of the objective, and the explanations of `profile`."""
    if out.ceilings is None:
        return {"mbu": None, "mfu": None, "bound_by": None, "tpot_roofline_sec": None, "explanations": []}
    goal, config = out.goal, out.config
    rate = out.ceilings.matrix_rates.get(RATE_OF[state.recipe.dtype])
    # What a step must read: the weights but for the embedding rows that are not looked up, and the keys and values.
    pattern = parse(facts.attention_pattern)
    kv = facts.kv_bytes_per_token * roofline.keys_seen(pattern, goal.input_len + 8)
    n_bytes = roofline.decode_bytes(facts.step_weights_bytes, int(kv))
    bandwidth = out.ceilings.bandwidth_at(n_bytes)
    prefill = roofline.prefill_flops(config, goal.input_len, pattern=pattern) * goal.batch_size
    is_prefill = goal.objective == "ttft"
    sec = ttft_sec if is_prefill else tpot_sec
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
            "facts": facts.threads,
            "whole": {
                "sec": sec,
                "dtype": RATE_OF[state.recipe.dtype],
                "bytes_per_weight": facts.bytes_per_weight,
                "needed_bytes": n_bytes,
                "needed_flops": flops,
                "mbu": roofline.mbu(n_bytes, sec, bandwidth),
                "mfu": roofline.mfu(flops, sec, rate) if rate else None,
                "bound_by": sentence,
            },
        }
        explanations = explain.explain(known)
    return {
        "mbu": roofline.mbu(n_bytes, tpot_sec, bandwidth),
        "mfu": roofline.mfu(prefill, ttft_sec, rate) if rate else None,
        "bound_by": sentence,
        "tpot_roofline_sec": n_bytes / bandwidth,  # a prediction: the least that these bytes take here
        "explanations": explanations,
    }


def _break_even(out: Outcome, state: TrialState, tpot_sec: float) -> float | None:
    """Output tokens after which extra load and compile time is paid back; None where it never is."""
    base = out.race.trials[BASELINE]
    if state.facts is None or base.facts is None or state is base:
        return None
    base_tpot = base.facts.side_sec.tpot
    if out.goal.sample_kind == "tpot":
        base_tpot = _median(out.race.measured().values(BASELINE))
    extra = state.facts.load_sec - base.facts.load_sec + (state.facts.compile_sec - base.facts.compile_sec)
    gain = base_tpot - tpot_sec
    if gain <= 0:
        return None
    return max(0.0, extra / gain)


def write(out: Outcome, folder: Path, again: str = "", is_stored: bool = False) -> TuneResult:
    """Writes `plan.json`, `trials.jsonl`, `report.html` and `report.json`, each whole or not at all.

    Args:
        is_stored: the converted model lies there already, from a moment ago.
    """
    from paretune.report.html import write_report  # matplotlib and jinja2 only when a report is written

    ensure_folder(folder)
    result = result_of(out)
    if again:
        result = dataclasses.replace(result, again=again)
    chosen = out.race.trials[out.winner] if out.winner else out.race.trials.get(BASELINE)
    recipe = chosen.recipe if chosen else baseline_recipe(out)
    if out.goal.threads and not recipe.engine.threads:  # the plan runs as it was measured
        recipe = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, threads=out.goal.threads))
    if is_stored:
        inside = "model" if (folder / "model").is_dir() else None
    else:
        inside = _store_checkpoint(out, chosen, recipe, folder)
    lines = [json.dumps(record.to_json(trial), allow_nan=False) + "\n" for trial in result.trials]
    write_text(folder / "trials.jsonl", "".join(lines))
    record.write(result, folder / "report.json")
    write_report(result, folder / "report.html")
    source = out.model_name
    if not checkpoint.is_named(source) and Path(source).expanduser().is_dir():
        source = str(Path(source).expanduser().resolve())
    plan = PlanFile(
        created=result.created,
        command=result.command,
        seed=result.seed,
        versions=result.versions,
        hardware=result.hardware,
        schema_version=PlanFile.SCHEMA,
        model=PlanModel(source=source, folder=inside, **vars(result.model)),
        goal=result.goal,
        outcome=result.outcome,
        verdict=result.verdict,
        recipe=recipe.to_dict(),
        confirmation=result.confirmation,
        dispatch=out.regimes.table if out.regimes else None,
    )
    record.write(plan, folder / PLAN_FILE)  # last: a folder with a plan is complete
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
    if chosen.facts.load_sec - base.facts.load_sec < INSTANT_SEC:
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


def _label(recipe: Recipe, quality: Fidelity | None) -> Literal["lossless", "bounded", "changed weights"] | None:
    """Equality proven, quality measured within the bound, other weights, or nothing that could be promised."""
    if not recipe.changes_numbers:
        return "lossless"
    if recipe.changes_weights:
        return "changed weights" if quality else None
    return "bounded" if quality and quality.within_bound else None


def _figures(interval: stats.Interval) -> tuple[float | None, float | None, float | None, int]:
    """The first fields of a `Ratio`."""
    return _finite(interval.value), _finite(interval.low), _finite(interval.high), interval.n


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _median(values: np.ndarray) -> float:
    return float(torch.tensor(values).median())


def _states(out: Outcome) -> States | None:
    """Median bandwidth of the two states of the host, bytes/s."""
    probes = [p for s in out.race.journal.samples for p in (s.bandwidth_before, s.bandwidth_after) if p is not None]
    labels = stats.bandwidth_states(probes)
    if labels is None:
        return None
    sides = [[p for p, label in zip(probes, labels, strict=True) if label == i] for i in (0, 1)]
    return States(*(_median(np.array(side)) for side in sides))
