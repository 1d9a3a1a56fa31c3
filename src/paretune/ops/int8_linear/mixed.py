"""LLM.int8 through PyTorch's integer product: arguments and result as `reference.mixed_int8_linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL = "paretune::mixed_int8_linear"


# Opaque to the compiler: how many columns are outliers is known only when the inputs are.
@torch.library.custom_op(KERNEL, mutates_args=())
def mixed_int8_linear(x: Tensor, q: Tensor, scale: Tensor, threshold: float, columns: Tensor, side: Tensor) -> Tensor:
    flat = x.reshape(-1, x.size(-1))
    is_outlier = flat.abs() >= threshold
    is_large = is_outlier.any(dim=0)
    is_large[columns] = False  # they have weights of their own
    large = is_large.nonzero().view(-1)
    small = flat.float()
    if large.numel() or columns.numel():
        small = small.masked_fill(is_outlier, 0)
        small[:, columns] = 0
    step = small.abs().amax(dim=1, keepdim=True) / 127
    if large.numel():  # as in bitsandbytes, what is small in them counted for the step
        small = small.masked_fill(is_large, 0)
    rounded = torch.round(small / torch.where(step > 0, step, torch.ones_like(step))).to(torch.int8)
    y = _integer_product(rounded, q).float() * step * scale
    if large.numel():  # their weights stay integers, as in bitsandbytes
        y += F.linear(flat[:, large].float(), q[:, large].float()) * scale
    if columns.numel():
        y += F.linear(flat[:, columns].float(), side.float())
    return y.to(x.dtype).view(*x.shape[:-1], q.size(0))


@mixed_int8_linear.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor, threshold: float, columns: Tensor, side: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], q.size(0))


def _integer_product(a: Tensor, q: Tensor) -> Tensor:
    """int32 `a q^T`; a GPU wants more than 16 rows and multiples of 8."""
    if a.device.type == "cpu":
        return torch._int_mm(a, q.t())
    n, (n_out, n_in) = a.size(0), q.shape
    a = F.pad(a, (0, -n_in % 8, 0, max(0, 17 - n)))
    return torch._int_mm(a, F.pad(q, (0, -n_in % 8, 0, -n_out % 8)).t())[:n, :n_out]
