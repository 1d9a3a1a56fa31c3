"""Attention in native CPU code that skips what a pattern does not see (`ops/native/attend.cpp`).

Online softmax in chunks of 256 keys, sums in fp32, inputs in fp32, bf16 or fp16: no matrix of scores or masks in
memory, whatever the pattern, ALiBi or not. It is the operator for PyTorch code; the native runner has the same
arithmetic inside its steps.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from paretune import native_build
from paretune.errors import ParetuneError
from paretune.ops.attention import reference, sdpa
from paretune.ops.attention.pattern import Pattern, Random, Union, parse, query_blocks
from paretune.ops.attention.spec import AttentionSpec, LayerCache, Visible

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCK = 192  # queries that share a packed chunk
KERNEL = "paretune::attend"


class _Run(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in ("start", "end", "is_local")]


class _Block(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in ("first", "last", "run_from", "run_to")]


class _Attend(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "out")),
        *((name, c_int64 * 3) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        *((name, c_void_p) for name in ("blocks", "runs", "begin", "slopes")),
        *((name, c_int32) for name in ("B", "H", "Hkv", "K", "D", "n_blocks", "format", "first", "prefix", "ring")),
        ("scale", c_float),
    ]


def requires(device: str) -> str | None:
    """Why this form cannot run on `device`, or None."""
    if device != "cpu":
        return "native attention is for CPUs"
    return native_build.unavailable_reason()


def attention(q: Tensor, k_new: Tensor, v_new: Tensor, layer_cache: LayerCache | None, spec: AttentionSpec) -> Tensor:
    """Arguments and result as in `reference.attention`; exact up to the order of additions.

    Rows of unequal length go through `sdpa` with a mask, and so do single tokens whose cache holds no more than the
    pattern sees (dense, or a ring): nothing is left to skip, and one call of PyTorch is the quicker one. Gradients are
    those of the reference, computed again in the backward pass with every score in memory.
    """
    k, v, start, prefix, ring = k_new, v_new, 0, 0, 0
    if layer_cache is not None:
        common = layer_cache.common_start
        prefix, ring = layer_cache.prefix_and_ring
        if common is None or (q.size(2) == 1 and (ring or spec.pattern.is_dense)):
            return sdpa.attention(q, k_new, v_new, layer_cache, spec)
        k, v = layer_cache.append(k_new, v_new, spec.pattern)[:2]
        start = common
    return attend(q, k, v, str(spec.pattern), list(spec.slopes or ()), spec.scale, start, prefix, ring)


@torch.library.custom_op(KERNEL, mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    slopes: list[float],
    scale: float,
    first: int,
    prefix: int = 0,
    ring: int = 0,
) -> Tensor:
    """The queries `[B, H, K, D]` at positions `first ..` on the keys at positions 0, 1, ...; `[B, H, K, D]`.

    Args:
        prefix, ring: of a ring cache: positions from `prefix` on share `ring` slots behind the first ones; 0: no ring.
    """
    B, H, K, D = q.shape
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    # Tokens outside heads, as the layer after it reads them.
    out = torch.empty(B, K, H, D, dtype=q.dtype).transpose(1, 2)
    blocks, runs, n_blocks, begin = _plan(pattern, first, K)
    slope_values = (c_float * H)(*slopes) if slopes else None
    call = _Attend(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        blocks=ctypes.addressof(blocks),
        runs=ctypes.addressof(runs),
        begin=begin.data_ptr(),
        slopes=None if slope_values is None else ctypes.addressof(slope_values),
        B=B,
        H=H,
        Hkv=k.size(1),
        K=K,
        D=D,
        n_blocks=n_blocks,
        format=FORMATS[q.dtype],
        first=first,
        prefix=prefix,
        ring=ring,
        scale=scale,
    )
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        getattr(call, f"{name}_stride")[:] = tensor.stride()[:3]
    with _lock:
        process = os.getpid()
        workers = _workers(torch.get_num_threads(), process)
        if library().paretune_attend(workers, ctypes.byref(call), _parallel(process)):
            raise ParetuneError("native attention ran out of memory", "Free memory")
    return out


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.size(0), q.size(2), q.size(1), q.size(3)).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    pattern, slopes, scale, first, _, ring = ctx.rest
    assert not ring, "training sees no cache"
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        n, K = k.size(2), q.size(2)
        query = torch.arange(first, first + K)[None]
        seen = Visible(k, v, parse(pattern).mask(query, torch.arange(n)[None]), False, query)
        spec = AttentionSpec(scale, parse(pattern), tuple(slopes) or None)
        out = reference.attention(q, k, v, _Given(seen), spec)
    return (*torch.autograd.grad(out, (q, k, v), gradient), *[None] * 6)


attend.register_autograd(_backward, setup_context=_setup_context)


class _Given(LayerCache):
    """A layer cache that shows what it was made with, in an order that it says nothing of."""

    common_start = in_order_from = None
    prefix_and_ring = (0, 0)

    def __init__(self, seen: Visible) -> None:
        self._seen = seen

    def append(self, k_new: Tensor, v_new: Tensor, pattern: Pattern) -> Visible:
        return self._seen


@functools.lru_cache(maxsize=64)
def _plan(pattern: str, first: int, n_tokens: int) -> tuple[Any, Any, int, Tensor]:
    """Blocks of queries and their runs of keys as native code takes them, and each query's begin."""
    found = parse(pattern)
    parts = found.parts if isinstance(found, Union) else (found,)
    is_drawn = any(isinstance(p, Random) for p in parts)
    blocks = query_blocks(found, first, n_tokens, *(() if is_drawn else (BLOCK,)))
    runs: list[_Run] = []
    out: list[_Block] = []
    for block in blocks:
        out.append(_Block(block.start - first, block.end - first, len(runs), len(runs) + len(block.runs)))
        runs += [_Run(*run) for run in block.runs]
    begin = found.begin(torch.arange(first, first + n_tokens)).to(torch.int32)
    return (_Block * len(out))(*out), (_Run * len(runs))(*runs), len(out), begin


_lock = threading.Lock()
_process = os.getpid()


@functools.lru_cache(maxsize=4)
def _parallel(process: int) -> int | None:
    """Where PyTorch's own threads are to be had (GNU OpenMP's entry), or None: then a team of ours works.

    Theirs spin for a while after each operation, and a second team would wait for their cores. A forked child has lost
    them.
    """
    if process != _process:
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (AttributeError, OSError, TypeError):  # another OpenMP, or a system that has no such look-up
        return None


@functools.lru_cache(maxsize=4)
def _workers(n_threads: int, process: int) -> int:
    """A team of threads, kept for the life of the process (a forked child makes its own)."""
    workers = library().paretune_workers(n_threads)
    if not workers:
        raise ParetuneError("no threads for native attention", "Lower --threads")
    return workers


@functools.cache
def library() -> Any:
    """The compiled operator, with its functions declared.

    Raises:
        NativeUnavailable: it cannot be built here.
    """
    lib = native_build.load("attend")
    lib.paretune_workers.restype = c_void_p
    lib.paretune_attend.argtypes = [c_void_p, POINTER(_Attend), c_void_p]
    for which, ours in enumerate((_Attend, _Block, _Run)):
        assert lib.paretune_attend_size(which) == ctypes.sizeof(ours), f"{ours.__name__} differs from attend.cpp"
    return lib
