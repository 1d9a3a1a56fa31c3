"""Choice by regime: which form of a plan runs a request, by its batch, its length, the memory left and the quality.

`tune` measures forms over a grid and ranks them in each cell; here two bisections and a walk over a few names answer
for one request. Nothing is asked per token, and the answer says what was chosen and why.
"""

from __future__ import annotations

import bisect
import copy
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from paretune import hardware
from paretune.engine.load import Loaded, load_recipe
from paretune.engine.runners.base import Runner
from paretune.errors import UsageError
from paretune.model.base import LanguageModel
from paretune.ops.weights.base import Weight
from paretune.recipe import Recipe
from paretune.registry import ATTENTION
from paretune.transforms.attention import Attention, attention_layers
from paretune.transforms.base import Context, Stage

PLAN = "plan"  # the form that the plan's own recipe is
LEVELS = {
    "plan": "the numbers of the plan's own recipe, up to the order of additions",
    "lossless": "the numbers of the model as it was before `tune`, up to the order of additions",
    "bounded": "any form whose quality was measured within the bound of `tune`",
}
LABELS = ("lossless", "bounded")
ASK_FROM_BYTES = 64 << 20  # a request that needs less is not worth asking the system how much memory is left
_FORM_KEYS = {"name", "recipe", "label", "ppl_increase_upper", "longest", "weights_bytes"}
_TABLE_KEYS = {"batch_sizes", "lengths", "forms", "cells"}


@dataclass(frozen=True)
class Form:
    """One way to run a plan.

    Args:
        label: lossless (equality proven) or bounded (quality measured within the bound).
        ppl_increase_upper: of a bounded form, surely no more than this share above the baseline.
        longest: tokens of a request for which the label holds; None: any.
        weights_bytes: of a second copy of the weights, where it cannot share the plan's; 0 where it does.
    """

    name: str
    recipe: Recipe
    label: str
    ppl_increase_upper: float | None = None
    longest: int | None = None
    weights_bytes: int = 0

    def permits(self, level: str, plan: Form) -> bool:
        """Whether a request that wants the quality `level` may run this form."""
        if level == "lossless":
            return self.label == "lossless"
        return level == "bounded" or same_numbers(self.recipe, plan.recipe)


@dataclass(frozen=True)
class Entry:
    """A form in a cell of the grid: `n_bytes` of cache and activations were taken there."""

    form: str
    n_bytes: int


@dataclass(frozen=True)
class Choice:
    """What was chosen for a request, for the report."""

    form: str
    recipe: str  # its title
    label: str
    regime: str  # the cell that the request belongs to
    reason: str

    def to_json(self) -> dict[str, str]:
        return dict(vars(self))

    def __str__(self) -> str:
        return f"{self.recipe} ({self.label}; {self.regime}: {self.reason})"


@dataclass(frozen=True)
class Table:
    """Forms by regime. Between grid points a request belongs to the nearer one, by ratio.

    Args:
        batch_sizes, lengths: the grid, ascending; a length is prompt and new tokens of a request.
        forms: by name; the plan's own is `PLAN`.
        cells: `[batch][length]` entries, the best first; the plan's own stands in each.
    """

    batch_sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    forms: Mapping[str, Form]
    cells: tuple[tuple[tuple[Entry, ...], ...], ...]
    _batch_bounds: list[float] = field(init=False, repr=False, compare=False)
    _length_bounds: list[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, values in (("batch_sizes", self.batch_sizes), ("lengths", self.lengths)):
            if not values or min(values) < 1 or list(values) != sorted(set(values)):
                raise UsageError(f"{name} of the dispatch table are {list(values)}", "They have to ascend from 1 on")
        if PLAN not in self.forms:
            raise UsageError(f"the dispatch table has no form {PLAN!r}", "Run `paretune tune` again")
        shape = [len(row) for row in self.cells]
        if shape != [len(self.lengths)] * len(self.batch_sizes):
            raise UsageError(f"the dispatch table has cells {shape}", "One a batch size and length is needed")
        for cell in itertools.chain(*self.cells):
            unknown = [e.form for e in cell if e.form not in self.forms]
            if unknown or PLAN not in [e.form for e in cell]:
                what = f"the unknown form {unknown[0]!r}" if unknown else f"no form {PLAN!r}"
                raise UsageError(f"a cell of the dispatch table has {what}", "Run `paretune tune` again")
        object.__setattr__(self, "_batch_bounds", _bounds(self.batch_sizes))
        object.__setattr__(self, "_length_bounds", _bounds(self.lengths))

    def choose(
        self,
        batch_size: int,
        length: int,
        level: str = "plan",
        memory_left: Callable[[], int] | None = None,
        available: Sequence[str] | None = None,
    ) -> Choice:
        """The form for a request of `length` tokens, prompt and answer, in a batch.

        Args:
            level: a key of `LEVELS`.
            memory_left: asked only where the request needs much; None: as much as it takes.
            available: names of the forms that are loaded; None: all.

        Raises:
            UsageError: an unknown level, or no form keeps it.
        """
        self.check_level(level)
        i = bisect.bisect_right(self._batch_bounds, batch_size)
        j = bisect.bisect_right(self._length_bounds, length)
        at = self.batch_sizes[i], self.lengths[j]
        regime = f"regime of batch {at[0]}, {at[1]} tokens"
        plan, left, passed = self.forms[PLAN], math.inf, ""
        fallback: tuple[float, Form] | None = None
        for rank, entry in enumerate(self.cells[i][j]):
            form = self.forms[entry.form]
            is_loaded = available is None or form.name in available
            is_too_long = length > (form.longest or length)
            # The plan's own numbers are what a plan promises, however long the request is.
            is_promised = form.name == PLAN and level == "plan"
            if not (is_loaded and form.permits(level, plan)) or (is_too_long and not is_promised):
                continue
            # From above: caches grow with the length, scores with its square; smaller requests take no more.
            needed = entry.n_bytes * max(1.0, batch_size / at[0]) * max(1.0, length / at[1]) ** 2
            if needed > ASK_FROM_BYTES and memory_left is not None and left == math.inf:
                left = memory_left()
            if needed <= left:
                why = "ranked first here" if rank == 0 else "the best here of what the request permits"
                if is_too_long:
                    why += f"; longer than the {form.longest} tokens that its loss was measured on"
                return Choice(form.name, form.recipe.name, form.label, regime, passed or why)
            passed = f"the first that fits into the {left / 1e6:.0f} MB left"
            if fallback is None or needed < fallback[0]:
                fallback = needed, form
        if fallback is None:
            raise UsageError(f"no form of this plan keeps the quality level {level!r}", _cure(self, level))
        form = fallback[1]
        return Choice(
            form.name, form.recipe.name, form.label, regime, f"the smallest; none surely fits into {left / 1e6:.0f} MB"
        )

    @staticmethod
    def check_level(level: str) -> None:
        """Raises UsageError where there is no such level."""
        if level not in LEVELS:
            raise UsageError(f"unknown quality level {level!r}", f"Known: {', '.join(LEVELS)}")

    def to_dict(self) -> dict[str, Any]:
        forms = [vars(f) | {"recipe": f.recipe.to_dict()} for f in self.forms.values()]
        return {
            "batch_sizes": list(self.batch_sizes),
            "lengths": list(self.lengths),
            "forms": forms,
            "cells": [[[dict(vars(e)) for e in cell] for cell in row] for row in self.cells],
        }

    @staticmethod
    def from_dict(data: Any) -> Table:
        """The opposite of `to_dict`; what is unknown, missing or of the wrong kind is an error, never dropped.

        Raises:
            UsageError: it is not such a table.
        """
        try:
            _only(data, _TABLE_KEYS, "the dispatch table")
            forms = {}
            for entry in data["forms"]:
                _only(entry, _FORM_KEYS, "a form of the dispatch table")
                if entry["label"] not in LABELS:
                    raise ValueError(f"label {entry['label']!r}")
                form = Form(**{**entry, "recipe": Recipe.from_dict(entry["recipe"])})
                upper, longest = form.ppl_increase_upper, form.longest
                if (form.label == "bounded") != isinstance(upper, float):
                    raise ValueError(f"form {form.name!r}: bounded means a measured loss")
                if not isinstance(form.weights_bytes, int) or not isinstance(longest, int | None):
                    raise TypeError(f"form {form.name!r}: bytes and tokens are whole numbers")
                forms[form.name] = form
            cells = []
            for row in data["cells"]:
                for entry in itertools.chain(*row):
                    _only(entry, {"form", "n_bytes"}, "an entry of the dispatch table")
                    if not isinstance(entry["n_bytes"], int) or entry["n_bytes"] < 0:
                        raise TypeError(f"n_bytes {entry['n_bytes']!r}")
                cells.append(tuple(tuple(Entry(**e) for e in cell) for cell in row))
            batches, lengths = tuple(data["batch_sizes"]), tuple(data["lengths"])
            if not all(type(n) is int for n in (*batches, *lengths)):
                raise TypeError("sizes are whole numbers")
            return Table(batches, lengths, forms, tuple(cells))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"the dispatch table is damaged ({error})", "Run `paretune tune` again") from None


class Dispatcher:
    """The runners of a plan's forms, ready; `runner_for` answers for one request.

    Forms that share the plan's weights are views of the one loaded model. Others are a second copy, made only where
    `spare_bytes` allow it.

    Args:
        loaded: the plan's own recipe, loaded.
        source: gives the checkpoint as it was before `tune`; asked for second copies alone.
        spare_bytes: for weights beside the plan's.
    """

    def __init__(self, loaded: Loaded, table: Table, source: Callable[[], Path], spare_bytes: int = 0) -> None:
        self.table = table
        self.runners: dict[str, Runner] = {PLAN: loaded.runner}
        device = str(loaded.runner.device)
        self._memory_left = functools.partial(hardware.memory_left, device)
        for form in table.forms.values():
            if form.name == PLAN or form.recipe.why_not(device, loaded.runner.config):
                continue
            if shares_weights(form.recipe, loaded.recipe):
                self.runners[form.name] = view(loaded.runner.model, form.recipe, loaded.recipe)
            elif form.weights_bytes <= spare_bytes:
                spare_bytes -= form.weights_bytes
                self.runners[form.name] = load_recipe(source(), form.recipe, device, check=False).runner

    @classmethod
    def of(cls, loaded: Loaded, plan: Any, spare_bytes: int = 0) -> Dispatcher | None:
        """For a plan as `engine.plan.read_plan` gives it; None where it has no table."""
        if plan is None or plan.table is None:
            return None
        # Threads are the process's: those that the plan was loaded with hold for all forms.
        threads = loaded.recipe.engine.threads
        forms = {f.name: replace(f, recipe=f.recipe.with_threads(threads)) for f in plan.table.forms.values()}
        return cls(loaded, replace(plan.table, forms=forms), lambda: plan.source, spare_bytes)

    def runner_for(self, batch_size: int, length: int, level: str = "plan") -> tuple[Runner, Choice]:
        """What runs a request; arguments and errors as `Table.choose`."""
        choice = self.table.choose(batch_size, length, level, self._memory_left, tuple(self.runners))
        return self.runners[choice.form], choice


def same_numbers(a: Recipe, b: Recipe) -> bool:
    """Whether two recipes give the same results up to the order of additions."""
    return _changing(a) == _changing(b) and a.engine.cache_dtype == b.engine.cache_dtype


def shares_weights(form: Recipe, plan: Recipe) -> bool:
    """Whether `form` can be a view of a model that was loaded under `plan`."""
    theirs, ours = _of_weights(form), _of_weights(plan)
    mechanisms = [t for t in plan.transforms if t.stage == Stage.MECHANISM]
    same_mechanism = mechanisms == [t for t in form.transforms if t.stage == Stage.MECHANISM]
    # What one runner has packed another cannot read; a mechanism that was applied is not taken back.
    return theirs == ours and _packer(form) == _packer(plan) and (not mechanisms or same_mechanism)


def _packer(recipe: Recipe) -> str | None:
    """The runner whose layout the weights are in; None: the model's own."""
    return recipe.engine.runner if recipe.runner_class.packs_weights else None


def view(model: LanguageModel, recipe: Recipe, plan: Recipe) -> Runner:
    """A runner of `recipe` on the weights of `model`, which runs `plan`: modules are copied, tensors shared."""
    assert shares_weights(recipe, plan)
    shared = [m for m in model.modules() if isinstance(m, Weight)]
    memo: dict[int, Any] = {id(x): x for x in [*shared, *model.parameters(), *model.buffers()]}
    other = copy.deepcopy(model, memo)
    ctx = Context(device=str(model.embedding.weight.device))
    known = [t for t in plan.transforms if t.stage == Stage.MECHANISM]
    for transform in recipe.transforms:
        if transform.stage in (Stage.MECHANISM, Stage.ATTENTION) and transform not in known:
            other = transform.apply(other, ctx)
    _ensure_shared(model, other)
    for transform in recipe.transforms:  # what only looks like the form would be timed, and told, as it
        if isinstance(transform, Attention):
            function = ATTENTION.get(transform.form)
            assert all(m.attention is function for m in attention_layers(other)), f"a view without {transform.form}"
    return recipe.runner(other)


def _ensure_shared(model: nn.Module, other: nn.Module) -> None:
    ours = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert all(t.data_ptr() in ours for t in [*other.parameters(), *other.buffers()]), "a view has weights of its own"


def _changing(recipe: Recipe) -> list[Any]:
    return [t for t in recipe.transforms if not t.exact]


def _of_weights(recipe: Recipe) -> list[Any]:
    return [t for t in recipe.transforms if t.stage not in (Stage.MECHANISM, Stage.ATTENTION)]


def _bounds(points: Sequence[int]) -> list[float]:
    """Where one grid point ends and the next begins: the middle by ratio."""
    return [math.sqrt(a * b) for a, b in itertools.pairwise(points)]


def _cure(table: Table, level: str) -> str:
    beside = [f for f in table.forms.values() if f.permits(level, table.forms[PLAN]) and f.weights_bytes]
    if beside:
        return f"Allow a second copy of the weights with --spare-memory {-(-beside[0].weights_bytes >> 20)}MB"
    return f"Ask for another level: {', '.join(k for k in LEVELS if k != level)}"


def _only(data: Any, keys: set[str], what: str) -> None:
    if not isinstance(data, Mapping):
        raise TypeError(f"{what} is not a table")
    if wrong := sorted(set(data) ^ keys):
        raise KeyError(f"{what}: {wrong[0]}")
