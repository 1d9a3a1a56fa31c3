"""Neighbouring inputs of a row that share a scale, and numbers of four bits two a byte: what all such formats do alike.

Widths are any: the last group of a row holds what is left, and the last byte of an odd row of 4-bit numbers is half
empty (zero).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def count(n_in: int, group: int) -> int:
    """Groups of a row of `n_in` inputs, the shorter one at its end included."""
    return -(-n_in // group)


def split(x: Tensor, group: int) -> list[Tensor]:
    """The groups of `x[..., in]` as views `[..., groups, group]`; what is left over is `[..., 1, rest]`, the last."""
    whole = x.size(-1) // group * group
    parts = [x[..., :whole].unflatten(-1, (-1, group))] if whole else []
    return parts if whole == x.size(-1) else [*parts, x[..., None, whole:]]


def each(x: Tensor, group: int, n_in: int) -> Tensor:
    """A number a group, `[..., groups]`, as one an input, `[..., in]`."""
    return x.repeat_interleave(group, dim=-1)[..., :n_in]


def scaled(numbers: Tensor, scale: Tensor, minimum: Tensor | None, group: int) -> Tensor:
    """`numbers * scale (+ minimum)` in fp32.

    Args:
        numbers: fp32 `[..., in]`.
        scale, minimum: any floating dtype, `[..., groups]`.
    """
    parts, at = [], 0
    for part in split(numbers, group):
        own = slice(at, at := at + part.size(-2))
        out = part * scale[..., own, None].float()
        parts.append((out if minimum is None else out + minimum[..., own, None].float()).flatten(-2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def pack_halves(numbers: Tensor) -> Tensor:
    """Numbers from 0 to 15, uint8 `[..., n]`, two a byte: `[..., n / 2]` rounded up, the even one in the low half."""
    numbers = F.pad(numbers, (0, numbers.size(-1) % 2))
    return numbers[..., ::2] | numbers[..., 1::2] << 4


def halves(packed: Tensor, n: int) -> Tensor:
    """The opposite of `pack_halves`: uint8 `[..., n]`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :n]
