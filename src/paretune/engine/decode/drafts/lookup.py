"""Prompt lookup: what followed the last few tokens when they last stood in the text (Saxena 2023; "prompt lookup
decoding"). No model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paretune.engine.cache import KVCache
from paretune.engine.decode.drafts.base import ON_TEXT, Draft, Proposal, Text, text_from
from paretune.model.config import ModelConfig
from paretune.option import Option

LONGEST = 4  # tokens of a stretch that is looked up
MOST_MATCH = 16  # tokens that a match is followed back for


class _Stretches:
    """One request's text, and where each of its stretches was last followed by something."""

    def __init__(self, request: Text) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.after: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST + 1)]  # by length of the stretch

    def read_on(self) -> None:
        tokens = self.tokens
        for token in text_from(self.request, len(tokens)):
            i = len(tokens)
            for n in range(1, min(LONGEST, i) + 1):
                self.after[n][tuple(tokens[i - n :])] = i  # what ends before i is followed by what stands there
            tokens.append(token)

    def find(self, most: int) -> Proposal:
        tokens = self.tokens
        for n in range(min(LONGEST, len(tokens)), 0, -1):
            at = self.after[n].get(tuple(tokens[-n:]))
            if at is None:
                continue
            match = n
            while match < min(MOST_MATCH, at) and tokens[at - match - 1] == tokens[-match - 1]:
                match += 1
            proposed = tokens[at : at + most]
            while len(proposed) < most:  # a match that reaches the end repeats itself
                proposed += proposed[: most - len(proposed)]
            return Proposal(proposed, match)
        return Proposal([])


class Lookup(Draft):
    name = "lookup"
    is_free = True

    def __init__(self, shared: Any, cache: KVCache) -> None:
        self._texts: dict[int, _Stretches] = {}

    @classmethod
    def options(cls, config: ModelConfig | None, device: str) -> Sequence[Option]:
        return [Option("speculate(lookup)", ON_TEXT, beside=(), changes_numbers=False)]

    def enter(self, row: int, request: Text) -> None:
        self._texts[row] = _Stretches(request)

    def leave(self, row: int, request: Text) -> None:
        del self._texts[row]

    def propose(self, most: Mapping[int, int]) -> dict[int, Proposal]:
        found = {}
        for row, n in most.items():
            self._texts[row].read_on()
            found[row] = self._texts[row].find(n)
        return found
