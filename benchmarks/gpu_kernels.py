"""The quantised linear layers on a GPU: checked, then timed against the library's bf16 product.

    python benchmarks/gpu_kernels.py -o benchmarks/results/gpu_kernels.json

Layers have the shapes of Mistral-7B. A case is one CUDA graph over copies of a layer that together are four times the
L2 cache, so that weights come from memory as they do in a decode step; the way to a kernel is not in it. Cases of a
table are interleaved: a block holds each once, in random order; ratios are medians over blocks with 95 % intervals,
above 1: faster than bf16. `bf16 again` is the twin that says what this machine resolves. `dequantised` is PyTorch's
own form: the whole layer in 16 bits at every call. The last table adds the layers of one decode step up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from paretune import clock, files, stats
from paretune.errors import ParetuneError, UsageError
from paretune.measure import environment
from paretune.measure.interleave import block_order
from paretune.ops.quantized_linear import op, reference
from paretune.ops.weights.base import Weight
from paretune.ops.weights.dense import Dense
from paretune.ops.weights.int8_rows import Int8Rows
from paretune.ops.weights.int_groups import IntGroups
from paretune.ops.weights.nf4 import NF4
from paretune.records.judge import judge
from paretune.report.tables import Column, to_markdown

BASELINE, TWIN = "bf16", "bf16 again"
# (outputs, inputs): how often a decode step of Mistral-7B has it.
LAYERS = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32, (32000, 4096): 1}
ROWS = (1, 2, 4, 8, 16, 64, 512)
SLICE_SEC = 0.02
LIMIT = 0.02  # of the error: bf16 weights and results, 2^-9 each, with room


def random_weight(name: str, n_out: int, n_in: int, dtype: torch.dtype) -> Weight:
    """A layer with random stored numbers of about the size that a real one has."""
    on = {"device": "cuda"}
    small = 0.02 / 73  # integers of 8 bits spread by 73
    if name in (BASELINE, TWIN):
        return Dense(torch.randn(n_out, n_in, dtype=dtype, **on) * 0.02)
    if name == "int8 rows":
        q = torch.randint(-127, 128, (n_out, n_in), dtype=torch.int8, **on)
        return Int8Rows(q, torch.rand(n_out, **on) * small, dtype)
    codes = torch.randint(0, 256, (n_out, n_in // 2), dtype=torch.uint8, **on)
    if name.startswith("nf4"):
        scale = torch.randint(0, 256, (n_out, n_in // 64), dtype=torch.uint8, **on)
        return NF4(codes, scale, torch.rand(-(-scale.numel() // 256), **on) * 0.01, torch.full((1,), 0.03, **on), dtype)
    group = int(name.split()[1].removeprefix("g"))
    scale = torch.rand(n_out, n_in // group, **on).half() * (small if name.startswith("int8") else 0.005)
    if name.startswith("int8"):
        return IntGroups(codes.view(torch.int8).repeat(1, 2), scale, None, dtype, group=group)
    return IntGroups(codes, scale, scale * 0.1 if "min" in name else None, dtype, group=group)


CASES = (
    BASELINE,
    TWIN,
    "int8 rows",
    "int8 g128",
    "int4 g32",
    "int4 g64 min",
    "int4 g128",
    "nf4",
    "int4 g128 dequantised",
)


def error_of(weight: Weight, n_rows: int, dtype: torch.dtype) -> float:
    x, bias = (
        torch.randn(*shape, device="cuda").to(dtype) for shape in ((n_rows, weight.in_features), (weight.out_features,))
    )
    exact = reference.linear(x.float(), weight.dequantize().float(), bias.float())
    return float((weight.linear(x, bias).float() - exact).norm() / exact.norm())


def graph_of(name: str, weights: list[Weight], x: torch.Tensor) -> Callable[[], None]:
    """One call of every copy as a CUDA graph."""

    def once() -> None:
        for weight in weights:
            if name.endswith("dequantised"):
                F.linear(x, weight.dequantize())
            else:
                weight.linear(x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        once()  # tiles are chosen here
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return graph.replay


def measure(shape: tuple[int, int], n_rows: int, names: tuple[str, ...], n_blocks: int) -> list[dict[str, Any]]:
    dtype = torch.bfloat16
    cache_bytes = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    x = torch.randn(n_rows, shape[1], dtype=dtype, device="cuda")
    replays: dict[str, tuple[Callable[[], None], int]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        first = random_weight(name, *shape, dtype)
        n_copies = min(64, max(2, -(-cache_bytes // first.stored_bytes)))
        weights = [first, *(random_weight(name, *shape, dtype) for _ in range(n_copies - 1))]
        error = error_of(first, n_rows, dtype)
        replay = graph_of(name, weights, x)
        replays[name] = (replay, n_copies)
        rows[name] = {
            "outputs": shape[0],
            "inputs": shape[1],
            "rows": n_rows,
            "format": name,
            "error": error,
            "is_right": error < LIMIT,
            "stored_bytes": first.stored_bytes,
        }
        rows[name]["replays"] = max(1, round(SLICE_SEC / timed(replay, 3)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for block in range(n_blocks):
        for name in block_order(names, 0, block):
            replay, n_copies = replays[name]
            samples[name].append(timed(replay, rows[name]["replays"]) / n_copies)
    resolution = stats.speed_ratio(samples[BASELINE], samples[TWIN])
    resolved = max(resolution.high - 1, 1 - resolution.low)
    for name, row in rows.items():
        ratio = stats.speed_ratio(samples[BASELINE], samples[name])
        row |= {"sec": float(np.median(samples[name])), "samples_sec": samples[name], "ratio": ratio.to_json()}
        row["bytes_per_sec"] = row["stored_bytes"] / row["sec"]
        row["verdict"] = judge(ratio, resolved) if row["is_right"] else "invalid"
    return list(rows.values())


def timed(replay: Callable[[], None], n: int) -> float:
    torch.cuda.synchronize()
    started = clock.now()
    for _ in range(n):
        replay()
    torch.cuda.synchronize()
    return (clock.now() - started) / n


def ratio_text(ratio: dict[str, Any]) -> str:
    bounds = ["?" if ratio[name] is None else f"{ratio[name]:.2f}" for name in ("low", "high")]
    return f"{ratio['value']:.2f}x [{', '.join(bounds)}]"


def step(rows: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """All linear layers of one decode step of Mistral-7B, as the sum of the layers that were timed."""
    sec = {(r["outputs"], r["inputs"], r["format"]): r["sec"] for r in rows if r["rows"] == 1}
    sums = {name: sum(n * sec[*shape, name] for shape, n in LAYERS.items()) for name in names}
    return [{"format": name, "step_sec": total, "ratio": sums[BASELINE] / total} for name, total in sums.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="of inputs")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="one row, few blocks")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UsageError("there is no GPU here", "The numerics are tested by Triton's interpreter: `make test`")
    if reason := op.unavailable_reason("cuda"):
        raise ParetuneError(reason, "See `paretune ls --device cuda`")
    files.ensure_folder(args.output.parent)
    n_blocks = 6 if args.quick else args.blocks
    rows: list[dict[str, Any]] = []
    columns = [
        Column("format", "Format", numeric=False),
        Column("sec", "Time", lambda r: f"{1e6 * r['sec']:.1f} us"),
        Column("bytes_per_sec", "Read", lambda r: f"{r['bytes_per_sec'] / 1e9:,.0f} GB/s"),
        Column("ratio", "Against bf16", lambda r: ratio_text(r["ratio"])),
        Column("verdict", "Verdict", numeric=False),
        Column("error", "Error", lambda r: f"{r['error']:.1e}"),
    ]
    with torch.inference_mode(), clock.quiet():
        for n_rows in [1] if args.quick else [int(n) for n in args.rows.split(",")]:
            for shape in LAYERS:
                found = measure(shape, n_rows, CASES, n_blocks)
                rows += found
                print(f"\n{shape[1]} -> {shape[0]}, {n_rows} rows\n\n{to_markdown(found, columns)}", flush=True)
                torch.cuda.empty_cache()
    result: dict[str, Any] = {**environment.header(), "rows": rows, "tiles": tiles_chosen()}
    if any(r["rows"] == 1 for r in rows):
        result["decode_step"] = step(rows, CASES)
        print("\nall linear layers of a decode step of Mistral-7B, one sequence (the sum of the above)")
        for row in result["decode_step"]:
            print(f"  {row['format']:16s} {1e3 * row['step_sec']:6.3f} ms  {row['ratio']:.2f}x")
    files.write_json(args.output, result)
    return 0 if all(r["is_right"] for r in rows) else 1


def tiles_chosen() -> list[dict[str, Any]]:
    """The tile that the first call of each shape chose."""
    from paretune.ops.quantized_linear import tiles, triton

    tuned = [("quantized_gemv", 1, triton._tuned("gemv", 1))]
    tuned += [("quantized_gemm", rows, triton._tuned("gemm", rows)) for rows in tiles.GEMM_TILES]
    return [
        {"kernel": name, "rows": rows, "key": [str(part) for part in key], "tile": str(config)}
        for name, rows, kernel in tuned
        for key, config in kernel.cache.items()
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ParetuneError as error:
        sys.exit(f"error: {error}")
