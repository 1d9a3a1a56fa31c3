"""int8 weights, 16-bit activations (W8A16). The exemplar: copy this file's form for a new optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from paretune.model.base import LanguageModel
from paretune.model.layers import Embedding, Linear
from paretune.ops.weights.base import Weight
from paretune.ops.weights.dense import Dense
from paretune.ops.weights.int8_rows import Int8Rows
from paretune.transforms.base import (
    Context,
    Observation,
    Stage,
    Transform,
    ensure,
    swap_weights_,
    weight_holders,
)


@dataclass(frozen=True)
class Int8(Transform):
    """Each row of a matrix becomes int8 with one scale, `max |row| / 127` (study 004, part 1).

    Args:
        embeddings: also the embeddings and the head (a tied pair stays one matrix).
    """

    name: ClassVar[str] = "int8"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    per_weight: ClassVar[bool] = True
    embeddings: bool = True

    @property
    def title(self) -> str:
        return "int8" if self.embeddings else "int8-linear"

    def _wanted(self, model: LanguageModel):
        head = model.head

        def keep(module: nn.Module, name: str) -> bool:
            return self.embeddings or not (isinstance(module, Embedding) or module is head)

        return keep

    def convert(self, model: LanguageModel, name: str, weight: Weight) -> Weight:
        is_wanted = self._wanted(model)(model.get_submodule(name), name) and isinstance(weight, Dense)
        return Int8Rows.quantize(weight.dequantize()) if is_wanted else weight

    def apply(self, model: LanguageModel, ctx: Context) -> LanguageModel:
        keep = self._wanted(model)
        swap_weights_(
            model,
            lambda m, n: keep(m, n) and isinstance(m, Linear | Embedding) and isinstance(m.weight, Dense),
            lambda weight: Int8Rows.quantize(weight.dequantize()),
        )
        return model

    def verify(self, model: LanguageModel, probe: Observation) -> list[str]:
        holders = weight_holders(model, self._wanted(model))
        left = [n for n, m in holders if m.weight.format != Int8Rows.format]
        ensure(not left, self, f"{len(left)} layers are not int8, {left[0] if left else ''} first")
        unique = {id(m.weight): m.weight for _, m in holders}.values()
        n_bytes = sum(w.stored_bytes for w in unique)
        n_values = sum(w.out_features * w.in_features for w in unique)
        # One byte a value and four a row, nothing else: no dequantised copy is kept.
        allowed = sum(w.padded_rows * (w.padded_inputs + 4) for w in unique)
        ensure(n_bytes <= allowed, self, f"{n_bytes} bytes are stored")
        said = [f"{len(holders)} layers hold int8 rows: {n_bytes:,} bytes for {n_values:,} weights"]
        kernel = "native::int8" if "native::int8" in probe.kernels else Int8Rows.kernel
        if not probe.compiled and next(model.parameters()).device.type == "cpu":
            ensure(bool(kernel and probe.kernels.get(kernel)), self, f"the profile of one step shows no {kernel}")
            said.append(f"{kernel} ran {probe.kernels[kernel]} times in one prefill and one decode step")
        return said
