"""What pruning inside blocks shares: neurons and heads are inputs of the one layer that reads them (`down`, `o`).

Layers are pruned alike (`scope=layer`: any tool reads the shapes), or ranked together (`scope=global`: each gets a
width of its own).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paretune.errors import UsageError
from paretune.model.base import LanguageModel
from paretune.model.config import LayerShape, ModelConfig
from paretune.model.families.base import Role
from paretune.model.layers import Linear
from paretune.transforms.calibrate import SecondMoments, walk
from paretune.transforms.prune import scores
from paretune.transforms.prune.structure import PruneStructure, best, linear, name_of, rounded, take_inputs_

SCOPES = ("layer", "global")


@dataclass(frozen=True)
class PruneInner(PruneStructure):
    """Args:
    scope: `layer` or `global`.
    """

    reader: ClassVar[Role]
    scope: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in SCOPES:
            raise UsageError(f"{self.name}: scope is {self.scope!r}", f"Known: {', '.join(SCOPES)}")

    @property
    def title(self) -> str:
        return super().title + (" global" if self.scope == "global" else "")

    # -- what a structure says

    def count(self, shape: LayerShape) -> int:
        """Structures in a layer of this shape."""
        raise NotImplementedError

    def step(self, config: ModelConfig) -> int:
        """Their numbers are multiples of it."""
        return 1

    def with_count(self, shape: LayerShape, n: int) -> LayerShape:
        """The shape with `n` of them."""
        raise NotImplementedError

    def magnitudes(self, model: LanguageModel, i: int) -> Tensor:
        """L2 norms of the weights of each in block `i`."""
        raise NotImplementedError

    def cut_(self, model: LanguageModel, i: int, kept: Tensor) -> Tensor:
        """Takes the others away where they are written; gives the inputs of the reader that stay."""
        raise NotImplementedError

    # -- what they share

    def least_tokens(self, config: ModelConfig) -> tuple[int, str]:
        widest = max(config.n_inner, config.n_head * config.head_dim)
        return widest, f"layers of {widest:,} inputs"  # with fewer their second moments are singular

    def smaller(self, config: ModelConfig) -> ModelConfig:
        shapes = []
        for i in range(config.n_layer):
            shape = config.layer(i)
            n = rounded(self.count(shape), self.keep, self.step(config), f"layer {i}")
            shapes.append(self.with_count(shape, n))
        return config.reshaped(shapes)

    def prune_(self, model: LanguageModel, tokens: Tensor | None, progress: Callable[[str], None]) -> ModelConfig:
        config = model.config
        n_each = [self.count(config.layer(i)) for i in range(config.n_layer)]
        ranked = self._ranked(model, tokens, n_each)
        left = self._left(config, n_each, ranked)
        shapes: list[LayerShape] = []

        def cut(i: int, moments: Tensor | None) -> None:
            reader = linear(model, self.reader, i)
            assert reader is not None
            score = None if ranked is None else ranked[i]
            if score is None:
                assert moments is not None
                score = scores.output_changes(reader, moments, n_each[i])
            kept = best(score, left[i])
            if len(kept) < n_each[i]:
                take_inputs_(reader, self.cut_(model, i, kept), moments)
            shapes.append(self.with_count(config.layer(i), left[i]))

        if tokens is None:
            for i in range(config.n_layer):
                cut(i, None)
        else:

            def visit(block: str, layers: dict[str, Linear], moments: SecondMoments) -> None:
                i = int(block.rpartition(".")[2])
                cut(i, moments.of(name_of(model, self.reader, i)))

            walk(model, tokens, visit, progress)
        return config.reshaped(shapes)

    def _ranked(self, model: LanguageModel, tokens: Tensor | None, n_each: list[int]) -> list[Tensor] | None:
        """Scores by layer; None where each layer's are made when its turn comes, of what is before it by then."""
        layers = range(model.config.n_layer)
        if self.by == scores.MAGNITUDE:
            return [self.magnitudes(model, i) for i in layers]
        assert tokens is not None
        names = [name_of(model, self.reader, i) for i in layers]
        if self.by == scores.TAYLOR:
            sums = {name: _summed(n) for name, n in zip(names, n_each, strict=True)}
            found = scores.effects(model, tokens, names, sums)
            return [found[name] for name in names]
        if self.scope == "layer":
            return None
        ranked: list[Tensor] = []

        def visit(block: str, layers: dict[str, Linear], moments: SecondMoments) -> None:
            i = int(block.rpartition(".")[2])
            ranked.append(scores.output_changes(layers[names[i]], moments.of(names[i]), n_each[i]))

        walk(model, tokens, visit, lambda line: None)
        return ranked

    def _left(self, config: ModelConfig, n_each: list[int], ranked: list[Tensor] | None) -> list[int]:
        """How many stay in each layer."""
        step = self.step(config)
        if self.scope == "layer" or ranked is None:
            return [rounded(n, self.keep, step, f"layer {i}") for i, n in enumerate(n_each)]
        # Layers are ranked by shares: the sizes of their outputs are not comparable.
        together = torch.cat([score / score.mean().clamp(min=1e-30) for score in ranked])
        kept = torch.zeros(len(together), dtype=torch.bool)
        kept[best(together, max(1, round(self.keep * len(together))))] = True
        counts = [int(part.sum()) for part in kept.split(n_each)]
        return [min(n, step * max(1, round(count / step))) for n, count in zip(n_each, counts, strict=True)]


def _summed(n: int) -> scores.Sum:
    """Numbers `[out, in]` -> sums over all outputs of each of `n` neighbouring groups of inputs."""
    return lambda change: change.sum(0).view(n, -1).sum(1)
