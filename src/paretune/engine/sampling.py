"""From logits to the next token.

The order of the steps is the usual one: repetition penalty, temperature, top-k, top-p, min-p, draw. Greedy is
temperature 0. Exactly k tokens survive top-k, ties included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paretune.errors import ParetuneError, UsageError


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen.

    Args:
        temperature: 0 is greedy.
        top_k: keep the k most likely; 0 keeps all.
        top_p: keep the smallest set whose probability reaches p (Holtzman et al. 2019, arXiv:1904.09751).
        min_p: keep tokens at least this share as likely as the most likely (arXiv:2407.01082).
        repetition_penalty: divide positive, multiply negative logits of tokens seen (Keskar et al. 2019,
            arXiv:1909.05858); 1 is off.
        seed: of the random generator of each sequence; None draws one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = [
            (0 <= self.temperature < math.inf, "temperature", self.temperature, "0 (greedy) or more"),
            (self.top_k >= 0, "top-k", self.top_k, "0 (off) or more"),
            (0 < self.top_p <= 1, "top-p", self.top_p, "above 0, at most 1"),
            (0 <= self.min_p <= 1, "min-p", self.min_p, "from 0 to 1"),
            (self.repetition_penalty > 0, "repetition-penalty", self.repetition_penalty, "above 0"),
            (self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2^63 - 1"),
        ]
        for ok, name, value, allowed in checks:
            if not ok:
                raise UsageError(f"{name} is {value}", f"It has to be {allowed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Sampler:
    """Chooses tokens for one sequence; holds its generator and the tokens it has seen."""

    def __init__(self, options: SamplingOptions, prompt: Sequence[int]) -> None:
        self.options = options
        self.generator = torch.Generator()
        if options.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(options.seed)
        self._seen: Tensor | None = None
        if options.repetition_penalty != 1:
            self._seen = torch.tensor(sorted(set(prompt)), dtype=torch.int64)

    def choose(self, logits: Tensor) -> int:
        """The next token for `logits[V]`."""
        options = self.options
        if self._seen is not None:
            logits = penalize_repetition(logits, self._seen, options.repetition_penalty)
        if options.greedy:
            token = argmax(logits[None])[0]
        elif options.top_k:
            candidates, probabilities = survivors(logits, options)
            token = int(candidates[draw(probabilities, self.generator)])
        else:
            probabilities = torch.softmax(logits.float() / options.temperature, 0)
            token = draw_nucleus(probabilities, options.top_p, options.min_p, self.generator)
        if self._seen is not None and not bool((self._seen == token).any()):
            self._seen = torch.cat([self._seen, torch.tensor([token])])
        return token


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens that were seen less likely, `logits[V]`, `seen[n]` unique ids."""
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def survivors(logits: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities.

    Returns:
        ids `[n]`, most likely first, and probabilities `[n]` that sum to 1.
    """
    k = min(options.top_k or logits.numel(), logits.numel())
    values, ids = torch.topk(logits.float() / options.temperature, k)  # sorted; exactly k, ties or not
    probabilities = torch.softmax(values, 0)
    # The token that crosses p is kept, so one always is.
    keep = probabilities >= options.min_p * probabilities[0]
    if options.top_p < 1:  # at 1, rounded sums would cut the tail
        keep &= probabilities.cumsum(0) - probabilities < options.top_p
    probabilities = probabilities[keep]
    return ids[keep], probabilities / probabilities.sum()


def argmax(logits: Tensor) -> list[int]:
    """Greedy choice of each row, `[B, V]`. NumPy's argmax is vectorised where PyTorch's is not (50 against 8 us)."""
    if logits.device.type != "cpu":
        return logits.argmax(-1).tolist()
    return logits.float().numpy().argmax(-1).tolist()


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """An index by inverse transform: one uniform number, no vector of noise."""
    return _locate(probabilities.double().cumsum(0), generator)


def draw_nucleus(probabilities: Tensor, top_p: float, min_p: float, generator: torch.Generator) -> int:
    """Draws from the set that top-p and min-p leave, without sorting the vocabulary.

    Rejection: a token drawn from the whole distribution is kept if it belongs to the set, which needs only the mass of
    the tokens before it. The result has exactly the truncated distribution; 1 / (mass of the set) draws on average.
    Equal probabilities are ordered by index.
    """
    cumulative = probabilities.double().cumsum(0)
    floor = min_p * float(probabilities.max()) if min_p > 0 else 0.0
    while True:
        token = _locate(cumulative, generator)
        p = probabilities[token]
        if float(p) < floor:
            continue
        if top_p >= 1:
            return token
        before = probabilities[probabilities > p].sum(dtype=torch.float64)
        before = before + p * int((probabilities[:token] == p).sum())
        if float(before) < top_p:
            return token


def _locate(cumulative: Tensor, generator: torch.Generator) -> int:
    total = float(cumulative[-1]) if cumulative.numel() else math.nan
    if not math.isfinite(total):
        raise ParetuneError("the model gives NaN or infinity", "Use a wider dtype, or check the weights")
    u = torch.rand((), dtype=torch.float64, generator=generator) * total
    return min(int(torch.searchsorted(cumulative, u, right=True)), cumulative.numel() - 1)
