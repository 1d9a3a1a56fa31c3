"""Linear layers over quantised weights on a GPU: dequantised in registers, inside the product (Triton).

Two kernels read the weights as they are stored. `quantized_gemv` is for one row of inputs, where reading the weights
is all there is to do: 16 bytes a thread and output, fp32 products. `quantized_gemm` is for more rows: a tile is
dequantised to the dtype of the inputs and goes to the matrix units, fp32 sums. Where the output is too narrow to keep
the device busy, the inputs are shared out among programs, and a third kernel adds the parts in a fixed order: with the
same tiles the same inputs give the same bits.

Integers become floats without a conversion: their bits are put into the mantissa of a power of two, which is then
subtracted. That is exact, and the interpreter runs it too.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from paretune.ops.quantized_linear import tiles
from paretune.ops.quantized_linear.tiles import Tile

MAGIC = 150 << 23  # the bits of 2^23


@triton.jit
def _nibble(words, I: tl.constexpr, magic, LOWEST: tl.constexpr):
    """fp32 of the `I`-th four bits, 0 to 15, less 8 and `LOWEST`."""
    part = words if I < 4 else words >> 16
    P: tl.constexpr = I % 4
    bits = (part & (15 << (4 * P))) | (magic - (P << 25))
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - 4 * P)) + 8 + LOWEST)


@triton.jit
def _byte(words, I: tl.constexpr, magic, LOWEST: tl.constexpr):
    """fp32 of the `I`-th byte, -128 to 127, whose highest bit was turned, less `LOWEST`."""
    part = words if I < 2 else words >> 16
    P: tl.constexpr = I % 2
    bits = (part & (255 << (8 * P))) | (magic - (P << 26))
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - 8 * P)) + 128 + LOWEST)


@triton.jit
def _number(words, I: tl.constexpr, codes_ptr, magic, FORMAT: tl.constexpr, LOWEST: tl.constexpr):
    """fp32 of the `I`-th four bits before it is scaled."""
    if FORMAT == "int4":
        return _nibble(words, I, magic, LOWEST)
    else:
        codes = tl.load(codes_ptr + tl.arange(0, 16))
        index = tl.reshape((words >> (4 * I)) & 15, (words.numel,))
        return tl.reshape(tl.gather(codes, index, 0), words.shape)


@triton.jit
def _scales(scale_ptr, of_scales_ptr, offset_ptr, map_ptr, at, mask, FORMAT: tl.constexpr):
    """fp32 scales at the places `at` (int64) of the stored ones."""
    stored = tl.load(scale_ptr + at, mask=mask, other=0)
    if FORMAT == "nf4":
        numbers = tl.load(map_ptr + stored.to(tl.int32))
        return numbers * tl.load(of_scales_ptr + at // 256, mask=mask, other=0.0) + tl.load(offset_ptr)
    return stored.to(tl.float32)


@triton.jit
def quantized_gemv(
    x_ptr,  # [K]
    q_ptr,  # int32 [N, 4 * CHUNKS]
    scale_ptr,  # int8 rows: fp32 [N]; groups: fp16 [N, row_groups]; nf4: uint8 [N, row_groups]
    low_ptr,  # fp16 [N, row_groups]
    of_scales_ptr,  # fp32 [N * row_groups / 256]
    offset_ptr,  # fp32 [1]
    map_ptr,  # fp32 [256]
    codes_ptr,  # fp32 [16]
    bias_ptr,  # [N]
    out_ptr,  # [N], or fp32 [SPLIT, N] where the inputs are split
    N,
    row_groups,
    magic,  # the bits of 2^23: an argument stays in a register, a constant would cost an instruction a weight
    CHUNKS: tl.constexpr,  # row_words / 4. Layers have few widths, and loops of known length suit the interpreter too
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,  # 0: a scale a row
    HAS_LOW: tl.constexpr,
    LOWEST: tl.constexpr,  # the integer that `low` stands for; 0 without it
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # A chunk is four words, 16 bytes: what a thread loads at once. It lies inside one group whatever the format.
    WORD: tl.constexpr = 4 if FORMAT == "int8" else 8
    CHUNK: tl.constexpr = 4 * WORD
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    row = n.to(tl.int64)
    STEPS: tl.constexpr = (CHUNKS + SPLIT * BLOCK_C - 1) // (SPLIT * BLOCK_C)
    # Chunks come first: threads of a warp then lie side by side along a row, and a thread meets the same inputs in
    # each of its rows.
    total = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for step in range(STEPS):
        c = (step * SPLIT + part) * BLOCK_C + tl.arange(0, BLOCK_C)
        there = c < CHUNKS
        live = there[:, None] & (n < N)[None, :]
        at = c[:, None] * 4 + row[None, :] * (4 * CHUNKS)
        w = tl.load(q_ptr + (at[:, :, None] + tl.arange(0, 4)[None, None, :]), mask=live[:, :, None], other=0)
        x = tl.load(x_ptr + (c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]), mask=there[:, None], other=0.0)
        if FORMAT == "int8":
            even, odd = tl.split(tl.reshape(x, (BLOCK_C, 4, 2, 2)))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            w = w ^ -2139062144  # the highest bit of each byte: two's complement becomes 0 to 255
            y = _byte(w, 0, magic, LOWEST) * x0.to(tl.float32)[:, None, :]
            y += _byte(w, 1, magic, LOWEST) * x1.to(tl.float32)[:, None, :]
            y += _byte(w, 2, magic, LOWEST) * x2.to(tl.float32)[:, None, :]
            y += _byte(w, 3, magic, LOWEST) * x3.to(tl.float32)[:, None, :]
        else:
            even, odd = tl.split(tl.reshape(x, (BLOCK_C, 4, 2, 2, 2)))
            x04, x26 = tl.split(even)
            x15, x37 = tl.split(odd)
            x0, x4 = tl.split(x04)
            x2, x6 = tl.split(x26)
            x1, x5 = tl.split(x15)
            x3, x7 = tl.split(x37)
            y = _number(w, 0, codes_ptr, magic, FORMAT, LOWEST) * x0.to(tl.float32)[:, None, :]
            y += _number(w, 1, codes_ptr, magic, FORMAT, LOWEST) * x1.to(tl.float32)[:, None, :]
            y += _number(w, 2, codes_ptr, magic, FORMAT, LOWEST) * x2.to(tl.float32)[:, None, :]
            y += _number(w, 3, codes_ptr, magic, FORMAT, LOWEST) * x3.to(tl.float32)[:, None, :]
            y += _number(w, 4, codes_ptr, magic, FORMAT, LOWEST) * x4.to(tl.float32)[:, None, :]
            y += _number(w, 5, codes_ptr, magic, FORMAT, LOWEST) * x5.to(tl.float32)[:, None, :]
            y += _number(w, 6, codes_ptr, magic, FORMAT, LOWEST) * x6.to(tl.float32)[:, None, :]
            y += _number(w, 7, codes_ptr, magic, FORMAT, LOWEST) * x7.to(tl.float32)[:, None, :]
        y = tl.sum(y, axis=2)
        if GROUP > 0:
            g = row[None, :] * row_groups + (c * CHUNK // GROUP)[:, None]
            y *= _scales(scale_ptr, of_scales_ptr, offset_ptr, map_ptr, g, live, FORMAT)
            if HAS_LOW:
                y += (
                    tl.load(low_ptr + g, mask=live, other=0.0).to(tl.float32)
                    * tl.sum(x.to(tl.float32), axis=1)[:, None]
                )
        total += y
    out = tl.sum(total, axis=0)
    if GROUP == 0:
        out *= tl.load(scale_ptr + n, mask=n < N, other=0.0)
    if SPLIT == 1:
        if HAS_BIAS:
            out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < N)
    else:
        tl.store(out_ptr + part.to(tl.int64) * N + n, out, mask=n < N)


@triton.jit
def _numbers(q, codes_ptr, magic, FORMAT: tl.constexpr, LOWEST: tl.constexpr):
    """fp32 `[BLOCK_N, BLOCK_K]` of stored bytes, before they are scaled."""
    if FORMAT == "int8":
        return q.to(tl.float32) - LOWEST
    else:
        q = q.to(tl.int32)
        even = _number(q, 0, codes_ptr, magic, FORMAT, LOWEST)
        odd = _number(q, 1, codes_ptr, magic, FORMAT, LOWEST)
        return tl.reshape(tl.join(even, odd), (q.shape[0], 2 * q.shape[1]))


@triton.jit
def quantized_gemm(
    x_ptr,  # [M, K], rows `x_stride` apart
    q_ptr,  # int8 [N, K], or uint8 [N, K / 2], rounded up: the padding meets zeros
    scale_ptr,
    low_ptr,
    of_scales_ptr,
    offset_ptr,
    map_ptr,
    codes_ptr,
    bias_ptr,  # these as above
    out_ptr,  # [M, N], or fp32 [SPLIT, M, N]
    M,
    N,
    x_stride,
    row_groups,
    magic,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_LOW: tl.constexpr,
    LOWEST: tl.constexpr,  # the integer that `low` stands for; 0 without it
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in fp32: the interpreter knows no bf16 products
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The product is transposed, `W x^T`, so that the dequantised side is the one that may come from registers.
    PER_BYTE: tl.constexpr = 1 if FORMAT == "int8" else 2
    ROW_BYTES: tl.constexpr = (K + PER_BYTE - 1) // PER_BYTE
    STEPS: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K)
    N_GROUPS: tl.constexpr = 1 if GROUP == 0 or GROUP >= BLOCK_K else BLOCK_K // GROUP
    # Programs that share a tile of weights are neighbours: it is read from memory once.
    n_tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    part = tl.program_id(1)
    m = (pid % n_tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid // n_tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < N
    row = n.to(tl.int64)
    x_row = m.to(tl.int64) * x_stride
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(STEPS):
        start = (step * SPLIT + part) * BLOCK_K
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + (k[:, None] + x_row[None, :]), mask=(k < K)[:, None] & (m < M)[None, :], other=0.0)
        b = start // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)
        live = live_n[:, None] & (b < ROW_BYTES)[None, :]
        q = tl.load(q_ptr + (row[:, None] * ROW_BYTES + b[None, :]), mask=live, other=0)
        w = _numbers(q, codes_ptr, magic, FORMAT, LOWEST)
        if GROUP > 0:
            g = start // GROUP + tl.arange(0, N_GROUPS)
            at = row[:, None] * row_groups + g[None, :]
            live = live_n[:, None] & (g < row_groups)[None, :]
            scale = _scales(scale_ptr, of_scales_ptr, offset_ptr, map_ptr, at, live, FORMAT)
            w = tl.reshape(w, (BLOCK_N, N_GROUPS, BLOCK_K // N_GROUPS)) * scale[:, :, None]
            if HAS_LOW:
                w += tl.load(low_ptr + at, mask=live, other=0.0).to(tl.float32)[:, :, None]
            w = tl.reshape(w, (BLOCK_N, BLOCK_K))
        w = w.to(x.dtype)  # rounded as the reference rounds it
        if WIDE:
            total = tl.dot(w.to(tl.float32), x.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(w, x, total, input_precision="ieee")
    if GROUP == 0:
        total *= tl.load(scale_ptr + n, mask=live_n, other=0.0)[:, None]
    mask = live_n[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT == 1:
        if HAS_BIAS:
            total += tl.load(bias_ptr + n, mask=live_n, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + part.to(tl.int64) * M * N + at, total, mask=mask)


@triton.jit
def gemm_sum_parts(
    parts_ptr,  # fp32 [SPLIT, M, N]
    bias_ptr,  # [N]
    out_ptr,  # [M, N]
    n_values,  # M * N
    N,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n_values
    at = parts_ptr + i
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(SPLIT):  # in the order of the parts
        total += tl.load(at, mask=mask, other=0.0)
        at += n_values
    if HAS_BIAS:
        total += tl.load(bias_ptr + i % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=mask)


# Under the interpreter kernels are plain functions: nothing is timed, and bf16 products are taken in fp32.
INTERPRETED = not isinstance(gemm_sum_parts, triton.JITFunction)
SUM_BLOCK = 1024
GEMV_CHUNK_BYTES = 16
_SHAPE = ["N", "FORMAT", "GROUP", "HAS_LOW", "SPLIT"]


@functools.cache
def _tuned(kernel_name: str, rows: int) -> triton.runtime.Autotuner:
    """The kernel with its tiles, of which the first call of each shape chooses the fastest (kept on disk)."""
    if kernel_name == "gemv":
        kernel, width, key = quantized_gemv, "BLOCK_C", ["CHUNKS"]
    else:
        kernel, width, key = quantized_gemm, "BLOCK_K", ["K"]
    configs = []
    for tile in tiles.GEMV_TILES if kernel_name == "gemv" else tiles.GEMM_TILES[rows]:
        named = tile.named(width)
        warps, stages = named.pop("num_warps"), named.pop("num_stages")
        configs.append(triton.Config(named, num_warps=warps, num_stages=stages))
    return triton.autotune(configs, [*_SHAPE, *key], cache_results=True)(kernel)


@functools.cache
def _nf4_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbers of scales, fp32 `[256]`, and of codes, fp32 `[16]`. The trial in `op` makes them in time."""
    from paretune.ops.weights.nf4 import CODES, dynamic_map

    return dynamic_map().to(device), torch.tensor(CODES, device=device)


@functools.cache
def _n_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def quantized_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    low: Tensor | None = None,
    of_scales: Tensor | None = None,
    offset: Tensor | None = None,
    lowest: int = 0,
    bias: Tensor | None = None,
    *,
    format: str,
    group: int,
    tile: Tile | None = None,
    parts: int | None = None,
) -> Tensor:
    """`y = x W^T + b` as `reference.linear`, over weights as `ops/weights` store them.

    Args:
        x: `[..., in]` in fp32, fp16 or bf16, any strides.
        q: int8 `[out, in]`, or uint8 `[out, in / 2]`, rounded up, with the even input in the low half; contiguous.
        scale: fp32 `[out]` (group 0), fp16 `[out, in / group]`, rounded up, or uint8 codes of it (nf4).
        low: fp16 as `scale`: what `lowest` stands for in each group, or None.
        lowest: an integer; 0 without `low`.
        of_scales, offset: fp32, of nf4.
        bias: `[out]` or None.
        format: one of `tiles.FORMATS`.
        group: inputs that share a scale, the last of a row may be fewer; 0: the row does.
        tile: of a program; None: the fastest of those that are tried at the first call of a shape.
        parts: among how many programs the inputs are shared out; None: as the device asks for.

    Returns:
        `[..., out]` in the dtype of `x`.
    """
    assert format in tiles.FORMATS and q.is_contiguous() and scale.is_contiguous()
    n_out, row_bytes = q.shape
    K = x.size(-1)
    per_byte = 1 if format == "int8" else 2
    assert row_bytes == triton.cdiv(K, per_byte), (x.shape, q.shape)
    flat = x.reshape(-1, K)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    M = flat.size(0)
    out = flat.new_empty(M, n_out)
    if M and n_out:
        stored = (q, scale, low, of_scales, offset, lowest, bias)
        # On a device of its own: Triton launches on the current one.
        with torch.cuda.device_of(x):
            # Loads of 16 bytes have to begin where they may and to meet as many inputs as they hold; other shapes take
            # the kernel that reads bytes.
            in_chunks = row_bytes % GEMV_CHUNK_BYTES == 0 and row_bytes * per_byte == K
            if M == 1 and in_chunks and q.storage_offset() % GEMV_CHUNK_BYTES == 0:
                _gemv(flat, *stored, out, format, group, tile, parts)
            else:
                _gemm(flat, *stored, out, format, group, tile, parts)
    return out.view(*x.shape[:-1], n_out)


def _pointers(flat, scale, low, of_scales, offset, bias, format):  # type: ignore[no-untyped-def]
    """The arguments in the kernels' order; what a format does not have is never read."""
    numbers, codes = _nf4_tables(flat.device) if format == "nf4" else (flat, flat)

    def or_any(tensor: Tensor | None) -> Tensor:
        return flat if tensor is None else tensor

    return scale, or_any(low), or_any(of_scales), or_any(offset), numbers, codes, or_any(bias)


def _constants(format, group, low, lowest, bias):  # type: ignore[no-untyped-def]
    has = {"HAS_LOW": low is not None, "HAS_BIAS": bias is not None}
    return {"FORMAT": format, "GROUP": group, "LOWEST": lowest, **has}


def _launch(kernel_name, rows, kernel, width, choices, grid, arguments, constants, tile):  # type: ignore[no-untyped-def]
    if tile is None and len(choices) > 1 and not INTERPRETED:
        _tuned(kernel_name, rows)[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants, **(tile or choices[0]).named(width))


def _gemv(flat, q, scale, low, of_scales, offset, lowest, bias, out, format, group, tile, parts):  # type: ignore[no-untyped-def]
    N, row_bytes = q.shape
    if parts is None:
        parts = tiles.split(triton.cdiv(N, 8), row_bytes // 512, 2 * _n_multiprocessors(flat.device))
    target = out if parts == 1 else torch.empty(parts, N, device=flat.device)
    pointers = _pointers(flat, scale, low, of_scales, offset, bias, format)
    constants = _constants(format, group, low, lowest, bias)
    _launch(
        "gemv",
        1,
        quantized_gemv,
        "BLOCK_C",
        tiles.GEMV_TILES,
        lambda meta: (triton.cdiv(N, meta["BLOCK_N"]), parts),
        (flat, q.view(torch.int32), *pointers, target, N, triton.cdiv(flat.size(1), group or 1), MAGIC),
        {**constants, "CHUNKS": row_bytes // GEMV_CHUNK_BYTES, "SPLIT": parts},
        tile,
    )
    if parts > 1:
        _add_parts(target, bias, out, parts)


def _gemm(flat, q, scale, low, of_scales, offset, lowest, bias, out, format, group, tile, parts):  # type: ignore[no-untyped-def]
    (M, K), N = flat.shape, q.size(0)
    is_fp32 = flat.dtype == torch.float32
    rows = tiles.rows_at_once(M, is_fp32)
    choices = tiles.FP32_TILES if is_fp32 else tiles.GEMM_TILES[rows]
    if parts is None:
        first = tile or choices[0]
        n_programs = triton.cdiv(M, rows) * triton.cdiv(N, first.rows)
        # Few rows wait for memory, which wants more loads under way than one program a multiprocessor has.
        wanted = _n_multiprocessors(flat.device) * (2 if M <= 16 else 1)
        parts = tiles.split(n_programs, K // first.inputs, wanted)
    target = out if parts == 1 else torch.empty(parts, M, N, device=flat.device)
    pointers = _pointers(flat, scale, low, of_scales, offset, bias, format)
    constants = _constants(format, group, low, lowest, bias)
    _launch(
        "gemm",
        rows,
        quantized_gemm,
        "BLOCK_K",
        choices,
        lambda meta: (triton.cdiv(M, rows) * triton.cdiv(N, meta["BLOCK_N"]), parts),
        (flat, q, *pointers, target, M, N, flat.stride(0), triton.cdiv(K, group or 1), MAGIC),
        {**constants, "K": K, "SPLIT": parts, "WIDE": INTERPRETED, "BLOCK_M": rows},
        tile,
    )
    if parts > 1:
        _add_parts(target, bias, out, parts)


def _add_parts(target: Tensor, bias: Tensor | None, out: Tensor, parts: int) -> None:
    n_values = out.numel()
    gemm_sum_parts[(triton.cdiv(n_values, SUM_BLOCK),)](
        target,
        out if bias is None else bias,
        out,
        n_values,
        out.size(1),
        HAS_BIAS=bias is not None,
        SPLIT=parts,
        BLOCK=SUM_BLOCK,
    )
