"""fp8 (e4m3) weights, one scale a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from paretune.ops.weights.base import Weight
from paretune.ops.weights.fp8 import Fp8
from paretune.transforms.formats import OWN_ENDS, Format
from paretune.transforms.quantize import Chosen, Quantize


@dataclass(frozen=True)
class Float8(Quantize):
    """Args:
    embeddings: also the embeddings and the head.
    """

    name: ClassVar[str] = "fp8"
    formats: ClassVar[Mapping[str, Format]] = {"fp8": Format("8-bit floats (e4m3), one scale a row", 8, OWN_ENDS)}
    format: ClassVar[str] = Fp8.format
    format_title: ClassVar[str] = "fp8 rows"
    embeddings: bool = True

    @property
    def title(self) -> str:
        return ("fp8" if self.embeddings else "fp8-linear") + self.of_layers

    def requires(self, device: str) -> str | None:
        return None if device == "cpu" or device.startswith("cuda") else f"{device} has no fp8 numbers"

    def notes(self, device: str) -> list[str]:
        if device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 9):
            return []
        return ["fp8 is storage only here: nothing multiplies it, so a layer is dequantised at every call"]

    def wants(self, is_end: bool) -> bool:
        return self.embeddings or not is_end

    def quantize(self, layer: Chosen) -> Weight:
        return Fp8.quantize(layer.weight.dequantize())

    def expected_bytes(self, layer: Chosen) -> float:
        return layer.weight.out_features * (layer.weight.in_features + 4)
