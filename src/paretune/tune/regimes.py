"""Which form of the plan is best in which regime: a grid of batch sizes and lengths, measured as `bench` measures.

After the plan is written, its recipe and the other forms that may stand in for it run side by side, a process a form,
in interleaved blocks on every cell. Out come a map for people and the table that `engine.dispatch` looks up. A form
ranks before the plan's own only where it is faster beyond noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from paretune import clock
from paretune.engine.dispatch import PLAN, Entry, Form, Table, shares_weights
from paretune.errors import ParetuneError, UsageError
from paretune.measure import bench as measure
from paretune.measure.interleave import Blocks, sample_of
from paretune.recipe import Recipe
from paretune.records.bench import PHASES, BenchResult, BenchRow, Phase, PhaseName
from paretune.records.record import from_json, to_json
from paretune.records.regimes import Figure, Ranked, RegimeCell, RegimeForm, Regimes
from paretune.registry import ATTENTION
from paretune.transforms.attention import Attention
from paretune.tune.goal import parse_grid
from paretune.tune.peers import chosen
from paretune.tune.race import BASELINE

if TYPE_CHECKING:
    from paretune.tune.goal import Goal
    from paretune.tune.outcome import Outcome

SAMPLES = "regimes.jsonl"
AUTO_BATCHES, AUTO_LENGTHS = (1, 8), (128, 512, 2048)
SHARE, LEAST_EACH_SEC = 0.5, 15.0  # timing: of the budget, and at least for each cell
SEED_STEP = 3000  # fresh prompts
# Each new length is compiled for, which takes tens of seconds: no request can wait for that.


def grid_of(goal: Goal, longest: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch sizes and lengths (prompt and answer) of a goal.

    Raises:
        UsageError: a length leaves no prompt before `--output-len`, or is longer than the context.
    """
    assert goal.regimes is not None
    given = parse_grid(goal.regimes)
    if given is None:
        lengths = sorted({min(n, longest) for n in AUTO_LENGTHS})
        given = AUTO_BATCHES, tuple(n for n in lengths if n > goal.output_len) or (longest,)
    if given[1][0] <= goal.output_len:
        raise UsageError(
            f"--regimes has a length of {given[1][0]}, and --output-len is {goal.output_len}",
            "Lengths are prompt and answer together: use longer ones, or a smaller --output-len",
        )
    if given[1][-1] > longest:
        raise UsageError(f"--regimes has a length of {given[1][-1]}, the context is {longest}", "Use shorter ones")
    return given


def timing_sec(goal: Goal, n_cells: int) -> float:
    """How long the forms are timed at most, on top of the budget."""
    return max(SHARE * goal.budget_sec, LEAST_EACH_SEC * n_cells)


def announcement(goal: Goal, longest: int) -> str:
    """What the grid is and takes, before it starts."""
    batches, lengths = grid_of(goal, longest)
    n = len(batches) * len(lengths)
    return (
        f"batch {', '.join(map(str, batches))} x {', '.join(map(str, lengths))} tokens: up to "
        f"{timing_sec(goal, n):.0f} s of timing on top of the budget, and the start of each form once"
    )


def forms_of(out: Outcome) -> tuple[dict[str, Form], list[tuple[str, str]]]:
    """The forms that may run the plan's requests, its own first, and what was left out with the reason.

    Exact forms of attention on the plan's weights; the model as it was (a second copy of the weights, unless the plan
    changed none); mechanisms that the search gated, with the loss it measured and up to the length it measured at.
    """
    name, recipe = chosen(out)
    device = out.goal.device
    forms: dict[str, Form] = {}
    left_out: list[tuple[str, str]] = []
    known = {state.recipe.hash: state for state in out.race.trials.values() if state.facts}

    def add(form: Form) -> None:
        if form.recipe.hash not in [f.recipe.hash for f in forms.values()]:
            forms[form.name] = form

    def copy_bytes(other: Recipe) -> int:
        if shares_weights(other, recipe):
            return 0
        state = known.get(other.hash)
        return state.facts.weights_bytes if state and state.facts else 0

    quality = out.confirmation.quality if out.confirmation else None
    if not recipe.changes_numbers:
        add(Form(PLAN, recipe, "lossless"))
    else:
        assert quality is not None and name != BASELINE
        longest = out.quality_len if recipe.changes_mechanism else None
        add(Form(PLAN, recipe, "bounded", float(quality.ppl_increase_upper), longest))
    for form in ATTENTION.names():
        other = _with_form(recipe, form)
        if other is None or other.hash == recipe.hash:
            continue
        reason = Attention(form).compiles_for_each_length or other.requires(device)
        if not recipe.runner_class.is_reference:
            reason = f"the {recipe.engine.runner} runner has only one attention"
        if reason:
            left_out.append((f"{form} attention", reason))
        else:
            add(replace(forms[PLAN], name=other.name, recipe=other))
    base = out.race.trials[BASELINE].recipe
    add(Form(base.name, base, "lossless", weights_bytes=copy_bytes(base)))
    for id, found in out.qualities.items():
        state = out.race.trials[id]
        if state.failure or not state.recipe.changes_mechanism:
            continue
        if found.within_bound:
            label = "bounded", float(found.ppl_increase_upper), out.quality_len
            add(Form(state.recipe.name, state.recipe, *label, weights_bytes=copy_bytes(state.recipe)))
        else:
            left_out.append((state.recipe.name, found.reason or "over the quality bound"))
    return forms, left_out


def _with_form(recipe: Recipe, form: str) -> Recipe | None:
    """The same recipe with another form of attention; None where it names none."""
    if not any(isinstance(t, Attention) for t in recipe.transforms):
        return None
    return replace(
        recipe, transforms=tuple(Attention(form) if isinstance(t, Attention) else t for t in recipe.transforms)
    )


def explore(out: Outcome, folder: Path, say: Callable[[str], None] = lambda line: None) -> Regimes:
    """Measures the forms over the grid; Ctrl-C ends it early, not the run.

    Returns:
        `table` (of `engine.dispatch`, None where there is nothing to choose), `cells` with every form's figures,
        `left_out`, and how it was measured.
    """
    goal, journal = out.goal, out.race.journal
    batches, lengths = grid_of(goal, out.config.longest)
    kind = goal.sample_kind
    about = Regimes(
        batch_sizes=list(batches), lengths=list(lengths), output_len=goal.output_len, kind=kind, samples_file=SAMPLES
    )
    if out.kind == "interrupted":
        return replace(about, cause="the search was interrupted before it")
    forms, left_out = forms_of(out)
    about = replace(
        about,
        left_out=[list(pair) for pair in left_out],
        forms=[RegimeForm(**{**vars(f), "recipe": f.recipe.name}) for f in forms.values()],
    )
    plan = forms[PLAN].recipe
    if plan.runner_class.fixed_batch:
        return replace(about, cause="a compiled graph is made for one batch size: there is no choice by regime")
    if len(forms) == 1:
        return replace(about, cause="this plan has no alternative here: nothing to choose from")
    known = journal.find("regimes", reference=plan.hash)
    if known:
        return from_json(Regimes, known["result"], "the journal")
    n = len(batches) * len(lengths)
    say(f"measuring {len(forms)} forms over {announcement(goal, out.config.longest)}")
    started = clock.now()
    try:
        result = measure.bench(
            out.model_folder,
            [(f.name, f.recipe) for f in forms.values()],
            input_lens=[length - goal.output_len for length in lengths],
            output_lens=(goal.output_len,),
            batch_sizes=batches,
            baseline=PLAN,
            kinds=(kind,),
            budget_sec=timing_sec(goal, n),
            loading_counts=False,
            keeps_processes=True,
            min_time_sec=1.0,
            seed=goal.seed + SEED_STEP,
            device=goal.device,
            threads=goal.threads,
            on_progress=say,
            sample_log=folder / SAMPLES,
        )
    except KeyboardInterrupt:
        return replace(about, interrupted=True, cause="it was interrupted", elapsed_sec=clock.now() - started)
    except ParetuneError as error:
        return replace(about, cause=f"it failed: {error.cause}", elapsed_sec=clock.now() - started)
    cells = [[cell_of(result, forms, b, length, goal.output_len, kind) for length in lengths] for b in batches]
    entries = tuple(tuple(tuple(Entry(e.form, e.n_bytes) for e in c.ranked) for c in row) for row in cells)
    # The plan runs as it was measured.
    kept = {
        f.name: replace(f, recipe=f.recipe.with_threads(f.recipe.engine.threads or goal.threads))
        for f in forms.values()
    }
    about = replace(
        about,
        cells=[c for row in cells for c in row],
        table=Table(batches, lengths, kept, entries).to_dict(),
        elapsed_sec=clock.now() - started,
        aa_half_width=result.widest,
    )
    journal.record("regimes", reference=plan.hash, result=to_json(about))
    return about


def cell_of(
    result: BenchResult, forms: dict[str, Form], batch_size: int, length: int, output_len: int, kind: str
) -> RegimeCell:
    """One cell of the map from the rows and samples of a `bench` result: every form's figures, and the ranking.

    Ranked first are the forms that are surely faster than the plan's own, then itself, then the rest. Among the faster
    those that cannot be told apart stand in the order of simplicity. What was not measured is not ranked, and no form
    at a length that its loss was not measured at. `runs`: what a request gets that grants nothing more.
    """
    phase = PHASES[kind]
    rows = {
        r.config: r
        for r in result.rows
        if (r.batch_size, r.input_len) == (batch_size, length - output_len) and r.role != "twin"
    }
    title = next(iter(rows.values())).cell
    blocks = Blocks([sample_of(s) for s in result.samples if (s.cell, s.kind) == (title, kind)])
    figures = {name: _figure(name, rows[name], phase) for name in forms}
    for name, form in forms.items():
        if name != PLAN and length > (form.longest or length):
            cause = f"its loss was measured on {form.longest} tokens, no more"
            figures[name] = replace(figures[name], ratio=None, cause=cause)
    ratios = {n: ratio for n in forms if (ratio := figures[n].ratio) is not None}
    others = sorted((n for n in ratios if n != PLAN), key=lambda n: -ratios[n])
    faster = [n for n in others if figures[n].verdict == "faster"]
    equal: list[str] = []
    if faster:
        equal = [n for n in faster if n == faster[0] or blocks.ratio(n, faster[0]).low <= 1]
        equal.sort(key=lambda n: (forms[n].weights_bytes > 0, forms[n].recipe.complexity, -ratios[n]))
        faster = [*equal, *(n for n in faster if n not in equal)]
    ranked = [*faster, PLAN, *(n for n in others if n not in faster)]
    if faster:
        is_tie = len(equal) > 1
    else:  # the plan's own: nobody beats it, but some may equal it
        is_tie = any(figures[n].verdict != "slower" for n in others)
    return RegimeCell(
        batch_size=batch_size,
        length=length,
        status="measured" if len(ratios) > 1 else "not_reached",
        best=ranked[0],
        runs=next(n for n in ranked if not forms[n].weights_bytes and forms[n].permits("plan", forms[PLAN])),
        is_tie=is_tie,
        figures=list(figures.values()),
        ranked=[Ranked(n, figures[n].n_bytes) for n in ranked],
    )


def _figure(name: str, row: BenchRow, name_of_phase: PhaseName) -> Figure:
    phase = row.phase(name_of_phase) or Phase.unmeasured()
    return Figure(
        form=name,
        status=row.status,
        cause=row.cause or None,
        seconds=phase.p50_sec,
        ratio=phase.speedup,
        low=phase.speedup_low,
        high=phase.speedup_high,
        verdict=phase.verdict,
        n_bytes=(row.kv_cache_bytes or 0) + (row.activation_peak_bytes or 0),
    )
