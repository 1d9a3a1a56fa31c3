"""The number formats of `paretune quantize` by name: transforms and their settings. A new format is one entry here."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paretune.errors import UsageError
from paretune.registry import TRANSFORMS

if TYPE_CHECKING:  # `paretune ls` reads the table, and imports no torch
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
    transform: in `registry.TRANSFORMS`.
    what: one line for the help.
    head_bits: of embeddings and head where the user does not say.
    ends: the choices for them by bits; 0 leaves them as they are.
    settings: of the transform.
    group: its field that `--group-size` sets; "": it has no choice.
    """

    transform: str
    what: str
    head_bits: int
    ends: Mapping[int, Ends]
    settings: Settings = field(default_factory=dict)
    group: str = ""


_GROUPS = {bits: Ends({"head_bits": bits}) for bits in (8, 4, 0)}
_OWN = {8: Ends(), 0: Ends({"embeddings": False})}
_BODY = {8: Ends(then="int8"), 0: Ends()}

FORMATS: dict[str, Format] = {
    "int8": Format("int8", "8 bits, one fp32 scale a row", 8, _OWN),
    "int8_groups": Format("groups", "8 bits in groups with fp16 scales", 8, _GROUPS, {"bits": 8}, "group"),
    "int4": Format("groups", "4 bits in groups, embeddings and head in 8", 8, _GROUPS, {"bits": 4}, "group"),
    "q8_0": Format("groups", "the numbers of llama.cpp's Q8_0", 8, _GROUPS, {"bits": 8, "group": 32}),
    "q4_0": Format("groups", "the numbers of llama.cpp's Q4_0 in all layers", 4, _GROUPS, {"bits": 4, "group": 32}),
    "llm_int8": Format("llm_int8", "LLM.int8: outlier inputs in 16 bits; embeddings and head int8", 8, _BODY),
    "nf4": Format(
        "nf4",
        "4-bit normal floats, blocks of 64, positions too; embedding and head int8: 17 % of fp32",
        8,
        {8: Ends({"positions": True}, then="int8"), 4: Ends({"embeddings": True}), 0: Ends()},
    ),
    "gptq": Format("gptq", "4 bits in groups of 64, rounded by GPTQ", 8, _GROUPS, {"bits": 4}, "group"),
    "awq": Format("awq", "4 bits in groups of 64, inputs scaled by AWQ", 8, _GROUPS, {"bits": 4}, "group"),
    "hqq": Format("hqq", "4 bits in groups of 64 with minima, optimised by HQQ", 8, _GROUPS, {"bits": 4}, "group"),
    "fp8": Format("fp8", "8-bit floats (e4m3), one scale a row", 8, _OWN),
}


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
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"unknown format {name!r}", f"{hint}Known: {', '.join(FORMATS)}")
    chosen = FORMATS[name]
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
    kinds = [(TRANSFORMS.get(chosen.transform), {**settings, **ends.settings})]
    kinds += [(TRANSFORMS.get(ends.then), {})] if ends.then else []
    made = []
    for kind, own in kinds:
        wanted = {option: patterns for option, patterns in filters.items() if patterns}
        missing = sorted(set(wanted) - {f.name for f in dataclasses.fields(kind)})
        if missing:
            raise UsageError(f"--{missing[0]} does not apply to {name}", "Leave it out")
        made.append(kind(**own, **wanted))
    return tuple(made)
