"""Options that verbs on article/summary pairs share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from paretune.evaluate.pairs import PairSet

Pairs = Annotated[
    Path | None,
    typer.Option(help="summarization: .jsonl or .csv, a pair a row. [default: the project's own pieces]"),
]
ArticleColumn = Annotated[str | None, typer.Option(help="Of --pairs. [default: article, document, text ..]")]
SummaryColumn = Annotated[str | None, typer.Option(help="Of --pairs. [default: summary, highlights ..]")]


@dataclass(frozen=True)
class PairFlags:
    """Which pairs are meant."""

    path: Path | None
    article_column: str | None
    summary_column: str | None

    def read(self) -> PairSet | None:
        """The file's pairs; None: the project's own are meant.

        Raises:
            UsageError: columns without a file, or the file is not what it should be.
        """
        from paretune.errors import UsageError
        from paretune.evaluate.pairs import read_pairs

        if self.path is not None:
            return read_pairs(self.path, self.article_column, self.summary_column)
        if self.article_column or self.summary_column:
            raise UsageError("column names were given without a file of pairs", "Pass --pairs FILE")
        return None
