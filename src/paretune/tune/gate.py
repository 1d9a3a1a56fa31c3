"""The quality gate: a candidate's text is scored in parts, and one far over the bound is turned away early.

    3 windows -> 8 -> 20 -> all of them (40 or more)

At each look before the last a candidate may only be rejected: the lower end of a one-sided interval of its loss lies
over the limit, or from what was seen the upper end has no chance to come out within it when all windows are scored
(conditional power; Lachin 2005, "A review of methods for futility stopping based on conditional power"). It may only be
accepted at the last, where the upper end has to lie within. Accepting has one look, so its bound of 95 % needs no
correction for looks; rejecting too early can cost a good candidate now and then, never a wrong acceptance. The winner
is judged again on text that the search did not see.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from paretune.errors import ParetuneError
from paretune.evaluate.fidelity import Fidelity, Scores, compare, joined, ppl_increase_lower
from paretune.tune.outcome import Outcome
from paretune.tune.race import BASELINE

LOOKS = (3, 8, 20)  # windows after which a candidate may be rejected
REJECT_LEVEL = 0.98
NO_CHANCE = 0.05  # of being accepted: less ends it
Z_95 = 1.645  # of a one-sided interval of 95 %
FIRST_CHANCE = 8  # windows; fewer say too little of the spread


class Gate:
    """Judges candidates on the search text, each once.

    Args:
        windows: int64 `[N, T]`.
        text_name: of the protocol, without the split.
        say: progress, a line at a time.
        any_scorer: whether a lossless candidate may score the baseline's text; else the baseline does it itself, and
            no third process is needed.
    """

    def __init__(
        self,
        out: Outcome,
        windows: torch.Tensor,
        text_name: str,
        say: Callable[[str], None],
        *,
        any_scorer: bool = True,
    ) -> None:
        self.out, self.windows, self.text_name, self.say = out, windows, text_name, say
        self.any_scorer = any_scorer

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(first window, the one after the last) of each part, ending at the looks."""
        n = self.windows.size(0)
        ends = [look for look in LOOKS if look < n] + [n]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def judge(self, id: str, has_time: Callable[[], bool] = lambda: True) -> bool | None:
        """True: it keeps the quality. False: it does not, or could not be scored. None: the time ran out first."""
        out = self.out
        if not out.race.trials[id].recipe.changes_numbers:
            return True  # held to the reference's own tokens before it was timed
        if id in out.rejected:
            return False
        if id in out.qualities:
            return out.qualities[id].within_bound
        base: list[Scores] = []
        ours: list[Scores] = []
        for start, stop in self.parts:
            if not has_time():
                return None
            theirs = self.reference("search", self.windows, start, stop)
            mine = out.race.score(id, "search", self.windows, f"{self.text_name}/search", start, stop)
            if mine is None:
                return False
            base.append(theirs)
            ours.append(mine)
            if stop < self.windows.size(0) and (
                figures := self._far_over(joined(base), joined(ours), stop)
                or self._without_chance(joined(base), joined(ours), stop)
            ):
                self._reject(id, joined(base), joined(ours), figures)
                return False
        quality = compare(joined(base), joined(ours), out.goal.max_ppl_increase)
        if not quality.within_bound:
            self._reject(id, joined(base), joined(ours), quality.reason)
            return False
        out.qualities[id] = quality
        return True

    def reference(self, split: str, windows: torch.Tensor, start: int, stop: int) -> Scores:
        """The baseline's scores, through the fastest trial that was proven to give the baseline's own tokens.

        Raises:
            ParetuneError: the baseline cannot be scored.
        """
        out, race = self.out, self.out.race
        name = f"{self.text_name}/{split}"
        for id in dict.fromkeys((self._scorer(), BASELINE)):
            scores = race.score(id, split, windows, name, start, stop)
            if scores is not None:
                out.scorer = id
                return scores
        raise ParetuneError(
            f"the baseline cannot be scored: {race.trials[BASELINE].failure}", "Try another text or --device"
        )

    def _scorer(self) -> str:
        """Chosen once, for parts of a text have to come from one trial."""
        race = self.out.race
        known = race.journal.find("scorer")
        if known and known["trial"] in race.trials and not race.trials[known["trial"]].failure:
            return known["trial"]
        blocks = race.measured()
        speeds = {i: blocks.ratio(BASELINE, i).value for i in self.out.rows()}
        equal = [i for i, gain in speeds.items() if gain > 1 and not race.trials[i].recipe.changes_numbers]
        fastest = max(equal, key=lambda i: speeds[i], default=BASELINE) if self.any_scorer else BASELINE
        race.journal.record("scorer", trial=fastest)
        return fastest

    def _far_over(self, base: Scores, ours: Scores, n_windows: int) -> str | None:
        limit = self.out.goal.max_ppl_increase
        lower = ppl_increase_lower(base, ours, REJECT_LEVEL)
        if not lower > limit:
            return None
        return f"perplexity rises by at least {lower:+.1%} after {n_windows} windows; the limit is {limit:+.2%}"

    def _without_chance(self, base: Scores, ours: Scores, n_windows: int) -> str | None:
        """Why it cannot be expected to be accepted when all windows are scored, or None."""
        limit, n_all = self.out.goal.max_ppl_increase, self.windows.size(0)
        found = compare(base, ours, limit)
        margin = found.ppl_increase_upper - found.ppl_increase
        if n_windows < FIRST_CHANCE or not math.isfinite(margin) or margin <= 0:
            return None
        # The margin shrinks with the root of the text; what is still to come moves the mean by the rest of the spread.
        at_the_end = margin * math.sqrt(n_windows / n_all)
        spread = margin / Z_95 * math.sqrt(1 - n_windows / n_all)
        chance = statistics.NormalDist(found.ppl_increase, spread).cdf(limit - at_the_end)
        if chance >= NO_CHANCE:
            return None
        return (
            f"perplexity {found.ppl_increase:+.2%} after {n_windows} windows: {n_all} would hardly show it within "
            f"{limit:+.2%} (chance below {NO_CHANCE:.0%})"
        )

    def _reject(self, id: str, base: Scores, ours: Scores, figures: str) -> None:
        quality: Fidelity = compare(base, ours, self.out.goal.max_ppl_increase)
        self.out.qualities[id] = replace(quality, within_bound=False, too_little_text=False, reason=figures)
        self.out.rejected[id] = figures
        self.say(f"{self.out.race.trials[id].recipe.name}: {figures}")
