"""`paretune tune`: a model and a quality bound in, a proven winner out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretune.cli.model_help import MODEL

if TYPE_CHECKING:
    from paretune.records.tune import TuneResult
    from paretune.tune.goal import Goal


def tune(
    model: Annotated[str, typer.Argument(help=MODEL)] = "pocket",
    objective: Annotated[str, typer.Option(help="tpot, ttft, throughput, memory or size.")] = "tpot",
    max_ppl_increase: Annotated[
        str, typer.Option(help="Largest relative increase of perplexity (its upper bound counts): 1% or 0.01.")
    ] = "1%",
    min_speedup: Annotated[
        float | None, typer.Option(help="Speed-up that the winner has to reach, else exit 3.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Time for search and confirmation: 90s, 5m, 1h.")] = "5m",
    input_len: Annotated[int, typer.Option(help="Prompt tokens of the request that is made fast.")] = 128,
    output_len: Annotated[int, typer.Option(help="New tokens of that request.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text for quality; default: the project's own pieces.")
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the plan.")] = Path("plan"),
    engine: Annotated[
        str | None,
        typer.Option(
            help="Other engines that the winner is compared with at the end, with or without a format: "
            "llama.cpp:Q8_0,onnxruntime:int8. See `paretune peers ls`. [default: none]"
        ),
    ] = None,
    regimes: Annotated[
        str | None,
        typer.Option(
            help="Also measure alternatives over a grid and put a table of choices into the plan: `auto`, or "
            "batch sizes x lengths such as 1,8x128,1024. Takes up to half the budget again (15 s or more a cell), "
            "after the search; --dry-run says how long. [default: none]"
        ),
    ] = None,
    allow: Annotated[
        str | None,
        typer.Option(help="What else may be tried: changed-weights (pruned models). [default: nothing]"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads; default: physical cores.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts, block order and windows.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was cut off.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run in the folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be tried, measure nothing.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Find the fastest form of MODEL within a quality bound, prove it, and write a plan that runs it."""
    from paretune.tune.goal import Goal, parse_duration, parse_percent

    goal = Goal(
        objective=objective,  # type: ignore[arg-type]
        max_ppl_increase=parse_percent(max_ppl_increase),
        min_speedup=min_speedup,
        budget_sec=parse_duration(budget),
        input_len=input_len,
        output_len=output_len,
        batch_size=batch_size,
        device=device,
        threads=threads,
        seed=seed,
        engines=() if engine is None else engine,  # type: ignore[arg-type]
        regimes=regimes,
        allow=() if allow is None else tuple(part.strip() for part in allow.split(",")),
    )
    if dry_run:
        _show_space(model, goal)
        return
    from paretune import clock
    from paretune.tune.run import run

    started = clock.now()

    def say(line: str) -> None:
        if not quiet:
            print(f"[{clock.now() - started:5.0f} s] {line}", file=sys.stderr, flush=True)

    result = run(model, goal, output_dir, text=text, resume=resume, force=force, say=say)
    if json_output:
        import json

        from paretune.records.record import to_json

        print(json.dumps(to_json(result), indent=2))
    else:
        print(_summary(result, output_dir))
    _raise_for(result)


def _show_space(model: str, goal: Goal) -> None:
    from paretune import hardware
    from paretune.measure.workload import Workload
    from paretune.model import checkpoint
    from paretune.tune import space as spaces

    config = checkpoint.read_config(checkpoint.resolve(model))
    Workload(goal.input_len, goal.output_len, goal.batch_size).check(config.n_positions)
    hardware.check_device(goal.device)
    by_regime = ""
    if goal.regimes:
        from paretune.tune.regimes import announcement

        by_regime = f"After the search, a choice by regime: {announcement(goal, config.longest)}."
    space = spaces.build(goal.device, config, goal.input_len + goal.output_len, goal.allow)
    print(f"baseline: {spaces.baseline().name}")
    print(f"{len(space.legal)} candidates:")
    for candidate in space.legal:
        print(f"  {candidate.recipe.name}")
    by_reason: dict[str, list[str]] = {}
    for name, reason in space.illegal:
        by_reason.setdefault(reason, []).append(name)
    if by_reason:
        print(f"{len(space.illegal)} left out, because they cannot run here or cannot pay:")
    for reason, (first, *others) in by_reason.items():
        print(f"  {first}{f' and {len(others)} more' if others else ''}: {reason}")
    if by_regime:
        print(by_regime)
    if goal.engines:
        from paretune.measure.peers.catalogue import peer_of
        from paretune.measure.peers.envs import state
        from paretune.tune import peers

        for name in goal.engines:
            print(f"engine {name}: {state(peer_of(name.partition(':')[0]))}")
        print(f"After the search, the winner beside the engines: {peers.announcement(goal)}.")
    print(f"Nothing was measured. Budget of a real run: {goal.budget_sec:.0f} s and about 20 s around it.")


def _summary(result: TuneResult, folder: Path) -> str:
    from dataclasses import replace

    from paretune.report import regimes, tables, trials

    tried = [t for t in result.trials if t.status not in ("not_reached", "excluded")]
    rows = trials.trial_rows(replace(result, trials=tried))
    by_regime = regimes.rows_of(result.regimes) if result.regimes else []
    space = result.space
    lines = [
        "",
        *result.verdict,
        "",
        tables.to_text(rows, trials.SHORT_COLUMNS),
        "",
        *([tables.to_text(by_regime, regimes.COLUMNS, width=110), ""] if by_regime else []),
        f"{space.n_measured} of {space.n_legal} legal recipes were measured, {space.n_failed} failed, "
        f"{space.n_excluded} cannot win by the figures (see the report), {space.n_not_reached} were not reached.",
        f"Report: {folder / 'report.html'}",
        f'Run it: paretune generate {folder} --prompt "..."',
    ]
    return "\n".join(lines)


def _raise_for(result: TuneResult) -> None:
    """The exit code of an outcome; what was found is written already."""
    from paretune.errors import NoRecipeError, TooNoisyError

    later = (result.peers_measured, result.regimes)
    if result.outcome == "interrupted" or any(part is not None and part.interrupted for part in later):
        raise KeyboardInterrupt
    if result.outcome == "none":
        raise NoRecipeError(
            f"no recipe reaches the requested speed-up of {result.goal.min_speedup:g} within the quality bound",
            "The best so far is written; lower --min-speedup",
        )
    if result.winner_id is None and result.too_noisy:
        raise TooNoisyError(
            "this machine is too noisy now to judge", "Close other programs and run it again; the baseline is kept"
        )
