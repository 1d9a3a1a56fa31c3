"""LLM.int8: int8 rows for integer inputs, outlier columns apart in 16 bits (Dettmers et al. 2022, arXiv:2208.07339)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor

from paretune.errors import CheckpointError
from paretune.ops.int8_linear.mixed import KERNEL, mixed_int8_linear
from paretune.ops.weights.base import NativeForm, Weight, part_of
from paretune.ops.weights.int8_rows import Int8Rows


class MixedInt8(Weight):
    """`W ~ q * scale`, but `W[:, columns] ~ side`; inputs of `threshold` or more are never rounded to 8 bits.

    Args:
        q: int8 `[out, in]`, zero in `columns`.
        scale: fp32 `[out]`, of the other columns.
        columns: int64 `[k]`, inputs that are known to be outliers. The transform names none: the weights of an input
            that proves large when it runs are the integers, as in bitsandbytes.
        side: fp16 `[out, k]`.
        threshold: size from which an input is an outlier.
        compute_dtype: of `rows` and `dequantize`.
    """

    format = "mixed_int8"
    is_native = True
    rows_matter = True  # an input that is an outlier in one row is taken apart in all
    kernel = KERNEL
    bits = 8
    q: Tensor
    scale: Tensor
    columns: Tensor
    side: Tensor
    limit: Tensor
    compute: Tensor

    def __init__(
        self, q: Tensor, scale: Tensor, columns: Tensor, side: Tensor, threshold: float, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        assert q.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == q.shape[:1]
        assert columns.dtype == torch.int64 and side.dtype == torch.float16
        assert side.shape == (q.size(0), columns.numel())
        self.out_features, self.in_features = q.shape
        self.threshold = threshold
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.register_buffer("columns", columns)
        self.register_buffer("side", side)
        # Plain numbers travel into a checkpoint as tensors.
        self.register_buffer("limit", torch.tensor([threshold], dtype=torch.float32))
        self.register_buffer("compute", torch.empty(0, dtype=compute_dtype, device=q.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(bfloat16)` changes the compute dtype; scales, outlier columns and threshold stay what they are.
        kept = {name: getattr(self, name) for name in ("scale", "side", "limit")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(self.q.device))
        return self

    @classmethod
    def quantize(cls, values: Tensor, threshold: float, columns: Tensor | None = None) -> MixedInt8:
        """Rounds to nearest, the outlier columns (int64 `[k]`) to fp16.

        Raises:
            ParetuneError: the matrix holds NaN or infinity.
        """
        columns = torch.empty(0, dtype=torch.int64) if columns is None else columns
        columns = columns.to(values.device)
        side = values[:, columns].half()
        rest = values
        if columns.numel():
            rest = values.clone()
            rest[:, columns] = torch.where(values[:, columns].isfinite(), 0.0, values[:, columns])
        rows = Int8Rows.quantize(rest)
        return cls(rows.q, rows.scale, columns, side, threshold, values.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        return mixed_int8_linear(x, self.q, self.scale, self.threshold, self.columns, self.side)

    def rows(self, index: Tensor) -> Tensor:
        return self._numbers(self.q[index], self.scale[index], self.side[index]).to(self.compute_dtype)

    def dequantize(self) -> Tensor:
        return self.exact().to(self.compute_dtype)

    def exact(self) -> Tensor:
        """The stored numbers in fp32, not rounded to the compute dtype."""
        return self._numbers(self.q, self.scale, self.side)

    def _numbers(self, q: Tensor, scale: Tensor, side: Tensor) -> Tensor:
        out = q.float() * scale[..., None]
        out[..., self.columns] = side.float()
        return out

    def native(self) -> NativeForm | None:
        """Native inputs have 16 bits: outliers need no product of their own there. With weights of theirs they do."""
        if self.columns.numel():
            return None
        return NativeForm("int8", self.q, self.scale, kept={"limit": self.limit})

    @classmethod
    def from_native(cls, form: NativeForm, compute_dtype: torch.dtype) -> MixedInt8:
        assert form.scale is not None
        none = torch.empty(0, dtype=torch.int64)
        side = torch.empty(form.data.size(0), 0, dtype=torch.float16)
        return cls(form.data, form.scale, none, side, float(form.kept["limit"]), compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.compute.dtype

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> MixedInt8:
        q = part_of(tensors, "q", (torch.int8,), 2)
        scale = part_of(tensors, "scale", (torch.float32,), (q.size(0),))
        columns = part_of(tensors, "columns", (torch.int64,), 1)
        side = part_of(tensors, "side", (torch.float16,), (q.size(0), columns.numel()))
        limit = float(part_of(tensors, "limit", (torch.float32,), (1,)))
        if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < q.size(1):
            raise CheckpointError(f"its outlier columns are not among {q.size(1)} inputs", "Save the model again")
        if not limit > 0:
            raise CheckpointError(f"its threshold is {limit}, not above 0", "Save the model again")
        return cls(q, scale, columns, side, limit, part_of(tensors, "compute").dtype)
