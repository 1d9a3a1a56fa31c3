"""Linear layer over int8 weights with one scale a row (W8A16), as the formula says it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def int8_linear(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """`y = (x q^T) * scale`.

    Args:
        x: `[..., in]`, floating point.
        q: int8 `[out, in]`.
        scale: fp32 `[out]`.

    Returns:
        `[..., out]` in the dtype of `x`.
    """
    if x.dtype == torch.float16:  # x q^T passes 65504 soon
        return F.linear(x, (q * scale[:, None]).to(x.dtype))
    return (F.linear(x, q.to(x.dtype)) * scale).to(x.dtype)
