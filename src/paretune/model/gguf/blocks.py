"""Weights as the blocks of a GGUF file and back (`ggml-quants.c`, `ggml-common.h`).

Integer weights in groups of 32, 64 or 128 with an fp16 scale are Q8_0, Q4_0 or, with a minimum that is the smallest
integer's, Q4_1 bit for bit: nothing is rounded again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paretune.errors import UsageError
from paretune.ops import grouping
from paretune.ops.weights.base import NativeForm, Weight
from paretune.ops.weights.dense import Dense
from paretune.ops.weights.int_groups import IntGroups

BLOCK = 32
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DENSE.items()}
BITS = {"Q8_0": 8, "Q4_0": 4}
EXACT = "the stored bits"


@dataclass(frozen=True)
class Encoded:
    """How a weight goes into a file.

    Args:
        make: gives the rows as bytes, uint8 `[out, bytes of a row]`.
        how: `EXACT`, or what is rounded.
    """

    type_name: str
    make: Callable[[], Tensor]
    how: str


def plan(weight: Weight, wanted: str | None, name: str) -> Encoded:
    """The blocks of a weight.

    Args:
        wanted: a type of `DENSE` or `BITS`; None: what the weight is. Integers that a block type holds exactly stay
            as they are when a block type is wanted.
        name: for messages.

    Raises:
        UsageError: the blocks do not divide its width.
    """
    form = weight.native()
    type_name = None if form is None else _type_of(form)
    if form is not None and type_name is not None and wanted not in DENSE and weight.in_features % BLOCK == 0:
        whole = form
        how = EXACT if form.scale is not None and form.scale.dtype == torch.float16 else "scales rounded to fp16"
        return Encoded(type_name, lambda: _pack_form(whole), how)
    if wanted is None:
        wanted = NAMES[weight.compute_dtype] if isinstance(weight, Dense) else "Q8_0"
    if wanted in DENSE:
        dtype = DENSE[wanted]
        exact = isinstance(weight, Dense) and dtype in (weight.compute_dtype, torch.float32)
        how = EXACT if exact else f"as {wanted}" if isinstance(weight, Dense) else f"dequantised, as {wanted}"
        return Encoded(wanted, lambda: _bytes(weight.dequantize().detach().to(dtype)), how)
    if weight.in_features % BLOCK:
        raise UsageError(
            f"blocks of {BLOCK} do not divide the {weight.in_features} inputs of {name}", "Use --format F16 or F32"
        )
    again = "rounded" if isinstance(weight, Dense) else f"{weight.format} rounded again"

    def rounded() -> Tensor:
        made = IntGroups.quantize(weight.dequantize(), BITS[wanted], BLOCK)
        form = made.native()
        assert form is not None
        return _pack_form(form)

    return Encoded(wanted, rounded, f"{again} to {wanted}")


def _bytes(x: Tensor) -> Tensor:
    """uint8 `[rows, bytes of a row]`."""
    rows = x.contiguous().view(torch.uint8)
    return rows.view(x.size(0), -1) if x.dim() > 1 else rows.view(1, -1)


def _type_of(form: NativeForm) -> str | None:
    """The block type that holds the integers as they are, or None."""
    if form.minimum is None:
        return {"int8": "Q8_0", "int4": "Q4_0"}.get(form.kind)
    return "Q4_1" if form.kind == "int4" and form.lowest == -8 else None


def _pack_form(form: NativeForm) -> Tensor:
    n_out, n_blocks = form.data.size(0), form.n_in // BLOCK

    def of_blocks(numbers: Tensor) -> Tensor:
        """One a group or a row -> fp16, one a block, as bytes `[out, blocks, 2]`."""
        own = grouping.each(numbers.view(n_out, -1).half(), (form.group or form.n_in) // BLOCK, n_blocks)
        return own[..., None].contiguous().view(torch.uint8)

    assert form.scale is not None
    if form.kind == "int8":
        q = form.data.view(n_out, n_blocks, BLOCK).view(torch.uint8)
    else:  # neighbours share a byte here; there the halves of a block do
        pairs = form.data.view(n_out, n_blocks, BLOCK // 2)
        flat = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)  # [out, blocks, 32]
        q = flat[..., : BLOCK // 2] | flat[..., BLOCK // 2 :] << 4
    heads = [of_blocks(numbers) for numbers in (form.scale, form.minimum) if numbers is not None]
    return torch.cat((*heads, q), dim=-1).view(n_out, -1)


def decode(raw: Tensor, type_name: str, dtype: torch.dtype) -> Weight:
    """The weight of raw rows; Q8_0 and Q4_0 keep their bits, Q6_K becomes fp16.

    Args:
        raw: uint8 `[out, bytes of a row]`.
        dtype: that integer weights are computed in.
    """
    if type_name in DENSE:
        return Dense(raw.view(DENSE[type_name]))
    n_out = raw.size(0)
    if type_name == "Q6_K":
        return Dense(_q6_k(raw.view(n_out, -1, 210)).view(n_out, -1).half())
    assert type_name in BITS
    blocks = raw.view(n_out, -1, 34 if type_name == "Q8_0" else 18)
    scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    q = blocks[..., 2:]
    if type_name == "Q8_0":
        return IntGroups(q.contiguous().view(torch.int8).view(n_out, -1), scale, None, dtype, group=BLOCK)
    flat = torch.cat((q & 15, q >> 4), dim=-1)  # [out, blocks, 32]
    packed = flat[..., ::2] | flat[..., 1::2] << 4
    return IntGroups(packed.reshape(n_out, -1), scale, None, dtype, group=BLOCK)


def _q6_k(blocks: Tensor) -> Tensor:
    """Values of Q6_K blocks, fp32 `[..., 256]` (`dequantize_row_q6_K`): 6 bits, a scale for 16, one for all 256."""
    low, high = blocks[..., :128], blocks[..., 128:192]
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float()
    d = blocks[..., 208:210].contiguous().view(torch.float16).float()
    halves = []
    for half in range(2):
        l, h = low[..., 64 * half : 64 * half + 64], high[..., 32 * half : 32 * half + 32]
        parts = [
            (l[..., :32] & 15) | (h & 3) << 4,
            (l[..., 32:] & 15) | (h >> 2 & 3) << 4,
            l[..., :32] >> 4 | (h >> 4 & 3) << 4,
            l[..., 32:] >> 4 | (h >> 6 & 3) << 4,
        ]
        halves.append(torch.cat(parts, dim=-1))
    q = torch.cat(halves, dim=-1).float() - 32
    return q * (d * scales).repeat_interleave(16, dim=-1)
