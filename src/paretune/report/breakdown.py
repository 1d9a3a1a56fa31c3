"""Shares of a step by part, ours beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paretune.report.canvas import BLUE, GREY, ORANGE, formatter, new_figure, save, say_empty, style

_COLOURS = {"prefill": BLUE, "decode": ORANGE}
_TITLES = {"model": "the step", "block": "a block", "attention": "self-attention", "mlp": "the MLP"}
CAPTION = (
    "Each group of bars adds up to the whole of its table (the published to 83 to 99 %). Published: GPT-2 small on "
    "a T4, another machine. Rows without a published bar are those that a cache adds."
)


def bars(results: Sequence[Mapping[str, Any]], fmt: str = "svg") -> bytes:
    """One horizontal bar a part and phase; `published_share` of a row is drawn in grey where it is there."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        for row in result["parts"]:
            entry = rows.setdefault((row["group"], row["part"]), {"title": row["title"], "shares": {}})
            entry["shares"][result["phase"]] = row["group_share"] or 0.0
            entry["published"] = row.get("published_share")
    # A sum of less than half a percent everywhere cannot be seen.
    drawn = {k: e for k, e in rows.items() if max([*e["shares"].values(), e["published"] or 0.0]) >= 0.005}
    title = "Shares of time by part, beside the published ones"
    with style("breakdown"):
        figure = new_figure(0.9 + 0.34 * max(len(drawn), 4) + 0.3 * len(_TITLES))
        axes = figure.add_subplot()
        if not drawn:
            say_empty(figure, axes, "The parts of the step are not known.")
            return save(figure, fmt, f"{title}: not known")
        y, ticks, names = 0.0, [], []
        phases = list(dict.fromkeys(str(r["phase"]) for r in results))
        labelled: set[str] = set()
        for group, heading in _TITLES.items():
            members = [e for (g, _), e in drawn.items() if g == group]
            if not members:
                continue
            axes.text(0, y, f"of {heading}", fontsize=10, fontweight="bold", va="center", ha="left")
            y += 1
            for entry in members:
                series = [(p, entry["shares"].get(p), _COLOURS.get(p, BLUE)) for p in phases]
                series.append(("published (T4)", entry["published"], GREY))
                height = 0.8 / len(series)
                for i, (name, share, colour) in enumerate(series):
                    if share is None:
                        continue
                    place = y + (i - (len(series) - 1) / 2) * height
                    label = name if name not in labelled else None
                    labelled.add(name)
                    axes.barh(place, share, height=height * 0.9, color=colour, label=label)
                ticks.append(y)
                names.append(entry["title"])
                y += 1
            y += 0.3
        axes.set_yticks(ticks, names)
        axes.set_ylim(y - 0.3, -0.8)
        axes.set_xlim(0, 1)
        axes.grid(True, axis="x")
        axes.xaxis.set_major_formatter(formatter(lambda v: f"{v:.0%}".replace("%", " %")))
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=3, fontsize=10)
        return save(figure, fmt, title)
