"""The number formats of `paretune quantize` by name: a transform and its settings. A new format is one line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paretune.errors import UsageError
from paretune.registry import TRANSFORMS
from paretune.transforms.base import Transform

# What a transform calls the inputs that share a scale, and the bits of embeddings and head.
GROUP_FIELDS = ("group", "group_size")
HEAD_FIELDS = ("head_bits",)


@dataclass(frozen=True)
class Format:
    """Args:
    transform: in `registry.TRANSFORMS`.
    settings: its fields.
    what: one line for the help.
    """

    transform: str
    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)


FORMATS: dict[str, Format] = {
    "int8": Format("int8", "8 bits, one fp32 scale a row"),
    "int4": Format("groups", "4 bits in groups, embeddings and head in 8", {"bits": 4}),
    "int8_groups": Format("groups", "8 bits in groups", {"bits": 8}),
    "q8_0": Format("groups", "the numbers of llama.cpp's Q8_0", {"bits": 8, "group": 32}),
    "q4_0": Format("groups", "the numbers of llama.cpp's Q4_0, all layers", {"bits": 4, "group": 32, "head_bits": 4}),
}


def transform_of(
    name: str, group_size: int | None = None, head_bits: int | None = None, embeddings: bool = True
) -> Transform:
    """The transform of a format with the user's settings.

    Args:
        group_size: inputs that share a scale; None: the format's own.
        head_bits: of embeddings and head; None: the format's own.
        embeddings: whether embeddings and head are quantised at all.

    Raises:
        UsageError: an unknown format, or one that does not have that setting.
    """
    if name not in FORMATS:
        import difflib

        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"unknown format {name!r}", f"{hint}Known: {', '.join(FORMATS)}")
    chosen = FORMATS[name]
    kind = TRANSFORMS.get(chosen.transform)
    known = {f.name for f in dataclasses.fields(kind)}
    settings = dict(chosen.settings)
    if group_size is not None:
        group_field = next((f for f in GROUP_FIELDS if f in known), None)
        fixed = group_field in settings and settings[group_field] != group_size
        if group_field is None or fixed:
            raise UsageError(f"--group-size {group_size} does not apply to {name} ({chosen.what})", "Leave it out")
        settings[group_field] = group_size
    if head_bits is not None and not embeddings:
        raise UsageError("--head and --no-embeddings contradict each other", "Give one of them")
    if head_bits is not None:
        head_field = next((f for f in HEAD_FIELDS if f in known), None)
        if head_field is None:
            raise UsageError(f"--head {head_bits} does not apply to {name} ({chosen.what})", "Leave it out")
        settings[head_field] = head_bits
    if not embeddings:
        off = {"embeddings": False, "head_bits": 0}
        found = [f for f in off if f in known]
        if not found:
            raise UsageError(f"{name} has no choice about embeddings", "Name them with --exclude")
        settings[found[0]] = off[found[0]]
    return kind(**settings)
