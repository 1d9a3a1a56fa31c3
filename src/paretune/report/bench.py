"""The result of `bench` for people: tables on a terminal, Markdown, CSV, a page; and its first rows while it runs."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paretune.files import write_text
from paretune.report import html
from paretune.report.tables import NOT_MEASURED, Column, Row, to_csv, to_markdown, to_text
from paretune.report.units import format_percent, format_ratio

Result = Mapping[str, Any]

_RESULTS = {
    "baseline": "baseline",
    "faster": "faster",
    "slower": "slower",
    "indistinguishable": "no difference",
    "undecided": "undecided",
}


def agreement_table() -> tuple[str, list[Column]]:
    """What stands beside the speed of peers: whether they compute the same model, and what they take."""

    def greedy(row: Row) -> str:
        same, n = row.get("agreement_greedy_same"), row.get("agreement_greedy_n")
        return NOT_MEASURED if same is None else f"{same} of {n}"

    def share(row: Row) -> str:
        return format_percent(row.get("agreement_top1_share"))

    def error(row: Row) -> str:
        value = row.get("agreement_logits_rel_rms")
        return NOT_MEASURED if value is None else f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"

    return (
        "Peers",
        [
            Column("config", "Engine", numeric=False),
            Column("cell", "Input+output xbatch", numeric=False),
            Column("engine_version", "Version", numeric=False),
            Column("agreement_top1_share", "Same top token", share),
            Column("agreement_logits_rel_rms", "Logit error", error),
            Column("agreement_greedy_same", "Greedy tokens", greedy),
            Column("disk_bytes", "On disk"),
            Column("rss_peak_bytes", "Peak memory"),
        ],
    )


def _result_cell(phase: str) -> Any:
    def show(row: Row) -> str:
        if row["status"] != "measured":
            return {"not_reached": "not reached"}.get(row["status"], str(row["status"]))
        word = row.get(f"{phase}_verdict")
        return _RESULTS.get(str(word), "-")

    return show


def _speed_cell(phase: str) -> Any:
    def show(row: Row) -> str:
        keys = (f"{phase}_speedup", f"{phase}_speedup_low", f"{phase}_speedup_high")
        return "1.00x" if row["role"] == "baseline" else format_ratio(*(row.get(k) for k in keys))

    return show


def columns_of_bench() -> list[tuple[str, list[Column]]]:
    """(title, columns) of the tables that people read; prefill and decode are never blended."""
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
                Column("prefill_mfu", "MFU", lambda row: format_percent(row.get("prefill_mfu"))),
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


def _tables(result: Result) -> list[tuple[str, list[Column], list[Row]]]:
    """(title, columns, rows) of everything that is shown; peers have a table where there are some."""
    tables = [(title, columns, result["rows"]) for title, columns in columns_of_bench()]
    peers = [row for row in result["rows"] if row["role"] == "peer"]
    return tables + ([(*agreement_table(), peers)] if peers else [])


def _remarks(result: Result) -> list[str]:
    """What a reader has to know beside the tables: the resolution, failures, notes, limits, proofs."""
    out = ["Interrupted: what follows is what was known then."] if result.get("interrupted") else []
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


def first_text(rows: Sequence[Row]) -> str:
    """What a run shows of its first blocks, before anything is judged: times and intervals."""
    columns = [
        Column("config", "Config", numeric=False),
        *(c for phase in ("decode", "prefill") for c in (_time_column(phase), _ratio_column(phase))),
    ]
    lines = [f"First intervals ({rows[0]['cell']}), nothing is decided yet:", "", to_text(rows, columns, _width())]
    return "\n".join(lines)


def _time_column(phase: str) -> Column:
    return Column("tpot_sec", "TPOT") if phase == "decode" else Column("ttft_sec", "TTFT")


def _ratio_column(phase: str) -> Column:
    def show(row: Row) -> str:
        return str(row["status"]).replace("_", " ") if row["status"] != "measured" else _speed_cell(phase)(row)

    return Column(f"{phase}_speedup", f"{phase.capitalize()} speed-up", show)


def _width() -> int:
    return max(80, shutil.get_terminal_size((110, 24)).columns)


def as_text(result: Result) -> str:
    """The tables for a terminal."""
    width = _width()
    parts = []
    for title, columns, rows in _tables(result):
        parts.append(f"{title}\n\n{to_text(rows, columns, width)}")
    lines = _remarks(result) + [f"{term}: {text}" for term, text in result["definitions"].items()]
    parts.append("\n".join(textwrap.fill(line, width, subsequent_indent="  ") for line in lines) + "\n")
    return "\n".join(parts)


def as_format(name: str, result: Result) -> str:
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
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else value


def _origin(result: Result) -> str:
    versions, machine = result["versions"], result["hardware"]
    commit = result["environment"]["git_commit"] or "none"
    return (
        f"{machine['cpu_model']}, {machine['n_cores']} cores (machine {machine['id']}); torch {versions['torch']}; "
        f"commit {commit}; {result['created']}; seed {result['seed']}\n"
    )


def write(result: Result, out: Path, formats: Sequence[str]) -> None:
    """The files of a run, each whole or absent; the JSON and the page are always there."""
    for name in dict.fromkeys([*formats, "json"]):
        write_text(out / f"bench.{name}", as_format(name, result))
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
