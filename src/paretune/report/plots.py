"""Pictures of a result: SVG to put into a page, PNG for everything else. The same input gives the same bytes.

Shape says the same as colour, so a grey print loses nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from paretune.records.tune import TuneResult
from paretune.report.canvas import (
    BLUE,
    GREEN,
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
    short,
    style,
)
from paretune.report.trials import TrialRow, trial_rows
from paretune.report.units import format_bytes, format_percent, format_rate, format_sec, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE_STYLES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (RED, "D"), (GREY, "v"))
_MAX_BARS = 24


# --- quality against speed ------------------------------------------------------------------------------


def pareto_points(result: TuneResult) -> list[TrialRow]:
    """The rows that can be drawn: measured speed and known quality."""
    rows = [r for r in trial_rows(result) if r.status == "measured" and r.speedup is not None]
    return [r for r in rows if r.loss is not None]


def _place(row: TrialRow) -> tuple[float, float]:
    """Loss and speed-up of one of `pareto_points`."""
    assert row.loss is not None and row.speedup is not None
    return row.loss, row.speedup


def frontier(points: Sequence[TrialRow]) -> list[TrialRow]:
    """The points that no other one beats in both quality and speed, from best quality to highest speed."""
    best, out = -math.inf, []
    for row in sorted(points, key=lambda r: (_place(r)[0], -_place(r)[1])):
        if _place(row)[1] > best:
            best = _place(row)[1]
            out.append(row)
    return out


def pareto_caption(result: TuneResult) -> str:
    """What the picture shows and what it leaves out, in words."""
    n_drawn, rows = len(pareto_points(result)), trial_rows(result)
    n_failed = sum(r.status in ("failed", "invalid") for r in rows)
    n_late = sum(r.status == "not_reached" for r in rows)
    n_excluded = sum(r.status == "excluded" for r in rows)
    left = [f"{n_failed} that failed"] if n_failed else []
    left += [f"{n_excluded} that cannot win by the figures"] if n_excluded else []
    left += [f"{n_late} that were not reached"] if n_late else []
    n_other = len(rows) - n_drawn - n_failed - n_late - n_excluded
    left += [f"{n_other} without a measured speed or quality"] if n_other > 0 else []
    text = (
        f"Up is faster, left is better quality. Each of the {n_drawn} marks is one measured candidate; a "
        "bigger mark stores more bytes. Upright bars are 95 % intervals of the speed; flat bars reach to "
        "the upper end of the quality loss, which has to stay left of the limit. The line joins the "
        "candidates that no other one beats in both speed and quality."
    )
    return text + (f" Not drawn: {', '.join(left)} (they are in the table)." if left else "")


def _kind(row: TrialRow) -> tuple[str, str, str]:
    """(legend, colour, marker) of a point."""
    if row.role == "baseline":
        return "baseline", INK, "s"
    if row.role in ("chosen", "best so far"):
        return row.role, GREEN, "o"
    word = str(row.judgement)
    if row.within_bound is False or word == "over the quality limit":
        return "over the quality limit", RED, "^"
    if word == "did not hold":
        return "did not hold when confirmed", RED, "v"
    if word.startswith("faster"):
        return ("faster, within the limit" if word == "faster" else word), BLUE, "o"
    return "slower or no clear difference", GREY, "D"


def pareto(result: TuneResult, fmt: str = "svg") -> bytes:
    """Quality loss (x) against speed-up (y), with intervals, the frontier, the baseline and the limit."""
    with style("pareto"):
        figure = new_figure(5.2)
        axes = figure.add_subplot()
        points = pareto_points(result)
        if not points:
            say_empty(figure, axes, "No candidate has both a measured speed and a measured quality.")
            return save(figure, fmt, "Quality loss against speed-up: nothing measured")
        _draw_pareto(figure, axes, points, result.goal.max_ppl_increase)
        return save(figure, fmt, "Quality loss against speed-up of every measured candidate")


def _scale_pareto(axes: Axes, points: Sequence[TrialRow], limit: float) -> None:
    """Axes on which both the limit and the far-away points can be seen."""
    from matplotlib.ticker import FixedLocator, NullLocator

    xs = [x for r in points for x in (r.loss, r.ppl_increase_upper) if x is not None]
    xs.append(limit)
    ys = [y for r in points for y in (r.speedup, r.speedup_low, r.speedup_high) if y is not None and y > 0]
    step = limit or max(abs(x) for x in xs) or 0.01
    right, left = max(*xs, step), min(*xs, 0.0)
    if right > 6 * step:
        # Even steps up to the limit, powers of ten beyond: a broken model must not squeeze the others flat.
        axes.set_xscale("symlog", linthresh=step, linscale=2.0)
        n_decades = math.ceil(math.log10(right / step))
        ticks = [0, step / 2, step] + [step * 10**k for k in range(1, n_decades + 1)]
        axes.xaxis.set_major_locator(FixedLocator([-step / 2, *ticks] if left < -step / 4 else ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(min(left * 1.3, -0.25 * step), right * 2.2)
    else:
        span = right - left
        axes.set_xlim(left - 0.08 * span, right + 0.12 * span)
    axes.xaxis.set_major_formatter(formatter(lambda v: format_percent(v, signed=True)))
    low, high = min([*ys, 1.0]), max([*ys, 1.0])
    if high / low > 8:
        axes.set_yscale("log", base=2)
        axes.set_ylim(low / 1.2, high * 1.25)
    else:
        span = max(high - low, 0.05)
        axes.set_ylim(low - 0.1 * span, high + 0.14 * span)
    axes.yaxis.set_major_formatter(formatter(lambda v: f"{v:.3g}x"))


def _draw_pareto(figure: Figure, axes: Axes, points: Sequence[TrialRow], limit: float) -> None:
    _scale_pareto(axes, points, limit)
    axes.grid(True)
    axes.set_xlabel("Quality loss: increase of perplexity over the baseline (left is better)")
    axes.set_ylabel("Speed-up over the baseline (up is faster)")
    axes.axhline(1.0, color=GREY, lw=1)
    axes.axvline(0.0, color=GREY, lw=1)
    axes.axvline(limit, color=RED, lw=1.4, ls="--")
    axes.axvspan(limit, axes.get_xlim()[1], color=RED, alpha=0.06, lw=0)
    front = frontier(points)
    axes.plot(*zip(*map(_place, front), strict=True), color=GREEN, lw=1.5, alpha=0.7)
    largest = max([r.weights_bytes or 0 for r in points]) or 1.0
    radii = []
    for row in points:
        legend, colour, marker = _kind(row)
        x, y = _place(row)
        area = 40 + 150 * (row.weights_bytes or 0.3 * largest) / largest
        radii.append(math.sqrt(area) / 2)
        upper = row.ppl_increase_upper
        if upper is not None and upper > x:
            axes.plot([x, upper], [y, y], color=colour, lw=1.1, alpha=0.8)
        if row.speedup_low is not None and row.speedup_high is not None:
            axes.plot([x, x], [row.speedup_low, row.speedup_high], color=colour, lw=1.1, alpha=0.8)
        # An open square lets the candidates that change nothing show through; a ring marks the chosen one.
        face = "none" if row.role == "baseline" else colour
        edge, width = (INK, 1.8) if row.role else (colour, 0.5)
        style_of: dict[str, Any] = {"marker": marker, "facecolor": face, "edgecolor": edge, "lw": width}
        axes.scatter([x], [y], s=area, alpha=0.85, label=legend, zorder=3, **style_of)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    legend_box = figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)), fontsize=10
    )
    for handle in legend_box.legend_handles:
        handle.set_sizes([60])  # type: ignore[union-attr]
    # Labels are placed in pixels: settle the layout first, then keep it.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    _label_pareto(axes, points, front, radii, limit)


def _label_pareto(
    axes: Axes, points: Sequence[TrialRow], front: Sequence[TrialRow], radii: Sequence[float], limit: float
) -> None:
    to_pixels = axes.transData.transform
    frame = axes.get_window_extent()
    hard: list[Box] = []
    soft: list[Box] = []
    for row, radius in zip(points, radii, strict=True):
        x, y = to_pixels(_place(row))
        hard.append((x - radius, y - radius, x + radius, y + radius))
        if row.ppl_increase_upper is not None:
            hard.append((x, y - 1, to_pixels((row.ppl_increase_upper, _place(row)[1]))[0], y + 1))
        if row.speedup_low is not None and row.speedup_high is not None:
            low, high = (to_pixels((_place(row)[0], end))[1] for end in (row.speedup_low, row.speedup_high))
            hard.append((x - 1, low, x + 1, high))
    _, y = to_pixels((0.0, 1.0))
    soft.append((frame.x0, y - 1, frame.x1, y + 1))
    corners = [to_pixels(_place(r)) for r in front]
    for (x0, y0), (x1, y1) in pairwise(corners):
        for i in range(n_steps := max(2, int(math.hypot(x1 - x0, y1 - y0) / 4))):
            x, y = x0 + (x1 - x0) * i / n_steps, y0 + (y1 - y0) * i / n_steps
            soft.append((x - 2, y - 2, x + 2, y + 2))
    x = to_pixels((limit, 1.0))[0]
    look: dict[str, Any] = {"va": "top", "color": RED, "fontsize": 10}
    text = axes.annotate(f"limit {format_percent(limit)}", (x + 5, frame.y1 - 2), xycoords="figure points", **look)
    extent = text.get_window_extent(axes.figure.canvas.get_renderer())  # type: ignore[attr-defined]
    hard.append((extent.x0, extent.y0, extent.x1, extent.y1))
    soft.append((x - 1, frame.y0, x + 1, frame.y1))
    front_ids = {id(r) for r in front}
    order = sorted(
        range(len(points)),
        key=lambda i: (points[i].role == "", id(points[i]) not in front_ids, -_place(points[i])[1]),
    )
    entries = []
    for i in order:
        row = points[i]
        x, y = to_pixels(_place(row))
        name = "baseline" if row.role == "baseline" else short(row.name, 34)
        entries.append((float(x), float(y), radii[i], name, row.role in ("chosen", "best so far")))
    place_labels(axes, entries, hard, soft)


# --- bars and curves --------------------------------------------------------------------------------------


def latency_bars(result: TuneResult, fmt: str = "svg") -> bytes:
    """Time per output token and time to first token of every measured candidate, fastest first."""
    rows = [r for r in trial_rows(result) if r.tpot_sec is not None or r.ttft_sec is not None]
    rows.sort(key=lambda r: (r.tpot_sec is None, r.tpot_sec or r.ttft_sec or 0.0))
    kept = [r for i, r in enumerate(rows) if i < _MAX_BARS or r.role]
    with style("latency"):
        figure = new_figure(1.1 + 0.42 * max(2, len(kept)))
        panels = figure.subplots(1, 2, sharey=True)
        if not kept:
            say_empty(figure, panels[0], "No candidate has a measured time.")
            panels[1].set_axis_off()
            return save(figure, fmt, "Times: nothing measured")
        for axes, values, title in (
            (panels[0], [r.tpot_sec for r in kept], "Time per output token (TPOT)"),
            (panels[1], [r.ttft_sec for r in kept], "Time to first token (TTFT)"),
        ):
            longest = max(value or 0.0 for value in values) or 1.0
            for i, (row, value) in enumerate(zip(kept, values, strict=True)):
                colour = _kind(row)[1]
                axes.barh(i, value or 0.0, height=0.32, color=GREY if colour == INK else colour)
                name = short(row.name, 40)
                if row.role == "chosen" or row.within_bound is False or row.judgement == "did not hold":
                    name += f" ({row.judgement})"
                if axes is panels[0]:
                    axes.text(0, i - 0.2, name, va="bottom", fontsize=10, fontweight="bold" if row.role else None)
                axes.text((value or 0.0) + 0.015 * longest, i, format_sec(value), va="center", fontsize=10)
            axes.set_xlim(0, 1.25 * longest)
            axes.set_ylim(len(kept) - 0.5, -0.8)
            axes.set_title(title, loc="left", fontsize=11)
            axes.set_yticks([])
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
        return save(figure, fmt, "Time per output token and time to first token of every measured candidate")


def loss_curve(points: Sequence[Mapping[str, Any]], fmt: str = "svg") -> bytes:
    """Training: one line for every key that ends in "loss" over `step` (or over the position in the list)."""
    keys = list(dict.fromkeys(k for p in points for k in p if k.endswith("loss")))
    with style("loss"):
        figure = new_figure(3.6)
        axes = figure.add_subplot()
        for i, key in enumerate(keys):
            line = [(number(p.get("step", j)), number(p.get(key))) for j, p in enumerate(points)]
            known = [(x, y) for x, y in line if x is not None and y is not None]
            colour, marker = _LINE_STYLES[i % len(_LINE_STYLES)]
            axes.plot(
                [x for x, _ in known],
                [y for _, y in known],
                color=colour,
                marker=marker if len(known) <= 40 else "",
                ms=4,
                label=key.replace("_", " "),
            )
        if not keys:
            say_empty(figure, axes, "No loss was recorded.")
            return save(figure, fmt, "Training loss: nothing recorded")
        axes.grid(True)
        axes.set_xlabel("Training step")
        axes.set_ylabel("Loss (nats per token, lower is better)")
        axes.legend()
        return save(figure, fmt, "Training loss over steps")


def _round(text: str) -> str:
    """The label of a tick: "10 GB/s" rather than "10.0 GB/s"."""
    return re.sub(r"\.0+ ", " ", text)


def bandwidth_curve(result: TuneResult, fmt: str = "svg") -> bytes:
    """Measured read bandwidth over the size of the data, and where baseline and winner stand on it."""
    from matplotlib.ticker import LogLocator, NullLocator

    by_threads: dict[int, list[tuple[int, float]]] = {}
    for point in result.bandwidth.sweep:
        if point.bytes and point.bytes_per_sec:
            by_threads.setdefault(point.n_threads, []).append((point.bytes, point.bytes_per_sec))
    with style("bandwidth"):
        figure = new_figure(3.6)
        axes = figure.add_subplot()
        if not by_threads:
            say_empty(figure, axes, "The read bandwidth was not measured.")
            return save(figure, fmt, "Read bandwidth: not measured")
        axes.set_xscale("log")
        for i, (n_threads, line) in enumerate(sorted(by_threads.items())):
            colour, marker = _LINE_STYLES[i % len(_LINE_STYLES)]
            line.sort()
            legend = "one thread" if n_threads == 1 else f"{n_threads} threads" if n_threads else "all threads"
            axes.plot(*zip(*line, strict=True), color=colour, marker=marker, ms=5, label=legend)
        axes.set_ylim(0, 1.18 * max(rate for line in by_threads.values() for _, rate in line))
        marks = {r.role: r.weights_bytes for r in trial_rows(result) if r.role and r.weights_bytes}
        for role, size in marks.items():
            label = "weights of the baseline" if role == "baseline" else "weights of the chosen one"
            axes.axvline(size, color=INK if role == "baseline" else GREEN, lw=1.4, ls="--", label=label)
        axes.grid(True)
        sizes = [size for line in by_threads.values() for size, _ in line]
        steps = (1,) if max(sizes) >= 100 * min(sizes) else (1, 2, 5)
        axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(formatter(lambda v: _round(format_bytes(v))))
        axes.yaxis.set_major_formatter(formatter(lambda v: _round(format_rate(v)) if v else "0"))
        axes.set_xlabel("Size of the data that is read again and again")
        axes.set_ylabel("Read bandwidth")
        figure.legend(loc="outside lower center", ncols=4, fontsize=10)
        return save(figure, fmt, "Read bandwidth of this machine by size of the data")
