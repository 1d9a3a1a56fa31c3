"""Options that verbs on article/summary pairs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Pairs = Annotated[
    Path | None,
    typer.Option(help="summarization: .jsonl or .csv, a pair a row. [default: the project's own pieces]"),
]
ArticleColumn = Annotated[str | None, typer.Option(help="Of --pairs. [default: article, document, text ..]")]
SummaryColumn = Annotated[str | None, typer.Option(help="Of --pairs. [default: summary, highlights ..]")]
