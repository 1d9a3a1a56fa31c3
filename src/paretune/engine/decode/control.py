"""How many tokens are worth proposing, and whether any are: from what steps cost here and what was accepted so far.

A step that verifies k proposed tokens gives one token more than it accepts. With S_j, the probability that the j-th
proposal is reached and right, and c(n), the seconds of a step of n tokens,

    tokens per second = (1 + S_1 + ... + S_k) / (c(1 + k) + seconds of drafting)

and the best k is taken, 0 among them. S is learned online by how long the match is that a proposal rests on. What is
proposed and not tried is held against the text all the same, so that learning costs nothing where proposals do not.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

# Lower ends of the classes that a match length and a position in the proposal fall into.
MATCHES = (0, 1, 2, 3, 5, 9)
POSITIONS = (0, 1, 2, 3, 5, 8)
# Before anything was seen: how likely the next proposed token is right, by match. Texts differ widely, so it counts
# no more than a few observations.
PRIOR = (0.7, 0.25, 0.35, 0.5, 0.7, 0.85)
PRIOR_WEIGHT = 3.0
FORGET = 0.97  # what an observation leaves of those before it


class Survival:
    """How likely proposed tokens are right, each given that those before it were."""

    def __init__(self) -> None:
        self._right = [[PRIOR_WEIGHT * p] * len(POSITIONS) for p in PRIOR]
        self._seen = [[PRIOR_WEIGHT] * len(POSITIONS) for _ in PRIOR]
        self.n_tried = [[0] * len(POSITIONS) for _ in PRIOR]
        self.n_right = [[0] * len(POSITIONS) for _ in PRIOR]

    def chain(self, match: int, n: int) -> list[float]:
        """For each of n proposed tokens, the probability that it and all before it are right."""
        m, product, out = bisect_right(MATCHES, match) - 1, 1.0, []
        right, seen = self._right[m], self._seen[m]
        for j in range(n):
            at = bisect_right(POSITIONS, j) - 1
            product *= right[at] / seen[at]
            out.append(product)
        return out

    def observe(self, match: int, n_right: int, n_tried: int) -> None:
        """Of `n_tried` tokens the first `n_right` were right, and the next one, where there is one, was not."""
        m = bisect_right(MATCHES, match) - 1
        for j in range(min(n_right + 1, n_tried)):
            at, is_right = bisect_right(POSITIONS, j) - 1, j < n_right
            self._right[m][at] = FORGET * self._right[m][at] + is_right
            self._seen[m][at] = FORGET * self._seen[m][at] + 1
            self.n_tried[m][at] += 1
            self.n_right[m][at] += is_right

    def to_json(self) -> list[dict[str, float]]:
        """A row for each class that was seen: match and position (lower ends), tokens tried and right."""
        return [
            {"match": MATCHES[m], "position": POSITIONS[j], "n_tried": n, "n_right": self.n_right[m][j]}
            for m, row in enumerate(self.n_tried)
            for j, n in enumerate(row)
            if n
        ]


@dataclass
class StepCosts:
    """Seconds of a step by its tokens a row, for one number of rows.

    Args:
        seconds: measured, by width; 1 is among them.
    """

    seconds: Mapping[int, float]
    _widths: list[int] = field(init=False, repr=False)
    _drift: dict[int, float] = field(init=False, repr=False)  # log of what a width takes now to what was measured
    _common: float = field(init=False, default=0.0, repr=False)

    def __post_init__(self) -> None:
        assert 1 in self.seconds and all(s > 0 for s in self.seconds.values())
        self._widths = sorted(self.seconds)
        self._drift = dict.fromkeys(self._widths, 0.0)

    def ratio(self, width: int) -> float:
        """c(width) / c(1); between measured widths on a line, above them along the last one."""
        return self._at(width) / self._at(1)

    def plain_sec(self) -> float:
        """Of a step of one token a row, as things are now."""
        return self._at(1) * math.exp(self._common)

    def _at(self, width: int) -> float:
        widths = self._widths
        if len(widths) == 1:
            return self._of(widths[0]) * width / widths[0]
        i = min(max(bisect_right(widths, width), 1), len(widths) - 1)
        low, high = widths[i - 1], widths[i]
        a, b = self._of(low), self._of(high)
        return max(a + (b - a) * (width - low) / (high - low), min(a, b))

    def _of(self, width: int) -> float:
        return self.seconds[width] * math.exp(self._drift[width])

    def observe(self, width: int, sec: float) -> None:
        """A step as it was taken: all widths drift together, as contexts grow and machines slow down, and each a little
        by itself. One step counts little, however odd it was."""
        seen = math.log(sec / self._at(width)) - self._common
        seen = min(max(seen, -0.5), 0.5)
        self._common += 0.1 * seen
        nearest = min(self._widths, key=lambda w: abs(w - width))
        if nearest == width:
            self._drift[width] += 0.03 * seen

    def to_json(self) -> dict[str, float]:
        """c(K) / c(1) by K, as measured."""
        return {str(w): self.seconds[w] / self.seconds[1] for w in self._widths}


def best_length(
    chains: Sequence[Sequence[float]], n_rows: int, ratio: Callable[[int], float], draft_ratio: float = 0.0
) -> tuple[int, float]:
    """The number of proposed tokens with the most tokens per second.

    Args:
        chains: of the rows that have proposals, `Survival.chain`.
        n_rows: of the step.
        ratio: c(width) / c(1).
        draft_ratio: of drafting one token, in steps of one token; paid for each of a proposal.

    Returns:
        k, 0 where plain decoding is best, and its tokens per second over those of plain decoding.
    """
    best, gain, tokens = 0, 1.0, float(n_rows)
    for k in range(1, max(map(len, chains), default=0) + 1):
        tokens += sum(chain[k - 1] for chain in chains if len(chain) >= k)
        rate = tokens / n_rows / (ratio(1 + k) + draft_ratio * k)
        if rate > gain:
            best, gain = k, rate
    return best, gain


ALLOWANCE = 1.0  # plain steps that speculation may cost before it rests
RETURN = 2.0  # plain steps that it would have to have gained, resting, before it is tried again
FADE = 0.98  # of what would have been gained, a token


class Ledger:
    """What speculation has gained or lost, in plain steps. It rests where it has lost more than it may: predictions can
    be wrong. What free drafts would have gained meanwhile is counted, and brings it back."""

    def __init__(self) -> None:
        self.balance = 0.0
        self.is_resting = False
        self.n_rests = 0
        self._missed = 0.0

    def settle(self, n_tokens: float, cost: float) -> None:
        """A step that gave `n_tokens` a row at `cost` plain steps."""
        # Old gains are no licence to lose.
        self.balance = min(self.balance + n_tokens - cost, 4.0)
        if self.balance < -ALLOWANCE:
            self.is_resting, self._missed = True, 0.0
            self.n_rests += 1

    def miss(self, n_tokens: float, cost: float) -> None:
        """The same of a step that was not taken."""
        if not self.is_resting:
            return
        self._missed = max(FADE ** max(n_tokens, 1) * self._missed + n_tokens - cost, -RETURN)
        if self._missed > RETURN:
            self.is_resting, self.balance = False, 0.0
