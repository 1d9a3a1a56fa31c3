"""The report on a profile: tables of parts and kernels, the roofline, explanations, in text and as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paretune.measure.profile_native import N_STEPS
from paretune.measure.profile_parts import TITLES
from paretune.report import html
from paretune.report.roofline import caption, roofline
from paretune.report.tables import Column, Row, to_markdown
from paretune.report.units import format_bytes, format_percent, format_rate, format_sec, number

GROUPS = TITLES  # the headings of the tables
PHASES = {"prefill": "Prefill", "decode": "Decode", "train": "Training"}
# Printed with every table.
DEFINITIONS = (
    "Time: of all calls in one step, the mean over the middle half of the steps. Share: of the step as timed on its "
    "own, without readings. In its table: of the sum of the rows of that table.",
    "Bytes and FLOP: counted at the operators as they ran; a multiply-add is 2 FLOP.",
    "Of the ceiling: the least time that the bytes or the arithmetic need on this machine, as measured, over the time "
    "taken. Small data may come from a cache that is faster than the ceiling's.",
)


_TIME = Column("sec", "Time", lambda r: format_sec(r["sec"]) if r["sec"] is not None else "-")


def _percent(share: Any) -> str:
    return "-" if number(share) is None else format_percent(share)


def _longer(change: float) -> str:
    return f"{_percent(abs(change))} {'longer' if change >= 0 else 'shorter'}"


def _ceiling_cell(row: Row) -> str:
    if number(row.get("ceiling_share")) is None:
        return "-"
    return f"{format_percent(row['ceiling_share'])} ({row['limit']})"


_AMOUNTS = (
    Column("bytes", "Bytes", lambda r: format_bytes(r["bytes"]) if r["bytes"] else "-"),
    Column("flops", "FLOP", lambda r: format_rate(r["flops"], "FLOP") if r["flops"] else "-"),
    Column("bytes_per_sec", "Bandwidth", lambda r: format_rate(r["bytes_per_sec"]) if r["bytes"] else "-"),
    Column("flops_per_sec", "Arithmetic", lambda r: format_rate(r["flops_per_sec"], "FLOP/s") if r["flops"] else "-"),
    Column("ceiling_share", "Of the ceiling", _ceiling_cell),
)


def part_columns(published: bool = False) -> list[Column]:
    """Columns of a breakdown; `published` adds the published study's share."""
    columns = [
        Column("title", "Part", numeric=False),
        _TIME,
        Column("share", "Share", lambda r: _percent(r["share"])),
        Column("group_share", "In its table", lambda r: _percent(r["group_share"])),
    ]
    if published:
        columns.append(Column("published_share", "Published", lambda r: _percent(r.get("published_share"))))
    return [
        *columns,
        *_AMOUNTS,
    ]


def kernel_columns(profiled_sec: float) -> list[Column]:
    return [
        Column("name", "Kernel", numeric=False),
        Column("kind", "Class", numeric=False),
        Column("count", "Count", lambda r: f"{r['count']:,.0f}"),
        _TIME,
        Column("share", "Share", lambda r: _percent(r["sec"] / profiled_sec)),
    ]


CLASS_COLUMNS = [
    Column("kind", "Class", numeric=False),
    Column("count", "Count", lambda r: f"{r['count']:,.0f}"),
    _TIME,
    Column("share", "Share", lambda r: _percent(r["share"])),
]
NATIVE_COLUMNS = [
    Column("operation", "Operation", numeric=False),
    Column("calls", "Calls", lambda r: f"{r['calls']:,.0f}"),
    _TIME,
    Column("share", "Share", lambda r: _percent(r["share"])),
    *_AMOUNTS,
]


def group_rows(result: Mapping[str, Any], group: str) -> list[Row]:
    """The rows of one table; that of the step ends with what its parts leave over."""
    rows = [dict(row) for row in result["parts"] if row["group"] == group]
    closing = result.get("closing")
    if group == "model" and closing and rows:
        empty = dict.fromkeys(rows[0])
        title = (
            "Between the parts" if closing["between_sec"] >= 0 else "Between the parts (below zero: what readings cost)"
        )
        share = closing["between_sec"] / result["whole"]["sec"]
        rows.append({**empty, "title": title, "sec": closing["between_sec"], "share": share, "bytes": 0, "flops": 0})
    return rows


def lead_of(result: Mapping[str, Any]) -> list[str]:
    """The answer in words: how long, and why."""
    whole = result["whole"]
    what = f"{result['config']}, {result['input_len']} input tokens, batch {result['batch_size']}"
    first = f"{PHASES[result['phase']]} ({what}): {format_sec(whole['sec'])} a step"
    first += f", {whole['tokens_per_sec']:,.0f} tokens/s." if number(whole.get("tokens_per_sec")) else "."
    return [first, *(f"{e['cause'][:1].upper()}{e['cause'][1:]}: {e['text']}" for e in result["explanations"])]


def measured_of(result: Mapping[str, Any]) -> list[str]:
    """How far the figures can be trusted."""
    blocks, overhead, closing = result["blocks"], result["overhead"], result["closing"]
    out = [
        f"{result['whole']['n_steps']} steps in {blocks['n_kept']} of {blocks['n']} blocks, those of the bandwidth "
        f"state that most blocks saw ({blocks['state']}); the mean over the half that was least disturbed."
    ]
    if overhead and closing:
        reading = f"{overhead['n_readings']} readings of {format_sec(overhead['sec_per_reading'])}"
        alone = overhead.get("alone_sec")
        how = "not taken off: a GPU does not wait for them"
        if alone:
            how = f"from steps that were read twice, within one to three times the {format_sec(alone)} around an empty "
            how += "module; taken off each part"
        out.append(
            f"Readings: the marked step took {_longer(overhead['share'])} than the plain one ({reading}, {how}). "
            f"The parts add up to {format_percent(closing['share'])} of the plain step; the difference is a row of its "
            "own."
        )
    native = result.get("native")
    if native and native["available"]:
        other = native["step_sec"] / result["whole"]["sec"] - 1
        out.append(
            f"Operations: the native runner's own counters over {N_STEPS} steps, switched on for them; such a step "
            f"took {_longer(other)} than the plain one, and shares are of it. Operations are "
            f"{format_percent(native['sum_sec'] / native['step_sec'])} of it; the rest, the call from Python and the "
            "waking of threads, is a row of its own."
        )
    longer = result["profiled_sec"] / result["whole"]["sec"] - 1
    out.append(
        f"Kernels: seen by PyTorch's profiler, under which a step takes {_longer(longer)}; "
        "their shares are of that step."
        + (" Over half of it is the profiler's or a disturbance: take these shares as rough." if longer > 1 else "")
    )
    return out + [f"{note[:1].upper()}{note[1:]}." for note in result["notes"]]


def markdown(results: Sequence[Mapping[str, Any]], n_kernels: int = 12) -> str:
    """All of it as Markdown that reads well as plain text."""
    lines: list[str] = []
    for result in results:
        lines += [f"# {result['model']['name']}: {PHASES[result['phase']].lower()}", ""]
        lines += [f"{s}\n" for s in lead_of(result)]
        for group, title in GROUPS.items():
            rows = group_rows(result, group)
            if rows:
                lines += [f"## {title}", "", to_markdown(rows, part_columns()), ""]
        lines += _native_lines(result)
        lines += ["## Kernels", "", to_markdown(result["kernel_classes"], CLASS_COLUMNS), ""]
        kernels = result["kernels"][:n_kernels]
        lines += [to_markdown(kernels, kernel_columns(result["profiled_sec"])), ""]
        if len(result["kernels"]) > n_kernels:
            lines += [f"{len(result['kernels']) - n_kernels} more kernels: see profile.json (-o FOLDER)", ""]
        lines += ["## How it was measured", ""] + [f"- {s}" for s in measured_of(result)] + [""]
    return "\n".join([*lines, *(f"- {d}" for d in DEFINITIONS), ""])


def _native_lines(result: Mapping[str, Any]) -> list[str]:
    native = result.get("native")
    if not native:
        return []
    if not native["available"]:
        return ["## Native operations", "", f"Not available: {native['reason']}.", ""]
    return ["## Native operations", "", to_markdown(native["rows"], NATIVE_COLUMNS), ""]


def sections_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The part of a page that is about one profile."""
    name = PHASES[result["phase"]]
    out = []
    for group, title in GROUPS.items():
        rows = group_rows(result, group)
        if rows:
            out.append(html.section(f"{name}: {title[:1].lower()}{title[1:]}", rows=rows, columns=part_columns()))
    if result["layers"]:
        rows = [{"layer": str(row["layer"]), "sec": row["sec"]} for row in result["layers"]]
        out.append(html.section(f"{name}: by layer", rows=rows, columns=[Column("layer", "Layer"), _TIME]))
    native = result.get("native")
    if native:
        text = [] if native["available"] else [f"Not available: {native['reason']}."]
        out.append(html.section(f"{name}: native operations", text, native["rows"], NATIVE_COLUMNS))
    out.append(html.section(f"{name}: kernels by class", rows=result["kernel_classes"], columns=CLASS_COLUMNS))
    columns = kernel_columns(result["profiled_sec"])
    out.append(html.section(f"{name}: kernels", rows=result["kernels"][:40], columns=columns))
    out.append(html.section(f"{name}: how it was measured", measured_of(result)))
    return out


def write(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes `report.html` and `roofline.png`.

    Raises:
        ParetuneError: the folder cannot be written.
    """
    from paretune import files

    figures = [(roofline(results), caption(results))]
    files.write_bytes(folder / "roofline.png", roofline(results, "png"))
    lead = [s for r in results for s in lead_of(r)]
    sections = [html.section("Roofline", figures=figures)]
    sections += [s for r in results for s in sections_of(r)]
    sections.append(html.section("What the columns mean", DEFINITIONS))
    first = results[0]
    machine = first["hardware"] | {"threads": first["threads"]["threads"], "versions": first["versions"]}
    sections.append(html.section("Machine", facts=machine))
    html.write_page(folder / "report.html", f"{first['model']['name']}: profile", lead, sections, first["command"])
