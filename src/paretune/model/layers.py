"""Layers that hold a `Weight`, whatever its format."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.ops.weights.base import Weight
from paretune.ops.weights.dense import Dense

DEFAULT_ATTENTION = "eager"  # the reference; a recipe puts a fast form in its place

ACTIVATION_FUNCTIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


class Linear(nn.Module):
    """`y = x W^T + b`.

    Args:
        weight: `[out, in]` in any format.
        bias: `[out]` or None.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.linear(x, self.bias)


class Embedding(nn.Module):
    """`index[...] -> [..., in]`."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, index: Tensor) -> Tensor:
        return self.weight.rows(index)


def empty_linear(in_features: int, out_features: int, bias: bool) -> Linear:
    """A linear layer with unset values in the default dtype, to be filled by `checkpoint` or an initialiser."""
    values = torch.empty(out_features, in_features)
    return Linear(Dense(values), torch.empty(out_features) if bias else None)


def empty_embedding(n_rows: int, width: int) -> Embedding:
    return Embedding(Dense(torch.empty(n_rows, width)))


class LayerNorm(nn.LayerNorm):
    """Layer norm whose parameters carry no gradient until a trainer asks for them."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)
        self.requires_grad_(False)


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`, the mean taken in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)
