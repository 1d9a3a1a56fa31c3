"""Weights as the blocks of a GGUF file and back (`ggml-quants.c`, `ggml-common.h`).

Integer weights in groups of 32, 64 or 128 with an fp16 scale are Q8_0, Q4_0 or, with a minimum that is the smallest
integer's, Q4_1 bit for bit: nothing is rounded again. Other blocks are read to the numbers they stand for, by
llama.cpp's own `gguf` package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import gguf
import numpy as np
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
BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}  # blocks of 32 that `IntGroups` holds
MINIMUM = "Q4_1"  # the one whose blocks have a minimum beside the scale
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
        made = IntGroups.quantize(weight.dequantize(), BITS[wanted], BLOCK, minimum=wanted == MINIMUM)
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
    return MINIMUM if form.kind == "int4" and form.lowest == -8 else None


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
    """The weight of raw rows: types of `BITS` keep their bits, other blocks become dense fp32.

    Args:
        raw: uint8 `[out, bytes of a row]`.
        type_name: one that `is_read`.
        dtype: that integer weights are computed in.
    """
    if type_name in DENSE:
        return Dense(raw.view(DENSE[type_name]))
    if type_name not in BITS:
        return Dense(values(raw, type_name))
    bits, n_heads = BITS[type_name], 1 + (type_name == MINIMUM)  # fp16 numbers before the integers: scale, minimum
    blocks = raw.view(raw.size(0), -1, 2 * n_heads + BLOCK * bits // 8)
    heads = blocks[..., : 2 * n_heads].contiguous().view(torch.float16)
    scale, minimum = heads[..., 0].contiguous(), heads[..., 1].contiguous() if n_heads > 1 else None
    q = blocks[..., 2 * n_heads :]
    if bits == 8:
        q = q.contiguous().view(torch.int8)
    else:
        q = grouping.pack_halves(torch.cat((q & 15, q >> 4), dim=-1))  # the halves of a block share bytes there
    return IntGroups(q.flatten(1).contiguous(), scale, minimum, dtype, group=BLOCK)


def values(raw: Tensor, type_name: str) -> Tensor:
    """What raw rows stand for, fp32 `[out, in]`, as the `gguf` package dequantises them.

    Args:
        raw: uint8 `[out, bytes of a row]`.
        type_name: one that `is_read`.
    """
    with np.errstate(all="ignore"):  # infinities are the caller's to find, not NumPy's to warn about
        made = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[type_name])
    return torch.from_numpy(np.ascontiguousarray(made, dtype=np.float32)).view(raw.size(0), -1)


@functools.cache
def is_read(type_name: str) -> bool:
    """Whether tensors of this type can be read; the package is asked by trying, since it keeps no list."""
    kind = gguf.GGMLQuantizationType[type_name]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True
