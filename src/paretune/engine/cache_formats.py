"""Keys and values in fewer bits: how a cache stores them, and reads them back."""

from __future__ import annotations

import torch
from torch import Tensor

from paretune.errors import UsageError
from paretune.option import OWN_KERNELS, Option

INT4 = torch.uint8  # what a 4-bit cache is stored as
# What keys and values are worth keeping in; PyTorch would convert the cache at every step.
OPTIONS = tuple(Option(name, needs=frozenset({OWN_KERNELS}), log_gain=0.05) for name in ("kv(bf16)", "kv8", "kv4"))
GROUP = 32  # neighbouring dimensions of a head that share a scale and a minimum in 4 bits


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x[..., D]` to int8 with one scale a head and position, `max |x| / 127`; NaN and infinity make the scale NaN."""
    x = x.float()
    absmax = x.abs().amax(dim=-1)
    scale = torch.where(absmax > 1e-30, absmax / 127, torch.zeros_like(absmax)) + (x * 0).sum(dim=-1)
    q = torch.round(x / torch.where(scale > 0, scale, torch.ones_like(scale))[..., None])
    return q.nan_to_num().clamp(-127, 127).to(torch.int8), scale


def int4_reason(head_dim: int) -> str | None:
    """Why heads of this size have no 4-bit cache, or None: two numbers a byte have to fill a head."""
    return f"a 4-bit cache needs an even head size, not {head_dim}" if head_dim % 2 else None


def check_int4(head_dim: int) -> None:
    """Raises `UsageError` with `int4_reason`."""
    if reason := int4_reason(head_dim):
        raise UsageError(reason, "Use cache_dtype int8")


def groups_of(head_dim: int) -> int:
    """Groups of a head in 4 bits; a head that 32 does not divide is one."""
    return head_dim // GROUP if head_dim % GROUP == 0 else 1


def position_bytes(dtype: torch.dtype, n_kv_head: int, head_dim: int) -> int:
    """Bytes of one position's keys (values have as many) in a layer, with what stands beside them."""
    if dtype == INT4:
        return n_kv_head * (head_dim // 2 + 4 * groups_of(head_dim))
    return n_kv_head * (head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0))


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x[..., D]` to 4 bits from the smallest to the largest of each group, `x ~ q * scale + minimum`.

    Asymmetric, a token by itself, so that a step can be rolled back. (KIVI, Liu et al. 2024, arXiv:2402.02750, does so
    for values; its keys share scales over tokens of a channel, which would have to wait for a whole group of tokens.)

    Returns:
        uint8 `[..., D / 2]`, the even dimension in the low half; fp16 `[..., G, 2]`, scale and minimum. NaN, infinity
        and what fp16 does not hold come back as NaN.
    """
    x = x.float().unflatten(-1, (groups_of(x.size(-1)), -1))
    low = x.amin(dim=-1)
    low, scale = low.half(), ((x.amax(dim=-1) - low) / 15).half()
    step = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    q = torch.round((x - low.float()[..., None]) / step[..., None])
    q = q.nan_to_num().clamp(0, 15).to(torch.uint8).flatten(-2)
    bad = ~(torch.isfinite(low) & torch.isfinite(scale))
    scale = scale.masked_fill(bad, torch.nan)
    return q[..., ::2] | q[..., 1::2] << 4, torch.stack((scale, low), dim=-1)


def dequantize_groups(q: Tensor, scale: Tensor) -> Tensor:
    """The opposite, fp32 `[..., D]`."""
    numbers = torch.stack((q & 15, q >> 4), dim=-1).flatten(-2).float().unflatten(-1, (scale.size(-2), -1))
    scale = scale.float()
    return (numbers * scale[..., :1] + scale[..., 1:]).flatten(-2)
