"""Linear layers over quantised weights, as the formulas say it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paretune.ops import grouping


def linear(x: Tensor, numbers: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y = x W^T + b` with the weights as their format reads them.

    Args:
        x: `[..., in]`, floating point.
        numbers: `[out, in]`, any floating dtype; rounded to that of `x`.
        bias: `[out]` or None.

    Returns:
        `[..., out]` in the dtype of `x`.
    """
    return F.linear(x, numbers.to(x.dtype), bias)


def dequantize(
    q: Tensor,
    scale: Tensor,
    low: Tensor | None,
    of_scales: Tensor | None,
    offset: Tensor | None,
    lowest: int,
    format: str,
    group: int,
    n_in: int,
) -> Tensor:
    """fp32 `[out, in]` of stored weights of `n_in` inputs; arguments as `triton.quantized_linear` has them."""
    from paretune.ops.weights.nf4 import CODES, dynamic_map  # above this file in the order of imports

    if format == "int8":
        numbers = q.float()
    else:
        codes = grouping.halves(q, n_in)
        numbers = torch.tensor(CODES, device=q.device)[codes.int()] if format == "nf4" else codes.float() - 8
    if not group:
        return numbers * scale[:, None]
    scales = scale.float()
    if of_scales is not None and offset is not None:  # 256 scales share one
        shared = of_scales.repeat_interleave(256)[: scale.numel()].view_as(scale)
        scales = dynamic_map().to(q.device)[scale.int()] * shared + offset
    return grouping.scaled(numbers - lowest if lowest else numbers, scales, low, group)
