"""Speculation for a loaded model: what proposes, what steps cost here, and what was accepted so far. One object for all
of its requests, so that the next one begins with what was learned."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paretune import clock
from paretune.engine.cache import RING_STEP, KVCache
from paretune.engine.decode import costs
from paretune.engine.decode.control import StepCosts, Survival
from paretune.engine.decode.drafts.base import Draft, Source, Target
from paretune.engine.decode.plain import Plain
from paretune.engine.decode.speculative import MAX_DRAFT, Counts, Speculative
from paretune.engine.runners.base import Runner
from paretune.errors import UsageError
from paretune.recipe import Recipe
from paretune.recipe.speculate import AUTO, BEST_FREE, OFF, draft_of


class Speculator:
    """What proposes tokens for a runner.

    Args:
        text: as `--speculate` has it: `lookup`, `suffix`, `draft=MODEL`, ...
        folder: of the runner's checkpoint; drafts that load it again need it.
        key: what model and recipe are, under which the costs of steps are kept; "": they are measured each time.
        most: proposed tokens of a step.
        adapts: whether their number is chosen step by step; False: always as many as there are.
        given: costs of steps by rows, instead of measured ones.

    Raises:
        UsageError: there is no such draft, or it does not go with this model.
    """

    def __init__(
        self,
        text: str,
        runner: Runner,
        folder: Path | None = None,
        *,
        key: str = "",
        most: int = MAX_DRAFT,
        adapts: bool = True,
        given: StepCosts | None = None,
    ) -> None:
        kind, argument = draft_of(text)
        check_most(most, runner)
        self.text, self.runner, self.most, self.adapts = text, runner, most, adapts
        self._kind: type[Draft] = kind
        if reason := kind.fits(argument, runner.config):
            raise UsageError(f"{text} cannot propose for this model: {reason}", "Choose another --speculate")
        before = clock.now()
        self._shared = kind.prepare(argument, Target(runner, folder, _opener(runner)))
        self.setup_sec = clock.now() - before  # loading a draft, measuring steps
        self._key, self._given = key, given
        self._costs: dict[int, StepCosts] = {}
        self._draft_sec = 0.0
        self.survival = Survival()
        self.counts = Counts()
        self.off_reason: str | None = None
        self._last: Speculative | None = None

    def why_off(self, n_rows: int) -> str | None:
        """Why batches of this size are decoded plainly, or None."""
        if self.runner.fixed_batch and n_rows > 1:
            return (
                f"the {self.runner.name} runner takes all {n_rows} rows of a batch at one width, and rows accept "
                "differently"
            )
        if self.runner.config.longest < 3:
            return "the model's context has no room for a proposal"
        return None

    def ready(self, n_rows: int) -> None:
        """Measures what steps of so many rows cost, where that is not known: once, before anything is timed."""
        if n_rows in self._costs or self.why_off(n_rows):
            return
        if self._given is not None:
            self._costs[n_rows] = self._given
            return
        most = min(self.most + 1, costs.WIDTHS[-1])
        self._costs[n_rows], took_sec = costs.step_costs(self.runner, n_rows, self._key, most)
        self.setup_sec += took_sec
        if isinstance(self._shared, Runner) and not self._draft_sec:
            key = f"{self._key} {self.text}" if self._key else ""
            found, took_sec = costs.step_costs(self._shared, n_rows, key, 1)
            self._draft_sec = found.plain_sec()
            self.setup_sec += took_sec

    def decode(self, runner: Runner, cache: KVCache) -> Plain:
        """What takes the steps of a scheduler: plain decoding where `why_off` says so."""
        assert runner is self.runner, "this speculator belongs to another runner"
        n_rows = cache.batch_size
        self.off_reason = self.why_off(n_rows)
        if self.off_reason is not None:
            return Plain(runner, cache)
        self.ready(n_rows)
        self._last = Speculative(
            runner,
            cache,
            self._kind(self._shared, cache),
            self._costs[n_rows],
            self.survival,
            self.counts,
            most=self.most,
            adapts=self.adapts,
            draft_sec=self._draft_sec,
        )
        return self._last

    def report(self) -> dict[str, Any]:
        """What ran: acceptance by source, match and position, tokens a step, c(K) and the break-even."""
        counts, last = self.counts, self._last
        n_rows = max(self._costs, default=1)
        table = self._costs.get(n_rows)
        return {
            "draft": self.text,
            "ran": self._kind.describe(self._shared),
            "off": self.off_reason or (None if last is None else last.off_reason),
            "is_resting": last is not None and last.ledger.is_resting,
            "n_rests": 0 if last is None else last.ledger.n_rests,
            "max_draft": self.most,
            "adapts": self.adapts,
            **asdict(counts),
            "acceptance": counts.acceptance,
            "tokens_per_step": counts.tokens_per_step,  # the target's own token counts
            "n_rows": n_rows,
            "step_cost": {} if table is None else table.to_json(),
            "step_sec": None if table is None else table.plain_sec(),
            "draft_token_sec": self._draft_sec or None,
            "break_even": {} if table is None else break_even(table, self._draft_sec, self.most),
            "survival": self.survival.to_json(),
            "setup_sec": self.setup_sec,
        }

    def summary(self) -> str:
        """One line of `report`."""
        found = f" ({BEST_FREE})" if self.text == AUTO else ""
        counts, about = self.counts, f"speculation {self.text}{found}"
        reason = self.off_reason or (None if self._last is None else self._last.off_reason)
        if reason is not None:
            return f"{about}: off, {reason}"
        if not counts.n_row_steps:
            return f"{about}: no step was taken"
        if not counts.n_proposed:
            return f"{about}: nothing was worth a try, {counts.n_steps} plain steps"
        said = (
            f"{about}: {counts.tokens_per_step:.2f} tokens a step (its own token counted), {counts.n_accepted} of "
            f"{counts.n_proposed} proposed accepted ({100 * (counts.acceptance or 0):.0f} %), proposals in "
            f"{counts.n_verifying} of {counts.n_steps} steps"
        )
        table = self._costs.get(max(self._costs, default=1))
        if table is not None:
            widths = [w for w in (4, 8) if w <= self.most + 1]
            said += "; " + ", ".join(f"c({w}) = {table.ratio(w):.2f}" for w in widths)
        if self._last is not None and self._last.ledger.is_resting:
            said += "; it does not pay and has stopped proposing"
        return said


def for_recipe(
    recipe: Recipe, runner: Runner, folder: Path | None, text: str | None = None, most: int | None = None
) -> Speculator | None:
    """What a recipe, or a request that says otherwise, speculates with; None: plain decoding.

    Args:
        folder: of the runner's checkpoint.
        text: of the request, `off` among them; None: as the recipe has it.
        most: proposed tokens of a step; None: the default.

    Raises:
        UsageError: there is no such draft, or it does not go with this model.
    """
    text = recipe.engine.speculate if text is None else text
    if text is None or text == OFF:
        if most is not None:
            raise UsageError("--draft-tokens is for speculation, and there is none", "Add --speculate auto")
        return None
    key = "" if folder is None else f"{folder.resolve()} {recipe.with_speculation(None).hash}"
    room = min(MAX_DRAFT, runner.config.longest - 2, RING_STEP - 1)
    return Speculator(text, runner, folder, key=key, most=max(1, room) if most is None else most)


def break_even(table: StepCosts, draft_sec: float, most: int) -> dict[str, float]:
    """By number of proposed tokens, the chance of each (alike and independent) from which they pay; above 1: never."""
    draft_ratio = draft_sec / table.plain_sec() if draft_sec else 0.0
    return {str(k): _least_chance(table, draft_ratio, k) for k in (1, 2, 3, 5, 7, 11, 15) if k <= most}


def _least_chance(table: StepCosts, draft_ratio: float, k: int) -> float:
    cost = table.ratio(1 + k) + draft_ratio * k
    if cost >= 1 + k:
        return math.inf
    low, high = 0.0, 1.0
    for _ in range(30):
        p = (low + high) / 2
        tokens = sum(p**j for j in range(k + 1))
        low, high = (p, high) if tokens < cost else (low, p)
    return high


def check_most(most: int, runner: Runner) -> None:
    """Raises `UsageError` where so many tokens cannot be proposed to this runner."""
    if most < 1:
        raise UsageError(f"--draft-tokens is {most}", "It has to be 1 or more")
    room = min(runner.config.longest - 2, RING_STEP - 1)
    if most > room:
        raise UsageError(
            f"--draft-tokens is {most}, a step of this model has room for {room}", "Propose fewer tokens a step"
        )


def _opener(runner: Runner) -> Any:
    def open_source(name: str, config: str) -> Source:
        from paretune.engine import session  # which knows requests and schedulers

        opened = session.open(name, config, str(runner.device))
        opened.check()
        return Source(name, opened.model_config, opened.folder, lambda: opened.load().runner)

    return open_source
