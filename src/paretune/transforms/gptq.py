"""Integers in groups, rounded so that a layer's output on calibration text changes least (GPTQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from paretune.errors import ParetuneError, UsageError
from paretune.model.base import LanguageModel
from paretune.model.layers import Linear
from paretune.ops.weights import rounding
from paretune.ops.weights.base import Weight
from paretune.ops.weights.dense import Dense
from paretune.transforms.base import Context
from paretune.transforms.calibrate import SecondMoments, blocks_of, check_calibration, walk
from paretune.transforms.groups import Groups
from paretune.transforms.quantize import naming


@dataclass(frozen=True)
class GPTQ(Groups):
    """Frantar et al. 2022, arXiv:2210.17323. Embeddings and head are rounded to nearest, as `groups` does.

    Args:
        act_order: round the inputs of the largest second moments first, while all others can still make up for them.
        damping: added to the diagonal of the second moments, in parts of its mean.
    """

    name: ClassVar[str] = "gptq"
    per_weight: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = True
    group: int = 64
    act_order: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise UsageError(f"gptq: damping is {self.damping}", "It has to be in (0, 1]; 0.01 is usual")

    @property
    def title(self) -> str:
        return f"gptq-{super().title}"

    def apply(self, model: LanguageModel, ctx: Context) -> LanguageModel:
        chosen = [c for c in self.chosen(model) if isinstance(c.weight, Dense)]
        if not chosen:
            return model  # a converted checkpoint
        todo = {id(c.weight): c for c in chosen}
        in_blocks = {id(m.weight) for _, b in blocks_of(model) for m in b.modules() if isinstance(m, Linear)}
        solved = [c for c in chosen if id(c.weight) in in_blocks]
        for layer in chosen:  # before the first minute of work
            with naming(layer.name):
                self.check_width(layer)
                if not bool(torch.isfinite(layer.weight.dequantize()).all()):
                    raise ParetuneError("a weight holds NaN or infinity", "Repair the checkpoint first")
        tokens = check_calibration(ctx, self.title, max((c.weight.in_features for c in solved), default=0))
        made: dict[int, Weight] = {key: self.quantized(c) for key, c in todo.items() if key not in in_blocks}
        touched: list[tuple[Linear, Weight]] = []

        def visit(block: str, layers: dict[str, Linear], moments: SecondMoments) -> None:
            for name, module in layers.items():
                old = module.weight
                if id(old) not in todo:
                    continue
                made[id(old)] = self._solve(old, moments, name)
                touched.append((module, old))
                module.weight = made[id(old)]  # the next block sees what this one became

        try:
            if solved:
                walk(model, tokens, visit, lambda said: ctx.progress(f"{self.title}: {said}"))
        finally:
            for module, old in touched:  # as it was, should anything have failed
                module.weight = old
        self._swap_(model, todo, lambda layer: made[id(layer.weight)])
        return model

    def _solve(self, weight: Weight, moments: SecondMoments, name: str) -> Weight:
        with naming(name):
            return rounding.gptq(
                weight.dequantize(),
                moments.of(name),
                self.bits,
                self.group,
                minimum=self.minimum,
                act_order=self.act_order,
                damping=self.damping,
                activation_bits=self.activation_bits,
            )

    def convert(self, model: LanguageModel, name: str, weight: Weight) -> Weight:
        return weight  # a whole model has to be there
