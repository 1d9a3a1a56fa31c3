"""The smallest weights become zero (study 004): of each layer, or of all layers together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paretune.errors import UsageError
from paretune.model.base import LanguageModel
from paretune.ops.weights.pruning import largest
from paretune.transforms.base import Context
from paretune.transforms.calibrate import SecondMoments
from paretune.transforms.calibrated import Edits
from paretune.transforms.prune.weights import PruneWeights, ensure_not_empty
from paretune.transforms.quantize import Chosen

SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Magnitude(PruneWeights):
    """Han et al. 2015, arXiv:1506.02626.

    Args:
        scope: `layer`: each layer keeps the same share; `global`: all layers are ranked together.
    """

    name: ClassVar[str] = "magnitude"
    scope: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in SCOPES:
            raise UsageError(f"magnitude: scope is {self.scope!r}", f"Known: {', '.join(SCOPES)}")

    @property
    def title(self) -> str:
        return super().title + (" global" if self.scope == "global" else "")

    def pruned(self, values: Tensor, name: str, moments: SecondMoments | None, shared: dict[int, Tensor]) -> Tensor:
        return values * largest(values.abs(), self.keep, name)

    def _prune_(self, model: LanguageModel, ctx: Context, chosen: list[Chosen], edits: Edits) -> None:
        if self.scope == "layer":
            super()._prune_(model, ctx, chosen, edits)
            return
        before = [c.weight.dequantize().detach() for c in chosen]
        mask = largest(torch.cat([values.abs().flatten() for values in before]), self.keep, "all layers")
        parts = mask.split([values.numel() for values in before])
        after = [values * part.view_as(values) for values, part in zip(before, parts, strict=True)]
        ensure_not_empty([(c.name, values) for c, values in zip(chosen, after, strict=True)])
        for layer, values in zip(chosen, after, strict=True):
            self._set_(layer.weight, values, edits)
