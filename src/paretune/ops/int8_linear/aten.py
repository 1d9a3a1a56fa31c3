"""The same through PyTorch's int8 matrix-vector kernel on a CPU.

The kernel is fast for bf16 activations only (AVX2, 768 -> 2304, one row: bf16 155 us, fp32 1,158, fp16 1,374), so up
to `FEW_ROWS` rows go through it in bf16: these are the 16 bits of W8A16. More rows are worth converting the weights
for, one transient copy of a layer, and run through the library's matrix product in fp32, or in bf16 where the
processor has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paretune.ops.int8_linear import reference

FEW_ROWS = 32  # where the curves of the two ways cross, 768 -> 2304 on two cores
STEP = 16  # inputs that the kernel takes at once (AVX-512; 8 with AVX2). It has no tail: it would read past the row


def _native_bf16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()


# Whether the library multiplies bf16 matrices with the processor's own instruction. A constant: the compiler cannot
# trace the question.
NATIVE_BF16 = _native_bf16()


def int8_linear(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Arguments and result as `reference.int8_linear`; error of bf16 activations (2^-8) for few rows."""
    n_rows = x.numel() // x.size(-1)
    if x.size(-1) % STEP:
        return reference.int8_linear(x, q, scale)
    if n_rows > FEW_ROWS and (x.dtype == torch.float32 or NATIVE_BF16):
        return reference.int8_linear(x, q, scale)
    flat = x.reshape(-1, x.size(-1)).to(torch.bfloat16).contiguous()
    y = _traced_few_rows(flat, q) if torch.compiler.is_compiling() else _few_rows(flat, q)
    return (y.to(scale.dtype) * scale).to(x.dtype).view(*x.shape[:-1], q.size(0))


def _few_rows(x: Tensor, q: Tensor) -> Tensor:
    """`x q^T` in bf16. Scales of one: a scale rounded to bf16 would shift its whole row by up to 0.4 %."""
    return torch._weight_int8pack_mm(x, q, torch.ones(q.size(0), dtype=torch.bfloat16, device=q.device))


# Opaque to the compiler: inductor's own lowering of the kernel fails on scales that are not a graph input (2.13).
@torch.library.custom_op("paretune::int8_few_rows", mutates_args=())
def _traced_few_rows(x: Tensor, q: Tensor) -> Tensor:
    return _few_rows(x, q)


@_traced_few_rows.register_fake
def _(x: Tensor, q: Tensor) -> Tensor:
    return x.new_empty(x.size(0), q.size(0))
