"""A smaller model of the same tokenizer proposes (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023,
arXiv:2302.01318), its likeliest tokens one by one, on a cache of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from paretune.engine.cache import KVCache
from paretune.engine.decode.drafts.base import Draft, Proposal, Source, Target, Text, text_from
from paretune.engine.runners.base import Runner
from paretune.errors import UsageError
from paretune.model.tokenizer import Tokenizer


class ModelDraft(Draft):
    """Drafts of a runner, `shared`, on a cache of its own."""

    def __init__(self, shared: Runner, cache: KVCache) -> None:
        self.runner = shared
        self.cache = self.new_cache(cache)
        self.requests: dict[int, Text] = {}
        self._text: dict[int, int] = {}  # tokens of the text that a row's cache holds; what it holds more is proposed
        self._more: dict[int, list[int]] = {}

    def new_cache(self, cache: KVCache) -> KVCache:
        made = self.runner.new_cache(cache.batch_size, cache.capacity)
        made.clear_()
        return made

    def enter(self, row: int, request: Text) -> None:
        self.requests[row], self._text[row], self._more[row] = request, 0, []
        self.cache.admit_(row)

    def leave(self, row: int, request: Text) -> None:
        del self.requests[row], self._text[row], self._more[row]
        self.cache.evict_(row)

    def follow(self) -> None:
        """Before tokens are proposed."""

    def propose(self, most: Mapping[int, int]) -> dict[int, Proposal]:
        self.follow()
        parts: dict[int, Sequence[int]] = {}
        n_of = {}
        for row, n in most.items():
            request = self.requests[row]
            n_text = len(request.prompt) + len(request.tokens)
            # Its context may be shorter than the target's: the last token that it proposes is not read in.
            n = min(n, self.cache.capacity - n_text + 1)
            if n >= 1:
                parts[row], n_of[row] = text_from(request, self._text[row]), n
        proposed: dict[int, list[int]] = {row: [] for row in parts}
        while parts:
            chosen = self._feed(parts)
            for row, part in parts.items():
                if proposed[row]:
                    self._more[row] += part
                else:
                    self._text[row] += len(part)
                proposed[row].append(chosen[row])
            parts = {row: [chosen[row]] for row in parts if len(proposed[row]) < n_of[row]}
        return {row: Proposal(tokens) for row, tokens in proposed.items()}

    def _feed(self, parts: Mapping[int, Sequence[int]]) -> dict[int, int]:
        """Reads tokens in and gives each row's likeliest next one."""
        K = max(map(len, parts.values()))
        if len(parts) > 1 and max(self.cache.host_lengths[row] for row in parts) + K > self.cache.capacity:
            return {row: token for row in parts for _, token in self._feed({row: parts[row]}).items()}  # no padding
        n_new = [len(parts.get(row, ())) for row in range(self.cache.batch_size)]
        tokens = torch.zeros(len(n_new), K, dtype=torch.int64)
        for row, part in parts.items():
            tokens[row, : len(part)] = torch.tensor(part)
        self.cache.stage_(n_new)
        chosen = self.runner.greedy(tokens.to(self.runner.device), self.cache)
        return {row: chosen[row] for row in parts}

    def settle(self) -> None:
        lengths = list(self.cache.host_lengths)
        for row, request in self.requests.items():
            held, more = self._text[row], self._more[row]
            if not more:
                continue
            came = text_from(request, held)
            n = next((i for i, (a, b) in enumerate(zip(more, came, strict=False)) if a != b), min(len(more), len(came)))
            self._text[row], self._more[row] = held + n, []
            lengths[row] = held + n
        if lengths != list(self.cache.host_lengths):
            self.cache.truncate_(lengths)


class SmallModel(ModelDraft):
    name = "draft"
    argument: ClassVar[str] = "MODEL"

    @classmethod
    def prepare(cls, argument: str, target: Target) -> Runner:
        name, _, config = argument.partition("@")
        source = opened(target, name, config or target.runner_name)
        check_vocabulary(source, target)
        return source.load()

    @classmethod
    def describe(cls, shared: Runner) -> dict[str, Any]:
        size = {"n_layer": shared.config.n_layer, "n_embd": shared.config.n_embd, "longest": shared.config.longest}
        return {"runner": shared.name, **size}


def opened(target: Target, name: str, config: str) -> Source:
    """Another model beside the target.

    Raises:
        UsageError: there is none of that name, or it cannot run here.
    """
    if target.open is None:
        raise UsageError("a draft with weights of its own cannot be loaded here", "Use lookup or suffix")
    return target.open(name, config)


def check_vocabulary(source: Source, target: Target) -> None:
    """A draft's tokens have to mean to the target what they mean to the draft.

    Raises:
        UsageError: another vocabulary or tokenizer.
    """
    ours, theirs = target.runner.config.vocab_size, source.config.vocab_size
    cure = "Choose a draft that was trained with the model's own tokenizer"
    if ours != theirs:
        raise UsageError(f"the draft {source.name} knows {theirs} tokens, the model {ours}", cure)
    if target.folder is None or not all(has_tokenizer(folder) for folder in (target.folder, source.folder)):
        return
    first, second = (Tokenizer(folder).vocabulary for folder in (target.folder, source.folder))
    if first != second:
        n_differing = sum(second.get(token) != i for token, i in first.items())
        raise UsageError(f"the draft {source.name} has another tokenizer ({n_differing} tokens differ)", cure)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
