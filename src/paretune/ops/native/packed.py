"""Weights packed for native code, and the library that packs, multiplies and walks.

The layout is described in `packed.h`. A packed weight takes the place of the one it was made from: there is one copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, c_int32, c_int64, c_void_p
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from paretune import native_build
from paretune.errors import ParetuneError
from paretune.ops import grouping
from paretune.ops.weights.base import NativeForm, Weight
from paretune.process import give_back_free_memory

KINDS = {"fp32": 0, "bf16": 1, "fp16": 2, "int8": 3, "int4": 4, "nf4": 5, "sparse8": 6}
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "int4": torch.uint8,
    "nf4": torch.uint8,
    "sparse8": torch.int8,
}
GROUPS = (32, 64, 128)
BLOCK = 16  # rows that lie side by side
_ALIGNMENT = 64  # bytes of a cache line
_HUGE_PAGE = 2 << 20
# Of originals, after which their memory is given back to the system. Not after each: what is allocated next would have
# to be mapped page by page again, which doubled the time of loading a model.
_GIVE_BACK_BYTES = 64 << 20


class Matrix(ctypes.Structure):
    """`Matrix` of `packed.h`."""

    _fields_ = [
        ("data", c_void_p),
        ("scale", c_void_p),
        ("minimum", c_void_p),
        ("format", c_int32),
        ("n_out", c_int32),
        ("n_in", c_int32),
        ("group", c_int32),
        ("activation_bits", c_int32),
        ("largest", c_int32),
        ("lowest", c_int32),
    ]


def library() -> Any:
    """The compiled code, built on first use.

    Raises:
        NativeUnavailable: it cannot be built here.
    """
    lib: Any = native_build.load("step")
    if not hasattr(lib, "packing_is_declared"):
        lib.paretune_isa.restype = ctypes.c_char_p
        lib.paretune_packed_bytes.argtypes, lib.paretune_packed_bytes.restype = [c_int32] * 3, c_int64
        lib.paretune_pack.argtypes = [c_int32, c_void_p, c_int32, c_int32, c_void_p]
        lib.paretune_pack.restype = None
        lib.paretune_unpack.argtypes, lib.paretune_unpack.restype = [POINTER(Matrix), c_void_p], None
        lib.paretune_row.argtypes, lib.paretune_row.restype = [POINTER(Matrix), c_int64, c_void_p], None
        lib.paretune_products.argtypes = [POINTER(Matrix), c_void_p, c_int32, c_void_p]
        assert lib.paretune_sizes(1) == ctypes.sizeof(Matrix), "Matrix differs from packed.h"
        lib.packing_is_declared = True
    return lib


def isa() -> str:
    """The instruction set that the code was compiled for: avx512 (+ bf16, + vnni), avx2 or portable."""
    return library().paretune_isa().decode()


def _blocks(values: Tensor) -> Tensor:
    """fp16 `[out, n]` -> `[out / 16, n, 16]`, missing rows zero."""
    padded = F.pad(values, (0, 0, 0, -values.size(0) % BLOCK))
    return padded.view(-1, BLOCK, values.size(1)).transpose(1, 2).contiguous()


def _rows(blocks: Tensor, n_out: int) -> Tensor:
    return blocks.transpose(1, 2).reshape(-1, blocks.size(1))[:n_out].contiguous()


class PackedWeight(Weight):
    """A weight as native code reads it. Made by `pack`; says of itself what the original said.

    Args:
        original: taken apart; nothing of it is kept but its class.
        memory: uint8, at least `packed_bytes(original)`.
    """

    rows_matter = False  # the bits of a row are the same whatever the others are
    packed: Tensor
    scale: Tensor | None
    minimum: Tensor | None

    def __init__(self, original: Weight, memory: Tensor) -> None:
        super().__init__()
        form = original.native()
        assert form is not None
        self._origin, self._compute_dtype = type(original), original.compute_dtype
        self.out_features, self.in_features = original.out_features, original.in_features
        self.kind, self.group, self.activation_bits = form.kind, form.group, form.activation_bits
        self.bits, self._lowest, self.n_stored = original.bits, form.lowest, form.n_stored
        data = form.data.contiguous()
        # Small numbers let byte products be added in 16 bits for longer (tiles.h), which only 7-bit inputs ask for.
        self._largest = (
            max(-int(data.min()), int(data.max())) if form.kind == "int8" and form.activation_bits == 7 else 128
        )
        assert data.device.type == "cpu" and memory.numel() == packed_bytes(original)
        library().paretune_pack(
            KINDS[form.kind], data.data_ptr(), self.out_features, self.in_features, memory.data_ptr()
        )
        self.register_buffer("packed", memory)
        scale, minimum = form.scale, form.minimum
        if form.group:
            assert form.group in GROUPS and scale is not None
            assert scale.size(1) == grouping.count(self.in_features, form.group)
            scale, minimum = _blocks(scale), None if minimum is None else _blocks(minimum)
        elif scale is not None:
            scale = F.pad(scale.float(), (0, -self.out_features % BLOCK))
        self.register_buffer("scale", scale)
        self.register_buffer("minimum", minimum)
        self._kept = list(form.kept)
        for name, tensor in form.kept.items():
            self.register_buffer(f"kept_{name}", tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(bfloat16)` changes what rows and products come out in; packed bytes and scales stay.
        self._compute_dtype = fn(torch.empty(0, dtype=self._compute_dtype)).dtype
        return self

    @property
    def format(self) -> str:  # type: ignore[override]
        return self._origin.format

    @property
    def is_plain(self) -> bool:  # type: ignore[override]
        return self._origin.is_plain

    @property
    def kernel(self) -> str:  # type: ignore[override]
        return f"native::{self.kind}"

    def matrix(self) -> Matrix:
        """For native code; valid as long as this object."""
        return Matrix(
            data=self.packed.data_ptr(),
            scale=None if self.scale is None else self.scale.data_ptr(),
            minimum=None if self.minimum is None else self.minimum.data_ptr(),
            format=KINDS[self.kind],
            n_out=self.out_features,
            n_in=self.in_features,
            group=self.group,
            activation_bits=self.activation_bits,
            largest=self._largest,
            lowest=self._lowest,
        )

    def original(self) -> Weight:
        """The weight that was packed, bit for bit."""
        width = -(-self.in_features // 2) if self.kind in ("int4", "nf4") else self.in_features
        data = torch.empty(self.out_features, width, dtype=_DTYPES[self.kind])
        library().paretune_unpack(ctypes.byref(self.matrix()), data.data_ptr())
        scale, minimum = self.scale, self.minimum
        if self.group:
            assert scale is not None
            scale = _rows(scale, self.out_features)
            minimum = None if minimum is None else _rows(minimum, self.out_features)
        elif scale is not None:
            scale = scale[: self.out_features].clone()
        kept = {name: getattr(self, f"kept_{name}") for name in self._kept}
        numbers = (self.kind, data, scale, minimum, self.group, self.activation_bits, kept)
        form = NativeForm(*numbers, n_in=self.in_features, lowest=self._lowest)
        return self._origin.from_native(form, self._compute_dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """Through the native kernel, one thread. The runner has faster ways."""
        flat = x.detach().reshape(-1, self.in_features).float().contiguous()
        out = torch.empty(flat.size(0), self.out_features)
        if flat.size(0):
            status = library().paretune_products(
                ctypes.byref(self.matrix()), flat.data_ptr(), flat.size(0), out.data_ptr()
            )
            if status:
                raise ParetuneError("no memory for a native product", "Free memory")
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        out = torch.empty(flat.numel(), self.in_features)
        for i, row in enumerate(flat.tolist()):
            if not 0 <= row < self.out_features:
                raise IndexError("a row is not in the table")
            library().paretune_row(ctypes.byref(self.matrix()), row, out[i].data_ptr())
        return out.view(*index.shape, self.in_features).to(self._compute_dtype)

    def dequantize(self) -> Tensor:
        return self.original().dequantize()

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._compute_dtype

    def to_tensors(self) -> dict[str, Tensor]:
        return self.original().to_tensors()

    def native(self) -> NativeForm | None:
        return self.original().native()

    @property
    def padded_rows(self) -> int:
        return -(-self.out_features // BLOCK) * BLOCK

    @property
    def padded_inputs(self) -> int:
        quantum = {"int4": 8, "nf4": 8, "int8": 4, "sparse8": 4, "bf16": 2}.get(self.kind, 1)
        return -(-self.in_features // quantum) * quantum

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def stored_bytes(self) -> int:
        return sum(t.nbytes for t in self.buffers())


def packed_bytes(weight: Weight) -> int:
    """Bytes of the packed values, scales aside."""
    form = weight.native()
    assert form is not None
    n_bytes = library().paretune_packed_bytes(KINDS[form.kind], weight.out_features, weight.in_features)
    return n_bytes + form.n_stored


def pack(weights: Sequence[Weight]) -> Iterator[PackedWeight]:
    """Packs one after the other into one piece of memory, so that the caller can let go of each original in between."""
    sizes = [packed_bytes(w) for w in weights]
    memory = _arena(sum(-(-n // _ALIGNMENT) * _ALIGNMENT for n in sizes))
    at = 0
    for weight, size in zip(weights, sizes, strict=True):
        _freed.add(weight.stored_bytes)
        # Each has a storage of its own, so that bytes can be counted by storage.
        yield PackedWeight(weight, torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=at))
        at += -(-size // _ALIGNMENT) * _ALIGNMENT


class _Freed:
    """Bytes of originals that were let go of since memory was last given back, over all calls of `pack`."""

    def __init__(self) -> None:
        self.n_bytes = 0

    def add(self, n_bytes: int) -> None:
        self.n_bytes += n_bytes
        if self.n_bytes >= _GIVE_BACK_BYTES:
            give_back_free_memory()
            self.n_bytes = 0


_freed = _Freed()


def _private(n_bytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, n_bytes)
    return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no huge pages


def _arena(n_bytes: int) -> Any:
    """Memory in huge pages where the system gives them: fewer misses of the address cache when it is streamed."""
    try:
        memory = _private(max(n_bytes, _ALIGNMENT))
    except (OSError, ValueError):
        raise ParetuneError(f"no memory for {n_bytes >> 20} MiB of weights", "Free memory") from None
    if n_bytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
