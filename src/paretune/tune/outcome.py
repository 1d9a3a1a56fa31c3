"""What a search has found so far, and the one judgement of each candidate that every word and picture is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from paretune import hardware, stats
from paretune.model.config import ModelConfig
from paretune.recipe import Recipe
from paretune.records.evaluation import Fidelity
from paretune.records.explanation import Explanation
from paretune.records.judge import judge, judge_bytes
from paretune.records.peers import Comparison
from paretune.records.regimes import Regimes
from paretune.records.tune import Confirmation, OutcomeKind, Standing, Word
from paretune.tune import space as spaces
from paretune.tune.goal import Goal
from paretune.tune.race import BASELINE, TWIN, Race, TrialState

WORDS = get_args(Word)


@dataclass
class Outcome:
    """What the search found, before it is told to anybody."""

    goal: Goal
    model_name: str
    model_folder: Path
    config: ModelConfig
    space: spaces.Space
    race: Race
    ceilings: hardware.Ceilings | None = None
    kind: OutcomeKind = "baseline"
    winner: str | None = None
    qualities: dict[str, Fidelity] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)  # over the quality limit, with the figures
    excluded: dict[str, str] = field(default_factory=dict)  # cannot win, with the figures
    confirmation: Confirmation | None = None
    notes: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # won the finals and did not hold, with the cause
    too_noisy: bool = False
    peers: Comparison | None = None  # of `peers.compare`
    explanations: dict[str, list[Explanation]] = field(default_factory=dict)  # of the winner and the baseline
    quality_len: int = 0  # tokens of a window that quality was measured on
    scorer: str = BASELINE  # the trial that the baseline's text was scored with
    regimes: Regimes | None = None  # of `regimes.explore`

    @property
    def resolution(self) -> float:
        """A/A half width over all blocks so far; infinite while there are too few."""
        return self.race.measured().aa_resolution(BASELINE, TWIN)

    def rows(self) -> list[str]:
        """Candidates that have been measured beside the baseline."""
        race, blocks = self.race, self.race.measured()
        return [
            i
            for i, s in race.trials.items()
            if i not in (BASELINE, TWIN)
            and not i.startswith("confirm")
            and not s.failure
            and i in blocks.subjects
            # The deadline may have cut a first block before the baseline's turn: that compares with nothing.
            and len(blocks.paired(BASELINE, i)[0])
        ]

    def ratio(self, id: str, level: float = stats.LEVEL) -> stats.Interval:
        """How many times better than the baseline: speed, or bytes where the objective is in bytes."""
        if self.goal.in_bytes:
            value = objective_bytes(self.goal, self.race.trials[BASELINE]) / objective_bytes(
                self.goal, self.race.trials[id]
            )
            return stats.Interval(value, value, value, 1)
        return self.race.measured().ratio(BASELINE, id, level)

    def verdict(self, id: str, level: float = stats.LEVEL) -> stats.Verdict:
        if self.goal.in_bytes:
            return judge_bytes(self.ratio(id).value)
        return judge(self.ratio(id, level), self.resolution)

    def is_accepted(self, id: str) -> bool:
        """Whether a measured candidate keeps the quality: proven equal, or surely within the bound."""
        if not self.race.trials[id].recipe.changes_numbers:
            return True
        quality = self.qualities.get(id)
        return quality is not None and quality.within_bound

    def leader(self) -> str | None:
        """The best candidate so far that surely beats the baseline, keeps the quality and was not refused."""
        sure = [i for i in self.rows() if i not in self.refused and self.is_accepted(i) and self.verdict(i) == "faster"]
        return max(sure, key=lambda i: self.ratio(i).value) if sure else None

    def standing(self, id: str) -> Standing:
        """The one judgement that headline, table and picture share."""
        state = self.race.trials.get(id)
        if id == BASELINE:
            return Standing("baseline")
        if state is not None and state.failure and id not in self.refused:
            return Standing(state.failure_kind, state.failure)
        if id == self.winner:
            return Standing("chosen" if self.kind == "winner" else "best so far")
        if id in self.refused:
            return Standing("did not hold", self.refused[id])
        if state is None or state.facts is None or id not in self.rows():
            if id in self.excluded:
                return Standing("excluded", self.excluded[id])
            if id in self.rejected:
                return Standing("over the quality limit", self.rejected[id])
            return Standing("not reached", "the budget was used up before it was its turn")
        if id in self.rejected:
            return Standing("over the quality limit", self.rejected[id])
        verdict = self.verdict(id)
        if verdict == "slower":
            return Standing("slower")
        if verdict != "faster":
            return Standing("no clear difference", "" if verdict == "indistinguishable" else "not decided")
        if self.is_accepted(id):
            return Standing("faster, within the limit", self._beaten_by(id))
        return Standing("faster, quality not judged", self._beaten_by(id) or "the budget ended before its quality")

    def _beaten_by(self, id: str) -> str:
        if self.winner is None or self.winner not in self.race.trials or self.winner == id:
            return ""
        ours, theirs = self.ratio(id), self.ratio(self.winner)
        if ours.value <= theirs.value:
            return "not as fast as the one chosen"
        return "" if ours.low > theirs.high else "not surely faster than the one chosen"


def baseline_recipe(out: Outcome) -> Recipe:
    return out.race.trials[BASELINE].recipe if BASELINE in out.race.trials else spaces.baseline()


def objective_bytes(goal: Goal, state: TrialState) -> float:
    """Stored weights ("size"), or weights, cache and activations ("memory")."""
    assert state.facts is not None
    return goal.bytes_of(state.facts.memory)
