"""3-bit weights: eight levels between the smallest and the largest number of a row, two numbers to a byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from paretune.model.config import ModelConfig
from paretune.ops.weights.base import Weight, part_of
from paretune.option import Option
from paretune.transforms.formats import BODY_ENDS, Format
from paretune.transforms.quantize import Chosen, Quantize


class ThreeBits(Weight):
    """`W[i, j] ~ low[i] + step[i] * q[i, j]`, `q` from 0 to 7, in half a byte each."""

    format = "three_bits"
    bits = 3
    q: Tensor
    low: Tensor
    step: Tensor

    def __init__(self, q: Tensor, low: Tensor, step: Tensor, n_in: int) -> None:
        super().__init__()
        self.out_features, self.in_features = q.size(0), n_in
        self.register_buffer("q", q)  # uint8 [out, ceil(in / 2)]
        self.register_buffer("low", low)  # fp32 [out]
        self.register_buffer("step", step)
        self.register_buffer("width", torch.tensor(n_in))

    @classmethod
    def quantize(cls, values: Tensor) -> ThreeBits:
        w = values.detach().float()
        low, step = w.amin(1), (w.amax(1) - w.amin(1)) / 7
        safe = torch.where(step > 0, step, torch.ones_like(step))
        q = ((w - low[:, None]) / safe[:, None]).round().clamp(0, 7).to(torch.uint8)
        q = torch.nn.functional.pad(q, (0, q.size(1) % 2))
        return cls(q[:, ::2] | q[:, 1::2] << 4, low, step, w.size(1))

    def dequantize(self) -> Tensor:
        q = torch.stack([self.q & 15, self.q >> 4], dim=2).flatten(1)[:, : self.in_features]
        return self.low[:, None] + self.step[:, None] * q

    def matmul(self, x: Tensor) -> Tensor:
        return x @ self.dequantize().to(x.dtype).T

    def rows(self, index: Tensor) -> Tensor:
        return self.dequantize()[index]

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float32

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ThreeBits:
        q, low = part_of(tensors, "q", (torch.uint8,), 2), part_of(tensors, "low", (torch.float32,), 1)
        step = part_of(tensors, "step", (torch.float32,), (low.size(0),))
        return cls(q, low, step, int(part_of(tensors, "width")))


@dataclass(frozen=True)
class Bits3(Quantize):
    name: ClassVar[str] = "three_bits"
    format: ClassVar[str] = ThreeBits.format
    format_title: ClassVar[str] = "3-bit rows"
    formats: ClassVar[Mapping[str, Any]] = {"three_bits": Format("3 bits, eight levels a row", 8, BODY_ENDS)}

    @classmethod
    def options(cls, config: ModelConfig | None, device: str, n_tokens: int) -> Sequence[Option]:
        return [Option("three_bits", "every call dequantises: it saves memory, not time")]

    @property
    def title(self) -> str:
        return "three_bits" + self.of_layers

    def wants(self, is_end: bool) -> bool:
        return not is_end

    def quantize(self, layer: Chosen) -> Weight:
        return ThreeBits.quantize(layer.weight.dequantize())

    def expected_bytes(self, layer: Chosen) -> float:
        return layer.weight.out_features * (-(-layer.weight.in_features // 2) + 8) + 8
