"""`paretune bench`: speed and memory of several configurations side by side."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretune.cli.model_help import MODEL_OR_PLAN

if TYPE_CHECKING:
    from paretune.records.bench import BenchRow

FORMATS = ("md", "csv", "json")


def bench(
    model: Annotated[str, typer.Argument(help=MODEL_OR_PLAN)] = "pocket",
    config: Annotated[
        str | None,
        typer.Option(
            help="Names or recipe files, comma-separated; the first, or `baseline`, is what the others are compared "
            "with. `plan` is the plan's own recipe. [default: baseline,bf16,int8; of a plan: baseline,plan]"
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="`paretune` (the configs) and peers, with or without a format: paretune,llama.cpp:Q8_0,transformers. "
            "Without `paretune` only our baseline is measured. See `paretune peers ls`."
        ),
    ] = "paretune",
    input_len: Annotated[str, typer.Option(help="Prompt tokens, e.g. 128,512.")] = "128",
    output_len: Annotated[str, typer.Option(help="New tokens, e.g. 32,128.")] = "32",
    batch_size: Annotated[str, typer.Option(help="Sequences at once, e.g. 1,8.")] = "1",
    format: Annotated[
        str | None,
        typer.Option(help="md, csv, json, comma-separated. [default: a table on stdout, all three with -o]"),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Folder for bench.md, .csv, .json, .html and samples.jsonl."),
    ] = None,
    min_blocks: Annotated[
        int, typer.Option("--min-blocks", "--repeats", help="Blocks before the first look at the result.")
    ] = 8,
    max_blocks: Annotated[int, typer.Option(help="Blocks after which it ends, decided or not.")] = 27,
    min_time: Annotated[str, typer.Option(help="Least time of sampling a configuration and phase.")] = "3s",
    max_time: Annotated[
        str | None,
        typer.Option(
            "--max-time",
            "--budget",
            help="Time for everything, e.g. 60s. [default: until all is decided, or --max-blocks]",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: physical cores]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of prompts and block order.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 5 on a noisy machine even if some verdicts hold.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be measured and how long it takes, run nothing.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measures configurations against a baseline in interleaved blocks: TTFT, TPOT, memory, with intervals."""
    from paretune.measure import session as trials

    if device == "cpu" and not dry_run:
        trials.prepare()  # trials import their libraries while this process imports its own
    from paretune import hardware
    from paretune.cli.interrupts import sigterm_as_interrupt
    from paretune.engine import session
    from paretune.errors import ParetuneError, TooNoisyError, UsageError
    from paretune.files import ensure_folder
    from paretune.measure import bench as measure
    from paretune.measure.grid import cells_of, estimate_sec
    from paretune.measure.peers.catalogue import engines_of
    from paretune.model import checkpoint
    from paretune.tune.goal import parse_duration

    formats = _formats(format)
    lens = [
        _numbers(text, flag)
        for text, flag in ((input_len, "--input-len"), (output_len, "--output-len"), (batch_size, "--batch-size"))
    ]
    min_time_sec = 0.0 if min_time in ("0", "0s") else parse_duration(min_time)
    budget_sec = parse_duration(max_time) if max_time else None
    if formats and len(formats) > 1 and output_dir is None:
        raise UsageError("standard output can hold one format only", "Add -o FOLDER, or ask for one")
    if min_blocks < 1:
        raise UsageError(f"--min-blocks is {min_blocks}", "It has to be 1 or more")
    max_blocks = max(max_blocks, min_blocks)
    if threads is not None and threads < 1:
        raise UsageError(f"--threads is {threads}", "It has to be 1 or more")
    hardware.check_device(device)
    sides = session.compare(model, _configs(model, config), device)
    folder, configs, folders, tables = sides.folder, sides.configs, sides.folders, sides.tables
    with_ours, engines = engines_of(engine)
    if engines and device != "cpu":
        raise UsageError(f"peers are measured on the CPU, not on {device!r}", "Leave --engine out, or --device cpu")
    if not with_ours:
        configs = [next((c for c in configs if c[0] == "baseline"), configs[0])]
    shape = checkpoint.read_config(folder)
    cells = cells_of(shape.longest, *lens)
    if dry_run:
        from paretune.measure.peers.envs import state
        from paretune.report.bench import estimate_text

        n = len(configs) + len(engines)
        seconds = estimate_sec(n, len(cells), 2, min_blocks, max_blocks)
        named = [(name, recipe.name) for name, recipe in configs]
        print(estimate_text(model, named, [(e.name, state(e.peer)) for e in engines], cells, seconds))
        return
    out = None if output_dir is None else ensure_folder(output_dir.expanduser())
    with sigterm_as_interrupt():
        result = measure.bench(
            folder,
            configs,
            input_lens=lens[0],
            output_lens=lens[1],
            batch_sizes=lens[2],
            min_blocks=min_blocks,
            max_blocks=max_blocks,
            min_time_sec=min_time_sec,
            budget_sec=budget_sec,
            seed=seed,
            device=device,
            threads=threads,
            on_progress=None if quiet else _say,
            sample_log=None if out is None else out / "samples.jsonl",
            folders=folders,
            engines=engines,
            tables=tables,
            on_first=None if quiet else _say_first,
            keeps_interrupted=True,
        )
    if checkpoint.is_named(model):
        result = replace(result, model=replace(result.model, name=model))
    from paretune.report import bench as report  # draws: not before something is measured

    if out is not None:
        report.write(result, out, formats or FORMATS)
    if json_output:
        print(report.as_format("json", result), end="")
    elif formats and out is None:
        print("\n".join(report.as_format(name, result) for name in formats), end="")
    else:
        print(report.as_text(result), end="")
    if out is not None and not quiet:
        _say(f"written: {out}")
    if result.interrupted:
        raise KeyboardInterrupt
    if all(row.status == "not_reached" for row in result.rows):
        raise ParetuneError("the time was up before anything was measured", "Allow more with --max-time")
    if result.too_noisy or (strict and result.is_noisy):
        what = "to judge" if result.too_noisy else "for --strict"
        raise TooNoisyError(
            f"this machine is too noisy {what}: the baseline differs from itself by up to {result.widest:.0%}",
            "Close other programs, or measure longer with --max-blocks",
        )


def _numbers(text: str, flag: str) -> list[int]:
    from paretune.errors import UsageError

    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise UsageError(f"{flag} is {text!r}", "Give whole numbers of 1 or more, such as 128 or 128,512")
    return values


def _formats(text: str | None) -> list[str]:
    from paretune.errors import UsageError

    names = [part.strip() for part in (text or "").split(",") if part.strip()]
    for name in names:
        if name not in FORMATS:
            raise UsageError(f"unknown format {name!r}", f"Known: {', '.join(FORMATS)}")
    if text is not None and not names:
        raise UsageError("--format is empty", f"Known: {', '.join(FORMATS)}")
    return list(dict.fromkeys(names))


def _configs(model: str, text: str | None) -> list[str]:
    from paretune.engine.plan import is_plan
    from paretune.errors import UsageError
    from paretune.recipe import split_list

    default = "baseline,plan" if is_plan(model) else "baseline,bf16,int8"
    names = split_list(default if text is None else text)
    if not names:
        raise UsageError("--config is empty", "Give names such as baseline,int8")
    return names


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_first(rows: list[BenchRow]) -> None:
    from paretune.report.bench import first_text

    _say(first_text(rows))
