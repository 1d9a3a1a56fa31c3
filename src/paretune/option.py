"""One setting of an axis that is worth trying: what transforms, runners and caches declare of themselves.

The axes of a search are `attention`, `mechanism`, `precision`, `quantize`, ... (transforms name theirs), `runner`,
`cache` and `threads`. An option is named by an expression (`recipe.expression`): what a table says can be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL_QUANTISED = "all_quantised"  # tag: no weight is left in a number format of its own
PRUNED = "pruned"  # tag: weights are zero, or gone
SPARSE = "sparse"  # tag: the format stores no zeros
OWN_KERNELS = "own_kernels"  # tag: the runner has products and attention of its own

Conflict = tuple[frozenset[str], str]


@dataclass(frozen=True)
class Option:
    """A setting, and what a search needs to know before it tries it.

    Args:
        name: an expression that gives it, such as `int4(group=64)` or `compile(freeze)`.
        reason: why it cannot pay here, although it may be asked for; None where it may.
        tags: what is true of a recipe that has it, for the conflicts of others.
        needs: tags without which it has no fast form: there it is not tried.
        conflicts: tags and a reason: beside all of these tags it is pointless, for that reason.
        beside: axes with whose options it is combined, in runners with kernels of their own; None: with every axis. It
            bounds what would multiply the space.
        is_default: what a recipe has where it does not say; one of an axis at most.
        changes_numbers: more than the order of additions.
        changes_weights: prunes the model or trains it further: a search tries it only where that is allowed.
        differs_after: tokens of a sequence after which it makes a difference.
        log_gain: that it is credited with until it is measured, so that cheap options are looked at first.
        start_sec: seconds until its first step can be timed, before anything was measured here; 0: nothing of note.
    """

    name: str
    reason: str | None = None
    tags: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    conflicts: tuple[Conflict, ...] = ()
    beside: tuple[str, ...] | None = None
    is_default: bool = False
    changes_numbers: bool = True
    changes_weights: bool = False
    differs_after: int = 0
    log_gain: float = 0.3
    start_sec: float = 0.0
