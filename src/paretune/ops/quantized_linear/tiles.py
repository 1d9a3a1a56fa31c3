"""How much of a quantised product one program takes: the choices that are tried on a device, few of each kind."""

from __future__ import annotations

from dataclasses import dataclass

FORMATS = ("int8", "int4", "nf4")  # how numbers are stored; int8 with a scale a row or a group


@dataclass(frozen=True)
class Tile:
    """Args:
    rows: outputs of a program.
    inputs: taken at once; for `quantized_gemv` chunks of 16 bytes.
    warps, stages: of a program; loads that are under way ahead of the products.
    """

    rows: int
    inputs: int
    warps: int = 4
    stages: int = 3

    def named(self, width: str) -> dict[str, int]:
        """As the kernels call them."""
        return {"BLOCK_N": self.rows, width: self.inputs, "num_warps": self.warps, "num_stages": self.stages}


GEMV_TILES = (Tile(4, 128), Tile(8, 128), Tile(16, 32), Tile(8, 32, warps=1), Tile(4, 64, warps=2))
# By rows of inputs a program takes. 64 outputs or more, so that Hopper's own matrix instructions apply.
GEMM_TILES = {
    16: (Tile(64, 128), Tile(64, 128, stages=4), Tile(64, 64, stages=5), Tile(128, 64, stages=4)),
    64: (Tile(64, 64, stages=4), Tile(128, 64, stages=3), Tile(128, 64, warps=8, stages=4)),
    128: (Tile(128, 64, warps=8), Tile(128, 64, warps=8, stages=4), Tile(64, 64, stages=4)),
}
FP32_TILES = (Tile(32, 32, stages=2),)  # exact products on the plain units: no matrix unit is that exact
FP32_ROWS = 16

LARGEST_SPLIT = 8


def rows_at_once(n_rows: int, is_fp32: bool) -> int:
    """Rows of inputs that a program of `quantized_gemm` takes."""
    if is_fp32:
        return FP32_ROWS
    return next((size for size in GEMM_TILES if n_rows <= size), 128)


def split(n_programs: int, n_steps: int, n_wanted: int) -> int:
    """Among how many programs the inputs of one output are shared out, so that there are `n_wanted` programs.

    Args:
        n_programs: without sharing.
        n_steps: that one program takes through its inputs: nobody's share is less than one.
    """
    parts = 1
    while parts < LARGEST_SPLIT and n_programs * parts < n_wanted and 2 * parts <= n_steps:
        parts *= 2
    return parts
