"""The linear layer over quantised weights as one operator: the kernels of `triton.py`, where they run.

Opaque to the compiler, which asks for nothing but the shape: no graph breaks, nothing is copied, the host waits for
nothing, so that a CUDA graph can hold it (the first call of a shape times tiles, and comes before a capture).
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from paretune.ops.quantized_linear import reference
from paretune.ops.quantized_linear.tiles import FORMATS, GEMV_TILES, Tile

KERNELS = ("quantized_gemv", "quantized_gemm")  # of which a profiled step shows at least one
NAME = "paretune::quantized_linear"


@torch.library.custom_op(NAME, mutates_args=())
def quantized_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    low: Tensor | None,
    of_scales: Tensor | None,
    offset: Tensor | None,
    lowest: int,
    bias: Tensor | None,
    format: str,
    group: int,
) -> Tensor:
    """Arguments and result as `triton.quantized_linear`; the formula where the kernels do not run."""
    if unavailable_reason(str(x.device)):
        numbers = reference.dequantize(q, scale, low, of_scales, offset, lowest, format, group, x.size(-1))
        return reference.linear(x, numbers, bias)
    from paretune.ops.quantized_linear import triton

    return triton.quantized_linear(x, q, scale, low, of_scales, offset, lowest, bias, format=format, group=group)


@quantized_linear.register_fake
def _(x, q, scale, low, of_scales, offset, lowest, bias, format, group):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], q.size(0))


def applies(x: Tensor) -> bool:
    """Whether a product with `x` takes the operator. It has no gradient: where one is wanted the formula runs."""
    return x.device.type == "cuda" and not (torch.is_grad_enabled() and x.requires_grad)


def unavailable_reason(device: str) -> str | None:
    """Why the kernels cannot run on `device`, or None: found by compiling them there, once a process.

    Loading a model asks first, so that neither the trial nor what it leaves behind falls into a captured graph.
    """
    if not device.startswith("cuda"):
        return "Triton's kernels run on a GPU"
    return _tried(device if ":" in device or not torch.cuda.is_available() else f"cuda:{torch.cuda.current_device()}")


@functools.cache
def _tried(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        error = trial(device)
    except Exception as failure:  # whatever the compiler or the driver says is the answer
        lines = str(failure).strip().splitlines()
        return f"Triton's kernels do not run: {(lines[0] if lines else type(failure).__name__)[:160]}"
    return None if error < 0.01 else f"Triton's kernels ran, and their result is {error:.0%} away"


@torch.no_grad()
def trial(device: str) -> float:
    """The largest relative error over formats and kernels on small layers; fp16, which every GPU knows."""
    from paretune.ops.quantized_linear import triton

    generator = torch.Generator().manual_seed(0)
    errors = []
    for format in FORMATS:
        is_nf4, n_in = format == "nf4", 64 if format == "int8" else 128
        q = torch.randint(0, 256, (16, 64), dtype=torch.uint8, generator=generator)
        q = q.view(torch.int8) if format == "int8" else q
        # 255 stands for 1 in the map of nf4, so that all scales are 1/64.
        scale = torch.full((16, n_in // 64), 255 if is_nf4 else 1 / 64, dtype=torch.uint8 if is_nf4 else torch.half)
        of_scales, offset = (torch.full((1,), 1 / 64), torch.zeros(1)) if is_nf4 else (None, None)
        numbers = reference.dequantize(q, scale, None, of_scales, offset, 0, format, 64, n_in)
        for n_rows, tile in ((1, GEMV_TILES[0]), (3, Tile(64, 64))):
            x = torch.randn(n_rows, n_in, generator=generator).half()
            on_device = [None if t is None else t.to(device) for t in (x, q, scale, None, of_scales, offset)]
            y = triton.quantized_linear(*on_device, format=format, group=64, tile=tile)  # type: ignore[arg-type]
            exact = reference.linear(x.double(), numbers)
            errors.append(float((y.cpu().double() - exact).norm() / exact.norm()))
    return max(errors)
