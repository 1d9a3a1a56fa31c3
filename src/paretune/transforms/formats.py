"""The number formats of `paretune quantize`: settings of a transform, under a name. The transforms declare theirs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paretune.errors import UsageError
from paretune.registry import TRANSFORMS

if TYPE_CHECKING:
    from paretune.transforms.base import Transform

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Ends:
    """What becomes of embeddings and head.

    Args:
        settings: of the format's own transform.
        then: one more transform for what it leaves, by name; "": none.
    """

    settings: Settings = field(default_factory=dict)
    then: str = ""


@dataclass(frozen=True)
class Format:
    """Args:
    what: one line for the help.
    head_bits: of embeddings and head where the user does not say.
    ends: the choices for them by bits; 0 leaves them as they are.
    settings: of the transform.
    group: its field that `--group-size` sets; "": it has no choice.
    """

    what: str
    head_bits: int
    ends: Mapping[int, Ends]
    settings: Settings = field(default_factory=dict)
    group: str = ""


GROUPS_ENDS = {bits: Ends({"head_bits": bits}) for bits in (8, 4, 0)}  # the ends as groups of their own bits
OWN_ENDS = {8: Ends(), 0: Ends({"embeddings": False})}  # the ends in the same form, or as they are
BODY_ENDS = {8: Ends(then="int8"), 0: Ends()}  # the ends in int8 rows, or as they are


def formats() -> dict[str, tuple[str, Format]]:
    """Every format by its name, with the transform that makes it."""
    return {name: (transform, made) for transform, kind in TRANSFORMS.working() for name, made in kind.formats.items()}


def transforms_of(
    name: str,
    group_size: int | None = None,
    head_bits: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[Transform, ...]:
    """The transforms of a format with the user's settings, in the order in which they are applied.

    Args:
        group_size: inputs that share a scale; None: the format's own.
        head_bits: of embeddings and head; None: the format's own; 0: they stay as they are.
        include, exclude: patterns of layer names.

    Raises:
        UsageError: an unknown format, or one that does not have that setting.
    """
    every = formats()
    if name not in every:
        if name in TRANSFORMS.broken:
            TRANSFORMS.get(name)  # says why it cannot be used
        near = difflib.get_close_matches(name, every, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"unknown format {name!r}", f"{hint}Known: {', '.join(every)}")
    transform, chosen = every[name]
    settings = dict(chosen.settings)
    if group_size is not None:
        if not chosen.group:
            raise UsageError(f"--group-size {group_size} does not apply to {name} ({chosen.what})", "Leave it out")
        settings[chosen.group] = group_size
    bits = chosen.head_bits if head_bits is None else head_bits
    if bits not in chosen.ends:
        known = ", ".join(map(str, chosen.ends))
        raise UsageError(f"--head {bits} does not apply to {name} ({chosen.what})", f"It takes {known}")
    ends = chosen.ends[bits]
    filters = {"include": ",".join(include), "exclude": ",".join(exclude)}
    kinds = [(TRANSFORMS.get(transform), {**settings, **ends.settings})]
    kinds += [(TRANSFORMS.get(ends.then), {})] if ends.then else []
    made = []
    for kind, own in kinds:
        wanted = {option: patterns for option, patterns in filters.items() if patterns}
        missing = sorted(set(wanted) - {f.name for f in dataclasses.fields(kind)})
        if missing:
            raise UsageError(f"--{missing[0]} does not apply to {name}", "Leave it out")
        made.append(kind(**own, **wanted))
    return tuple(made)
