"""The roofline picture: what this machine allows by arithmetic intensity, and where each part of a step stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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

_GROUPS = ("blocks", "attention", "mlp")  # sums: their members are drawn
_LOOKS = {"prefill": (BLUE, "o"), "decode": (ORANGE, "s"), "train": (RED, "D")}
MIN_SHARE = 0.01  # of the step: less is not drawn
_MAX_LABELS = 9  # a phase


def points_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is drawn of a profile: parts with arithmetic, or the whole step where the parts are not known."""
    out = []
    for row in result.get("parts") or ():
        x, y = number(row.get("intensity")), number(row.get("flops_per_sec"))
        if row["part"] not in _GROUPS and x and y and row["share"] >= MIN_SHARE:
            out.append({"x": x, "y": y, "share": row["share"], "title": row["title"]})
    whole = result.get("whole") or {}
    if not out and whole.get("needed_flops") and whole.get("needed_bytes"):
        x = whole["needed_flops"] / whole["needed_bytes"]
        out.append({"x": x, "y": whole["needed_flops"] / whole["sec"], "share": 1.0, "title": "the whole step"})
    return out


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
        axes.set_ylim(min(min(ys) / 3, min(b for _, b, _ in roofs) * low), max(r for _, _, r in roofs) * 2.2)
        hard: list[Box] = []
        for (label, bandwidth, rate), look in zip(roofs, ("-", "--", ":"), strict=False):
            bend = rate / bandwidth
            axes.plot([low, bend, high], [low * bandwidth, rate, rate], color=INK, lw=1.4, ls=look, label=label)
        figure.canvas.draw()
        entries = []
        for result, points in drawn:
            colour, marker = _LOOKS.get(result["phase"], (GREY, "o"))
            # Profiles of several recipes are told apart by filling.
            for i, point in enumerate(sorted(points, key=lambda p: -p["share"])):
                size = 5 + 13 * point["share"] ** 0.5
                name = result["phase"] if i == 0 else None
                axes.plot(
                    point["x"],
                    point["y"],
                    marker,
                    color=colour,
                    ms=size,
                    mec="white",
                    mew=0.8,
                    alpha=0.9,
                    label=name,
                    ls="",
                )
                px, py = axes.transData.transform((point["x"], point["y"]))
                hard.append((px - size / 2, py - size / 2, px + size / 2, py + size / 2))
                if i < _MAX_LABELS:
                    entries.append((px, py, size / 2, point["title"], False))
        axes.grid(True)
        axes.set_xlabel("Arithmetic intensity: FLOP for each byte that is moved")
        axes.set_ylabel("Arithmetic done")
        axes.yaxis.set_major_formatter(formatter(lambda v: format_rate(v, "FLOP/s")))
        axes.xaxis.set_major_formatter(formatter(lambda v: f"{v:g}"))
        legend = figure.legend(loc="outside lower center", ncols=2, fontsize=10)
        for handle in legend.legend_handles:
            if handle is not None and hasattr(handle, "set_markersize"):
                handle.set_markersize(8)
        figure.canvas.draw()
        moved = []
        for (_, _, radius, text, bold), point in zip(
            entries, [p for _, ps in drawn for p in sorted(ps, key=lambda p: -p["share"])[:_MAX_LABELS]], strict=True
        ):
            px, py = axes.transData.transform((point["x"], point["y"]))
            moved.append((px, py, radius, text, bold))
        hard = [
            (x - r, y - r, x + r, y + r)
            for x, y, r in (
                (*axes.transData.transform((p["x"], p["y"])), (5 + 13 * p["share"] ** 0.5) / 2)
                for _, ps in drawn
                for p in ps
            )
        ]
        place_labels(axes, moved, hard, [])
        return save(figure, fmt, title)


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
