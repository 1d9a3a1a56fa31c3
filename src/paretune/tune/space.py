"""Every legal combination of the transforms and runners, and in which order to try them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from paretune.recipe import Recipe, preset

ATTENTION = ("sdpa", "eager")
PRECISION = (None, "bf16", "fp16")
QUANTIZE = (None, "int8", "int8-linear")
RUNNERS = ("eager", "native", "compile:default", "compile:freeze", "compile:max-autotune")
FAMILIES = ("attention", "precision", "quantize", "runner")
Choice = tuple[str, str | None, str | None, str]
MAX_NATIVE_BATCH = 32  # `engine.runners.native.MAX_ROWS`, written again so that listing the space imports no torch
SAME_ATTENTION = "native code runs the same attention whatever the form: a duplicate"
BASELINE: Choice = ("sdpa", None, None, "eager")

# Log gain that a change nobody has measured yet is credited with, so that each is looked at once, cheap ones first.
UNSEEN = {"attention": 0.3, "precision": 0.4, "quantize": 0.5, "runner": 0.6}


@dataclass(frozen=True)
class Candidate:
    """One point of the space."""

    choice: Choice
    recipe: Recipe

    @property
    def id(self) -> str:
        return self.recipe.hash

    @property
    def changes(self) -> dict[str, str | None]:
        """What differs from the baseline, by family."""
        return {f: c for f, c, b in zip(FAMILIES, self.choice, BASELINE, strict=True) if c != b}


@dataclass
class Space:
    """The candidates; the baseline is not among them."""

    legal: list[Candidate] = field(default_factory=list)
    illegal: list[tuple[str, str]] = field(default_factory=list)  # name, reason


def recipe_of(choice: Choice) -> Recipe:
    attention, precision, quantize, runner = choice
    transforms: list[dict[str, object]] = [{"name": "attention", "form": attention}]
    if precision:
        transforms.append({"name": "precision", "dtype": precision})
    if quantize:
        transforms.append({"name": "int8", "embeddings": quantize == "int8"})
    name, _, mode = runner.partition(":")
    engine = {"runner": name, "compile_mode": mode} if mode else {"runner": name}
    return Recipe.from_dict({"transforms": transforms, "engine": engine})


def baseline() -> Recipe:
    """The reasonable default that everything is compared with."""
    recipe = preset("baseline")
    assert recipe == recipe_of(BASELINE)
    return recipe


def build(device: str, batch_size: int = 1) -> Space:
    """All combinations; those that cannot run on `device` go aside with the reason."""
    space = Space()
    reasons: dict[tuple[str, str | None], str | None] = {}
    for family, options in zip(FAMILIES, (ATTENTION, PRECISION, QUANTIZE, RUNNERS), strict=True):
        at = FAMILIES.index(family)
        for option in options:
            alone = (*BASELINE[:at], option, *BASELINE[at + 1 :])
            reasons[family, option] = recipe_of(alone).requires(device)  # type: ignore[arg-type]
    for a in ATTENTION:
        for p in PRECISION:
            for q in QUANTIZE:
                for r in RUNNERS:
                    choice: Choice = (a, p, q, r)
                    if choice == BASELINE:
                        continue
                    candidate = Candidate(choice, recipe_of(choice))
                    reason = next((reasons[f, c] for f, c in zip(FAMILIES, choice, strict=True) if reasons[f, c]), None)
                    if r == "native" and a != BASELINE[0]:
                        reason = reason or SAME_ATTENTION
                    if r == "native" and batch_size > MAX_NATIVE_BATCH:
                        reason = reason or f"native steps hold {MAX_NATIVE_BATCH} sequences at most"
                    if reason:
                        space.illegal.append((candidate.recipe.name, reason))
                    else:
                        space.legal.append(candidate)
    return space


def predicted_log_gain(candidate: Candidate, singles: Mapping[tuple[str, str | None], float]) -> float:
    """Log gain if gains multiplied: an order to try in, never a result (they do not multiply).

    Args:
        singles: measured log ratio of each change alone.
    """
    total = 0.0
    for change in candidate.changes.items():
        gain = singles.get(change, math.nan)  # NaN: not seen, or the deadline cut its first block
        if not math.isnan(gain):
            total += gain
        elif len(candidate.changes) == 1:  # in company an unknown change is worth nothing yet: alone comes first
            total += UNSEEN[change[0]]
    return total


def next_wave(
    space: Space,
    tried: set[str],
    singles: Mapping[tuple[str, str | None], float],
    start_sec: Mapping[str, float],
    budget_sec: float,
    size: int,
) -> list[Candidate]:
    """The next candidates to measure together.

    Changes alone that start quickly come first (they teach the most). Then the rest by predicted gain and start-up, and
    in each wave, after the two best of them, the next change alone: a runner that compiles for a minute has its turn
    before the budget ends, but not before what promises most. What would not start within the budget is left out.
    """

    def cost(c: Candidate) -> float:
        return start_sec.get(c.choice[3], DEFAULT_START_SEC[c.choice[3]])

    left = [c for c in space.legal if c.id not in tried and cost(c) <= budget_sec]

    def rank(c: Candidate) -> tuple[bool, float]:
        is_cheap_single = len(c.changes) == 1 and c.choice[3] in ("eager", "native")
        return (not is_cheap_single, -predicted_log_gain(c, singles) / (1 + cost(c) / 60))

    def take(candidates: list[Candidate], most: int) -> list[Candidate]:
        chosen: list[Candidate] = []
        spent = 0.0
        for candidate in candidates:
            if len(chosen) < most and spent + cost(candidate) <= budget_sec:
                chosen.append(candidate)
                spent += cost(candidate)
        return chosen

    ordered = sorted(left, key=rank)
    alone = [c for c in ordered if len(c.changes) == 1]
    if alone and ordered[0] is not alone[0]:
        ordered.remove(alone[0])
        ordered.insert(2, alone[0])
    promising = [c for c in ordered if len(c.changes) == 1 or predicted_log_gain(c, singles) > 0]
    # Nothing promising is left: the rest is measured too while there is time.
    return take(promising, size) or take(ordered, min(size, 2))


# Before anything was measured; replaced by what this run sees.
DEFAULT_START_SEC = {
    "eager": 7.0,
    "native": 7.0,
    "compile:default": 45.0,
    "compile:freeze": 50.0,
    "compile:max-autotune": 90.0,
}
