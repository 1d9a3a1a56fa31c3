"""Which candidates are measured next: cheap knowledge orders them, and each measurement improves it.

    the native runner alone -> each kind of weights in it -> their caches -> changes alone in PyTorch, runners that
    compile -> combinations of those

Native forms come first because they start in seconds and are the fastest where they exist; their order is that of the
bytes that they read, corrected by what was measured. Where the native runner by itself does not beat the baseline,
they queue with the others. What cannot win by `bounds` is not proposed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from paretune.tune.bounds import Bounds
from paretune.tune.estimate import Estimator
from paretune.tune.outcome import Outcome
from paretune.tune.space import CACHE, RUNNER, Candidate, Change

FIRST_WAVE = 4  # candidates: the first answer comes early
NATIVE_SHARE = 0.75  # of the roofline, before a native form was measured


class Proposer:
    """Chooses waves of candidates for one search."""

    def __init__(self, out: Outcome, estimator: Estimator) -> None:
        self.out, self.estimator = out, estimator

    def next_wave(self, budget_sec: float, size: int, sec_of: Mapping[str, float]) -> list[Candidate]:
        """The candidates to measure together next; none where nothing is left or fits.

        What cannot win is written into `out.excluded`, with the reason.

        Args:
            budget_sec: for starting and measuring them.
            size: at most so many.
            sec_of: seconds of each runner's start and of one candidate's blocks (`"blocks"`).
        """
        out = self.out
        bounds = Bounds(out, self.estimator)
        out.excluded = {}
        left: list[Candidate] = []
        for candidate in out.space.legal:
            if candidate.id in out.race.trials:
                continue
            if reason := bounds.reason(candidate):
                out.excluded[candidate.id] = reason
            else:
                left.append(candidate)
        rows = set(out.rows())
        native = self._native(left, rows) if self._native_pays(rows) else []
        if native:
            if not any(c.has_own_kernels and c.id in out.race.trials for c in out.space.legal):
                size = min(size, FIRST_WAVE)
            return _that_fit(native, budget_sec, size, sec_of)
        singles = self._singles(rows)
        return _next_plain(left, singles, budget_sec, size, sec_of)

    # -- native forms

    def _native_pays(self, rows: set[str]) -> bool:
        """Whether native forms come first: they do until the runner by itself is shown not to beat the baseline."""
        alone = next((c.id for c in self.out.space.legal if c.has_own_kernels and len(c.changes) == 1), None)
        return alone not in rows or self.out.goal.in_bytes or self.out.ratio(alone).value > 1

    def _native(self, left: Sequence[Candidate], rows: set[str]) -> list[Candidate]:
        """The native candidates in the order of their turn."""
        out = self.out
        kinds = {c.weights: c for c in out.space.legal if c.has_own_kernels and CACHE not in c.options}
        share = self._native_share(rows)

        def rank(c: Candidate) -> tuple[int, float]:
            first = kinds.get(c.weights)
            gain = self._native_gain(c, first, rows, share)
            if len(c.changes) == 1:
                return 0, -gain  # proven equal: the first answer that can be taken
            if first is None or c.id == first.id:
                return 1, -gain
            # What differs in the cache alone waits for its kind, and drops out with it.
            return (2 if first.id in out.race.trials else 3), -gain

        native = [c for c in left if c.has_own_kernels]
        ordered = sorted(native, key=rank)
        if any(rank(c)[0] < 3 for c in ordered):
            ordered = [c for c in ordered if rank(c)[0] < 3]
        return ordered

    def _native_share(self, rows: set[str]) -> float:
        """The share of the roofline that native forms reach here."""
        out, blocks = self.out, self.out.race.measured()
        shares = []
        for c in out.space.legal:
            if c.has_own_kernels and c.id in rows and (floor := self.estimator.floor_sec(c.recipe)):
                shares.append(floor / float(statistics.median(blocks.values(c.id))))
        return statistics.median(shares) if shares else NATIVE_SHARE

    def _native_gain(self, c: Candidate, first: Candidate | None, rows: set[str], share: float) -> float:
        """Log of how many times better than the baseline it should be: an order to try in, never a result."""
        out, estimator = self.out, self.estimator
        if out.goal.in_bytes:
            return -math.log(estimator.step_bytes(c.recipe))
        floor, runner = estimator.floor_sec(c.recipe), {RUNNER: c.runner.name}
        if first is not None and first.id in rows and c.id != first.id:
            gain = math.log(out.ratio(first.id).value)
            alone = out.space.find(runner)
            cached = out.space.find({**runner, CACHE: c.changes[CACHE]}) if CACHE in c.options else alone
            if cached and alone and cached.id in rows and alone.id in rows:
                return gain + math.log(out.ratio(cached.id).value / out.ratio(alone.id).value)
            before = estimator.floor_sec(first.recipe)
            return gain + (math.log(before / floor) if before and floor else 0.0)
        if floor is None:  # nothing is known of its products: smaller weights first
            return -math.log(estimator.weights_bytes(c.recipe))
        return -math.log(floor / share)

    # -- the rest

    def _singles(self, rows: set[str]) -> dict[Change, float]:
        """Measured log gain of each change alone."""
        failed = {i for i, s in self.out.race.trials.items() if s.failure}
        found: dict[Change, float] = {}
        for c in self.out.space.legal:
            if change := c.single:
                if c.id in rows:
                    gain = math.log(self.out.ratio(c.id).value)
                    # What runs natively alone is compared with the native runner by itself.
                    alone = gain if len(c.changes) == 1 else gain - found.get((RUNNER, c.runner.name), 0.0)
                    found[change] = max(alone, found.get(change, -math.inf))  # a mechanism is seen eager and native
                elif c.id in failed:
                    found.setdefault(change, -10.0)  # what fails alone is not tried in company first
        return found


def predicted_log_gain(candidate: Candidate, singles: Mapping[Change, float]) -> float:
    """Log gain if gains multiplied: an order to try in, never a result (they do not multiply).

    Args:
        singles: measured log gain of each change alone.
    """
    total = 0.0
    for change in candidate.changes.items():
        gain = singles.get(change, math.nan)  # NaN: not seen, or the deadline cut its first block
        if not math.isnan(gain):
            total += gain
        elif change == candidate.single:  # in company an unknown change is worth nothing yet: alone comes first
            total += candidate.options[change[0]].log_gain
    return total


def _next_plain(
    left: Sequence[Candidate],
    singles: Mapping[Change, float],
    budget_sec: float,
    size: int,
    sec_of: Mapping[str, float],
) -> list[Candidate]:
    """Changes alone that start quickly come first (they teach the most). Then the rest by predicted gain and start-up,
    and in each wave, after the two best of them, the next change alone: a runner that compiles for a minute has its
    turn before the budget ends, but not before what promises most."""

    def rank(c: Candidate) -> tuple[bool, float]:
        is_cheap_single = c.single is not None and (c.is_plain or c.has_own_kernels)
        return (not is_cheap_single, -predicted_log_gain(c, singles) / (1 + start_sec(c, sec_of) / 60))

    ordered = sorted(left, key=rank)
    alone = [c for c in ordered if c.single]
    if alone and ordered[0] is not alone[0]:
        ordered.remove(alone[0])
        ordered.insert(2, alone[0])
    promising = [c for c in ordered if c.single or predicted_log_gain(c, singles) > 0]
    # Nothing promising is left: the rest is measured too while there is time.
    return _that_fit(promising, budget_sec, size, sec_of) or _that_fit(ordered, budget_sec, size, sec_of)


def start_sec(candidate: Candidate, sec_of: Mapping[str, float]) -> float:
    """Seconds until its first step can be timed: as seen here, else as the runner declares."""
    return sec_of.get(candidate.runner.name, candidate.runner.start_sec)


def _that_fit(
    candidates: Sequence[Candidate], budget_sec: float, most: int, sec_of: Mapping[str, float]
) -> list[Candidate]:
    chosen: list[Candidate] = []
    spent = 0.0
    for candidate in candidates:
        cost = start_sec(candidate, sec_of) + sec_of.get("blocks", 0.0)
        if len(chosen) < most and spent + cost <= budget_sec:
            chosen.append(candidate)
            spent += cost
    return chosen
