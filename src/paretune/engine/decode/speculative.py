"""Speculative decoding: tokens are proposed, one step of the model verifies them, and the text is the plain one.

At each position the target's own token is chosen as plain decoding chooses it, the likeliest or the one that the
request's random numbers of that position draw, and proposals count as long as they are equal to it. Whatever proposes,
the text does not change; only the number of steps does. What the target did not say is rolled back from its cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from paretune import clock
from paretune.engine.cache import KVCache
from paretune.engine.decode.control import Ledger, StepCosts, Survival, best_length
from paretune.engine.decode.drafts.base import Draft, Proposal
from paretune.engine.decode.plain import Plain, Rows
from paretune.engine.request import Request
from paretune.engine.runners.base import Runner
from paretune.engine.sampling import argmax

MAX_DRAFT = 15  # proposed tokens of a step: 16 with the one before them


@dataclass
class Counts:
    """What speculation did, over all rows. Tokens of a step count the one that the target adds to what it accepts."""

    n_steps: int = 0  # of the target, plain ones among them
    n_verifying: int = 0  # steps that had proposals
    n_row_steps: int = 0  # rows in steps
    n_tokens: int = 0  # given to requests
    n_proposed: int = 0
    n_accepted: int = 0
    draft_sec: float = 0.0

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens a row and step of the target, its own token counted; None before the first."""
        return self.n_tokens / self.n_row_steps if self.n_row_steps else None

    @property
    def acceptance(self) -> float | None:
        return self.n_accepted / self.n_proposed if self.n_proposed else None


@dataclass
class _Untried:
    """A proposal that was not verified, as far as the text has gone along with it."""

    proposal: Proposal
    k: int  # tokens of it that would have been verified
    ratio: float  # c(1 + k) / c(1)
    at: int  # new tokens of the request when it was made


class Speculative(Plain):
    """Steps of a batch on a cache, with proposals.

    Args:
        draft: proposes.
        costs: of this runner's steps of as many rows.
        survival: learned so far; it goes on learning here.
        counts: of what is done here, added to.
        most: proposed tokens of a step.
        adapts: whether the number of tokens is chosen step by step; False: always as many as there are.
        draft_sec: of one proposed token, as far as it is known before.

    Attributes:
        off_reason: why nothing is proposed any more, or None.
        ledger: gain and loss so far; None where nothing is chosen.
    """

    def __init__(
        self,
        runner: Runner,
        cache: KVCache,
        draft: Draft,
        costs: StepCosts,
        survival: Survival,
        counts: Counts,
        *,
        most: int = MAX_DRAFT,
        adapts: bool = True,
        draft_sec: float = 0.0,
    ) -> None:
        super().__init__(runner, cache)
        self.draft, self.costs, self.survival, self.counts = draft, costs, survival, counts
        self.most, self.adapts = most, adapts
        self.off_reason: str | None = None
        self.ledger = Ledger()
        self._draft_sec = draft_sec  # of one proposed token, a moving mean
        self._held: dict[int, Request] = {}  # requests that the draft knows, by row
        self._untried: dict[int, _Untried] = {}

    # -- rows come and go

    def evict(self, row: int, request: Request) -> None:
        super().evict(row, request)
        self._forget(row)

    def rewind(self, row: int, request: Request) -> None:
        super().rewind(row, request)
        self._forget(row)  # what it has read would give away what comes

    def _forget(self, row: int) -> None:
        self._untried.pop(row, None)
        if (held := self._held.pop(row, None)) is not None and self.off_reason is None:
            try:
                self.draft.leave(row, held)
            except Exception as error:  # another package's code may raise anything
                self._give_up(error)

    # -- a step

    def advance(self, rows: Rows, running: Sequence[tuple[int, Request]], n_new: Sequence[int] | None) -> None:
        before = [len(request.tokens) for _, request in running]
        k, proposals = self._proposals(rows, running)
        in_model = self.model_sec
        if k == 0:
            super().advance(rows, running, n_new)
            width = 1
        else:
            width = 1 + k
            self._verify(rows, running, {row: p.tokens[:k] for row, p in proposals.items()})
        counts = self.counts
        n_given = sum(len(request.tokens) for _, request in running) - sum(before)
        counts.n_steps += 1
        counts.n_verifying += k > 0
        counts.n_row_steps += len(running)
        counts.n_tokens += n_given
        if self.off_reason is None:
            drafted = self._learn(running, proposals, k, before)
            if self.adapts:
                cost = self.costs.ratio(width) + drafted * self._draft_ratio()
                if k > 0:
                    self.ledger.settle(n_given / len(running), cost)
                self.costs.observe(width, max(self.model_sec - in_model, 1e-9))
            self._settle()

    def _proposals(self, rows: Rows, running: Sequence[tuple[int, Request]]) -> tuple[int, dict[int, Proposal]]:
        """Proposals by row, and how many tokens of them are worth a step, 0 for none."""
        if self.off_reason is not None:
            return 0, {}
        held = self.cache.host_lengths
        longest = max(held if self.cache.static else (held[row] for row, r in enumerate(rows) if r is not None))
        room = min(self.most, self.cache.max_step - 1, self.cache.capacity - longest - 1)
        wanted = {
            row: n
            for row, request in running
            # The target adds a token of its own to what it accepts.
            if (n := min(room, request.max_new_tokens - len(request.tokens) - 1)) >= 1
        }
        n_rows = sum(r is not None for r in rows)
        if self.adapts and not self.draft.is_free:
            wanted = self._worth(wanted, n_rows)
        if not wanted:
            return 0, {}
        before, n_held = clock.now(), len(self._held)
        try:
            for row, request in running:
                if row in wanted and row not in self._held:
                    self.draft.enter(row, request)
                    self._held[row] = request
            proposals = {row: p for row, p in self.draft.propose(wanted).items() if p.tokens}
        except Exception as error:  # a draft that fails costs the text nothing
            self._give_up(error)
            return 0, {}
        drafting = clock.now() - before
        self.counts.draft_sec += drafting
        if not proposals:
            return 0, {}
        most = max(len(p.tokens) for p in proposals.values())
        if len(self._held) == n_held:  # else whole prompts were read in
            each = drafting / most
            self._draft_sec = each if self._draft_sec == 0 else 0.9 * self._draft_sec + 0.1 * each
        if not self.adapts or not self.draft.is_free:
            return most, proposals
        chains = [self.survival.chain(p.match, len(p.tokens)) for p in proposals.values()]
        k, _ = best_length(chains, n_rows, self.costs.ratio)
        return 0 if self.ledger.is_resting else k, proposals

    def _worth(self, wanted: Mapping[int, int], n_rows: int) -> dict[int, int]:
        """As many tokens as are worth proposing where proposing costs something; none where it does not pay."""
        if self.ledger.is_resting:
            return {}
        chains = [self.survival.chain(0, n) for n in wanted.values()]
        k, _ = best_length(chains, n_rows, self.costs.ratio, self._draft_ratio())
        return {row: min(n, k) for row, n in wanted.items()} if k else {}

    def _draft_ratio(self) -> float:
        """Of drafting a token, in plain steps."""
        return self._draft_sec / self.costs.plain_sec()

    def _verify(self, rows: Rows, running: Sequence[tuple[int, Request]], parts: Mapping[int, Sequence[int]]) -> None:
        """One step over each row's last token and its proposals; requests get what the target says."""
        cache, n_rows = self.cache, len(rows)
        n_new = [0 if r is None else 1 + len(parts.get(row, ())) for row, r in enumerate(rows)]
        width = max(n_new)
        tokens = torch.zeros(n_rows, width, dtype=torch.int64)
        for row, n in enumerate(n_new):
            if n:
                tokens[row, :n] = torch.tensor([self.last[row], *parts.get(row, ())])
        if min(n_new) < width:
            cache.stage_(n_new)
        held = cache.host_lengths
        before = clock.now()
        logits = self.runner.forward(tokens.to(self._device), cache, "all")  # (B, width, V)
        clock.synchronize(self._device.type)
        self.model_sec += clock.now() - before
        best = argmax(logits.flatten(0, 1)) if any(r.is_greedy for _, r in running) else []
        sampled = None if all(r.is_greedy for _, r in running) else logits.cpu()
        lengths = [n + (r is not None) for n, r in zip(held, rows, strict=True)]
        for row, request in running:
            part = parts.get(row, ())
            for i in range(1 + len(part)):
                if request.is_greedy:
                    token = best[row * width + i]
                else:
                    assert sampled is not None
                    token = request.choose(sampled[row, i])
                self.give(row, request, token)
                if request.is_done or i == len(part) or token != part[i]:
                    break
            lengths[row] = len(request.prompt) + len(request.tokens) - 1
        if tuple(lengths) != cache.host_lengths:
            cache.truncate_(lengths)

    # -- what was right

    def _learn(
        self,
        running: Sequence[tuple[int, Request]],
        proposals: Mapping[int, Proposal],
        k: int,
        before: Sequence[int],
    ) -> int:
        """Holds proposals against the text; gives the number of tokens that were drafted for a row."""
        for (row, request), n_before in zip(running, before, strict=True):
            proposal = proposals.get(row)
            if k > 0 and proposal is not None:
                self._untried.pop(row, None)
                tried = proposal.tokens[:k]
                n_right = n_equal(tried, request.tokens[n_before:])
                self.counts.n_proposed += len(tried)
                self.counts.n_accepted += n_right
                # What would have come after the last token of a request is not known.
                is_known = n_right < len(request.tokens) - n_before
                self.survival.observe(proposal.match, n_right, len(tried) if is_known else n_right)
                continue
            untried = self._untried.get(row)
            if untried is not None and self._judge(untried, request):
                del self._untried[row]
            if k == 0 and proposal is not None and row not in self._untried and self.adapts:
                chain = self.survival.chain(proposal.match, len(proposal.tokens))
                would, _ = best_length([chain], 1, self.costs.ratio)
                untried = _Untried(proposal, would, self.costs.ratio(1 + would), n_before)
                if not self._judge(untried, request):
                    self._untried[row] = untried
        return max((len(p.tokens) for p in proposals.values()), default=0) if not self.draft.is_free else 0

    def _judge(self, untried: _Untried, request: Request) -> bool:
        """Whether enough is known of a proposal that was not tried; then it has been learned from."""
        came = request.tokens[untried.at :]
        tokens = untried.proposal.tokens
        n_right = n_equal(tokens, came)
        if n_right == len(came) < len(tokens) and not request.is_done:
            return False
        self.survival.observe(untried.proposal.match, n_right, min(len(tokens), len(came)))
        self.ledger.miss(1 + min(n_right, untried.k), untried.ratio)
        return True

    def _settle(self) -> None:
        try:
            self.draft.settle()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        lines = str(error).strip().splitlines() or [""]
        self.off_reason = f"the draft failed ({type(error).__name__}: {lines[0]})"
        self._untried.clear()


def n_equal(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with together."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
