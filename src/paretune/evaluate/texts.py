"""The text that the embedded job evaluates on: articles and stories written for this project, each with a summary.

`search` is for the search, `confirm` for the winner; no piece is in both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paretune.errors import ParetuneError, UsageError

Split = Literal["search", "confirm"]


@dataclass(frozen=True)
class Piece:
    """One article or story."""

    id: str
    kind: str  # article, story
    title: str
    text: str
    summary: str


def pieces(split: Split) -> list[Piece]:
    """The pieces of a split, in file order."""
    path = Path(__file__).parent.parent / "assets" / "pieces" / f"{split}.jsonl"
    return [Piece(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def text_of(split: Split) -> str:
    """All pieces of a split as one text."""
    return "\n\n".join(f"{p.title}\n\n{p.text}" for p in pieces(split))


def read_text(path: str | Path) -> str:
    """A user's text file.

    Raises:
        UsageError: it is missing, is not UTF-8, or is empty.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise UsageError(f"there is no text file {path}", "Check the path") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder", "Pass one text file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start})", "Convert it to UTF-8 first") from None
    except OSError as error:
        raise ParetuneError(f"cannot read {path}: {error.strerror}", "Check its permissions") from None
    if not text.strip():
        raise UsageError(f"{path} is empty", "Pass a file that holds something")
    return text
