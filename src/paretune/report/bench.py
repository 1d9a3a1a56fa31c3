"""The result of `bench` for people: tables on a terminal, Markdown, CSV, a page; and its first rows while it runs."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paretune.files import write_text
from paretune.records.bench import BenchResult, BenchRow, Cell, PhaseName
from paretune.records.record import to_json
from paretune.report import html
from paretune.report.tables import NOT_MEASURED, Column, to_csv, to_markdown, to_text
from paretune.report.units import format_percent, format_ratio, format_sec

_RESULTS = {
    "baseline": "baseline",
    "faster": "faster",
    "slower": "slower",
    "indistinguishable": "no difference",
    "undecided": "undecided",
}
_SHOWN: tuple[PhaseName, ...] = ("decode", "prefill")  # phases of the tables


def agreement_table() -> tuple[str, list[Column]]:
    """What stands beside the speed of peers: whether they compute the same model, and what they take."""

    def greedy(row: BenchRow) -> str:
        found = row.agreement
        return NOT_MEASURED if found is None else f"{found.greedy_same} of {found.greedy_n}"

    def share(row: BenchRow) -> str:
        return format_percent(None if row.agreement is None else row.agreement.top1_share)

    def error(row: BenchRow) -> str:
        if row.agreement is None:
            return NOT_MEASURED
        value = row.agreement.logits_rel_rms
        return f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"

    return (
        "Peers",
        [
            Column("config", "Engine", numeric=False),
            Column("cell", "Input+output xbatch", numeric=False),
            Column("engine_version", "Version", numeric=False),
            Column("agreement.top1_share", "Same top token", share),
            Column("agreement.logits_rel_rms", "Logit error", error),
            Column("agreement.greedy_same", "Greedy tokens", greedy),
            Column("disk_bytes", "On disk"),
            Column("rss_peak_bytes", "Peak memory"),
        ],
    )


def _result(row: BenchRow, phase: PhaseName) -> str | None:
    """The verdict in words; None where there is none."""
    found = row.phase(phase)
    return None if found is None or found.verdict is None else _RESULTS[found.verdict]


def _result_cell(phase: PhaseName) -> Callable[[BenchRow], str]:
    def show(row: BenchRow) -> str:
        if row.status != "measured":
            return row.status.replace("_", " ")
        return _result(row, phase) or "-"

    return show


def _speed_cell(phase: PhaseName) -> Callable[[BenchRow], str]:
    def show(row: BenchRow) -> str:
        found = row.phase(phase)
        if row.role == "baseline":
            return "1.00x"
        return NOT_MEASURED if found is None else format_ratio(found.speedup, found.speedup_low, found.speedup_high)

    return show


def columns_of_bench() -> list[tuple[str, list[Column]]]:
    """(title, columns) of the tables that people read; prefill and decode are never blended."""
    head = [Column("config", "Config", numeric=False), Column("cell", "Input+output xbatch", numeric=False)]

    def phase(name: PhaseName, *more: Column) -> list[Column]:
        result = Column(f"{name}.verdict", "Result", _result_cell(name), numeric=False)
        return [*head, result, Column(f"{name}.speedup", "Speed-up", _speed_cell(name)), *more]

    return [
        (
            "Decode",
            phase(
                "decode",
                Column("tpot_sec", "TPOT"),
                Column("decode_tokens_per_sec", "Tokens/s"),
                Column("mbu", "MBU"),
                Column("decode.n", "Slices"),
            ),
        ),
        (
            "Prefill",
            phase(
                "prefill",
                Column("ttft_sec", "TTFT"),
                Column("prefill_tokens_per_sec", "Tokens/s"),
                Column("prefill_mfu", "MFU", lambda row: format_percent(row.prefill_mfu)),
                Column("prefill.n", "Slices"),
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


def _tables(result: BenchResult) -> list[tuple[str, list[Column], list[BenchRow]]]:
    """(title, columns, rows) of everything that is shown; peers have a table where there are some."""
    tables = [(title, columns, result.rows) for title, columns in columns_of_bench()]
    peers = [row for row in result.rows if row.role == "peer"]
    return tables + ([(*agreement_table(), peers)] if peers else [])


def _remarks(result: BenchResult) -> list[str]:
    """What a reader has to know beside the tables: the resolution, failures, notes, limits, proofs."""
    out = ["Interrupted: what follows is what was known then."] if result.interrupted else []
    for entry in result.aa:
        where = f"{entry.cell}, {entry.kind}" + (f", group {entry.group + 1}" if entry.group else "")
        if entry.half_width is None:
            out.append(f"A/A ({where}): too few blocks to know what this machine resolves; nothing is decided.")
        else:
            out.append(f"A/A ({where}): the baseline differs from itself by up to {entry.half_width:.1%}.")
    for row in result.rows:
        where = f"{row.config} ({row.cell})"
        if row.cause:
            out.append(f"{where}: {row.cause}.")
        out += [f"{where}: {note}." for note in row.notes]
        if row.role != "twin":
            out += [f"{where}: {bound}." for bound in (row.bound_by, row.prefill_bound_by) if bound]
        for name in _SHOWN:
            found = row.phase(name)
            if found is not None and found.by_state is not None:
                for state, ratio in (("low", found.by_state.low), ("high", found.by_state.high)):
                    if ratio.value is not None:
                        out.append(f"{where}: {name} speed-up in the {state}-bandwidth state {ratio.value:.2f}x.")
    threads = sorted({row.threads for row in result.rows if row.threads})
    repeated = sum(phase.n_repeated for row in result.rows for name, phase in row.phases if name in _SHOWN)
    out.append(f"Threads, read back: {', '.join(map(str, threads)) or 'unknown'}.")
    out.append(f"Slices repeated because the bandwidth changed meanwhile: {repeated}.")
    return out


def first_text(rows: Sequence[BenchRow]) -> str:
    """What a run shows of its first blocks, before anything is judged: times and intervals."""
    columns = [
        Column("config", "Config", numeric=False),
        *(c for phase in _SHOWN for c in (_time_column(phase), _ratio_column(phase))),
    ]
    lines = [f"First intervals ({rows[0].cell}), nothing is decided yet:", "", to_text(rows, columns, _width())]
    return "\n".join(lines)


def _time_column(phase: PhaseName) -> Column:
    return Column("tpot_sec", "TPOT") if phase == "decode" else Column("ttft_sec", "TTFT")


def _ratio_column(phase: PhaseName) -> Column:
    def show(row: BenchRow) -> str:
        return row.status.replace("_", " ") if row.status != "measured" else _speed_cell(phase)(row)

    return Column(f"{phase}.speedup", f"{phase.capitalize()} speed-up", show)


def _width() -> int:
    return max(80, shutil.get_terminal_size((110, 24)).columns)


def as_text(result: BenchResult) -> str:
    """The tables for a terminal."""
    width = _width()
    parts = []
    for title, columns, rows in _tables(result):
        parts.append(f"{title}\n\n{to_text(rows, columns, width)}")
    lines = _remarks(result) + [f"{term}: {text}" for term, text in result.definitions.items()]
    parts.append("\n".join(textwrap.fill(line, width, subsequent_indent="  ") for line in lines) + "\n")
    return "\n".join(parts)


def as_format(name: str, result: BenchResult) -> str:
    if name == "json":
        return json.dumps(to_json(result), indent=2, allow_nan=False) + "\n"
    if name == "csv":
        return to_csv([{k: _flat(v) for k, v in to_json(row).items()} for row in result.rows])
    parts = [f"# {result.model.name}: speed and memory\n"]
    parts += [f"## {title}\n\n{to_markdown(rows, columns)}" for title, columns, rows in _tables(result)]
    parts.append("## Remarks\n\n" + "".join(f"- {line}\n" for line in _remarks(result)))
    defined = "".join(f"- **{term}**: {text}\n" for term, text in result.definitions.items())
    parts.append(f"## Definitions\n\n{defined}")
    parts.append(f"## Make it again\n\n    {result.command}\n\n{_origin(result)}")
    return "\n".join(parts)


def _flat(value: Any) -> Any:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else value


def _origin(result: BenchResult) -> str:
    machine, commit = result.hardware, result.environment.git_commit or "none"
    return (
        f"{machine.cpu_model}, {machine.n_cores} cores (machine {machine.id}); torch {result.versions['torch']}; "
        f"commit {commit}; {result.created}; seed {result.seed}\n"
    )


def write(result: BenchResult, out: Path, formats: Sequence[str]) -> None:
    """The files of a run, each whole or absent; the JSON and the page are always there."""
    for name in dict.fromkeys([*formats, "json"]):
        write_text(out / f"bench.{name}", as_format(name, result))
    lead = [
        f"{row.config} ({row.cell}), {phase}: {_result(row, phase) or 'not compared'}, "
        f"{_speed_cell(phase)(row)} the speed of the baseline."
        for row in result.rows
        for phase in _SHOWN
        if row.role in ("", "peer") and row.status == "measured"
    ]
    sections = [html.section(title, (), rows, columns) for title, columns, rows in _tables(result)]
    sections.append(html.section("Remarks", _remarks(result)))
    proofs = [f"{row.config} ({row.cell}): {'; '.join(row.proof)}." for row in result.rows if row.proof]
    sections.append(html.section("Checked before it was timed", proofs))
    sections.append(html.section("Definitions", [f"{k}: {v}" for k, v in result.definitions.items()]))
    sections.append(html.section("Machine", facts=to_json(result.hardware) | {"versions": result.versions}))
    html.write_page(out / "bench.html", f"{result.model.name}: bench", lead, sections, result.command)


def estimate_text(
    model: str,
    configs: Sequence[tuple[str, str]],
    engines: Sequence[tuple[str, str]],
    cells: Sequence[Cell],
    seconds: tuple[float, float],
) -> str:
    """What a run would measure and how long it takes.

    Args:
        configs: names and their recipes'.
        engines: names and whether they are installed.
        seconds: from, to.
    """
    lines = [f"model: {model}"]
    lines += [f"config {name}: {recipe}" for name, recipe in configs]
    lines += [f"engine {name}: {state}" for name, state in engines]
    lines += [f"cell: {c.input_len} input + {c.output_len} output tokens, batch {c.batch_size}" for c in cells]
    low, high = (format_sec(float(round(s))) for s in seconds)
    lines.append(f"estimate: {low} to {high} for a small model without compilation; larger ones take longer")
    return "\n".join(lines)
