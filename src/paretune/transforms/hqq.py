"""Integers in groups whose minima are optimised without calibration text (HQQ)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from paretune.errors import UsageError
from paretune.ops.weights import rounding
from paretune.ops.weights.base import Weight
from paretune.transforms.formats import GROUPS_ENDS, Format
from paretune.transforms.groups import Groups
from paretune.transforms.quantize import Chosen


@dataclass(frozen=True)
class HQQ(Groups):
    """Badri and Shaji 2023: minima by half-quadratic optimisation, without calibration text."""

    name: ClassVar[str] = "hqq"
    terms: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    formats: ClassVar[Mapping[str, Format]] = {
        "hqq": Format("4 bits in groups of 64 with minima, optimised by HQQ", 8, GROUPS_ENDS, {"bits": 4}, "group")
    }
    group: int = 64
    minimum: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.minimum:
            raise UsageError("hqq: minimum is False", "The minima are what it optimises; take gptq or groups instead")

    @property
    def title(self) -> str:
        return f"hqq-{super().title}".replace("-min", "")

    def quantize(self, layer: Chosen) -> Weight:
        values = layer.weight.dequantize()
        return rounding.hqq(values, self.bits_of(layer.is_end), self.group, activation_bits=self.activation_bits)
