"""Speculation as text: `suffix`, `draft=MODEL`, `self=int4`, `exit=4`; `auto` is the best draft that needs no model."""

from __future__ import annotations

from typing import Any

from paretune.errors import UsageError
from paretune.registry import DRAFTS

AUTO, OFF = "auto", "off"
BEST_FREE = "suffix"  # what `auto` is


def check(text: str) -> None:
    """Raises UsageError where there is no such draft; nothing is imported."""
    DRAFTS.check(_parts(text)[0])


def _parts(text: str) -> tuple[str, str, str]:
    return (BEST_FREE if text == AUTO else text).partition("=")


def draft_of(text: str) -> tuple[type[Any], str]:
    """The class of the draft and its argument.

    Raises:
        UsageError: an unknown draft, one without what it needs, or with what it does not take.
    """
    name, is_given, argument = _parts(text)
    kind = DRAFTS.get(name)
    if kind.argument:
        if not argument:
            raise UsageError(f"speculation by {name!r} needs {kind.argument}", f"Write {name}={kind.argument}")
    elif is_given and argument not in kind.choices:
        takes = f"takes {' or '.join(kind.choices)}" if kind.choices else "takes nothing after ="
        raise UsageError(f"speculation by {name!r} {takes}, not {argument!r}", f"Write {name}")
    return kind, argument
