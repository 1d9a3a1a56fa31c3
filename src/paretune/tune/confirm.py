"""The confirmation: the winner and the baseline in fresh processes, on fresh prompts and text that nobody has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from paretune import stats
from paretune.evaluate.fidelity import Scores, compare
from paretune.records.evaluation import Fidelity
from paretune.records.judge import TOO_NOISY, judge
from paretune.records.trial import TrialFacts
from paretune.records.tune import Confirmation, MedianTimes, Speedup
from paretune.tune.gate import Gate
from paretune.tune.outcome import Outcome
from paretune.tune.race import BASELINE

CONFIRM_ROUNDS, CONFIRM_BLOCKS = 2, 10
UNKNOWN_RESOLUTION = TOO_NOISY  # where too few blocks have shown what this machine resolves
PROFILE_SEC = 5.0  # a quick profile of a trial that is loaded and warm, roughly


class Confirmer:
    """Holds what won against fresh evidence, and takes the next one where it does not hold.

    Args:
        windows: int64 `[N, T]`, of text that the search did not see.
        text_name: of the protocol, without the split.
    """

    def __init__(
        self, out: Outcome, gate: Gate, windows: torch.Tensor, text_name: str, say: Callable[[str], None]
    ) -> None:
        self.out, self.gate, self.windows, self.text_name, self.say = out, gate, windows, text_name, say

    def _left(self, share: float) -> float:
        return share * self.out.goal.budget_sec - self.out.race.journal.elapsed_sec

    def confirm(self, winner: str | None, finalists: Sequence[str]) -> bool:
        """Measures the winner again; where it does not hold, the next one has its turn, at last one that was proven
        equal: what could have been taken before is never lost.

        Returns:
            whether one held (and reached what was asked for).
        """
        out = self.out
        if winner is None:  # the finals were cut, or decided nothing: the answer from before is asked to hold
            winner = self._answer()
        left = [f for f in finalists if f != winner]
        while winner is not None:
            if out.race.trials[winner].recipe.changes_numbers:  # now, while the process that scores is there
                self._reference()
            out.race.stop_all()
            confirmation, cause = self._confirmed(winner)
            name = out.race.trials[winner].recipe.name
            if confirmation is not None:
                wanted = out.goal.min_speedup or 0
                value = confirmation.speedup.value or 0.0
                if out.confirmation is None or value > (out.confirmation.speedup.value or 0.0):
                    out.winner, out.confirmation = winner, confirmation
                out.kind = "winner" if value >= wanted else "none"
                if out.kind == "winner":
                    return True
                out.notes.append(f"{name} reached {value:.2f}x in fresh processes, not the {wanted:g}x asked for.")
            else:
                out.refused[winner] = cause
                out.notes.append(f"{name} won the finals but did not hold in fresh processes ({cause}): not taken.")
            better = [f for f in left if out.verdict(f) == "faster" and not out.race.trials[f].failure]
            winner = max(better, key=lambda i: out.ratio(i).value) if better and self._left(0.9) > 0 else None
            left = [f for f in left if f != winner]
            if winner is None and out.confirmation is None:
                winner = self._answer()
        if BASELINE not in out.explanations:
            self._explain(BASELINE, BASELINE)
        if out.confirmation is None:
            wanted = (out.goal.min_speedup or 0) > 1 and not out.too_noisy
            out.kind = "none" if wanted else "baseline"
        return False

    def _answer(self) -> str | None:
        """The best of what is known to keep the quality, though it was no finalist: an answer that was there stays one.

        Where the budget has ended, only what needs no text to be scored is measured beyond it.
        """
        out = self.out
        known = [i for i in out.rows() if i not in out.refused and out.is_accepted(i) and out.verdict(i) == "faster"]
        if self._left(1.0) <= 0:
            known = [i for i in known if not out.race.trials[i].recipe.changes_numbers]
        return max(known, key=lambda i: out.ratio(i).value, default=None)

    def _confirmed(self, winner: str) -> tuple[Confirmation | None, str]:
        """The figures of the confirmation, or why it does not hold."""
        out = self.out
        race, goal = out.race, out.goal
        recipe = race.trials[winner].recipe
        pairs: list[tuple[Any, Any]] = []
        values: dict[str, list[float]] = {"ours": [], "base": []}
        quality: Fidelity | None = None
        for round in range(CONFIRM_ROUNDS):
            done = race.journal.find("stage", stage=f"confirm {winner} {round}")
            if round and not done and self._left(1.0) < self._round_sec(winner):
                out.notes.append("The budget allowed one confirmation round, not two.")
                break
            base, ours = f"confirm-{winner}-{round}-baseline", f"confirm-{winner}-{round}"
            self.say(f"confirming {recipe.name} in fresh processes ({round + 1} of {CONFIRM_ROUNDS})")
            race.add(base, race.trials[BASELINE].recipe, seed=goal.seed + 1000 + round)
            race.add(ours, recipe, seed=goal.seed + 1000 + round)
            race.blocks(f"confirm {winner} {round}", [base, ours], CONFIRM_BLOCKS, None)
            if failure := race.trials[ours].failure:
                return None, failure
            if failure := race.trials[base].failure:
                return None, f"the baseline beside it failed: {failure}"
            blocks = race.measured()
            pairs.append(blocks.paired(base, ours))
            values["base"] += blocks.values(base).tolist()
            values["ours"] += blocks.values(ours).tolist()
            if quality is None and recipe.changes_numbers:
                quality = self._quality(ours)
                if quality is None or not quality.within_bound:
                    return None, quality.reason if quality else "it could not be scored"
            if not round:
                self._explain(BASELINE, base)
                self._explain(winner, ours)
            sides = {i: race.trials[i].facts for i in (base, ours)}
            race.stop(base)
            race.stop(ours)
        a, b = (np.concatenate([p[k] for p in pairs]) for k in (0, 1))
        speed = stats.speed_ratio(a, b)
        resolution = out.resolution if np.isfinite(out.resolution) else UNKNOWN_RESOLUTION
        verdict = judge(speed, resolution)
        if not goal.in_bytes and verdict != "faster":
            return None, f"{speed.value:.2f} times as fast, {speed.low:.2f} to {speed.high:.2f}: {verdict}"
        facts, base_facts = sides[ours], sides[base]
        assert facts is not None and base_facts is not None
        median = {k: float(np.median(v)) for k, v in values.items()}

        def sec(side: str, of: TrialFacts, kind: str) -> float:
            return median[side] if goal.sample_kind == kind else of.side_sec.of(kind)

        confirmation = Confirmation(
            speedup=Speedup(speed.value, speed.low, speed.high, speed.n, verdict),
            quality=quality,
            n_processes=len(pairs),
            median_sec=MedianTimes(**median),
            note=f"{len(pairs)} fresh {'pair' if len(pairs) == 1 else 'pairs'} of processes, fresh prompts"
            + ("" if quality is None else ", text that the search did not see"),
            ttft_sec=sec("ours", facts, "ttft"),
            baseline_ttft_sec=sec("base", base_facts, "ttft"),
            tpot_sec=sec("ours", facts, "tpot"),
            baseline_tpot_sec=sec("base", base_facts, "tpot"),
        )
        return confirmation, ""

    def _round_sec(self, winner: str) -> float:
        """What one more round takes, from the samples of the first."""
        race = self.out.race
        taken = [e["elapsed_sec"] for e in race.journal.all("loaded") if e["trial"] == f"confirm-{winner}-0"]
        return 2 * race.trials[winner].start_sec if not taken else race.journal.elapsed_sec - taken[-1]

    def _quality(self, ours: str) -> Fidelity | None:
        n = self.windows.size(0)
        scores = self.out.race.score(ours, "confirm", self.windows, f"{self.text_name}/confirm", 0, n)
        return None if scores is None else compare(self._reference(), scores, self.out.goal.max_ppl_increase)

    def _reference(self) -> Scores:
        """The baseline's scores on the text of the confirmation."""
        return self.gate.reference("confirm", self.windows, 0, self.windows.size(0))

    def _explain(self, id: str, process: str) -> None:
        """Why a trial is as fast as it is, from a profile in the process of its twin `process`, if time is left."""
        out = self.out
        assert out.ceilings is not None
        if self._left(1.0) < PROFILE_SEC and not out.race.journal.find("why", trial=process):
            return
        found = out.race.why(process, out.ceilings)
        if found is not None:
            out.explanations[id] = found
