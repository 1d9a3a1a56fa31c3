"""The roofline picture: what this machine allows by arithmetic intensity, and where each part of a step stands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from paretune.measure.profile_parts import SUM_KEYS  # sums: their members are drawn
from paretune.report.canvas import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    RED,
    Box,
    formatter,
    new_figure,
    place_labels,
    save,
    say_empty,
    style,
)
from paretune.report.units import format_rate, number

_LOOKS = {"prefill": (BLUE, "o"), "decode": (ORANGE, "s"), "train": (RED, "D")}
MIN_SHARE = 0.01  # of the step: less is not drawn
_MAX_LABELS = 9  # a phase


def points_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is drawn of a profile: parts with arithmetic, or the whole step where the parts are not known."""
    out = []
    for row in result.get("parts") or ():
        x, y = number(row.get("intensity")), number(row.get("flops_per_sec"))
        if row["part"] not in SUM_KEYS and x and y and row["share"] >= MIN_SHARE:
            out.append({"x": x, "y": y, "share": row["share"], "title": row["title"]})
    whole = result.get("whole") or {}
    if not out and whole.get("needed_flops") and whole.get("needed_bytes"):
        x = whole["needed_flops"] / whole["needed_bytes"]
        out.append({"x": x, "y": whole["needed_flops"] / whole["sec"], "share": 1.0, "title": "the whole step"})
    return sorted(out, key=lambda p: -p["share"])


def caption(results: Sequence[Mapping[str, Any]]) -> str:
    phases = " and ".join(f"{r['phase']} ({r['config']})" for r in results)
    return (
        f"Each mark is a part of {phases}; its size is its share of the step (parts under 1 % are not drawn). Left of "
        "the bend of the roof the bandwidth is the limit, right of it the rate of matrix products. The roof was "
        "measured on this machine: data that stays in a cache may stand above its slope, and elementwise arithmetic "
        "never reaches the flat part, which is that of matrix products."
    )


def roofline(results: Sequence[Mapping[str, Any]], fmt: str = "svg") -> bytes:
    """Arithmetic intensity (x) against FLOP/s (y), both logarithmic, with the measured ceilings.

    Args:
        results: profiles of one machine, one a phase; the first one's ceilings are drawn.
    """
    from matplotlib.lines import Line2D

    title = "Roofline of this machine and the parts of a step"
    with style("roofline"):
        figure = new_figure(5.6)
        axes = figure.add_subplot()
        drawn = [(r, points_of(r)) for r in results]
        xs = [p["x"] for _, points in drawn for p in points]
        ceilings = (results[0].get("ceilings") or {}) if results else {}
        if not xs or not ceilings.get("read_bandwidth"):
            say_empty(figure, axes, "No part with arithmetic was measured.")
            return save(figure, fmt, f"{title}: nothing measured")
        ys = [p["y"] for _, points in drawn for p in points]
        axes.set_xscale("log")
        axes.set_yscale("log")
        low, high = min(xs) / 2.5, max(max(xs), 40.0) * 2.5
        roofs = _roofs(results)
        axes.set_xlim(low, high)
        axes.set_ylim(min(min(ys) / 3, min(b for _, b, _ in roofs) * low), max(*ys, *(r for _, _, r in roofs)) * 2.2)
        for (label, bandwidth, rate), look in zip(roofs, ("-", "--", ":"), strict=False):
            bend = rate / bandwidth
            axes.plot([low, bend, high], [low * bandwidth, rate, rate], color=INK, lw=1.4, ls=look, label=label)
        for result, points in drawn:
            colour, marker = _LOOKS.get(result["phase"], (GREY, "o"))
            marks: dict[str, Any] = {"color": colour, "mec": "white", "mew": 0.8, "alpha": 0.9, "ls": ""}
            for i, point in enumerate(points):
                name = result["phase"] if i == 0 else None
                axes.plot(point["x"], point["y"], marker, ms=_size(point), label=name, **marks)
        axes.grid(True)
        axes.set_xlabel("Arithmetic intensity: FLOP for each byte that is moved")
        axes.set_ylabel("Arithmetic done")
        axes.yaxis.set_major_formatter(formatter(_axis_text))
        axes.xaxis.set_major_formatter(formatter(lambda v: f"{v:g}"))
        legend = figure.legend(loc="outside lower center", ncols=2, fontsize=10)
        for handle in legend.legend_handles:
            if isinstance(handle, Line2D):
                handle.set_markersize(8)
        figure.canvas.draw()  # the layout is settled: pixels can be asked for
        entries, hard = [], []
        for _, points in drawn:
            for i, point in enumerate(points):
                x, y = axes.transData.transform((point["x"], point["y"]))
                radius = _size(point) / 2
                hard.append((x - radius, y - radius, x + radius, y + radius))
                if i < _MAX_LABELS:
                    entries.append((x, y, radius, point["title"], False))
        place_labels(axes, entries, hard, _boxes_along(axes, roofs, low, high))
        return save(figure, fmt, title)


def _size(point: Mapping[str, Any]) -> float:
    """Diameter of a mark in points: its area grows with the share of the step."""
    return 5 + 13 * point["share"] ** 0.5


def _boxes_along(axes: Any, roofs: Sequence[tuple[str, float, float]], low: float, high: float) -> list[Box]:
    """Small boxes along the roofs: labels keep off them where they can."""
    out: list[Box] = []
    for _, bandwidth, rate in roofs:
        for i in range(200):
            x = low * (high / low) ** (i / 199)
            px, py = axes.transData.transform((x, min(x * bandwidth, rate)))
            out.append((px - 2, py - 2, px + 2, py + 2))
    return out


def _axis_text(value: float) -> str:
    return re.sub(r"\.0+(?= )", "", format_rate(value, "FLOP/s"))


def _roofs(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(legend, bytes/s, FLOP/s): from memory with each number format that a result computes in; from the caches."""
    ceilings = results[0]["ceilings"]
    rates = ceilings["matrix_rates"]
    most = max(row["threads"] for row in ceilings["read_bandwidth"])
    rows = sorted((row for row in ceilings["read_bandwidth"] if row["threads"] == most), key=lambda row: row["bytes"])
    memory, fastest = rows[-1]["bytes_per_sec"], max(row["bytes_per_sec"] for row in rows)
    out = []
    for dtype in dict.fromkeys(str(r["whole"]["dtype"]) for r in results):
        if dtype in rates:
            speed = f"{format_rate(memory)}, {format_rate(rates[dtype], 'FLOP/s')}"
            out.append((f"from memory, products in {dtype}: {speed}", memory, rates[dtype]))
    if fastest > 1.3 * memory and out:
        out.append((f"from the caches: {format_rate(fastest)}", fastest, out[0][2]))
    return out or [("from memory", memory, max(rates.values()))]
