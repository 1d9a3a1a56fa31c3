"""int8 rows without their zeros: a bit for each weight, and a byte for each that is not zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor

from paretune.errors import CheckpointError, UsageError
from paretune.ops.weights.base import NativeForm, Weight, part_of
from paretune.ops.weights.int8_rows import Int8Rows

BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
LEAST_ZEROS = 1 / 8  # of all weights: with fewer the mask takes more than the zeros did


class Sparse8(Weight):
    """`W[i] ~ q[i] * scale[i]` as int8 rows have it, of which only `q != 0` is stored.

    Native code multiplies it (`ops/native/sparse.h`), with the sums of the dense form bit for bit. PyTorch has no such
    product: there the matrix is expanded at every call.

    Args:
        mask: uint8 `[out, in / 8 rounded up]`, the first input in the lowest bit.
        values: int8 `[n]`, row after row.
        scale: fp32 `[out]`.
        n_in: inputs.
        compute_dtype: of `rows` and `dequantize`.
    """

    format = "sparse8"
    is_native = True
    rows_matter = False  # PyTorch multiplies the expanded matrix, however many rows there are
    kernel = None
    bits = 8
    mask: Tensor
    values: Tensor
    scale: Tensor
    layout: Tensor
    compute: Tensor

    def __init__(self, mask: Tensor, values: Tensor, scale: Tensor, n_in: int, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = mask.size(0), n_in
        self.register_buffer("mask", mask)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("layout", torch.tensor([n_in], dtype=torch.int32))
        self.register_buffer("compute", torch.empty(0, dtype=compute_dtype))  # follows `model.to(dtype)`

    @staticmethod
    def quantize(values: Tensor) -> Sparse8:
        """Rounds a matrix that was pruned.

        Raises:
            UsageError: it has hardly any zeros.
            ParetuneError: it holds NaN or infinity.
        """
        dense = Int8Rows.quantize(values)
        share = 1 - int(dense.q.count_nonzero()) / max(1, dense.q.numel())
        if share < LEAST_ZEROS:
            raise UsageError(
                f"{share:.1%} of its weights are zero: without its zeros it would be larger than int8",
                "Prune it first (wanda, sparsegpt, magnitude)",
            )
        return Sparse8.of(dense.q, dense.scale, values.dtype)

    @staticmethod
    def of(q: Tensor, scale: Tensor, compute_dtype: torch.dtype) -> Sparse8:
        """From int8 `[out, in]` and fp32 scales `[out]`."""
        is_there = q != 0
        padded = torch.nn.functional.pad(is_there, (0, -q.size(1) % 8)).view(q.size(0), -1, 8)
        mask = (padded.to(torch.uint8) * BITS).sum(-1, dtype=torch.int32).to(torch.uint8)
        return Sparse8(mask, q[is_there], scale, q.size(1), compute_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.mask.device)  # fp32 whatever the model's dtype
        return self

    def integers(self) -> Tensor:
        """int8 `[out, in]`, zeros in their places."""
        bits = (self.mask[..., None] & BITS.to(self.mask.device)) != 0
        is_there = bits.flatten(1)[:, : self.in_features]
        q = torch.zeros(is_there.shape, dtype=torch.int8, device=self.mask.device)
        q[is_there] = self.values
        return q

    def matmul(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.dequantize().to(x.dtype))

    def rows(self, index: Tensor) -> Tensor:
        return self.dequantize()[index]

    def dequantize(self) -> Tensor:
        return (self.integers().float() * self.scale[:, None]).to(self.compute_dtype)

    @property
    def n_stored(self) -> int:
        """Numbers that are not zero."""
        return len(self.values)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.compute.dtype

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Sparse8:
        mask = part_of(tensors, "mask", (torch.uint8,), 2)
        values = part_of(tensors, "values", (torch.int8,), 1)
        scale = part_of(tensors, "scale", (torch.float32,), (mask.size(0),))
        n_in = int(part_of(tensors, "layout", (torch.int32,), (1,)))
        if not 8 * mask.size(1) - 8 < n_in <= 8 * mask.size(1):
            raise CheckpointError(f"its mask is {mask.size(1)} bytes wide for {n_in} inputs", "Save the model again")
        made = cls(mask, values, scale, n_in, part_of(tensors, "compute").dtype)
        n = int(((mask[..., None] & BITS) != 0).flatten(1)[:, :n_in].sum())
        if n != len(values):
            raise CheckpointError(f"its mask says {n} values, {len(values)} are stored", "Save the model again")
        return made

    def native(self) -> NativeForm | None:
        return NativeForm("sparse8", self.integers(), self.scale, n_stored=self.n_stored)

    @classmethod
    def from_native(cls, form: NativeForm, compute_dtype: torch.dtype) -> Sparse8:
        assert form.scale is not None
        return cls.of(form.data, form.scale, compute_dtype)
