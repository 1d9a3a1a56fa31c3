"""Compiles the kernels for a chip that need not be here, and prints what each takes. Run by its test, and by hand:

    python tests/ops/compile_quantized_linear.py 90 [every]

One JSON object a line: kernel, format, dtype, tile, registers a thread, bytes spilled, shared memory. `every` takes
all tiles; otherwise the first of each kind.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from paretune.ops.quantized_linear import tiles
from paretune.ops.quantized_linear import triton as kernels

# name -> format, group, minimum, types of the weights and their scales
FORMATS = {
    "int8 rows": ("int8", 0, False, "i8", "fp32"),
    "int8 groups": ("int8", 128, True, "i8", "fp16"),
    "int4": ("int4", 32, False, "u8", "fp16"),
    "int4 with minimum": ("int4", 128, True, "u8", "fp16"),
    "nf4": ("nf4", 64, False, "u8", "u8"),
}
TYPES = {"low_ptr": "fp16", "of_scales_ptr": "fp32", "offset_ptr": "fp32", "map_ptr": "fp32", "codes_ptr": "fp32"}
WIDTH = 4096


def compile_for(arch, kernel, types, constants, warps, stages, ones=()):
    """What a kernel takes. `ones`: arguments that are 1, which Triton fixes."""
    names = kernel.arg_names
    constants = constants | dict.fromkeys(ones, 1)
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in ("N", "x_stride")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned if n not in constants}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return {"registers": int(registers), "spilled_bytes": int(stack), "shared_bytes": made.metadata.shared}


def cases(every):
    """kernel, its types, constants, tile"""
    for (name, (kind, group, low, q, scale)), x in itertools.product(FORMATS.items(), ("bf16", "fp16", "fp32")):
        types = {k: f"*{v}" for k, v in TYPES.items()} | dict.fromkeys(("x_ptr", "bias_ptr"), f"*{x}")
        types |= dict.fromkeys(("M", "N", "x_stride", "row_groups", "magic"), "i32") | {"scale_ptr": f"*{scale}"}
        fixed = {"FORMAT": kind, "GROUP": group, "HAS_LOW": low, "LOWEST": -8 if low else 0, "HAS_BIAS": True}
        for parts in (1, 2) if every else (1,):
            shared = types | {"out_ptr": "*fp32" if parts > 1 else f"*{x}"}
            for tile in tiles.GEMV_TILES if every else tiles.GEMV_TILES[:1]:
                chunks = WIDTH // (16 if kind == "int8" else 32)
                constants = fixed | {"CHUNKS": chunks, "SPLIT": parts, "BLOCK_N": tile.rows, "BLOCK_C": tile.inputs}
                yield name, x, tile, kernels.quantized_gemv, shared | {"q_ptr": "*i32"}, constants
            lists = {tiles.FP32_ROWS: tiles.FP32_TILES} if x == "fp32" else tiles.GEMM_TILES
            for rows, choices in lists.items():
                for tile in choices if every else choices[:1]:
                    constants = fixed | {"K": WIDTH, "SPLIT": parts, "WIDE": False, "BLOCK_M": rows}
                    constants |= {"BLOCK_N": tile.rows, "BLOCK_K": tile.inputs}
                    yield name, x, tile, kernels.quantized_gemm, shared | {"q_ptr": f"*{q}"}, constants


def main() -> None:
    arch, every = int(sys.argv[1]), "every" in sys.argv
    for name, x, tile, kernel, types, constants in cases(every):
        took = compile_for(arch, kernel, types, constants, tile.warps, tile.stages)
        print(json.dumps({"kernel": kernel.__name__, "format": name, "dtype": x, **vars(tile), **took}), flush=True)
    # Arguments of 1 are fixed by Triton: a row, an output, a group.
    constants["K"] = 64
    for ones in (("M",), ("N",), ("M", "N", "row_groups", "x_stride")):
        compile_for(arch, kernel, types, constants, 4, 2, ones)
    types = {"parts_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16", "n_values": "i32", "N": "i32"}
    constants = {"HAS_BIAS": True, "SPLIT": 8, "BLOCK": kernels.SUM_BLOCK}
    for ones in ((), ("n_values", "N")):
        took = compile_for(arch, kernels.gemm_sum_parts, types, constants, 4, 3, ones)
    print(json.dumps({"kernel": "gemm_sum_parts", **took}), flush=True)


if __name__ == "__main__":
    main()
