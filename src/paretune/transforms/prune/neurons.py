"""Neurons of the MLPs go: rows of `up` (and `gate`), inputs of `down`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from paretune.model.base import LanguageModel
from paretune.model.config import LayerShape, ModelConfig
from paretune.model.families.base import Role
from paretune.transforms.prune import scores
from paretune.transforms.prune.inner import PruneInner
from paretune.transforms.prune.structure import in_words, linear, step_of, take_rows_

WRITERS: tuple[Role, ...] = ("up", "gate")


@dataclass(frozen=True)
class Neurons(PruneInner):
    """The MLPs keep a share of their neurons, in steps that kernels like."""

    name: ClassVar[str] = "neurons"
    what: ClassVar[str] = "neurons"
    reader: ClassVar[Role] = "down"

    def count(self, shape: LayerShape) -> int:
        return shape.n_inner

    def step(self, config: ModelConfig) -> int:
        return min(step_of(config.layer(i).n_inner) for i in range(config.n_layer))

    def with_count(self, shape: LayerShape, n: int) -> LayerShape:
        return shape._replace(n_inner=n)

    def magnitudes(self, model: LanguageModel, i: int) -> Tensor:
        writers = [layer for role in WRITERS if (layer := linear(model, role, i)) is not None]
        reader = linear(model, self.reader, i)
        assert reader is not None
        return scores.sizes([(layer, lambda x: x) for layer in writers], [(reader, lambda x: x)])

    def cut_(self, model: LanguageModel, i: int, kept: Tensor) -> Tensor:
        for role in WRITERS:
            layer = linear(model, role, i)
            if layer is not None:
                take_rows_(layer, kept)
        return kept

    def shapes(self, config: ModelConfig) -> str:
        return f"MLPs of {in_words([config.layer(i).n_inner for i in range(config.n_layer)])} neurons"
