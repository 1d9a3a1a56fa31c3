"""Pictures of sweeps: ratios over a size, with their intervals, and bars of one value by configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paretune.report.canvas import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    formatter,
    new_figure,
    save,
    say_empty,
    short,
    style,
)

_LINES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (RED, "D"), (GREY, "v"), (INK, "P"))
CAPTION = (
    "Speed-up over the baseline at the same place: above 1 is faster. Bars are the intervals over all planned looks "
    "(95 %); a point whose bar crosses 1 cannot be told from the baseline."
)


def curves(points: Sequence[Mapping[str, Any]], x_title: str, fmt: str = "svg", show: Callable | None = None) -> bytes:
    """Speed-up over `x` by configuration.

    Args:
        points: rows with `x`, `config`, `speedup`, `speedup_low`, `speedup_high`; a row without a speed-up is left out.
        show: text of an x.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    known = [p for p in points if p.get("speedup") is not None]
    title = f"Speed-up over the baseline by {x_title.lower()}"
    with style("curves"):
        figure = new_figure(3.9)
        axes = figure.add_subplot()
        if not known:
            say_empty(figure, axes, "Nothing was measured.")
            return save(figure, fmt, f"{title}: nothing measured")
        xs = sorted({p["x"] for p in known})
        configs = list(dict.fromkeys(p["config"] for p in known))
        axes.set_xscale("log")
        axes.set_yscale("log", base=2)
        for i, name in enumerate(configs):
            colour, marker = _LINES[i % len(_LINES)]
            line = sorted((p for p in known if p["config"] == name), key=lambda p: p["x"])
            # Side by side: intervals at one place do not hide each other.
            shifted = [p["x"] * 1.03 ** (i - (len(configs) - 1) / 2) for p in line]
            ys = [p["speedup"] for p in line]
            ends = [(p.get("speedup_low") or p["speedup"], p.get("speedup_high") or p["speedup"]) for p in line]
            below = [max(0.0, y - low) for y, (low, _) in zip(ys, ends, strict=True)]
            above = [max(0.0, high - y) for y, (_, high) in zip(ys, ends, strict=True)]
            style_of: dict[str, Any] = {"color": colour, "marker": marker, "ms": 5, "capsize": 2, "lw": 1.4}
            axes.errorbar(shifted, ys, yerr=(below, above), label=short(name, 30), **style_of)
        axes.axhline(1.0, color=GREY, lw=1)
        axes.grid(True)
        axes.xaxis.set_major_locator(FixedLocator(xs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(formatter(show or (lambda v: f"{v:g}")))
        axes.set_xlim(xs[0] / 1.3, xs[-1] * 1.3)
        axes.yaxis.set_major_formatter(formatter(lambda v: f"{v:.3g}x"))
        axes.set_xlabel(x_title)
        axes.set_ylabel("Speed-up over the baseline")
        figure.legend(loc="outside lower center", ncols=4, fontsize=10)
        return save(figure, fmt, title)


def bars(
    rows: Sequence[Mapping[str, Any]],
    series: Sequence[tuple[str, str]],
    title: str,
    show: Callable[[float], str],
    name: str = "config",
    fmt: str = "svg",
) -> bytes:
    """Horizontal bars by configuration, one a series; a value that is None has no bar and says so.

    Args:
        series: (key of the value, name for the legend).
        show: text of a value, written at the end of its bar.
    """
    with style("bars"):
        figure = new_figure(0.9 + (0.16 + 0.26 * len(series)) * max(2, len(rows)))
        axes = figure.add_subplot()
        values = [row[key] for row in rows for key, _ in series if row.get(key) is not None]
        if not values:
            say_empty(figure, axes, "Nothing was measured.")
            return save(figure, fmt, f"{title}: nothing measured")
        height, longest = 0.8 / len(series), max(values)
        for i, (key, legend) in enumerate(series):
            colour = _LINES[i % len(_LINES)][0]
            for y, row in enumerate(rows):
                place, value = y + (i - (len(series) - 1) / 2) * height, row.get(key)
                label = legend if y == 0 else None
                axes.barh(place, value or 0.0, height=0.9 * height, color=colour, label=label)
                text = "not measured" if value is None else show(value)
                axes.text((value or 0.0) + 0.01 * longest, place, text, va="center", fontsize=10)
        axes.set_yticks(range(len(rows)), [short(row[name], 30) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.set_xlim(0, 1.2 * longest)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(title, loc="left", fontsize=11)
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=3, fontsize=10)
        return save(figure, fmt, title)
