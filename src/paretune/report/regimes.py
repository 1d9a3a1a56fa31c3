"""The map of regimes: which form is best at which batch size and length; ties are grey."""

from __future__ import annotations

from paretune.records.regimes import Figure, Regimes
from paretune.report.canvas import BLUE, GREEN, GREY, INK, ORANGE, RED, new_figure, save, say_empty, short, style
from paretune.report.tables import Column, Row
from paretune.report.units import format_bytes, format_percent, format_ratio, plain

_COLOURS = (GREEN, BLUE, ORANGE, RED, "#cc79a7", "#56b4e9")
_PLAN = "the plan's own recipe"
CAPTION = (
    "Each field is one regime: a batch size and a length of prompt and answer together. It names the form that is "
    "surely faster than the plan's own recipe there, and by how much; else the plan's own runs. Grey: two or more "
    "cannot be told apart. Empty: not measured."
)
COLUMNS = (
    Column("batch_size", "Batch"),
    Column("length", "Tokens"),
    Column("best", "Fastest", numeric=False),
    Column("runs", "Runs unless more is granted", numeric=False),
    Column("result", "Beside the plan's own recipe", numeric=False),
    Column("n_bytes", "Cache and activations"),
    Column("others", "Other forms", numeric=False),
)


def title_of(name: str) -> str:
    return _PLAN if name == "plan" else plain(name)


def rows_of(regimes: Regimes) -> list[Row]:
    """The map as a table in words, one row a cell."""
    rows = []
    for cell in regimes.cells:
        best = cell.figure(cell.best)
        if cell.status != "measured":
            result = "not measured: the plan's own runs"
        elif cell.best == "plan":
            result = "cannot be told from another choice" if cell.is_tie else "the fastest"
        else:
            result = f"{format_ratio(best.ratio, best.low, best.high)} as fast"
            result += "; ties with another choice" if cell.is_tie else ""
        others = [f"{title_of(f.form)} {_short_result(f)}" for f in cell.figures if f.form not in (cell.best, "plan")]
        rows.append(
            {
                "batch_size": cell.batch_size,
                "length": cell.length,
                "best": title_of(cell.best),
                "runs": title_of(cell.runs),
                "result": result,
                "n_bytes": best.n_bytes or None,
                "others": "; ".join(others) or "none",
            }
        )
    return rows


def _short_result(figure: Figure) -> str:
    if figure.ratio is None:
        return plain(figure.cause or "not measured")
    word = "no difference" if figure.verdict == "indistinguishable" else str(figure.verdict)
    return f"{figure.ratio:.2f}x ({word})"


def form_lines(regimes: Regimes) -> list[str]:
    """What each form is and when a request may get it."""
    out = []
    for form in regimes.forms:
        text = f"{title_of(form.name)} ({plain(form.recipe)}): {form.label}"
        if form.ppl_increase_upper is not None:
            text += f", perplexity at most {format_percent(form.ppl_increase_upper, signed=True)}"
        if form.longest is not None:
            text += f", measured for up to {form.longest} tokens and used no further"
        if form.weights_bytes:
            text += f"; a second copy of the weights, {format_bytes(form.weights_bytes)}, only if that is granted"
        out.append(text + ".")
    return out + [f"Not among them: {plain(name)}: {plain(reason)}." for name, reason in regimes.left_out]


def sentences(regimes: Regimes | None) -> list[str]:
    """What the grid says, in plain words."""
    if regimes is None:
        return []
    if regimes.table is None:
        return [f"No choice by regime: {regimes.cause}."]
    measured = [c for c in regimes.cells if c.status == "measured"]
    changed = [c for c in measured if c.best != "plan"]
    said = []
    for c in changed:
        said.append(
            f"At batch {c.batch_size} and {c.length} tokens {c.best} is {c.figure(c.best).ratio:.2f} times as fast as "
            "the plan's own recipe"
            + ("." if c.runs == c.best else "; it runs where a request grants its numbers or its memory.")
        )
    if measured and not changed:
        said.append("No alternative beats the plan's own recipe beyond noise at any batch size and length of the grid.")
    n, n_late = len(regimes.cells), len(regimes.cells) - len(measured)
    if n_late:
        said.append(f"{n_late} of {n} regimes were not reached: there the plan's own runs.")
    return said


def crossover(regimes: Regimes, fmt: str = "svg") -> bytes:
    """The map: batch sizes upwards, lengths to the right; colour and text name the form, grey is a tie."""
    with style("regimes"):
        cells, lengths, batches = regimes.cells, regimes.lengths, regimes.batch_sizes
        figure = new_figure(1.3 + 0.85 * max(1, len(batches)))
        axes = figure.add_subplot()
        if not cells:
            say_empty(figure, axes, f"No map: {plain(regimes.cause or 'nothing was measured')}.")
            return save(figure, fmt, "Best choice by regime: nothing measured")
        names = [f.name for f in regimes.forms]
        for cell in cells:
            x, y = lengths.index(cell.length), batches.index(cell.batch_size)
            is_measured = cell.status == "measured"
            colour = GREY if cell.is_tie else _COLOURS[names.index(cell.best) % len(_COLOURS)]
            face = colour if is_measured else "none"
            axes.bar(x, 0.94, 0.96, y - 0.47, facecolor=face, alpha=0.35, edgecolor=GREY, linewidth=0.8)
            best = cell.figure(cell.best)
            text = short(title_of(cell.best).replace("the plan's own recipe", "plan's own"), 26)
            if not is_measured:
                text = "not measured"
            elif cell.is_tie:
                text = f"{text}\n(tie)"
            elif cell.best != "plan":
                text = f"{text}\n{best.ratio:.2f}x"
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)
        axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        axes.set_yticks(range(len(batches)), [str(n) for n in batches])
        axes.set_xlim(-0.55, len(lengths) - 0.45)
        axes.set_ylim(-0.55, len(batches) - 0.45)
        axes.set_xlabel("tokens of a request, prompt and answer")
        axes.set_ylabel("batch size")
        axes.tick_params(length=0)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        return save(figure, fmt, "Fastest choice by batch size and length; ties are grey")
