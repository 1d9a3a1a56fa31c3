"""Suffix index: the most frequent continuation of the longest stretch that the text ends with (SuffixDecoding, Oliaro
et al. 2024, arXiv:2411.04975), over prompt and output, and over earlier requests where the user wants it. No model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from paretune import native_build
from paretune.engine.cache import KVCache
from paretune.engine.decode.drafts.base import ON_TEXT, Draft, Proposal, Target, Text, text_from
from paretune.model.config import ModelConfig
from paretune.ops.suffix import native
from paretune.option import Option

EARLIER = "earlier"
MAX_MATCH = 12  # tokens of a stretch: what is left of the index's depth is for its continuation
FLOOR = 0.1  # a draft ends where it is thought less likely than this


class _Index:
    """One request's text in an index of its own, and in that of earlier requests."""

    def __init__(self, request: Text, earlier: Any) -> None:
        self.request, self.n_read = request, 0
        own: Any = native.best()
        self.places = [(own, own.cursor(), True)]
        if earlier is not None:
            self.places.append((earlier, earlier.cursor(), False))

    def find(self, most: int) -> Proposal:
        fresh = text_from(self.request, self.n_read)
        self.n_read += len(fresh)
        best = Proposal([])
        for index, cursor, grows in self.places:
            index.push(cursor, fresh, grows)
            found = Proposal(*index.draft(cursor, MAX_MATCH, most, FLOOR))
            if found.match > best.match:
                best = found
        return best


class Suffix(Draft):
    name = "suffix"
    choices: ClassVar[tuple[str, ...]] = (EARLIER,)
    is_free = True

    def __init__(self, shared: Any, cache: KVCache) -> None:
        self._earlier = shared
        self._texts: dict[int, _Index] = {}

    @classmethod
    def options(cls, config: ModelConfig | None, device: str) -> Sequence[Option]:
        return [Option("speculate(suffix)", ON_TEXT, beside=(), changes_numbers=False)]

    @classmethod
    def prepare(cls, argument: str, target: Target) -> Any:
        return native.best() if argument == EARLIER else None

    @classmethod
    def describe(cls, shared: Any) -> dict[str, Any]:
        about: dict[str, Any] = {"index": "C++" if native_build.unavailable_reason() is None else "Python"}
        return about if shared is None else about | {"earlier_nodes": shared.n_nodes}

    def enter(self, row: int, request: Text) -> None:
        self._texts[row] = _Index(request, self._earlier)

    def leave(self, row: int, request: Text) -> None:
        del self._texts[row]
        if self._earlier is not None and request.is_done:
            self._earlier.push(self._earlier.cursor(), [*request.prompt, *request.tokens])

    def propose(self, most: Mapping[int, int]) -> dict[int, Proposal]:
        return {row: self._texts[row].find(n) for row, n in most.items()}
