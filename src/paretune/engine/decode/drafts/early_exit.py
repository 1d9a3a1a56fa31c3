"""The first layers of the model propose, with its own norm and head behind them, on the model's own cache: what they
read in, the model has read in. No weight is stored twice and no prompt is read in twice."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from paretune.engine.cache import KVCache
from paretune.engine.decode.drafts.base import Target, Text
from paretune.engine.decode.drafts.model import ModelDraft
from paretune.engine.runners.base import Runner
from paretune.errors import UsageError
from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.ops.weights.base import Weight
from paretune.registry import RUNNERS


class EarlyExit(ModelDraft):
    name = "exit"
    argument: ClassVar[str] = "N"

    def __init__(self, shared: Runner, cache: KVCache) -> None:
        super().__init__(shared, cache)
        self._of_target = cache

    def new_cache(self, cache: KVCache) -> KVCache:
        return cache.first_layers(self.runner.config.n_layer)

    @classmethod
    def fits(cls, argument: str, config: ModelConfig) -> str | None:
        if not argument.isdecimal() or not 1 <= int(argument) < config.n_layer:
            return f"it can leave after 1 to {config.n_layer - 1} of {config.n_layer} layers, not {argument}"
        return None

    @classmethod
    def prepare(cls, argument: str, target: Target) -> Runner:
        if reason := cls.fits(argument, target.runner.config):
            raise UsageError(f"exit={argument}: {reason}", "Choose another number of layers")
        runner = RUNNERS.get(target.runner_name)(first_layers(target.runner.model, int(argument)))
        runner.cache_dtype = target.runner.cache_dtype
        return runner

    @classmethod
    def describe(cls, shared: Runner) -> dict[str, Any]:
        return {"runner": shared.name, "n_layer": shared.config.n_layer}

    def enter(self, row: int, request: Text) -> None:
        self.requests[row] = request

    def leave(self, row: int, request: Text) -> None:
        del self.requests[row]

    def follow(self) -> None:
        self.cache.follow_(self._of_target)
        held = self._of_target.host_lengths
        self._text, self._more = {row: held[row] for row in self.requests}, {row: [] for row in self.requests}

    def settle(self) -> None:
        """The target's own step has overwritten what was proposed."""


def first_layers(model: LanguageModel, n_layer: int) -> LanguageModel:
    """The first layers of a model with its norm and head: modules of its own, the model's tensors."""
    shared = [m for m in model.modules() if isinstance(m, Weight)]
    memo: dict[int, Any] = {id(x): x for x in [*shared, *model.parameters(), *model.buffers()]}
    for block in list(model.get_submodule(model.family.stack).children())[n_layer:]:
        memo[id(block)] = block  # is dropped: nothing of it is copied
    other = copy.deepcopy(model, memo)
    path, _, name = model.family.stack.rpartition(".")
    blocks = list(other.get_submodule(model.family.stack).children())[:n_layer]
    setattr(other.get_submodule(path), name, nn.ModuleList(blocks))
    other.config = replace(model.config, n_layer=n_layer)
    return other
