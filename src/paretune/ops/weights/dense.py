"""The plain format: one tensor in fp32, fp16 or bf16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.ops.weights.base import NativeForm, Weight


class Dense(Weight):
    """A dense matrix.

    Args:
        values: `[out_features, in_features]`.
    """

    format = "dense"
    is_plain = True
    is_native = True
    rows_matter = False

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = values.shape
        # `requires_grad` stays what it was: inference models carry no gradients, the trainer switches them on.
        is_parameter = isinstance(values, nn.Parameter)
        self.bits = 8 * values.element_size()
        self.values = values if is_parameter else nn.Parameter(values, requires_grad=False)

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(x, self.values)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.values, bias)  # one fused addmm

    def rows(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.values)

    def dequantize(self) -> Tensor:
        return self.values

    def native(self) -> NativeForm | None:
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        name = names.get(self.values.dtype)
        return None if name is None else NativeForm(name, self.values.detach())

    @classmethod
    def from_native(cls, form: NativeForm, compute_dtype: torch.dtype) -> Dense:
        return cls(form.data)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.values.dtype

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Dense:
        return cls(tensors["values"])
