"""int8 weights, 16-bit activations (W8A16). The exemplar: copy this file's form for a new optimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.ops.int8_linear import aten
from paretune.ops.weights.base import Weight
from paretune.ops.weights.int8_rows import Int8Rows
from paretune.option import ALL_QUANTISED, Option
from paretune.transforms.base import Observation, ensure
from paretune.transforms.formats import OWN_ENDS, Format
from paretune.transforms.quantize import Chosen, Quantize, fast_kernel


@dataclass(frozen=True)
class Int8(Quantize):
    """Each row of a matrix becomes int8 with one scale, `max |row| / 127` (the published W8A16).

    Args:
        embeddings: also the embeddings and the head (a tied pair stays one matrix).
    """

    name: ClassVar[str] = "int8"
    formats: ClassVar[Mapping[str, Format]] = {"int8": Format("8 bits, one fp32 scale a row", 8, OWN_ENDS)}
    format: ClassVar[str] = Int8Rows.format
    format_title: ClassVar[str] = "int8 rows"
    embeddings: bool = True

    @classmethod
    def options(cls, config: ModelConfig | None, device: str, n_tokens: int) -> Sequence[Option]:
        reason = cls.cannot_pay(device)
        return (
            Option("int8", reason, frozenset({ALL_QUANTISED}), log_gain=0.5),
            Option("int8(embeddings=false)", reason, log_gain=0.5),
        )

    @property
    def title(self) -> str:
        return ("int8" if self.embeddings else "int8-linear") + self.of_layers

    @property
    def weight_width(self) -> float:
        return 1.1  # with a scale a row

    def wants(self, is_end: bool) -> bool:
        return self.embeddings or not is_end

    def quantize(self, layer: Chosen) -> Weight:
        return Int8Rows.quantize(layer.weight.dequantize())

    def expected_bytes(self, layer: Chosen) -> float:
        # One byte a value and four a row, nothing else: no dequantised copy is kept.
        return layer.weight.padded_rows * (layer.weight.padded_inputs + 4)

    def proof_of_kernel(self, model: LanguageModel, probe: Observation) -> list[str]:
        if next(model.parameters()).device.type == "cuda":
            return fast_kernel(self, model, probe, "native::int8")
        if probe.compiled:
            return []
        kernel = "native::int8" if "native::int8" in probe.kernels else Int8Rows.kernel
        products = [c for c in self.chosen(model) if self.is_mine(c) and c.is_product]
        if kernel == Int8Rows.kernel and not any(c.weight.in_features % aten.STEP == 0 for c in products):
            return [f"no layer goes through {kernel}, which takes inputs by {aten.STEP}: converted at every call"]
        ensure(bool(kernel and probe.kernels.get(kernel)), self, f"the profile of one step shows no {kernel}")
        return [f"{kernel} ran {probe.kernels[kernel]} times in one prefill and one decode step"]
