"""4 or 8 bits in groups, each with an fp16 scale (Q4_0, Q4_1 and Q8_0 of llama.cpp), rounded to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from paretune.errors import UsageError
from paretune.model.base import LanguageModel
from paretune.model.layers import Embedding
from paretune.ops.weights.base import Weight
from paretune.ops.weights.dense import Dense
from paretune.ops.weights.int_groups import GROUPS, IntGroups
from paretune.transforms.base import Context, Observation, Stage, Transform, ensure, swap_weights_, weight_holders


@dataclass(frozen=True)
class Groups(Transform):
    """Every `group` neighbouring inputs of a row share a scale.

    Args:
        bits: of a weight: 4, 8, or 7, which are stored in 8 and leave room to add byte products in 16 bits (AVX2).
        group: 32, 64 or 128; it has to divide every layer's width.
        minimum: also a smallest value a group (the integers then cover exactly the range that is there).
        head_bits: of the embeddings and the head: 4, 8, or 0 to leave them as they are; their groups are `group` too.
        activation_bits: what native code rounds inputs to: 16 (as good as exact), 8 or 7 (faster where the processor
            multiplies bytes, AVX2 among them with 7; measured like every change of numbers).
    """

    name: ClassVar[str] = "groups"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    per_weight: ClassVar[bool] = True
    bits: int = 4
    group: int = 32
    minimum: bool = False
    head_bits: int = 8
    activation_bits: int = 16

    def __post_init__(self) -> None:
        allowed = {
            "bits": (4, 7, 8),
            "group": GROUPS,
            "head_bits": (0, 4, 8),
            "activation_bits": (7, 8, 16),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                known = ", ".join(map(str, values))
                raise UsageError(f"groups: {name} is {getattr(self, name)}", f"It has to be one of {known}")

    @property
    def title(self) -> str:
        head = "" if self.head_bits == max(self.bits, 8) else f" head{self.head_bits or 'plain'}"
        inputs = "" if self.activation_bits == 16 else f"-a{self.activation_bits}"
        return f"int{self.bits}-g{self.group}{'-min' if self.minimum else ''}{inputs}{head}"

    def _bits_of(self, model: LanguageModel, module: nn.Module) -> int:
        tied = {id(m.weight) for m in (model.embedding, model.head)}
        is_end = isinstance(module, Embedding) or id(getattr(module, "weight", None)) in tied
        return self.head_bits if is_end else self.bits

    def _quantize(self, name: str, weight: Weight, bits: int) -> IntGroups:
        if weight.in_features % self.group:
            raise UsageError(
                f"groups of {self.group} do not divide the {weight.in_features} inputs of {name}",
                "Choose a smaller group, or int8 rows",
            )
        return IntGroups.quantize(
            weight.dequantize(), bits, self.group, minimum=self.minimum, activation_bits=self.activation_bits
        )

    def convert(self, model: LanguageModel, name: str, weight: Weight) -> Weight:
        bits = self._bits_of(model, model.get_submodule(name))
        return self._quantize(name, weight, bits) if bits and isinstance(weight, Dense) else weight

    def apply(self, model: LanguageModel, ctx: Context) -> LanguageModel:
        wanted = {
            id(m.weight): (name, self._bits_of(model, m))
            for name, m in weight_holders(model, lambda m, n: isinstance(m.weight, Dense))  # type: ignore[union-attr]
        }
        swap_weights_(
            model,
            lambda m, n: bool(wanted.get(id(m.weight), ("", 0))[1]),  # type: ignore[union-attr]
            lambda weight: self._quantize(wanted[id(weight)][0], weight, wanted[id(weight)][1]),
        )
        return model

    def verify(self, model: LanguageModel, probe: Observation) -> list[str]:
        holders = weight_holders(model, lambda m, n: bool(self._bits_of(model, m)))
        left = [n for n, m in holders if m.weight.format != IntGroups.format]
        ensure(not left, self, f"{len(left)} layers are not in groups, {left[0] if left else ''} first")
        unique = {id(m.weight): (m.weight, self._bits_of(model, m)) for _, m in holders}.values()
        n_bytes = sum(w.stored_bytes for w, _ in unique)
        n_values = sum(w.out_features * w.in_features for w, _ in unique)
        numbers = 2 if self.minimum else 1
        # The integers and two bytes a group for each number.
        allowed = sum(
            w.padded_rows * w.padded_inputs * ((0.5 if bits == 4 else 1) + numbers * 2 / self.group)
            for w, bits in unique
        )
        ensure(n_bytes <= allowed, self, f"{n_bytes} bytes are stored, {allowed:.0f} expected")
        said = [f"{len(holders)} layers hold groups of {self.group}: {n_bytes:,} bytes for {n_values:,} weights"]
        kernel = f"native::int{4 if self.bits == 4 else 8}"
        if probe.runner.get("runner") == "native":
            ensure(bool(probe.kernels.get(kernel)), self, f"the step runs no {kernel}")
            said.append(f"{kernel} ran {probe.kernels[kernel]} times in one step")
        return said
