"""Pictures of the studies: bars in groups with intervals, and lines over lengths or batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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

_LOOKS = (
    (INK, "o", ""),
    (BLUE, "s", "//"),
    (ORANGE, "^", ".."),
    (GREEN, "D", "\\\\"),
    (RED, "v", "xx"),
    (GREY, "P", "--"),
    ("#cc79a7", "X", "||"),
    ("#56b4e9", "*", "oo"),
)


class Bar(NamedTuple):
    """A value and its interval, where there is one."""

    value: float | None
    low: float | None = None
    high: float | None = None


def bars(
    groups: Mapping[str, Mapping[str, Bar]], y_label: str, title: str, show: Callable[[float], str], fmt: str = "svg"
) -> bytes:
    """A group of bars for each key, in it a bar a series; upright lines are the intervals.

    Args:
        groups: group -> series -> bar. Every group has its own scale where it stands alone in its panel.
        show: the text over a bar.
    """
    drawn = {name: {k: b for k, b in series.items() if b.value is not None} for name, series in groups.items()}
    drawn = {name: series for name, series in drawn.items() if series}
    names = list(dict.fromkeys(k for series in drawn.values() for k in series))
    with style("bars"):
        figure = new_figure(3.9)
        if not drawn:
            say_empty(figure, figure.add_subplot(), "Nothing was measured.")
            return save(figure, fmt, f"{title}: nothing measured")
        panels = figure.subplots(1, len(drawn), squeeze=False)[0]
        tilt = 90 if len(names) * len(drawn) > 12 else 0  # side by side the numbers of many bars run into each other
        for axes, (group, series) in zip(panels, drawn.items(), strict=True):
            top = max(b.high or b.value or 0.0 for b in series.values())
            for i, name in enumerate(names):
                bar, (colour, _, hatch) = series.get(name, Bar(None)), _LOOKS[i % len(_LOOKS)]
                if bar.value is None:
                    continue
                look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
                axes.bar(i, bar.value, width=0.8, label=short(name, 34), **look)
                if bar.low is not None and bar.high is not None:
                    axes.plot([i, i], [bar.low, bar.high], color=GREY, lw=1.6, solid_capstyle="butt")
                at = (bar.high or bar.value) + 0.02 * top
                axes.text(i, at, show(bar.value), ha="center", fontsize=8, rotation=tilt, va="bottom")
            axes.set_ylim(0, (1.3 if tilt else 1.16) * top or 1)
            axes.set_xticks([])
            axes.set_title(group, fontsize=11)
            axes.tick_params(axis="y", labelsize=9)
        panels[0].set_ylabel(y_label)
        handles: dict[str, Any] = {}
        for axes in panels:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=9)
        return save(figure, fmt, title)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    title: str,
    *,
    show_x: Callable[[float], str],
    show_y: Callable[[float], str],
    logarithmic: bool = True,
    marks: Mapping[str, float] | None = None,
    fmt: str = "svg",
) -> bytes:
    """A line a series over one axis.

    Args:
        logarithmic: both axes, in powers of two across; else linear.
        marks: label -> place of a dashed upright line.
    """
    drawn = {name: sorted(points) for name, points in series.items() if points}
    with style("lines"):
        figure = new_figure(4.2)
        axes = figure.add_subplot()
        if not drawn:
            say_empty(figure, axes, "Nothing was measured.")
            return save(figure, fmt, f"{title}: nothing measured")
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        for i, (name, points) in enumerate(drawn.items()):
            colour, marker, _ = _LOOKS[i % len(_LOOKS)]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=5, lw=1.6, label=short(name, 34))
        for label, place in (marks or {}).items():
            axes.axvline(place, color=GREY, lw=1.2, ls="--")
            axes.text(place, 1.0, f" {label}", transform=axes.get_xaxis_transform(), va="top", fontsize=9)
        places = sorted({x for points in drawn.values() for x, _ in points})
        if len(places) <= 12:
            from matplotlib.ticker import FixedLocator, NullLocator

            axes.xaxis.set_major_locator(FixedLocator(places))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(formatter(show_x))
        axes.yaxis.set_major_formatter(formatter(show_y))
        axes.yaxis.set_minor_formatter(formatter(lambda v: ""))
        if not logarithmic:
            axes.set_ylim(bottom=0)
        axes.grid(True)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)
        return save(figure, fmt, title)


def utilization(points: Sequence[Mapping[str, object]], fmt: str = "svg") -> bytes:
    """Busy share of processor and accelerator over a run; what ran stands above."""
    title = "How busy processor and accelerator were"
    with style("utilization"):
        figure = new_figure(3.2)
        axes = figure.add_subplot()
        known = {
            name: [(float(p["sec"]), float(p[key])) for p in points if isinstance(p.get(key), float)]  # type: ignore[arg-type]
            for key, name in (("cpu_share", "processor"), ("gpu_share", "accelerator"))
        }
        known = {name: line for name, line in known.items() if line}
        if not known:
            say_empty(figure, axes, "The utilisation cannot be read on this system.")
            return save(figure, fmt, f"{title}: not measured")
        for (name, line), (colour, _, _) in zip(known.items(), _LOOKS[1:], strict=False):
            axes.plot(*zip(*line, strict=True), color=colour, lw=1.2, label=name)
        last = max(line[-1][0] for line in known.values())
        begun: dict[str, float] = {}
        for p in points:
            begun.setdefault(str(p["phase"]), float(p["sec"]))  # type: ignore[arg-type]
        latest = -last
        for i, (phase, sec) in enumerate(begun.items()):
            axes.axvline(sec, color=GREY, lw=0.8, ls=":")
            level = 1.02 if sec - latest > 0.16 * last else 1.09 if i % 2 else 1.16
            axes.text(sec, level, phase, transform=axes.get_xaxis_transform(), fontsize=8, va="bottom")
            latest = sec
        axes.set_ylim(0, 1)
        axes.set_xlim(0, max(last, 1e-6))
        axes.yaxis.set_major_formatter(formatter(lambda v: f"{100 * v:.0f} %"))
        axes.set_xlabel("Seconds since the start")
        axes.set_ylabel("Busy")
        axes.grid(True)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        return save(figure, fmt, title)
