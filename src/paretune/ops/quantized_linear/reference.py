"""Linear layers over quantised weights, as the formula says it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, numbers: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y = x W^T + b` with the weights as their format reads them (`Weight.dequantize`).

    Args:
        x: `[..., in]`, floating point.
        numbers: `[out, in]`, any floating dtype; rounded to that of `x`.
        bias: `[out]` or None.

    Returns:
        `[..., out]` in the dtype of `x`.
    """
    return F.linear(x, numbers.to(x.dtype), bias)
