"""Why a step takes the time that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from paretune.records.record import Record


@dataclass(frozen=True)
class Explanation(Record):
    """One cause.

    Args:
        cause: its name.
        share: of the step's time that it accounts for, or 0 where that is not known.
        sentence: what was found, with the figures.
        try_next: what to do in this tool.
        gain: predicted speed-up of the step at most, 1.5 for 1.5 times as fast; None: not predictable from here.
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("text",)

    cause: str
    share: float
    sentence: str
    try_next: str
    gain: float | None = None

    @property
    def text(self) -> str:
        """Everything in one line."""
        gain = "" if self.gain is None else f" Predicted gain: at most {self.gain:.2f}x."
        return f"{self.sentence}. To try: {self.try_next}.{gain}"
