"""Rows, units and text tables: the one place that decides how a number is written.

A row is a record or a flat dict of raw values; a `Column` says how one of them is shown. CSV keeps the raw values
(units are in the names of the columns), Markdown and text show them with units. `bench` and the studies bring rows of
their own.
"""

from __future__ import annotations

import csv
import io
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paretune.report.units import (
    DEFINITIONS,
    NOT_MEASURED,
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_rate,
    format_ratio,
    format_sec,
    format_value,
    number,
    plain,
)

__all__ = [
    "DEFINITIONS",
    "NOT_MEASURED",
    "STATUS_WORDS",
    "Column",
    "Row",
    "as_column",
    "columns_of",
    "definitions_of",
    "format_bytes",
    "format_count",
    "format_number",
    "format_percent",
    "format_rate",
    "format_ratio",
    "format_sec",
    "format_value",
    "number",
    "plain",
    "to_csv",
    "to_markdown",
    "to_text",
]

Row = Any  # a dict, or a record whose fields a column names: "decode.n" is a field of a field

STATUS_WORDS = {
    "faster": "faster",
    "slower": "slower",
    "indistinguishable": "no difference beyond noise",
    "undecided": "undecided: too few samples",
}


# --- columns ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """How one value of a row is shown.

    Args:
        key: name of the value in the row, and the name of the CSV column.
        title: heading for people.
        show: the text for a whole row; by default chosen from the ending of `key` (`_sec`, `_bytes`, ...).
        numeric: right-aligned.
        term: the entry of `DEFINITIONS` that this column needs.
    """

    key: str
    title: str
    show: Callable[[Row], str] | None = None
    numeric: bool = True
    term: str | None = None

    def text(self, row: Row) -> str:
        """The cell of `row`, with its unit."""
        return plain(self.show(row) if self.show else format_value(self.key, value_of(row, self.key)))


def value_of(row: Row, key: str) -> Any:
    """The value of a row that `key` names; None where it is not known."""
    if isinstance(row, Mapping):
        return row.get(key)
    for part in key.split("."):
        row = None if row is None else getattr(row, part)
    return row


def _term(key: str) -> str | None:
    """The definition that a column of this name needs."""
    for part, term in (
        ("speedup", "Speed-up"),
        ("ttft", "TTFT"),
        ("tpot", "TPOT"),
        ("itl", "ITL"),
        ("tokens_per_sec", "Throughput"),
        ("weights_bytes", "Weights"),
        ("rss_peak", "Peak memory"),
        ("ppl_increase", "Quality loss"),
        ("perplexity", "Perplexity"),
        ("break_even", "Pays back after"),
        ("mbu", "Bandwidth use"),
        ("guarantee", "Guarantee"),
    ):
        if part in key:
            return term
    return None


def as_column(column: Column | str) -> Column:
    """A key alone becomes a column whose unit, heading and definition come from its name."""
    if isinstance(column, Column):
        return column
    title = column.replace("bytes_per_sec", "bandwidth").replace("_per_sec", "/s")
    for suffix in ("_sec", "_bytes"):
        title = title.removesuffix(suffix)
    title = title.replace("_", " ").strip()
    title = title.upper() if title in ("ttft", "tpot", "itl", "mbu") else title[:1].upper() + title[1:]
    return Column(column, title, term=_term(column))


def columns_of(rows: Sequence[Row], columns: Sequence[Column | str] | None = None) -> list[Column]:
    """The columns asked for, or every key of the rows in order of appearance. Text is left-aligned."""
    chosen: Iterable[Column | str] = columns if columns is not None else dict.fromkeys(k for r in rows for k in r)
    out = []
    for given in chosen:
        column = as_column(given)
        is_text = any(isinstance(value_of(r, column.key), str) for r in rows)
        out.append(Column(column.key, column.title, column.show, column.numeric and not is_text, column.term))
    return out


# --- tables -----------------------------------------------------------------------------------------------


def definitions_of(columns: Iterable[Column]) -> dict[str, str]:
    """The definitions that a table with these columns needs."""
    terms = {c.term for c in columns}
    return {term: text for term, text in DEFINITIONS.items() if term in terms}


def to_markdown(rows: Sequence[Row], columns: Sequence[Column | str] | None = None) -> str:
    """A Markdown table with its definitions below."""
    chosen = columns_of(rows, columns)

    def cell(text: str) -> str:
        # A bar would end the cell, an angle bracket would start raw HTML: names come from outside.
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

    lines = ["| " + " | ".join(cell(c.title) for c in chosen) + " |"]
    lines.append("|" + "|".join("---:" if c.numeric else ":---" for c in chosen) + "|")
    lines += ["| " + " | ".join(cell(c.text(row)) for c in chosen) + " |" for row in rows]
    notes = definitions_of(chosen)
    return "\n".join(lines + ([""] if notes else []) + [f"- **{t}**: {text}" for t, text in notes.items()]) + "\n"


def to_csv(rows: Sequence[Row], columns: Sequence[Column | str] | None = None) -> str:
    """Raw values; what was not measured is empty; the unit is in the name of the column."""
    keys = [c.key for c in columns_of(rows, columns)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(keys)
    values = [[value_of(row, key) for key in keys] for row in rows]
    writer.writerows([["" if value is None else value for value in line] for line in values])
    return out.getvalue()


def _width(text: str) -> int:
    """Columns on a terminal: East Asian wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def to_text(
    rows: Sequence[Row],
    columns: Sequence[Column | str] | None = None,
    width: int | None = None,
    definitions: bool = True,
) -> str:
    """A fixed-width table for a terminal.

    Args:
        width: columns of the terminal; the widest text column is wrapped to fit. None: as wide as it takes.
        definitions: print what the columns mean below.
    """
    chosen = columns_of(rows, columns)
    table = [[c.title for c in chosen]] + [[c.text(row) for c in chosen] for row in rows]
    widths = [max(_width(line[i]) for line in table) for i in range(len(chosen))]
    excess = sum(widths) + 2 * (len(widths) - 1) - width if width and widths else 0
    text_columns = [i for i, c in enumerate(chosen) if not c.numeric]
    while excess > 0 and text_columns:
        # The widest text column gives way, down to a width at which wrapping still reads.
        i = max(text_columns, key=lambda i: widths[i])
        cut = min(excess, max(0, widths[i] - 18))
        widths[i] -= cut
        excess -= cut
        text_columns.remove(i)

    def lines_of(cells: list[str]) -> list[str]:
        wrapped = [textwrap.wrap(text, w) or [""] for text, w in zip(cells, widths, strict=True)]
        lines = []
        for i in range(max((len(w) for w in wrapped), default=0)):
            parts = []
            for part, w, column in zip(wrapped, widths, chosen, strict=True):
                text = part[i] if i < len(part) else ""
                gap = " " * max(0, w - _width(text))
                parts.append(gap + text if column.numeric else text + gap)
            lines.append("  ".join(parts).rstrip())
        return lines

    out = lines_of(table[0])
    out.append("  ".join("-" * w for w in widths))
    for cells in table[1:]:
        out += lines_of(cells)
    if definitions and (notes := definitions_of(chosen)):
        out.append("")
        for term, text in notes.items():
            out += textwrap.wrap(f"{term}: {text}", max(40, width or 100), subsequent_indent="  ")
    return "\n".join(out) + "\n"
