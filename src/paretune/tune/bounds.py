"""Which candidates cannot win any more, and the figures that say so.

Three bounds, each with a stated margin. None is a measurement: what they exclude is shown as excluded, with its
figures.

    roofline     its bytes (or its arithmetic) take longer than the leader takes in all
    effects      what its changes gave one by one, multiplied, and MARGIN on top, stays below the leader
    quality      a candidate with fewer of its changes is over the quality limit already
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from paretune import stats
from paretune.records.judge import MIN_BYTES_GAIN
from paretune.tune.estimate import Estimator
from paretune.tune.outcome import Outcome
from paretune.tune.race import BASELINE
from paretune.tune.space import RUNNER, Candidate, baseline

ROOFLINE_SLACK = 0.8  # of the least time: the ceiling may have been measured in a slow moment
MARGIN = 1.5  # on top of the product of single effects: changes may help each other
BYTES_SLACK = 0.97  # expected bytes are an upper bound that formats fill but for headers


class Bounds:
    """Answers for one moment of the search: the leader and what was measured so far do not change meanwhile."""

    def __init__(self, out: Outcome, estimator: Estimator) -> None:
        self.out, self.estimator = out, estimator
        self.by_id = {c.id: c for c in out.space.legal}
        self.leader = out.leader()
        self._rows = set(out.rows())
        self._ratios: dict[str, stats.Interval] = {i: out.ratio(i) for i in self._rows}
        base = out.race.measured()
        self._base_sec = float(np.median(base.values(BASELINE))) if BASELINE in base.subjects else math.nan

    def reason(self, candidate: Candidate) -> str | None:
        """Why this candidate cannot win, with figures; None where it may."""
        by_quality = self._quality(candidate)
        if by_quality or self.leader is None or self.leader == candidate.id:
            return by_quality
        if self.out.goal.in_bytes:
            return self._bytes(candidate)
        return self._roofline(candidate) or self._effects(candidate)

    # -- quality

    def _quality(self, candidate: Candidate) -> str | None:
        for id, figures in self.out.rejected.items():
            other = self.by_id.get(id)
            if other is None or id == candidate.id or not other.numbers <= candidate.numbers:
                continue
            if other.numbers == candidate.numbers and other.runner != candidate.runner:
                return f"the same numbers are over the quality limit in {other.recipe.name}: {figures}"
            return f"{other.recipe.name}, which changes less, is over the quality limit: {figures}"
        return None

    # -- bytes and rooflines

    def _bytes(self, candidate: Candidate) -> str | None:
        assert self.leader is not None
        state = self.out.race.trials[self.leader]
        if self.out.goal.objective != "size" or state.facts is None:
            return None  # activations are known only after a run
        theirs = state.facts.memory.weights_bytes
        ours = BYTES_SLACK * self.estimator.weights_bytes(candidate.recipe)
        if ours * MIN_BYTES_GAIN < theirs:
            return None
        return f"its weights take {ours / 1e6:.1f} MB or more, those of {state.recipe.name} {theirs / 1e6:.1f} MB"

    def _roofline(self, candidate: Candidate) -> str | None:
        assert self.leader is not None
        if candidate.single and candidate.is_plain:
            return None  # a change alone in plain PyTorch starts at once, and what it gives bounds its combinations
        floor = self.estimator.floor_sec(candidate.recipe)
        most = self._base_sec / self._ratios[self.leader].low if self._ratios[self.leader].low else math.inf
        if floor is None or not ROOFLINE_SLACK * floor > most:
            return None
        name = self.out.race.trials[self.leader].recipe.name
        if self.out.goal.sample_kind == "ttft":
            what = "its arithmetic takes"
        else:
            what = f"reading its {self.estimator.step_bytes(candidate.recipe) / 1e6:.0f} MB a token takes"
        return f"{what} {_ms(floor)} here at the measured rate; {name} takes {_ms(most)} at most"

    # -- single effects

    def _effects(self, candidate: Candidate) -> str | None:
        """Compares the product of what its parts gave, each at the upper end of its interval, with the leader."""
        assert self.leader is not None
        low = self._ratios[self.leader].low
        parts = self._native_parts(candidate) if candidate.has_own_kernels else self._plain_parts(candidate)
        if not parts or not low or (len(parts) == 1 and candidate.is_plain):  # a plain change alone is measured
            return None
        product = math.prod(value for _, value in parts)
        if not MARGIN * product < low:
            return None
        told = ", ".join(f"{name} {value:.2f}x" for name, value in parts)
        name = self.out.race.trials[self.leader].recipe.name
        return (
            f"its parts gave at most {told}; {MARGIN:g} times their product is {MARGIN * product:.2f}x, "
            f"below the {low:.2f}x that {name} gives at least"
        )

    def _plain_parts(self, candidate: Candidate) -> list[tuple[str, float]] | None:
        """(what, upper end of its gain) of each change by itself in PyTorch; None where one is not known."""
        parts: list[tuple[str, float]] = []
        for axis, change in candidate.changes.items():
            alone = self._alone({axis: change})
            if alone is not None:
                parts.append((change, alone))
            elif axis == RUNNER:
                bound = self._compiled_bound(candidate)
                if bound is None:
                    return None
                parts.append(bound)
            else:
                return None
        return parts

    def _alone(self, changes: Mapping[str, str]) -> float | None:
        """The upper end of the gain of these changes together, where they were measured."""
        found = self.out.space.find(changes)
        if found is None or found.id not in self._rows or not math.isfinite(self._ratios[found.id].high):
            return None
        return self._ratios[found.id].high

    def _compiled_bound(self, candidate: Candidate) -> tuple[str, float] | None:
        """What another mode of the compiler gave, or the most that any code of the baseline's weights can give."""
        runner, kind = candidate.runner.name, candidate.recipe.engine.runner
        seen = [
            (c.runner.name, self._ratios[c.id].high)
            for c in self.out.space.legal
            if c.id in self._rows and len(c.changes) == 1 and not c.is_plain and c.recipe.engine.runner == kind
        ]
        if seen:
            return max(seen, key=lambda pair: pair[1])
        floor = self.estimator.floor_sec(baseline())
        if floor is None or not math.isfinite(self._base_sec):
            return None
        return f"{runner} (the baseline at its roofline)", self._base_sec / (ROOFLINE_SLACK * floor)

    def _native_parts(self, candidate: Candidate) -> list[tuple[str, float]] | None:
        """The native runner by itself, and each other change beside it, as far as they were measured."""
        runner = {RUNNER: candidate.runner.name}
        native = self.out.space.find(runner)
        if native is None or native.id not in self._rows:
            return None
        plain = self._ratios[native.id]
        if not plain.low or not math.isfinite(plain.high):
            return None
        parts = [(candidate.runner.name, plain.high)]
        for axis, change in candidate.changes.items():
            if axis == RUNNER:
                continue
            beside = {**runner, axis: change}
            high = self._alone(beside)
            if beside == candidate.changes or high is None:
                return None
            parts.append((f"{change} beside it", high / plain.value))
        return parts if len(parts) > 2 else None


def _ms(sec: float) -> str:
    return f"{sec * 1e3:.3g} ms"
