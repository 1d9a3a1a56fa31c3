"""Plain decoding: one step of the model gives one token of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
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
        last: the token that each row goes on with, which is not in the cache yet.
    """

    def __init__(self, runner: Runner, cache: KVCache, choose: Choose | None = None) -> None:
        self.runner, self.cache = runner, cache
        self.model_sec = 0.0
        self.last = [0] * cache.batch_size
        self._device = runner.device
        self._choose = choose

    def advance(self, rows: Rows, running: Sequence[tuple[int, Request]], n_new: Sequence[int] | None) -> None:
        """A step of one token for each of `rows`; those of `running` get theirs and may be done with it.

        Args:
            n_new: 1 for each row of the step, 0 for the others; None where all take part.
        """
        if n_new is not None:
            self.cache.stage_(n_new)
        chosen = self.step(torch.tensor(self.last, device=self._device)[:, None], rows)
        for row, request in running:
            self.give(row, request, chosen[row])

    def give(self, row: int, request: Request, token: int) -> None:
        """The request in a row gets its next token."""
        self.last[row] = token
        request.accept(token)
        if request.is_done:
            request.finish()

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
        clock.synchronize(self._device.type)
        self.model_sec += clock.now() - before
        if self._choose is not None:
            return self._choose(logits)
        return argmax(logits) if plain else choose_each(logits, rows)

    def admit(self, row: int, request: Request) -> None:
        """A request has come into a row."""

    def evict(self, row: int, request: Request) -> None:
        """A request leaves its row."""
        self.last[row] = 0

    def rewind(self, row: int, request: Request) -> None:
        """A request has gone back to fewer tokens."""
        self.last[row] = request.tokens[-1]


def choose_each(logits: Tensor, rows: Rows) -> list[int]:
    """Each request's choice from its row of `[B, V]`; 0 where there is none to make."""
    logits = logits.cpu()
    return [
        0 if request is None or request.is_done else request.choose(logits[row]) for row, request in enumerate(rows)
    ]
