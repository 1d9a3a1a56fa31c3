"""Plain decoding: one step of the model gives one token of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from paretune import clock
from paretune.engine.cache import KVCache
from paretune.engine.request import Request
from paretune.engine.runners.base import Runner
from paretune.engine.sampling import argmax

Rows = Sequence[Request | None]  # by row of the cache; None has no part in the step
Choose = Callable[[Tensor], Sequence[int]]  # from logits [B, V] to a token of each row


class Plain:
    """Steps of a batch on a cache.

    Args:
        choose: the next tokens; None: each request chooses its own.

    Attributes:
        model_sec: spent in the runner.
    """

    def __init__(self, runner: Runner, cache: KVCache, choose: Choose | None = None) -> None:
        self.runner, self.cache = runner, cache
        self.model_sec = 0.0
        self._device = runner.device.type
        self._choose = choose

    def step(self, tokens: Tensor, rows: Rows) -> Sequence[int]:
        """Feeds `tokens[B, K]` (staged, where they are padded) and gives the token after them of each row; of a row
        that has no part in the step, anything."""
        plain = self._choose is None and all(request is None or request.is_greedy for request in rows)
        before = clock.now()
        if plain and self.runner.chooses:
            chosen = self.runner.greedy(tokens, self.cache)
            self.model_sec += clock.now() - before
            return chosen
        logits = self.runner.forward(tokens, self.cache, "last")[:, 0]  # (B, V)
        clock.synchronize(self._device)
        self.model_sec += clock.now() - before
        if self._choose is not None:
            return self._choose(logits)
        return argmax(logits) if plain else choose_each(logits, rows)


def choose_each(logits: Tensor, rows: Rows) -> list[int]:
    """Each request's choice from its row of `[B, V]`; 0 where there is none to make."""
    logits = logits.cpu()
    return [
        0 if request is None or request.is_done else request.choose(logits[row]) for row, request in enumerate(rows)
    ]
