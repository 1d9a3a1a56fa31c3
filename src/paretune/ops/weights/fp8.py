"""fp8 (e4m3), one scale a row: FP8 formats for deep learning, Micikevicius et al. 2022, arXiv:2209.05433."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from paretune.errors import ParetuneError
from paretune.ops.weights.base import Weight, is_finite, part_of

LARGEST = 448.0  # of e4m3
AT_ONCE = 1 << 18  # numbers that are rounded together: they and what is made of them stay in the caches


class Fp8(Weight):
    """`W[i] ~ values[i] * scale[i]`, `scale[i] = max |W[i]| / 448`.

    Args:
        values: float8_e4m3fn `[out, in]`.
        scale: fp32 `[out]`.
        compute_dtype: of `rows` and `dequantize`.
    """

    format = "fp8"
    bits = 8
    rows_matter = False
    values: Tensor
    scale: Tensor
    compute: Tensor

    def __init__(self, values: Tensor, scale: Tensor, compute_dtype: torch.dtype) -> None:
        super().__init__()
        assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == values.shape[:1]
        self.out_features, self.in_features = values.shape
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        # An empty tensor that carries the compute dtype into a checkpoint and back.
        self.register_buffer("compute", torch.empty(0, dtype=compute_dtype, device=values.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(bfloat16)` changes the compute dtype; the stored numbers only follow the device.
        values, scale = self.values, self.scale
        super()._apply(fn, recurse)
        device = self.compute.device
        self.values, self.scale = values.to(device), scale.to(device)
        return self

    @classmethod
    def quantize(cls, values: Tensor) -> Fp8:
        """Rounds to nearest.

        Raises:
            ParetuneError: the matrix holds NaN or infinity.
        """
        if values.numel() > AT_ONCE:
            parts = [cls.quantize(part) for part in values.split(max(1, AT_ONCE // values.size(1)))]
            return cls(torch.cat([p.values for p in parts]), torch.cat([p.scale for p in parts]), values.dtype)
        w = values.detach().float()
        if not is_finite(w):
            raise ParetuneError("a weight holds NaN or infinity", "Repair the checkpoint before quantising it")
        absmax = w.abs().amax(dim=1)
        scale = torch.where(absmax > 0, absmax / LARGEST, torch.ones_like(absmax))  # a zero row stays zero
        return cls((w / scale[:, None]).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale, values.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """On a GPU that multiplies fp8, inputs get a scale a row too; elsewhere the layer is dequantised each time."""
        # The library's product takes whole sixteens of inputs and outputs only.
        in_sixteens = self.in_features % 16 == 0 and self.out_features % 16 == 0
        if in_sixteens and x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= (8, 9):
            return _scaled_product(x, self.values, self.scale)
        return F.linear(x, self.dequantize().to(x.dtype))

    def rows(self, index: Tensor) -> Tensor:
        return (self.values[index].float() * self.scale[index][..., None]).to(self.compute_dtype)

    def dequantize(self) -> Tensor:
        return (self.values.float() * self.scale[:, None]).to(self.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.compute.dtype

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Fp8:
        values = part_of(tensors, "values", (torch.float8_e4m3fn,), 2)
        scale = part_of(tensors, "scale", (torch.float32,), (values.size(0),))
        return cls(values, scale, part_of(tensors, "compute").dtype)


def _scaled_product(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    flat = x.reshape(-1, x.size(-1))
    step = (flat.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=1e-12)
    rounded = (flat.float() / step).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    y = torch._scaled_mm(rounded, values.t(), scale_a=step, scale_b=scale[None], out_dtype=torch.bfloat16)
    return y.to(x.dtype).view(*x.shape[:-1], values.size(0))
