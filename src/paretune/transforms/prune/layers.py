"""Whole layers go: those that change the residual stream least, or matter least by another measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.model.layers import Linear
from paretune.transforms.calibrate import blocks_of
from paretune.transforms.prune import scores
from paretune.transforms.prune.structure import PruneStructure, best, rounded


@dataclass(frozen=True)
class Layers(PruneStructure):
    """A share of the blocks stays, in their order; the model is one of its family with fewer layers."""

    name: ClassVar[str] = "layers"
    what: ClassVar[str] = "layers"
    criteria: ClassVar[tuple[str, ...]] = (*PruneStructure.criteria, scores.RESIDUAL)
    by: str = scores.RESIDUAL

    @property
    def title(self) -> str:
        return f"{self.name} {100 * self.keep:.3g}%" + ("" if self.by == scores.RESIDUAL else f" by {self.by}")

    def fits(self, config: ModelConfig) -> str | None:
        if config.scale_attn_by_inverse_layer_idx and not self.is_done(config):
            return "its layers are scaled by their numbers"
        return super().fits(config)

    def smaller(self, config: ModelConfig) -> ModelConfig:
        n = rounded(config.n_layer, self.keep, 1, "the layers")
        return config.reshaped([config.layer(i) for i in range(n)])

    def prune_(self, model: LanguageModel, tokens: Tensor | None, progress: Callable[[str], None]) -> ModelConfig:
        config = model.config
        score = self._scores(model, tokens)
        kept = best(score, rounded(config.n_layer, self.keep, 1, "the layers")).tolist()
        blocks = model.get_submodule(model.family.stack)
        assert isinstance(blocks, nn.ModuleList)
        progress(f"layers {', '.join(str(i) for i in range(config.n_layer) if i not in kept)} go")
        setattr(model, model.family.stack, nn.ModuleList([blocks[i] for i in kept]))
        return config.reshaped([config.layer(i) for i in kept])

    def _scores(self, model: LanguageModel, tokens: Tensor | None) -> Tensor:
        inside = [[m for m in block.modules() if isinstance(m, Linear)] for _, block in blocks_of(model)]
        if tokens is None:
            squares = [sum(float(m.weight.dequantize().float().square().sum()) for m in layers) for layers in inside]
            return torch.tensor(squares).sqrt()
        if self.by == scores.TAYLOR:
            names = [[n for n, m in model.named_modules() if m in layers] for layers in inside]
            every = [name for layer in names for name in layer]
            found = scores.effects(model, tokens, every, dict.fromkeys(every, lambda change: change.sum()))
            return torch.tensor([sum(float(found[name]) for name in layer) for layer in names])
        angles, added = scores.changes_of_stream(model, tokens)
        return angles if self.by == scores.RESIDUAL else added

    def shapes(self, config: ModelConfig) -> str:
        return f"{config.n_layer} layers"
