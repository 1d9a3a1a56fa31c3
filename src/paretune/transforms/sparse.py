"""Pruned layers in int8 without their zeros (`ops/weights/sparse8.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.ops.weights.base import Weight
from paretune.ops.weights.sparse8 import Sparse8
from paretune.option import OWN_KERNELS, PRUNED, SPARSE, Option
from paretune.transforms.base import Observation
from paretune.transforms.quantize import Chosen, Quantize, fast_kernel

LEAST_SHARE = 0.1  # of numbers that are stored, where nothing is known yet: an estimate must not be too high


@dataclass(frozen=True)
class Sparse(Quantize):
    """Linear layers that were pruned before: a bit a weight, and a byte for each that is not zero.

    The embedding and the head are another transform's (`int8`), or stay as they are.
    """

    name: ClassVar[str] = "sparse8"
    format: ClassVar[str] = Sparse8.format
    format_title: ClassVar[str] = "int8 without zeros"

    @classmethod
    def options(cls, config: ModelConfig | None, device: str, n_tokens: int) -> Sequence[Option]:
        if config is None:
            return ()
        reason = "no kernel for it on a GPU" if device != "cpu" else None
        needs = frozenset({PRUNED, OWN_KERNELS})
        return [Option("sparse8", reason, frozenset({SPARSE}), needs, beside=("prune",), changes_weights=True)]

    @property
    def title(self) -> str:
        return "sparse8" + self.of_layers

    def wants(self, is_end: bool) -> bool:
        return not is_end

    def quantize(self, layer: Chosen) -> Weight:
        return Sparse8.quantize(layer.weight.dequantize())

    def expected_bytes(self, layer: Chosen) -> float:
        weight = layer.weight
        n = weight.padded_rows * weight.padded_inputs
        n_stored = float(getattr(weight, "n_stored", LEAST_SHARE * n))
        # Mask and values, a scale a row, and where the values of 16 rows and 128 inputs begin.
        return 1.05 * (n / 8 + n_stored + 4 * weight.padded_rows) + 512

    def proof_of_kernel(self, model: LanguageModel, probe: Observation) -> list[str]:
        return fast_kernel(self, model, probe, "native::sparse8")
