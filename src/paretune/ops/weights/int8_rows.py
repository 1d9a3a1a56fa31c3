"""int8, one symmetric scale a row: W8A16 of the `quantization` study (absmax)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor

from paretune.errors import ParetuneError
from paretune.ops.int8_linear import aten, reference
from paretune.ops.weights.base import GpuForm, NativeForm, Weight, is_finite, part_of

AT_ONCE = 1 << 18  # numbers that are rounded together: they and what is made of them stay in the caches


class Int8Rows(Weight):
    """`W[i] ~ q[i] * scale[i]`, `scale[i] = max |W[i]| / 127`.

    Args:
        q: int8 `[out, in]`.
        scale: fp32 `[out]`.
        compute_dtype: of `rows` and `dequantize`.
    """

    format = "int8_rows"
    is_native = True
    rows_matter = True  # few rows are rounded to bf16, many are not
    kernel = "aten::_weight_int8pack_mm"
    bits = 8
    q: Tensor
    scale: Tensor
    compute: Tensor

    def __init__(self, q: Tensor, scale: Tensor, compute_dtype: torch.dtype) -> None:
        super().__init__()
        assert q.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == q.shape[:1]
        self.out_features, self.in_features = q.shape
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        # An empty tensor that carries the compute dtype into a checkpoint and back.
        self.register_buffer("compute", torch.empty(0, dtype=compute_dtype, device=q.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(bfloat16)` changes the compute dtype; the scales stay fp32, on the device of their rows.
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.q.device)
        return self

    @classmethod
    def quantize(cls, values: Tensor) -> Int8Rows:
        """Rounds to nearest.

        Raises:
            ParetuneError: the matrix holds NaN or infinity.
        """
        if values.numel() > AT_ONCE:  # rows are independent, and the steps in between take four times the memory
            parts = [cls.quantize(part) for part in values.split(max(1, AT_ONCE // values.size(1)))]
            return cls(torch.cat([p.q for p in parts]), torch.cat([p.scale for p in parts]), values.dtype)
        w = values.detach().float()
        if not is_finite(w):
            raise ParetuneError("a weight holds NaN or infinity", "Repair the checkpoint before quantising it")
        absmax = w.abs().amax(dim=1)
        scale = torch.where(absmax > 0, absmax / 127, torch.ones_like(absmax))  # a zero row stays zero
        q = torch.round(w / scale[:, None]).clamp_(-127, 127).to(torch.int8)
        return cls(q, scale, values.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        form = aten if x.device.type == "cpu" else reference
        return form.int8_linear(x, self.q, self.scale)

    def rows(self, index: Tensor) -> Tensor:
        return (self.q[index].float() * self.scale[index][..., None]).to(self.compute_dtype)

    def dequantize(self) -> Tensor:
        return (self.q.float() * self.scale[:, None]).to(self.compute_dtype)

    def gpu(self) -> GpuForm | None:
        return GpuForm(self.q, self.scale)

    def native(self) -> NativeForm | None:
        return NativeForm("int8", self.q, self.scale)

    @classmethod
    def from_native(cls, form: NativeForm, compute_dtype: torch.dtype) -> Int8Rows:
        assert form.scale is not None
        return cls(form.data, form.scale, compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.compute.dtype

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Int8Rows:
        q = part_of(tensors, "q", (torch.int8,), 2)
        scale = part_of(tensors, "scale", (torch.float32,), (q.size(0),))
        return cls(q, scale, part_of(tensors, "compute").dtype)
