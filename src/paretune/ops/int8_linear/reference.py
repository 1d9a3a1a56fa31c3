"""Linear layers over int8 weights with one scale a row (W8A16 and LLM.int8), as the formulas say it."""

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


def mixed_int8_linear(x: Tensor, q: Tensor, scale: Tensor, threshold: float, columns: Tensor, side: Tensor) -> Tensor:
    """LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339, section 3.2): two products.

    Inputs whose size is `threshold` or more in some row, and `columns`, are multiplied as they are; the others are
    rounded to 127 steps of their row's largest, so that integers meet integers.

    Args:
        x: `[..., in]`, floating point.
        q, scale: as above.
        columns: int64 `[k]`, inputs whose weights are kept in 16 bits; `q` holds zeros there.
        side: those weights, 16 bits, `[out, k]`.

    Returns:
        `[..., out]` in the dtype of `x`.
    """
    flat = x.reshape(-1, x.size(-1)).float()
    weight = q.double() * scale.double()[:, None]
    weight[:, columns] = side.double()
    is_outlier = flat.abs() >= threshold
    is_large = is_outlier.any(dim=0)
    is_large[columns] = True
    # As in bitsandbytes, what is small in a column that is large elsewhere counts for its row's step.
    stays = flat.masked_fill(is_outlier, 0)
    stays[:, columns] = 0
    step = stays.abs().amax(dim=1, keepdim=True) / 127
    small = flat.masked_fill(is_large, 0)
    rounded = torch.round(small / torch.where(step > 0, step, torch.ones_like(step))).double() * step
    y = torch.where(is_large, flat, rounded).double() @ weight.T
    return y.to(x.dtype).view(*x.shape[:-1], q.size(0))
