"""`paretune bench`: speed and memory of several configurations side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.model_help import MODEL_OR_PLAN

if TYPE_CHECKING:
    from paretune.engine.dispatch import Table
    from paretune.measure.peers.catalogue import Engine
    from paretune.recipe import Recipe
    from paretune.report.tables import Column, Row

FORMATS = ("md", "csv", "json")
_RESULTS = {
    "baseline": "baseline",
    "faster": "faster",
    "slower": "slower",
    "indistinguishable": "no difference",
    "undecided": "undecided",
}


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
            "Without `paretune` the baseline alone stands for us. See `paretune peers ls`."
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
        str | None, typer.Option("--max-time", "--budget", help="Time for everything, e.g. 2m. [default: no limit]")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: physical cores]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of prompts and block order.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be measured and how long it takes, run nothing.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measures configurations against a baseline in interleaved blocks: TTFT, TPOT, memory, with intervals."""
    from paretune import hardware
    from paretune.errors import ParetuneError, TooNoisyError, UsageError
    from paretune.files import ensure_folder
    from paretune.measure import bench as measure
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
        raise UsageError("several formats cannot be told apart on standard output", "Add -o FOLDER, or ask for one")
    if min_blocks < 1:
        raise UsageError(f"--min-blocks is {min_blocks}", "It has to be 1 or more")
    max_blocks = max(max_blocks, min_blocks)
    if threads is not None and threads < 1:
        raise UsageError(f"--threads is {threads}", "It has to be 1 or more")
    if not (device == "cpu" or (device.partition(":")[0] == "cuda" and hardware.has_cuda())):
        raise UsageError(f"there is no device {device!r} here", "Use --device cpu")
    folder, configs, folders, tables = _configs(model, config)
    with_ours, engines = engines_of(engine)
    if engines and device != "cpu":
        raise UsageError(f"peers are measured on the CPU, not on {device!r}", "Leave --engine out, or --device cpu")
    if not with_ours:
        configs = [next((c for c in configs if c[0] == "baseline"), configs[0])]
    shape = checkpoint.read_config(folder)
    cells = measure.cells_of(shape.longest, *lens)
    if dry_run:
        n = len(configs) + len(engines)
        _show(model, configs, engines, cells, measure.estimate_sec(n, len(cells), 2, min_blocks, max_blocks))
        return
    out = None if output_dir is None else ensure_folder(output_dir.expanduser())
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
    )
    if checkpoint.is_named(model):
        result["model"]["name"] = model
    if out is not None:
        _write(result, out, formats or FORMATS)
    if json_output:
        print(_as("json", result), end="")
    elif formats and out is None:
        print("\n".join(_as(name, result) for name in formats), end="")
    else:
        print(as_text(result), end="")
    if out is not None and not quiet:
        _say(f"written: {out}")
    if all(row["status"] == "not_reached" for row in result["rows"]):
        raise ParetuneError("the time ended before anything was measured", "Allow more with --max-time")
    if result["too_noisy"]:
        widths = [entry["half_width"] for entry in result["aa"] if entry["half_width"] is not None]
        raise TooNoisyError(
            f"this machine is too noisy to judge: the baseline differs from itself by up to {max(widths):.0%}",
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


def _configs(model: str, text: str | None) -> tuple[Path, list[tuple[str, Recipe]], dict[str, Path], dict[str, Table]]:
    """The folder of the model as given, the configurations, the folders of those that have their own, and the tables
    of those that choose by regime."""
    from paretune.errors import UsageError
    from paretune.model import checkpoint
    from paretune.recipe import preset
    from paretune.tune.plan import is_plan, read_plan

    plan = read_plan(model) if is_plan(model) else None
    default = "baseline,plan" if plan else "baseline,bf16,int8"
    names = [part.strip() for part in (default if text is None else text).split(",") if part.strip()]
    if not names:
        raise UsageError("--config is empty", "Give names such as baseline,int8")
    configs = [(name, plan.recipe if plan and name == "plan" else preset(name)) for name in names]
    if plan is None:
        return checkpoint.resolve(model), configs, {}, {}
    # The others start from the model as it was before `tune` converted it.
    tables = {} if plan.table is None else {"plan": plan.table}
    return plan.source, configs, {"plan": plan.model_folder}, tables


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(
    model: str, configs: list[tuple[str, Recipe]], engines: list[Engine], cells: list[Any], seconds: tuple[float, float]
) -> None:
    from paretune.measure.peers.envs import state
    from paretune.report.units import format_sec

    print(f"model: {model}")
    for name, recipe in configs:
        print(f"config {name}: {recipe.name}")
    for engine in engines:
        print(f"engine {engine.name}: {state(engine.peer)}")
    for cell in cells:
        print(f"cell: {cell.input_len} input + {cell.output_len} output tokens, batch {cell.batch_size}")
    low, high = (format_sec(float(round(s))) for s in seconds)
    print(f"estimate: {low} to {high} for a small model without compilation; larger ones take longer")


# --- tables ---------------------------------------------------------------------------------------------------------


def _result_cell(phase: str) -> Any:
    def show(row: Row) -> str:
        if row["status"] != "measured":
            return {"not_reached": "not reached"}.get(row["status"], str(row["status"]))
        word = row.get(f"{phase}_verdict")
        return _RESULTS.get(str(word), "-")

    return show


def _speed_cell(phase: str) -> Any:
    from paretune.report.units import format_ratio

    def show(row: Row) -> str:
        keys = (f"{phase}_speedup", f"{phase}_speedup_low", f"{phase}_speedup_high")
        return "1.00x" if row["role"] == "baseline" else format_ratio(*(row.get(k) for k in keys))

    return show


def _columns() -> list[tuple[str, list[Column]]]:
    """(title, columns) of the tables that people read; prefill and decode are never blended."""
    from paretune.report.tables import Column

    head = [Column("config", "Config", numeric=False), Column("cell", "Input+output xbatch", numeric=False)]

    def phase(name: str, *more: Column) -> list[Column]:
        result = Column(f"{name}_verdict", "Result", _result_cell(name), numeric=False)
        return [*head, result, Column(f"{name}_speedup", "Speed-up", _speed_cell(name)), *more]

    return [
        (
            "Decode",
            phase(
                "decode",
                Column("tpot_sec", "TPOT"),
                Column("decode_tokens_per_sec", "Tokens/s"),
                Column("mbu", "MBU"),
                Column("decode_n", "Slices"),
            ),
        ),
        (
            "Prefill",
            phase(
                "prefill",
                Column("ttft_sec", "TTFT"),
                Column("prefill_tokens_per_sec", "Tokens/s"),
                Column("prefill_mfu", "MFU", lambda row: _percent(row.get("prefill_mfu"))),
                Column("prefill_n", "Slices"),
            ),
        ),
        (
            "Memory and start",
            [
                *head,
                Column("weights_bytes", "Weights"),
                Column("kv_cache_bytes", "Cache"),
                Column("activation_peak_bytes", "Activations"),
                Column("rss_peak_bytes", "Peak memory"),
                Column("load_sec", "Load"),
                Column("compile_sec", "Compile"),
                Column("break_even_tokens", "Pays back after"),
            ],
        ),
    ]


def _tables(result: dict[str, Any]) -> list[tuple[str, list[Column], list[Row]]]:
    """(title, columns, rows) of everything that is shown; peers have a table where there are some."""
    from paretune.cli.peers import agreement_table

    tables = [(title, columns, result["rows"]) for title, columns in _columns()]
    peers = [row for row in result["rows"] if row["role"] == "peer"]
    return tables + ([(*agreement_table(), peers)] if peers else [])


def _percent(value: Any) -> str:
    from paretune.report.units import format_percent

    return format_percent(value)


def _remarks(result: dict[str, Any]) -> list[str]:
    """What a reader has to know beside the tables: the resolution, failures, notes, limits, proofs."""
    out = []
    for entry in result["aa"]:
        where = f"{entry['cell']}, {entry['kind']}" + (f", group {entry['group'] + 1}" if entry["group"] else "")
        if entry["half_width"] is None:
            out.append(f"A/A ({where}): too few blocks to know what this machine resolves; nothing is decided.")
        else:
            out.append(f"A/A ({where}): the baseline differs from itself by up to {entry['half_width']:.1%}.")
    for row in result["rows"]:
        where = f"{row['config']} ({row['cell']})"
        if row["cause"]:
            out.append(f"{where}: {row['cause']}.")
        out += [f"{where}: {note}." for note in row["notes"]]
        if row["role"] != "twin":
            out += [f"{where}: {row[key]}." for key in ("bound_by", "prefill_bound_by") if row[key]]
        for phase in ("decode", "prefill"):
            for state, ratio in (row.get(f"{phase}_by_state") or {}).items():
                if ratio["value"] is not None:
                    out.append(f"{where}: {phase} speed-up in the {state}-bandwidth state {ratio['value']:.2f}x.")
    threads = sorted({row["threads"] for row in result["rows"] if row["threads"]})
    repeated = sum(row.get(f"{phase}_n_repeated") or 0 for row in result["rows"] for phase in ("decode", "prefill"))
    out.append(f"Threads, read back: {', '.join(map(str, threads)) or 'unknown'}.")
    out.append(f"Slices repeated because the bandwidth changed meanwhile: {repeated}.")
    return out


def as_text(result: dict[str, Any]) -> str:
    """The tables for a terminal."""
    import shutil
    import textwrap

    from paretune.report.tables import to_text

    width = max(80, shutil.get_terminal_size((110, 24)).columns)
    parts = []
    for title, columns, rows in _tables(result):
        parts.append(f"{title}\n\n{to_text(rows, columns, width)}")
    lines = _remarks(result) + [f"{term}: {text}" for term, text in result["definitions"].items()]
    parts.append("\n".join(textwrap.fill(line, width, subsequent_indent="  ") for line in lines) + "\n")
    return "\n".join(parts)


def _as(name: str, result: dict[str, Any]) -> str:
    import json

    from paretune.report.tables import to_csv, to_markdown

    if name == "json":
        return json.dumps(result, indent=2, allow_nan=False) + "\n"
    if name == "csv":
        rows = [{k: _flat(v) for k, v in row.items()} for row in result["rows"]]
        return to_csv(rows)
    parts = [f"# {result['model']['name']}: speed and memory\n"]
    parts += [f"## {title}\n\n{to_markdown(rows, columns)}" for title, columns, rows in _tables(result)]
    parts.append("## Remarks\n\n" + "".join(f"- {line}\n" for line in _remarks(result)))
    defined = "".join(f"- **{term}**: {text}\n" for term, text in result["definitions"].items())
    parts.append(f"## Definitions\n\n{defined}")
    parts.append(f"## Make it again\n\n    {result['command']}\n\n{_origin(result)}")
    return "\n".join(parts)


def _flat(value: Any) -> Any:
    import json

    if isinstance(value, list):
        return "; ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else value


def _origin(result: dict[str, Any]) -> str:
    versions, machine = result["versions"], result["hardware"]
    commit = result["environment"]["git_commit"] or "none"
    return (
        f"{machine['cpu_model']}, {machine['n_cores']} cores (machine {machine['id']}); torch {versions['torch']}; "
        f"commit {commit}; {result['created']}; seed {result['seed']}\n"
    )


def _write(result: dict[str, Any], out: Path, formats: Any) -> None:
    """The files of a run, each whole or absent; the JSON and the page are always there."""
    from paretune.files import write_text
    from paretune.report import html

    for name in dict.fromkeys([*formats, "json"]):
        write_text(out / f"bench.{name}", _as(name, result))
    lead = [
        f"{row['config']} ({row['cell']}), {phase}: {_RESULTS.get(str(row.get(f'{phase}_verdict')), 'not compared')}, "
        f"{_speed_cell(phase)(row)} the speed of the baseline."
        for row in result["rows"]
        for phase in ("decode", "prefill")
        if row["role"] in ("", "peer") and row["status"] == "measured"
    ]
    sections = [html.section(title, (), rows, columns) for title, columns, rows in _tables(result)]
    sections.append(html.section("Remarks", _remarks(result)))
    proofs = [f"{row['config']} ({row['cell']}): {'; '.join(row['proof'])}." for row in result["rows"] if row["proof"]]
    sections.append(html.section("Checked before it was timed", proofs))
    sections.append(html.section("Definitions", [f"{k}: {v}" for k, v in result["definitions"].items()]))
    sections.append(html.section("Machine", facts=result["hardware"] | {"versions": result["versions"]}))
    html.write_page(out / "bench.html", f"{result['model']['name']}: bench", lead, sections, result["command"])
