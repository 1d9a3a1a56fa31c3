"""From logits to the next token.

The order of the steps is the usual one: repetition penalty, temperature, top-k, top-p, min-p, draw. Greedy is
temperature 0. Exactly k tokens survive top-k, ties included.

Random numbers are counted, not kept: those of a token are a function of the request's seed, the sample within the
request and the token's position. So a text depends neither on the batch nor on the order in which its tokens are
found, and speculation that draws each token at its own position gives the very text of plain decoding.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
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
        seed: of the request's random numbers; None draws one.
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


# Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the generator of NumPy's `Philox`).
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_WORD = (1 << 64) - 1


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Four random words of 64 bits, a function of the words of `key` and `counter` alone."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & _WORD, (a >> 64) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


class Uniforms:
    """The random numbers of one token, in [0, 1): calling it gives the next.

    Args:
        seed: of the request.
        sample: which of the request's samples, from 0.
        position: of the token in its sequence, prompt included.
    """

    def __init__(self, seed: int, sample: int, position: int) -> None:
        self._key, self._at = (seed, 0), (position, sample, 0)
        self._n = 0
        self._words: tuple[int, ...] = ()

    def __call__(self) -> float:
        n, self._n = self._n, self._n + 1
        if n % 4 == 0:
            self._words = philox(self._key, (n // 4, *self._at))
        return (self._words[n % 4] >> 11) * 2.0**-53


Random = Callable[[], float]  # gives the next number in [0, 1)


class Sampler:
    """Chooses tokens for one sequence; holds its seed and the tokens it has seen.

    Args:
        sample: which of the request's samples this is: others of the same prompt and seed draw other numbers.
    """

    def __init__(self, options: SamplingOptions, prompt: Sequence[int], sample: int = 0) -> None:
        self.options, self.sample = options, sample
        self.seed = secrets.randbelow(2**63) if options.seed is None else options.seed
        self._seen: Tensor | None = None
        if options.repetition_penalty != 1:
            self._seen = torch.tensor(sorted(set(prompt)), dtype=torch.int64)

    def choose(self, logits: Tensor, position: int) -> int:
        """The token at `position` for `logits[V]`; it counts as seen from then on."""
        options = self.options
        if self._seen is not None:
            logits = penalize_repetition(logits, self._seen, options.repetition_penalty)
        if options.greedy:
            token = argmax(logits[None])[0]
        else:
            random = Uniforms(self.seed, self.sample, position)
            if options.top_k:
                candidates, probabilities = survivors(logits, options)
                token = int(candidates[draw(probabilities, random)])
            else:
                probabilities = torch.softmax(logits.float() / options.temperature, 0)
                token = draw_nucleus(probabilities, options.top_p, options.min_p, random)
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


def draw(probabilities: Tensor, random: Random) -> int:
    """An index by inverse transform: one uniform number, no vector of noise."""
    return _locate(probabilities.double().cumsum(0), random)


def draw_nucleus(probabilities: Tensor, top_p: float, min_p: float, random: Random) -> int:
    """Draws from the set that top-p and min-p leave, without sorting the vocabulary.

    Rejection: a token drawn from the whole distribution is kept if it belongs to the set, which needs only the mass of
    the tokens before it. The result has exactly the truncated distribution; 1 / (mass of the set) draws on average.
    Equal probabilities are ordered by index.
    """
    cumulative = probabilities.double().cumsum(0)
    floor = min_p * float(probabilities.max()) if min_p > 0 else 0.0
    while True:
        token = _locate(cumulative, random)
        p = probabilities[token]
        if float(p) < floor:
            continue
        if top_p >= 1:
            return token
        before = probabilities[probabilities > p].sum(dtype=torch.float64)
        before = before + p * int((probabilities[:token] == p).sum())
        if float(before) < top_p:
            return token


def _locate(cumulative: Tensor, random: Random) -> int:
    total = float(cumulative[-1]) if cumulative.numel() else math.nan
    if not math.isfinite(total):
        raise ParetuneError("the model gives NaN or infinity", "Use a wider dtype, or check the weights")
    u = torch.tensor(random() * total, dtype=torch.float64)
    return min(int(torch.searchsorted(cumulative, u, right=True)), cumulative.numel() - 1)
