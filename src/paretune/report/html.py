"""The report as one HTML file: no network, no scripts, nothing beside it.

Everything that comes from outside is escaped by the template engine; only our own pictures pass as markup.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune import files
from paretune.records.explanation import Explanation
from paretune.records.record import to_json
from paretune.records.regimes import Regimes
from paretune.records.tune import TuneResult
from paretune.report import plots, regimes, words
from paretune.report.tables import DEFINITIONS, Column, Row, columns_of, definitions_of
from paretune.report.trials import EXCLUDED_COLUMNS, PEER_COLUMNS, TRIAL_COLUMNS, TrialRow, peer_lines, trial_rows
from paretune.report.units import (
    NOT_MEASURED,
    format_count,
    format_number,
    format_percent,
    format_rate,
    format_sec,
    format_value,
    plain,
)

if TYPE_CHECKING:
    from jinja2 import Environment

_MAX_LATE = 12  # candidates that were not reached: more than that are folded away
_LATENCY_CAPTION = (
    "Medians; shorter is better. Green: chosen. Blue: faster and within the limit. Orange: over the quality "
    "limit. Grey: the baseline, and what is slower or not clearly different."
)
_BANDWIDTH_CAPTION = (
    "How fast this machine reads data, measured here by size of the data: small data stays in the caches of "
    "the processor. Writing one token reads all weights once, so the height of a curve at the dashed line is "
    "the most that the model can get."
)
_CONFIRMED_NOTE = (
    " The row of the chosen one holds the numbers of the search; those on top were confirmed afterwards in "
    "fresh processes, so they differ a little."
)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )


def _markup(svg: bytes) -> Any:
    """A picture of ours: the one thing that the template may take as it is."""
    from markupsafe import Markup

    return Markup(svg.decode("utf-8"))


def _cell(text: str, kind: str, label: str, under: str = "", span: int = 1) -> dict[str, Any]:
    return {"text": text, "kind": kind, "label": label, "under": under, "span": span}


def _trial_grid(rows: Sequence[TrialRow]) -> dict[str, Any]:
    """The table of trials: the cause stands in the row where the numbers would be, never off the screen."""
    chosen = columns_of(rows, [c for c in TRIAL_COLUMNS if c.key != "cause"])
    grid = _grid(rows, chosen)
    for row, line in zip(rows, grid["lines"], strict=True):
        name, result, *values = line["cells"]
        result["kind"] = "result"
        if row.status == "measured":
            result["under"] = row.cause
            for cell, column in zip(values, chosen[2:], strict=True):
                if column.key == "ppl_increase":
                    cell["kind"] = "loss"
        else:
            whole = _cell(f"{NOT_MEASURED}: {row.cause}", "cause", "Cause", span=len(values))
            line["cells"] = [name, result, whole]
    return grid


def _grid(rows: Sequence[Row], columns: Sequence[Column | str] | None = None) -> dict[str, Any]:
    """A table as the templates want it."""
    chosen = columns_of(rows, columns)
    lines = []
    for row in rows:
        cells = []
        for i, column in enumerate(chosen):
            text = column.text(row)
            kind = "name" if i == 0 else "num" if column.numeric else "cause" if column.key == "cause" else "text"
            kind += " gone" if text in (NOT_MEASURED, "-", "") else ""
            cells.append(_cell(text, kind, column.title))
        lines.append({"cells": cells, "emphasis": _role(row) in ("chosen", "best so far")})
    return {"head": chosen, "lines": lines, "definitions": definitions_of(chosen)}


def _role(row: Row) -> Any:
    return row.get("role") if isinstance(row, Mapping) else getattr(row, "role", None)


def _pairs(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(name, text) of a nested dict, units by the names of the keys."""
    out: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out += _pairs(value, f"{name}.")
            continue
        label = plain(name).removesuffix("_bytes").replace("n_", "number of ", key.startswith("n_"))
        text = "none" if value is None else format_value(str(key), value)
        out.append((label.replace("_", " "), text))
    return out


def _why(result: TuneResult) -> list[dict[str, Any]]:
    """What the winner and the baseline are bound by, and the proof that the changes took effect."""
    blocks = []
    winner, baseline = result.winner, result.baseline
    for role, trial in (("", winner), ("the baseline", baseline)):
        if trial is None or (role and trial is winner):
            continue
        found, name = trial.measured, plain(trial.name)
        mbu = None
        if found and found.mbu is not None:
            mbu = (
                f"Each output token reads the weights and the cache at {format_percent(found.mbu)} of the read "
                "bandwidth that this machine delivers; near 100 % only fewer bytes can make it faster."
            )
        blocks.append(
            {
                "name": name if not role or name.lower() == "baseline" else f"{name} ({role})",
                "bound_by": plain(found.bound_by).rstrip(".") if found and found.bound_by else None,
                "mbu": mbu,
                "explanations": _sentences(found.explanations) if found else [],
                "proof": [plain(s) for s in found.proof] if found else [],
            }
        )
    return blocks


def _sentences(explanations: Sequence[Explanation]) -> list[str]:
    """The explanations; where no rule fired, the roofline's own sentence stands above already."""
    return [plain(e.text) for e in explanations if e.cause != "no single cause"]


def _details(result: TuneResult) -> list[dict[str, Any]]:
    """Everything else that is known of a measured trial."""
    out = []
    for trial in result.trials:
        found = trial.measured
        if found is None:
            continue
        pairs, quality = _pairs(to_json(found.memory)), found.quality
        if quality is not None:
            pairs += [
                ("perplexity", format_number(quality.perplexity)),
                ("perplexity of the baseline", format_number(quality.baseline_perplexity)),
                ("mean KL divergence from the baseline", format_number(quality.kl_mean)),
                ("same most likely token as the baseline", format_percent(quality.top1_agreement)),
            ]
        pairs += [
            ("time to load", format_sec(found.load_sec)),
            ("time to compile", format_sec(found.compile_sec)),
            ("pays back after (output tokens)", format_number(found.break_even_tokens)),
            ("bound by", plain(found.bound_by or NOT_MEASURED)),
            ("checked", "; ".join(plain(s) for s in found.proof) or "nothing to check"),
            ("recipe", json.dumps(trial.recipe, sort_keys=True, default=str)),
        ]
        # What a reader can do nothing with is left out: the table already says which parts were not measured.
        kept = [(key, text) for key, text in pairs if text != NOT_MEASURED]
        out.append({"name": plain(trial.name), "pairs": kept})
    return out


def _machine(result: TuneResult) -> list[tuple[str, str]]:
    pairs = _pairs(to_json(result.hardware))
    pairs += [
        (f"matrix products in {plain(dtype)}, measured", format_rate(rate, "FLOP/s"))
        for dtype, rate in result.matrix_rates.items()
    ]
    largest = max(result.bandwidth.sweep, key=lambda p: (p.bytes, p.n_threads), default=None)
    if largest:
        size = format_value("bytes", largest.bytes)
        pairs.append((f"read bandwidth at {size}, measured", format_rate(largest.bytes_per_sec)))
    return pairs


def _regimes(found: Regimes) -> dict[str, Any]:
    """The map, the table in words, and what the forms are."""
    rows = regimes.rows_of(found)
    return {
        "lines": regimes.form_lines(found),
        "map": _markup(regimes.crossover(found)),
        "caption": regimes.CAPTION,
        "grid": _grid(rows, regimes.COLUMNS) if rows else None,
    }


def _context(result: TuneResult) -> dict[str, Any]:
    """All that the template prints, already in words."""
    rows = trial_rows(result)
    late = [r for r in rows if r.status == "not_reached"]
    excluded = [r for r in rows if r.status == "excluded"]
    peers = peer_lines(result)
    fold = len(late) > _MAX_LATE
    shown = [r for r in rows if r.status != "excluded" and not (fold and r.status == "not_reached")]
    model_name = plain(result.model.name)
    model = to_json(result.model) | {"n_parameters": format_count(result.model.n_parameters)}
    origin = [
        ("command", plain(result.command)),
        ("seed", plain(result.seed)),
        ("raw samples", plain(result.samples_file)),
    ]
    origin += [(f"version of {plain(k)}", plain(v)) for k, v in result.versions.items()]
    return {
        "title": f"Paretune: {model_name}",
        "model_name": model_name,
        "created": plain(result.created).replace("T", " ").replace("+00:00", " UTC"),
        "top": words.top_of(result),
        "goal": words.goal_sentence(result),
        "cards": words.cards_of(result),
        "certainty": words.certainty_of(result),
        "pareto": _markup(plots.pareto(result)),
        "pareto_caption": plots.pareto_caption(result),
        "table_note": _CONFIRMED_NOTE if result.confirmation else "",
        "grid": _trial_grid(shown),
        "late": {**_trial_grid(late), "definitions": {}} if fold else None,
        "excluded": _grid(excluded, EXCLUDED_COLUMNS) if excluded else None,
        "peers": _grid(peers, PEER_COLUMNS) if peers else None,
        "peers_text": words.peers_sentences(result) if peers else [],
        "regimes": _regimes(result.regimes) if result.regimes else None,
        "why": _why(result),
        "latency": _markup(plots.latency_bars(result)),
        "latency_caption": _LATENCY_CAPTION,
        "details": _details(result),
        "space": words.space_sentence(result),
        "illegal": words.illegal_groups(result),
        "machine": _machine(result),
        "bandwidth": _markup(plots.bandwidth_curve(result)),
        "bandwidth_caption": _BANDWIDTH_CAPTION,
        "model": _pairs(model),
        "again": plain(result.again),
        "origin": origin,
        "definitions": DEFINITIONS,
    }


def render_report(result: TuneResult) -> str:
    """The report on `tune` as text."""
    return _environment().get_template("tune.html.j2").render(_context(result))


def write_report(result: TuneResult, path: str | os.PathLike[str]) -> None:
    """Writes the report on a result of `tune` as one self-contained HTML file.

    Raises:
        ParetuneError: the file cannot be written.
    """
    files.write_text(path, render_report(result))


def section(
    heading: str,
    text: Iterable[str] = (),
    rows: Sequence[Row] = (),
    columns: Sequence[Column | str] | None = None,
    figures: Iterable[tuple[bytes, str]] = (),
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One part of a page of `write_page`: sentences, pictures (SVG of `plots`, caption), a table, facts."""
    return {
        "heading": heading,
        "text": list(text),
        "figures": [(_markup(svg), caption) for svg, caption in figures],
        "grid": _grid(rows, columns) if rows else None,
        "pairs": _pairs(facts) if facts else None,
    }


def write_page(
    path: str | os.PathLike[str],
    title: str,
    lead: Iterable[str],
    sections: Iterable[dict[str, Any]],
    again: str = "",
) -> None:
    """Writes a report of another verb (`bench`, `eval`, a study) in the same look.

    Args:
        lead: the answer in plain words, on top.
        sections: made by `section`.
        again: the command that makes it again.

    Raises:
        ParetuneError: the file cannot be written.
    """
    template = _environment().get_template("bench.html.j2")
    values = {"title": title, "lead": list(lead), "sections": list(sections), "again": again}
    files.write_text(path, template.render(values))
