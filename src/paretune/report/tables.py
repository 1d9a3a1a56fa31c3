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
    dig,
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
    "PEER_COLUMNS",
    "SHORT_COLUMNS",
    "TRIAL_COLUMNS",
    "Column",
    "Row",
    "as_column",
    "columns_of",
    "definitions_of",
    "dig",
    "format_bytes",
    "format_count",
    "format_number",
    "format_percent",
    "format_rate",
    "format_ratio",
    "format_sec",
    "format_value",
    "number",
    "peer_rows",
    "plain",
    "to_csv",
    "to_markdown",
    "to_text",
    "trial_rows",
    "winner_role",
]

Row = Any  # a dict, or a record whose fields a column names: "decode.n" is a field of a field

_STATUS_WORDS = {
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


# --- the rows of `tune` -----------------------------------------------------------------------------------


def _judgement(trial: Mapping[str, Any], role: str) -> str:
    """What became of a trial, in words."""
    if role == "baseline":
        return "baseline"
    if word := dig(trial, "standing", "word"):
        return plain(word)
    status = trial.get("status")  # a file of an earlier version
    if status != "measured":
        return {"failed": "failed", "invalid": "invalid", "not_reached": "not reached"}.get(str(status), plain(status))
    if role in ("chosen", "best so far"):
        return role
    if dig(trial, "quality", "within_bound") is False:
        return "over the quality limit"
    return _STATUS_WORDS.get(str(dig(trial, "speedup", "verdict")), NOT_MEASURED)


def _cause(trial: Mapping[str, Any], limit: Any) -> str:
    """Why a trial was not taken, in words; empty for one that measured well."""
    if trial.get("reason") or dig(trial, "standing", "why"):
        return plain(trial.get("reason") or trial["standing"]["why"])
    status = trial.get("status")
    if status == "not_reached":
        return "the time budget ended before its turn"
    if status != "measured":
        return "the cause was not recorded"
    if dig(trial, "quality", "within_bound") is False:
        upper = dig(trial, "quality", "ppl_increase_upper")
        return f"perplexity may rise by up to {format_percent(upper)}; the limit is {format_percent(limit)}"
    return ""


def winner_role(result: Mapping[str, Any]) -> str:
    """What the trial named by `winner_id` is: chosen, or the best so far of an unfinished search."""
    return "chosen" if result.get("outcome") == "winner" else "best so far"


def trial_rows(result: Mapping[str, Any]) -> list[Row]:
    """One flat row per trial: the winner, then by speed-up, then what failed, was excluded, was not reached."""
    limit = dig(result, "goal", "max_ppl_increase")
    rows: list[Row] = []
    for trial in result.get("trials") or []:
        role = ""
        if trial.get("id") is not None and trial.get("id") == result.get("baseline_id"):
            role = "baseline"
        elif trial.get("id") is not None and trial.get("id") == result.get("winner_id"):
            role = winner_role(result)
        speedup, quality, memory = (trial.get(k) or {} for k in ("speedup", "quality", "memory"))
        is_reference = role == "baseline" and trial.get("status") == "measured"
        rows.append(
            {
                "id": trial.get("id"),
                "name": plain(trial.get("name") or trial.get("id") or "unnamed"),
                "role": role,
                "status": trial.get("status"),
                "judgement": _judgement(trial, role),
                # The baseline is the unit of this scale, whether or not the producer wrote it down.
                "speedup": number(speedup.get("value")) if speedup else (1.0 if is_reference else None),
                "speedup_low": number(speedup.get("low")),
                "speedup_high": number(speedup.get("high")),
                "n_blocks": speedup.get("n_blocks"),
                "tpot_sec": number(trial.get("tpot_sec")),
                "ttft_sec": number(trial.get("ttft_sec")),
                "weights_bytes": number(memory.get("weights_bytes")),
                "kv_cache_bytes": number(memory.get("kv_cache_bytes")),
                "activation_peak_bytes": number(memory.get("activation_peak_bytes")),
                "rss_peak_bytes": number(memory.get("rss_peak_bytes")),
                "perplexity": number(quality.get("perplexity")),
                "ppl_increase": number(quality.get("ppl_increase")),
                "ppl_increase_upper": number(quality.get("ppl_increase_upper")),
                "kl_mean": number(quality.get("kl_mean")),
                "top1_agreement": number(quality.get("top1_agreement")),
                "within_bound": quality.get("within_bound"),
                "guarantee": trial.get("label"),
                "load_sec": number(trial.get("load_sec")),
                "compile_sec": number(trial.get("compile_sec")),
                "break_even_tokens": number(trial.get("break_even_tokens")),
                "mbu": number(trial.get("mbu")),
                "cause": _cause(trial, limit),
            }
        )
    order = {"measured": 1, "failed": 2, "invalid": 2, "excluded": 3, "not_reached": 4}

    def key(row: Row) -> tuple[int, float, str]:
        rank = 0 if row["role"] in ("chosen", "best so far") else order.get(str(row["status"]), 2)
        return rank, -(row["speedup"] or 0.0), row["name"]

    return sorted(rows, key=key)


def _speed_cell(row: Row) -> str:
    if row.get("role") == "baseline" and row.get("speedup") is not None:
        return f"{format_ratio(row['speedup'])} (reference)"
    return format_ratio(row.get("speedup"), row.get("speedup_low"), row.get("speedup_high"))


def _quality_cell(row: Row) -> str:
    if row.get("role") == "baseline":
        return "none (reference)"
    if row.get("ppl_increase") is None:
        return "none (lossless)" if row.get("guarantee") == "lossless" else NOT_MEASURED
    middle, upper = (format_percent(row.get(k), signed=True) for k in ("ppl_increase", "ppl_increase_upper"))
    return middle if row.get("ppl_increase_upper") is None or upper == middle else f"{middle}, at most {upper}"


def _guarantee_cell(row: Row) -> str:
    if row.get("guarantee") == "bounded" and row.get("within_bound") is False:
        return "none"  # "bounded" would promise what the measurement refuted
    return row.get("guarantee") or "-"


TRIAL_COLUMNS: tuple[Column, ...] = (
    Column("name", "Candidate", numeric=False, term="Baseline"),
    Column("judgement", "Result", numeric=False),
    Column("speedup", "Speed-up", _speed_cell, term="Speed-up"),
    Column("tpot_sec", "TPOT", term="TPOT"),
    Column("ttft_sec", "TTFT", term="TTFT"),
    Column("weights_bytes", "Weights", term="Weights"),
    Column("rss_peak_bytes", "Peak memory", term="Peak memory"),
    Column("ppl_increase", "Quality loss", _quality_cell, term="Quality loss"),
    Column("guarantee", "Guarantee", _guarantee_cell, numeric=False, term="Guarantee"),
    Column("cause", "Cause", lambda r: r.get("cause") or "-", numeric=False),
)

EXCLUDED_COLUMNS: tuple[Column, ...] = (TRIAL_COLUMNS[0], Column("cause", "Why it cannot win", numeric=False))

# What fits on a terminal; the file beside it and the report hold the rest.
SHORT_COLUMNS: tuple[Column, ...] = (
    *(c for c in TRIAL_COLUMNS if c.key in ("name", "judgement", "speedup", "tpot_sec")),
    Column("ppl_increase_upper", "Loss at most", term="Quality loss"),
    TRIAL_COLUMNS[-1],
)


# --- the peers of `tune` ----------------------------------------------------------------------------------


def peer_rows(result: Mapping[str, Any]) -> list[Row]:
    """What the plan runs, the baseline, then one row a peer; none where no peer was asked for."""
    measured, peers = result.get("peers_measured") or {}, result.get("peers") or []
    if not peers:
        return []
    ours, base = number(measured.get("reference_sec")), number(measured.get("baseline_sec"))
    rows: list[Row] = [
        {"engine": f"{plain(measured.get('reference'))} (ours)", "judgement": "the plan", "seconds": ours, "cause": ""}
    ]
    if base is not None and base != ours:
        rows.append({"engine": "baseline (ours)", "judgement": "-", "seconds": base, "cause": ""})
        rows[-1]["ratio"] = base / ours if ours else None
    for peer in peers:
        ratio, agreement = peer.get("ratio") or {}, peer.get("agreement") or {}
        status = "not reached" if peer.get("status") == "not_reached" else plain(peer.get("status"))
        rows.append(
            {
                "engine": plain(peer.get("engine")),
                "version": peer.get("version"),
                "judgement": _STATUS_WORDS.get(str(peer.get("verdict")), status),
                "seconds": number(peer.get("seconds")),
                **{f"ratio{end}": number(ratio.get(key)) for end, key in _ENDS},
                "top1_share": number(agreement.get("top1_share")),
                "logits_rel_rms": number(agreement.get("logits_rel_rms")),
                "perplexity": number(peer.get("perplexity")),
                "ppl_increase_upper": number(peer.get("ppl_increase_upper")),
                "keeps_bound": {True: "yes", False: "no", None: "not known"}.get(peer.get("keeps_bound"), "-"),
                "cause": plain(peer.get("cause") or ""),
            }
        )
    return rows


_ENDS = (("", "value"), ("_low", "low"), ("_high", "high"))


def _share_cell(key: str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(key) is None else format_percent(row[key])


def _peer_ratio_cell(row: Row) -> str:
    return "-" if row.get("ratio") is None else format_ratio(*(row.get(f"ratio{end}") for end, _ in _ENDS))


PEER_COLUMNS: tuple[Column, ...] = (
    Column("engine", "Engine", numeric=False),
    Column("judgement", "Against the plan", numeric=False),
    Column("ratio", "Plan's speed over it", _peer_ratio_cell),
    Column("seconds", "Time", lambda row: "-" if row.get("seconds") is None else format_sec(row["seconds"])),
    Column("top1_share", "Same top token", _share_cell("top1_share")),
    Column("logits_rel_rms", "Logit error", _share_cell("logits_rel_rms")),
    Column(
        "perplexity", "Perplexity", lambda row: "-" if row.get("perplexity") is None else f"{row['perplexity']:.4g}"
    ),
    Column("ppl_increase_upper", "Loss at most", _share_cell("ppl_increase_upper")),
    Column("keeps_bound", "Keeps the bound", lambda row: plain(row.get("keeps_bound") or "-"), numeric=False),
    Column("version", "Version", lambda row: plain(row.get("version") or "-"), numeric=False),
    Column("cause", "Cause", lambda row: row.get("cause") or "-", numeric=False),
)


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
    writer.writerows([["" if row.get(k) is None else row[k] for k in keys] for row in rows])
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
