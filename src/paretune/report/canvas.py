"""What every picture shares: the style, the way it is saved, and labels that do not overlap.

matplotlib is imported inside the functions: most commands never draw. The colours are those of Okabe and Ito:
colour-blind readers can tell them apart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from paretune.report.units import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2430"  # becomes `currentColor` in SVG, so that a page may be dark
GREY, BLUE, GREEN, RED, ORANGE = "#8a8f98", "#0072b2", "#009e73", "#d55e00", "#e69f00"
_WIDTH = 8.0  # inches

Box = tuple[float, float, float, float]


@contextmanager
def style(name: str) -> Iterator[None]:
    """matplotlib's defaults (not the user's own settings) with ours on top."""
    import matplotlib.style

    ours = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"paretune-{name}",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.parse_math": False,  # a `$` in a model's name is a dollar
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.unicode_minus": False,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "legend.frameon": False,
    }
    with matplotlib.style.context(["default", ours]):  # type: ignore[list-item]
        yield


def new_figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # 72 dots per inch is what the SVG writer counts in, so pixels here are points there.
    figure = Figure(figsize=(_WIDTH, height), dpi=72, layout="constrained")
    FigureCanvasAgg(figure)  # measures text
    return figure


def save(figure: Figure, fmt: str, title: str) -> bytes:
    """The picture as bytes; SVG is cleaned so that several can stand inside one HTML page."""
    out = io.BytesIO()
    if fmt == "png":
        figure.savefig(out, format="png", dpi=180, facecolor="white", metadata={"Software": None})
        return out.getvalue()
    if fmt != "svg":
        raise ValueError(f"unknown picture format {fmt!r}")
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue().decode("utf-8")
    text = re.sub(r"^.*?(?=<svg)", "", text, count=1, flags=re.DOTALL)  # XML and DOCTYPE lines
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # would repeat from picture to picture
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would style the page around it
    text = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", text)  # the reader's font, not ours
    text = re.sub(r"(font: [^;\"]*?px )[^;\"]*", r"\1sans-serif", text)
    text = text.replace(INK, "currentColor")
    safe = plain(title).replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    # A function as replacement: a backslash in the title stays one.
    return re.sub(
        "<svg ", lambda _: f'<svg role="img" aria-label="{safe}" stroke-linejoin="round" ', text, count=1
    ).encode()


def short(name: Any, n: int = 44) -> str:
    text = plain(name)
    return text if len(text) <= n else text[: n - 3].rstrip() + "..."


def formatter(show: Callable[[float], str]) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: show(value))


def say_empty(figure: Figure, axes: Axes, text: str) -> None:
    axes.set_axis_off()
    figure.set_figheight(1.0)
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _candidates(x: float, y: float, radius: float, w: float, h: float) -> Iterator[tuple[float, float, bool]]:
    """Places for a label around a point, nearest first: (left, bottom, far enough for a leader)."""
    for distance in (3, 12, 24, 40, 60):
        gap = radius + distance
        is_far = distance > 3  # a label that does not touch its point has a leader, or it seems to belong to another
        if not is_far:  # a level leader would look like an error bar
            yield x + gap, y - h / 2, False
        for dy in (1, -1):
            yield x + gap, y + dy * 0.8 * gap - (h if dy < 0 else 0), is_far
        if not is_far:
            yield x - gap - w, y - h / 2, False
        for dy in (1, -1):
            yield x - gap - w, y + dy * 0.8 * gap - (h if dy < 0 else 0), is_far
        for share in (0.5, 0.25, 0.75, 0.1, 0.9):
            for dy in (1, -1):
                yield x - share * w, y + dy * gap - (h if dy < 0 else 0), is_far


def _leader(x: float, y: float, box: Box) -> tuple[tuple[float, float], list[Box]]:
    """Where a leader meets the label, and small boxes along it."""
    end = (min(max(x, box[0]), box[2]), box[1] if box[1] > y else box[3])
    steps = [i / 12 for i in range(1, 12)]
    path = [(x + (end[0] - x) * t, y + (end[1] - y) * t) for t in steps]
    return end, [(u - 1, v - 1, u + 1, v + 1) for u, v in path]


def place_labels(
    axes: Axes,
    entries: Sequence[tuple[float, float, float, str, bool]],
    hard: Sequence[Box],
    soft: Sequence[Box],
) -> int:
    """Writes each label at the nearest free spot around its point, most important first.

    Args:
        entries: (x, y, radius of the marker, text, bold), the first two in pixels.
        hard: boxes that no label may cover.
        soft: boxes that a label covers only where there is no other place.

    Returns:
        How many labels found no free spot and were left out.
    """
    frame = axes.get_window_extent()
    labels: list[Box] = []

    def try_all(entry: tuple[float, float, float, str, bool], taken: Sequence[Box]) -> bool:
        x, y, radius, text, bold = entry
        look: dict[str, Any] = {"fontsize": 10, "fontweight": "bold" if bold else "normal"}
        probe = axes.text(0, 0, text, **look)
        extent = probe.get_window_extent(axes.figure.canvas.get_renderer())  # type: ignore[attr-defined]
        probe.remove()
        for left, bottom, is_far in _candidates(x, y, radius, extent.width, extent.height):
            box: Box = (left - 2, bottom - 1, left + extent.width + 2, bottom + extent.height + 1)
            if box[0] < frame.x0 or box[1] < frame.y0 or box[2] > frame.x1 or box[3] > frame.y1:
                continue
            end, path = _leader(x, y, box)
            if any(_overlap(box, other) for other in (*labels, *taken)):
                continue
            if is_far and any(_overlap(step, other) for step in path for other in labels):
                continue
            labels.append(box)
            arrow = {"arrowstyle": "-", "lw": 0.7, "color": GREY, "shrinkA": 0, "shrinkB": radius}
            if is_far:
                axes.annotate("", (x, y), end, xycoords="figure points", arrowprops=arrow)
            axes.annotate(text, (left, bottom), xycoords="figure points", va="bottom", **look)
            return True
        return False

    return sum(not try_all(entry, [*hard, *soft]) and not try_all(entry, hard) for entry in entries)
