"""Speculation as text: `suffix`, `draft=MODEL`, `self=int4`, `exit=4`; `auto` is the best draft that needs no model."""

from __future__ import annotations

from typing import Any

from paretune.errors import UsageError
from paretune.registry import DRAFTS

AUTO, OFF = "auto", "off"
BEST_FREE = "suffix"  # what `auto` is


def check(text: str) -> str:
    """Returns `text` if it says how to speculate.

    Raises:
        UsageError: an unknown draft, one without what it needs, or with what it does not take.
    """
    draft_of(text)
    return text


def draft_of(text: str) -> tuple[type[Any], str]:
    """The class of the draft and its argument.

    Raises:
        UsageError: as `check`.
    """
    name, is_given, argument = (BEST_FREE if text == AUTO else text).partition("=")
    kind = DRAFTS.get(name)
    if kind.argument:
        if not argument:
            raise UsageError(f"speculation by {name!r} needs {kind.argument}", f"Write {name}={kind.argument}")
    elif is_given and argument not in kind.choices:
        takes = f"takes {' or '.join(kind.choices)}" if kind.choices else "takes nothing after ="
        raise UsageError(f"speculation by {name!r} {takes}, not {argument!r}", f"Write {name}")
    return kind, argument
