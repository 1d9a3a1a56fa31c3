"""LLM.int8: int8 weights and int8 inputs, outlier inputs in 16 bits (Dettmers et al. 2022, arXiv:2208.07339)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from paretune.errors import UsageError
from paretune.model.base import LanguageModel
from paretune.ops.weights.base import Weight
from paretune.ops.weights.mixed_int8 import MixedInt8
from paretune.transforms.base import Observation, ensure
from paretune.transforms.formats import BODY_ENDS, Format
from paretune.transforms.quantize import Chosen, Quantize


@dataclass(frozen=True)
class LLMInt8(Quantize):
    """Int8 rows whose inputs are rounded to 8 bits a token, except where one of them is large.

    As in bitsandbytes, outliers are found among the inputs when the layer runs: their columns are multiplied in 16 bits
    (fp32 here), by the stored 8-bit weights. Nothing is fixed beforehand, so nothing has to be calibrated.

    Args:
        threshold: size from which an input's whole column is multiplied in 16 bits.
    """

    name: ClassVar[str] = "llm_int8"
    formats: ClassVar[Mapping[str, Format]] = {
        "llm_int8": Format("LLM.int8: outlier inputs in 16 bits; embeddings and head int8", 8, BODY_ENDS)
    }
    format: ClassVar[str] = MixedInt8.format
    format_title: ClassVar[str] = "LLM.int8 rows"
    threshold: float = 6.0

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise UsageError(f"llm_int8: threshold is {self.threshold}", "It has to be positive; 6.0 is the paper's")

    def notes(self, device: str) -> list[str]:
        if not device.startswith("cuda"):
            return []
        return ["the host waits for the device in every layer, to learn which inputs are outliers: no graph holds it"]

    @property
    def title(self) -> str:
        return "llm.int8" + ("" if self.threshold == 6.0 else f" t{self.threshold:g}") + self.of_layers

    def wants(self, is_end: bool) -> bool:
        return not is_end  # an embedding is a look-up, and the paper leaves the head alone

    def quantize(self, layer: Chosen) -> Weight:
        return MixedInt8.quantize(layer.weight.dequantize(), self.threshold)

    def expected_bytes(self, layer: Chosen) -> float:
        weight = layer.weight
        # A byte a value, four a row, the threshold.
        return weight.padded_rows * (weight.padded_inputs + 4) + 4

    def proof_of_kernel(self, model: LanguageModel, probe: Observation) -> list[str]:
        if probe.compiled:
            return []
        said = []
        for layer in self.chosen(model):
            if isinstance(layer.weight, MixedInt8):  # packed for native code all inputs have 16 bits
                said = [self._proof_of_outliers(layer)]
                break
        kernel = "native::int8" if probe.own_kernels else MixedInt8.kernel
        ensure(bool(probe.kernels.get(kernel)), self, f"the profile of one step shows no {kernel}")
        return [f"{kernel} ran {probe.kernels[kernel]} times in one step", *said]

    def _proof_of_outliers(self, layer: Chosen) -> str:
        """One input at a hundred times the threshold must leave the steps of the others as fine as they were."""
        weight, device = layer.weight, layer.weight.device
        assert isinstance(weight, MixedInt8)
        n_in = weight.in_features
        x = torch.linspace(-0.9, 0.9, n_in).roll(n_in // 3).repeat(2, 1).to(device) * min(self.threshold, 1.0)
        plain = x.clone()
        x[0, n_in // 2] = 100 * self.threshold
        exact = weight.exact()
        errors = [float((weight.matmul(v) - v @ exact.T)[0].norm()) for v in (plain, x)]
        step = float(x.abs().max()) / 127  # of inputs that share 8 bits with the outlier
        coarse = torch.round(x / step) * step
        lost = float(((coarse - x) @ exact.T)[0].norm())
        ensure(errors[1] <= 2 * errors[0] + 1e-5 * lost, self, f"an outlier takes the bits of others in {layer.name}")
        return (
            f"an input of {100 * self.threshold:g} in {layer.name} adds an error of {errors[1]:.2g} "
            f"({lost:.2g} with all inputs in 8 bits)"
        )
