"""How the quality of summaries is shown: the columns of its tables."""

from __future__ import annotations

from collections.abc import Callable

from paretune.report.tables import Column, Row
from paretune.report.units import number

TITLES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum", "bleu": "BLEU"}


def metric_text(key: str, row: Row) -> str:
    """A metric with its interval: four digits after the point for ROUGE, two for BLEU; "-" where there is none."""
    form = "{:.2f}" if key == "bleu" else "{:.4f}"
    value, low, high = (number(row.get(name)) for name in (key, f"{key}_low", f"{key}_high"))
    if value is None:
        return "-"
    if low is None or high is None:
        return form.format(value)
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]"


def metric_column(key: str, title: str = "") -> Column:
    def show(row: Row) -> str:
        return metric_text(key, row)

    return Column(key, title or TITLES[key], show)


def _share(key: str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(key) is None else f"{row[key]:.0%}".replace("%", " %")


COLUMNS = (
    Column("system", "System", numeric=False),
    *(metric_column(key) for key in TITLES),
    Column(
        "length_ratio", "Length", lambda row: "-" if row.get("length_ratio") is None else f"{row['length_ratio']:.2f}"
    ),
    Column("ended_share", "Ended", _share("ended_share")),
)
