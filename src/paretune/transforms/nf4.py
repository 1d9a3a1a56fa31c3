"""4-bit normal floats in blocks of 64 (NF4 of bitsandbytes), doubly quantised scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.ops import grouping
from paretune.ops.weights.base import Weight
from paretune.ops.weights.nf4 import BLOCK, NF4, SCALE_BLOCK
from paretune.option import ALL_QUANTISED, Option
from paretune.transforms.base import Observation
from paretune.transforms.formats import Ends, Format
from paretune.transforms.quantize import Chosen, Quantize, fast_kernel


@dataclass(frozen=True)
class NormalFloat4(Quantize):
    """QLoRA's format (arXiv:2305.14314), rounded to nearest.

    Args:
        embeddings: also the embeddings and the head.
        positions: also the embedding of positions, where there is one (4 % of the embedded model).
    """

    name: ClassVar[str] = "nf4"
    formats: ClassVar[Mapping[str, Format]] = {
        "nf4": Format(
            "4-bit normal floats, blocks of 64, positions too; embedding and head int8: 17 % of fp32",
            8,
            {8: Ends({"positions": True}, then="int8"), 4: Ends({"embeddings": True}), 0: Ends()},
        )
    }
    format: ClassVar[str] = NF4.format
    format_title: ClassVar[str] = "NF4 blocks"
    embeddings: bool = False
    positions: bool = False

    @classmethod
    def options(cls, config: ModelConfig | None, device: str, n_tokens: int) -> Sequence[Option]:
        if not device.startswith("cuda"):
            return ()  # in native code its look-up costs more than the bytes of int4 groups that it saves
        return (Option("nf4+int8", cls.cannot_pay(device), frozenset({ALL_QUANTISED}), log_gain=0.5),)

    @property
    def title(self) -> str:
        name = "nf4-all" if self.embeddings else "nf4-pos" if self.positions else "nf4"
        return name + self.of_layers

    def wants(self, is_end: bool) -> bool:
        return self.embeddings or not is_end

    def takes(self, layer: Chosen) -> bool:
        return super().takes(layer) or (self.positions and layer.is_positions)

    def quantize(self, layer: Chosen) -> Weight:
        return NF4.quantize(layer.weight.dequantize())

    def expected_bytes(self, layer: Chosen) -> float:
        weight = layer.weight
        of_row = grouping.count(weight.in_features, BLOCK)
        n_blocks = weight.out_features * of_row
        # Four bits, a byte a block, four bytes a block of blocks, the offset and the width.
        own = weight.padded_rows * weight.padded_inputs / 2 + n_blocks + 4 * (-(-n_blocks // SCALE_BLOCK)) + 8
        # Packed for native code, the scales are also there in fp16.
        packed = 2 * weight.padded_rows * of_row
        return own if weight.kernel is None else own + packed

    def proof_of_kernel(self, model: LanguageModel, probe: Observation) -> list[str]:
        return fast_kernel(self, model, probe, "native::nf4")
