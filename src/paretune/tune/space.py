"""Every legal combination of the axes' options, and why the others are not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from paretune.model.config import ModelConfig
from paretune.option import OWN_KERNELS, Option
from paretune.recipe import Recipe, preset
from paretune.recipe.axes import Axes, axes, default_of

RUNNER, CACHE = "runner", "cache"  # the axes that say how a model is run, not what it is
CHANGED_WEIGHTS = "changed-weights"  # of `allow`: pruned models are tried too
Change = tuple[str, str]  # an axis and the name of its option


@dataclass(frozen=True)
class Candidate:
    """One point of the space: its options by axis, those that the baseline has too left out.

    Args:
        runner: the option of the runner's axis, the baseline's where that is the same.
    """

    options: Mapping[str, Option]
    runner: Option
    recipe: Recipe

    @property
    def id(self) -> str:
        return self.recipe.hash

    @property
    def changes(self) -> dict[str, str]:
        """What differs from the baseline, by axis."""
        return {axis: option.name for axis, option in self.options.items()}

    @property
    def tags(self) -> frozenset[str]:
        return frozenset().union(self.runner.tags, *(o.tags for o in self.options.values()))

    @property
    def single(self) -> Change | None:
        """The one change that this candidate tells something about: it is alone, or runs in kernels of its own because
        it is tried nowhere else."""
        changes = [c for c in self.changes.items() if c[0] != RUNNER]
        if RUNNER not in self.options:
            return changes[0] if len(changes) == 1 else None
        if not changes:
            return RUNNER, self.runner.name
        if len(changes) > 1 or not self.has_own_kernels:
            return None
        option = self.options[changes[0][0]]
        return changes[0] if option.needs or option.beside is not None else None

    @property
    def has_own_kernels(self) -> bool:
        return OWN_KERNELS in self.runner.tags

    @property
    def is_plain(self) -> bool:
        """Whether the baseline's own runner executes it: it starts at once."""
        return RUNNER not in self.options

    @property
    def weights(self) -> frozenset[Change]:
        """What is computed, with which numbers: candidates that share it differ in the runner and the cache alone."""
        return frozenset(change for change in self.numbers if change[0] != CACHE)

    @property
    def numbers(self) -> frozenset[Change]:
        """The changes that change numbers."""
        return frozenset((axis, o.name) for axis, o in self.options.items() if o.changes_numbers)


@dataclass
class Space:
    """The candidates; the baseline is not among them."""

    legal: list[Candidate] = field(default_factory=list)
    illegal: list[tuple[str, str]] = field(default_factory=list)  # name, reason

    @cached_property
    def _by_changes(self) -> dict[frozenset[Change], Candidate]:
        return {frozenset(c.changes.items()): c for c in self.legal}

    def find(self, changes: Mapping[str, str]) -> Candidate | None:
        """The candidate of exactly these changes."""
        return self._by_changes.get(frozenset(changes.items()))

    @property
    def runners(self) -> dict[str, Option]:
        """The runners' options by name, the baseline's among them where a candidate has it."""
        return {c.runner.name: c.runner for c in self.legal}


def baseline() -> Recipe:
    """The reasonable default that everything is compared with."""
    return preset("baseline")


def candidate(options: Mapping[str, Option], default_runner: Option) -> Candidate:
    """The point of these options; axes that are not named are as in the baseline."""
    names = "+".join(option.name for option in options.values())
    return Candidate(dict(options), options.get(RUNNER, default_runner), preset(names or "baseline"))


def build(device: str, config: ModelConfig | None = None, n_tokens: int = 0, allow: Sequence[str] = ()) -> Space:
    """All combinations; those that cannot run on `device`, or cannot win there, go aside with the reason.

    Args:
        config, n_tokens: the model and the longest sequence of the request, for what it may not have; None: of any.
        allow: what else may be tried (`CHANGED_WEIGHTS`).
    """
    space = Space()
    offered = axes(device, config, n_tokens)
    if CHANGED_WEIGHTS not in allow:
        for axis, options in offered.items():
            asked = [o.name for o in options if o.changes_weights]
            space.illegal += [(name, f"it changes weights: --allow {CHANGED_WEIGHTS} tries it") for name in asked]
            offered[axis] = [o for o in options if not o.changes_weights]
    runner = default_of(offered[RUNNER])
    assert runner is not None, "some runner is the reference"
    reasons = {
        (axis, option.name): candidate({axis: option}, runner).recipe.requires(device) or option.reason
        for axis, options in offered.items()
        for option in options
        if not option.is_default
    }
    for chosen in _combinations(offered):
        point = candidate(chosen, runner)
        if any(not o.needs <= point.tags for o in chosen.values()):
            continue
        reason = next((r for axis, o in chosen.items() if (r := reasons[axis, o.name])), None)
        if config is not None:
            reason = reason or point.recipe.fits(config)
        reason = reason or _conflict(point)
        if reason:
            space.illegal.append((point.recipe.name, reason))
        else:
            space.legal.append(point)
    return space


def differs_after(device: str, config: ModelConfig, n_tokens: int) -> int:
    """Tokens after which all that may be tried on this model makes a difference; 0: from the first on."""
    offered = [option for options in axes(device, config, n_tokens).values() for option in options]
    return max((o.differs_after for o in offered if not o.reason), default=0)


def _combinations(offered: Axes) -> Iterator[dict[str, Option]]:
    """The points, by what of them differs from the baseline. What would multiply the space comes last."""
    wide = {axis: [o for o in options if o.beside is None] for axis, options in offered.items()}
    for choice in itertools.product(*([None, *_changing(options)] for options in wide.values())):
        made = {axis: o for axis, o in zip(wide, choice, strict=True) if o is not None}
        if made:
            yield made
    own = [o for o in wide[RUNNER] if OWN_KERNELS in o.tags]
    for axis, options in offered.items():
        for option in options:
            if option.beside is None:
                continue
            yield {axis: option}
            for runner in own:
                yield {axis: option, RUNNER: runner}
                for other in option.beside:
                    for beside in _changing(wide.get(other, ())):
                        yield {axis: option, other: beside, RUNNER: runner}


def _changing(options: Sequence[Option]) -> list[Option]:
    return [o for o in options if not o.is_default]


def _conflict(point: Candidate) -> str | None:
    """Why an option is pointless beside the others of a point, or None."""
    for option in point.options.values():
        for tags, reason in option.conflicts:
            if tags <= point.tags:
                return reason
    return None
