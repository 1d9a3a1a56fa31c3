"""The Triton kernels of quantised linear layers, run by Triton's interpreter, against the formula."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantized_layers import MAKE
from torch.utils._python_dispatch import TorchDispatchMode

from paretune.ops.quantized_linear import op, reference, tiles
from paretune.ops.quantized_linear.tiles import Tile
from paretune.ops.weights.int8_rows import Int8Rows
from paretune.ops.weights.int_groups import IntGroups

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not installed, or there is a GPU, where `make gpu` runs the kernels themselves",
)

# Error relative to the fp64 result, of the whole: fp32 sums; fp16 weights and results, 2^-11 each; bf16 the same with
# 2^-8, twice that because the interpreter cuts bf16 off where a GPU rounds it.
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}
SMALL = Tile(16, 32)


@pytest.fixture
def kernels():
    """The kernels, interpreted. Memory that is not written holds NaN."""
    from paretune.ops.quantized_linear import triton

    assert triton.INTERPRETED, "Triton was imported before TRITON_INTERPRET was set"
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` gives
    yield triton
    torch.use_deterministic_algorithms(False)


def among_poison(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, with NaN (or the largest integers) before and behind them in memory."""
    poison = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    memory = torch.full((tensor.numel() + 128,), poison, dtype=tensor.dtype)
    memory[64:-64] = tensor.reshape(-1)
    return memory[64:-64].view(tensor.shape)


def rows_among_poison(x: torch.Tensor) -> torch.Tensor:
    """Rows that are not neighbours, with NaN between them."""
    memory = torch.full((x.size(0) + 2, x.size(1) + 40), float("nan"), dtype=x.dtype)
    memory[1:-1, 16:-24] = x
    return memory[1:-1, 16:-24]


def run(kernels, name, n_rows, shape, dtype, tile=None, parts=None, with_bias=True):
    """The kernel's result and its error against the formula in fp64."""
    weight = MAKE[name](torch.randn(shape))
    x, bias = torch.randn(n_rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype) if with_bias else None
    form = [among_poison(t) if isinstance(t, torch.Tensor) else t for t in weight.gpu()]
    kind = "nf4" if name == "nf4" else f"int{weight.bits}"
    got = kernels.quantized_linear(
        rows_among_poison(x), *form, bias, format=kind, group=weight.group, tile=tile, parts=parts
    )
    exact = reference.linear(x.double(), weight.dequantize().double(), None if bias is None else bias.double())
    assert got.dtype == dtype and got.shape == exact.shape and bool(got.isfinite().all())
    error = (got.double() - exact).abs()
    assert float(error.norm() / exact.norm()) < LIMITS[dtype]
    # One wrong output among many would hide in the norm.
    assert float(error.max() / exact.abs().max()) < 4 * LIMITS[dtype]
    return got


CASES = [
    # Neither 33 nor 37 outputs fill a tile; 224 and 384 inputs are 7 and 12 chunks of 4 bits, 14 and 24 of 8.
    ("int8 rows", (37, 208), torch.bfloat16, 2),
    ("int8 rows", (33, 16), torch.float32, 1),
    ("int8 groups", (37, 224), torch.float16, 1),
    ("int8 groups with minimum", (33, 384), torch.float32, 2),
    ("int4", (37, 224), torch.bfloat16, 1),
    ("int4", (1, 32), torch.float32, 2),
    ("int4 with minimum", (33, 384), torch.float16, 2),
    ("nf4", (37, 192), torch.float32, 1),
    ("nf4", (17, 448), torch.float16, 2),
]


@needs_triton
@pytest.mark.parametrize(("name", "shape", "dtype", "parts"), CASES)
def test_quantized_gemv(kernels, name, shape, dtype, parts):
    run(kernels, name, 1, shape, dtype, SMALL, parts)


@needs_triton
@pytest.mark.parametrize(
    ("name", "n_rows", "shape", "dtype", "tile", "parts"),
    [
        ("int8 rows", 7, (70, 101), torch.float16, Tile(64, 64), 2),  # odd widths: rows begin anywhere
        ("int8 rows", 1, (70, 101), torch.bfloat16, Tile(64, 64), 1),
        ("int8 rows", 63, (65, 7), torch.float32, None, 1),
        ("int8 groups", 16, (70, 224), torch.bfloat16, Tile(64, 128), 2),
        ("int8 groups with minimum", 7, (33, 384), torch.float16, Tile(64, 64), 1),  # a group is wider than the tile
        ("int4", 63, (70, 224), torch.float16, Tile(64, 64), 2),
        ("int4", 16, (70, 96), torch.float32, None, 2),
        ("int4 with minimum", 17, (130, 384), torch.bfloat16, Tile(128, 64), 1),
        ("nf4", 16, (70, 192), torch.float16, Tile(64, 128), 2),
        ("nf4", 7, (70, 192), torch.bfloat16, Tile(64, 64), 1),
    ],
)
def test_quantized_gemm(kernels, name, n_rows, shape, dtype, tile, parts):
    run(kernels, name, n_rows, shape, dtype, tile, parts)


@needs_triton
@pytest.mark.parametrize("n_in", [1, 31, 72, 100, 127, 129, 192, 576, 960, 1600])
@pytest.mark.parametrize("name", MAKE)
def test_any_width(kernels, name, n_in):
    """The last group is shorter, the last byte of an odd width half empty; one row takes one kernel, more the other."""
    for n_rows in (1, 2, 7, 33) if n_in < 200 else (1, 7):  # the interpreter is slow
        run(kernels, name, n_rows, (33, n_in), torch.float32, parts=1 + n_in % 2)


@needs_triton
@pytest.mark.parametrize("name", MAKE)
def test_tiles_that_are_wider_and_narrower_than_a_group_meet_its_rest(kernels, name):
    for n_in, tile, parts in ((129, Tile(64, 64), 2), (100, Tile(64, 128), 1), (192, Tile(64, 32), 3)):
        run(kernels, name, 7, (33, n_in), torch.float16, tile, parts)


@needs_triton
def test_minima_of_older_folders(kernels):
    """They stand for the integer 0, not for the smallest."""
    for kind, make in (("int4", MAKE["int4 with minimum"]), ("int8", MAKE["int8 groups with minimum"])):
        made = make(torch.randn(20, 384))
        weight = IntGroups(made.q, made.scale, made.minimum, torch.float32, group=made.group, lowest=0)
        for n_rows in (1, 3):
            x = torch.randn(n_rows, 384)
            got = kernels.quantized_linear(x, *weight.gpu(), format=kind, group=weight.group, tile=Tile(32, 32))
            assert float((got - x @ weight.dequantize().T).norm() / got.norm()) < LIMITS[torch.float32]


@needs_triton
def test_gemm_sum_parts(kernels):
    """In the order of the parts, whatever their number, also where the inputs have fewer steps than there are parts."""

    def result(parts):
        torch.manual_seed(0)
        return run(kernels, "int4", 7, (20, 64), torch.float32, parts=parts, with_bias=False)

    split = result(4)
    torch.testing.assert_close(split, result(1))
    assert torch.equal(split, result(4))


@needs_triton
def test_inputs_of_any_shape_and_stride(kernels):
    weight = MAKE["int4"](torch.randn(18, 64))
    form, kind = weight.gpu(), {"format": "int4", "group": 32}
    x = torch.randn(2, 64, 3)
    for inputs in (x.transpose(1, 2), x[:, :, :1].transpose(1, 2), torch.randn(1, 1, 64).expand(2, 3, 64), x[0, :, 0]):
        got = kernels.quantized_linear(inputs, *form, **kind, tile=Tile(32, 32))
        torch.testing.assert_close(got, reference.linear(inputs, weight.dequantize()), rtol=1e-5, atol=1e-5)
    assert kernels.quantized_linear(torch.randn(0, 64), *form, **kind).shape == (0, 18)


@needs_triton
def test_extreme_numbers(kernels):
    """Zero rows stay zero, and what fp16 sums of products would pass fp32 sums hold."""
    w = torch.randn(20, 64)
    w[3] = 0
    for name in ("int8 rows", "int4", "nf4"):
        weight = MAKE[name](w)
        kind = {"format": "nf4" if name == "nf4" else f"int{weight.bits}", "group": weight.group}
        for n_rows in (1, 3):
            y = kernels.quantized_linear(
                torch.full((n_rows, 64), 300.0).half(), *weight.gpu(), **kind, tile=Tile(32, 32)
            )
            assert not y[:, 3].any() and bool(y.isfinite().all())
    weight = Int8Rows(torch.full((4, 64), 127, dtype=torch.int8), torch.full((4,), 1e-4), torch.float32)
    for n_rows in (1, 3):
        x = torch.full((n_rows, 64), 1000.0).half()  # the sum before the scale is 8 million
        y = kernels.quantized_linear(x, *weight.gpu(), format="int8", group=0, tile=Tile(32, 32))
        torch.testing.assert_close(y, torch.full((n_rows, 4), 812.8).half())


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("tile", [*tiles.GEMV_TILES])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", MAKE)
def test_every_tile_of_the_gemv(kernels, name, dtype, tile):
    for parts in (1, 4):
        run(kernels, name, 1, (45, 2 * 1152), dtype, tile, parts)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("rows", tiles.GEMM_TILES)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", MAKE)
def test_every_tile_of_the_gemm(kernels, name, dtype, rows):
    for tile in tiles.FP32_TILES if dtype == torch.float32 else tiles.GEMM_TILES[rows]:
        for n_rows in (rows, max(2, rows - 3)):
            run(kernels, name, n_rows, (131, 384), dtype, tile, 1 if rows > 16 else 3)


# ---- the operator


@pytest.fixture
def everywhere(monkeypatch, kernels):
    """Weights take the kernels on a CPU too."""
    monkeypatch.setattr(op, "applies", lambda x: True)
    monkeypatch.setattr(op, "unavailable_reason", lambda device: None)


@needs_triton
@pytest.mark.parametrize("name", MAKE)
def test_a_weight_hands_its_own_tensors_to_the_operator(everywhere, name):
    weight, bias = MAKE[name](torch.randn(18, 128)), torch.randn(18)
    x = torch.randn(2, 3, 128)
    expected = reference.linear(x, weight.dequantize(), bias)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == op.NAME:
                seen.append({t.data_ptr() for t in args[1:6] if t is not None})
            return func(*args, **(kwargs or {}))

    with Watch():
        got = weight.linear(x, bias)
    stored = {t.data_ptr() for name, t in weight.to_tensors().items() if t.numel() and name != "layout"}
    assert seen == [stored], "the kernel reads what is stored, no copy of it"
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@needs_triton
def test_the_operator_says_its_shape_and_is_pure(everywhere):
    weight = MAKE["int4"](torch.randn(8, 32))
    args = (torch.randn(2, 32), *weight.gpu(), torch.randn(8), "int4", 32)
    exact = reference.linear(args[0], weight.dequantize(), args[-3])
    torch.testing.assert_close(op.quantized_linear(*args), exact, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(op.quantized_linear, args, test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_a_compiled_layer_is_one_graph(everywhere):
    weight, bias = MAKE["nf4"](torch.randn(8, 64)), torch.randn(8)
    layer = torch.compile(lambda x: torch.relu(weight.linear(x, bias)), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for n_rows in (1, 5):
            x = torch.randn(n_rows, 64)
            assert torch.equal(layer(x), torch.relu(weight.linear(x, bias)))


@pytest.mark.parametrize("name", MAKE)
def test_the_formula_of_the_operator(name):
    """Bit for bit what the weight says of itself; and what runs where the kernels do not."""
    for n_in in (1152, 129, 31):
        weight = MAKE[name](torch.randn(18, n_in))
        kind = "nf4" if name == "nf4" else f"int{weight.bits}"
        assert torch.equal(reference.dequantize(*weight.gpu(), kind, weight.group, n_in), weight.dequantize())
        x, bias = torch.randn(3, n_in), torch.randn(18)
        got = op.quantized_linear(x, *weight.gpu(), bias, kind, weight.group)
        assert torch.equal(got, reference.linear(x, weight.dequantize(), bias))


def test_where_gradients_are_wanted_the_formula_runs():
    on_gpu = type("Fake", (), {"device": torch.device("cuda"), "requires_grad": False})()
    assert op.applies(on_gpu) and not op.applies(torch.randn(2))
    on_gpu.requires_grad = True
    assert not op.applies(on_gpu)
    with torch.no_grad():
        assert op.applies(on_gpu)


def test_why_the_kernels_cannot_run(monkeypatch):
    reason = op._tried.__wrapped__
    assert "on a GPU" in op.unavailable_reason("cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reason("cuda") == "Triton is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def fails(device):
        raise RuntimeError("no compiler\nand a long trace")

    monkeypatch.setattr(op, "trial", fails)
    assert reason("cuda") == "Triton's kernels do not run: no compiler"
    monkeypatch.setattr(op, "trial", lambda device: float("nan"))
    assert "their result is" in reason("cuda")
    monkeypatch.setattr(op, "trial", lambda device: 1e-3)
    assert reason("cuda") is None


@needs_triton
def test_the_trial_that_decides_on_a_device(kernels, monkeypatch):
    assert op.trial("cpu") < 2e-3
    monkeypatch.setattr(op, "FORMATS", ("int4",))
    monkeypatch.setattr(reference, "dequantize", lambda *args: torch.ones(16, 128))
    assert op.trial("cpu") > 0.1, "a wrong result is seen"


@pytest.mark.parametrize(
    ("n_programs", "n_steps", "wanted", "parts"),
    [(512, 8, 264, 1), (128, 8, 264, 4), (32, 8, 264, 8), (32, 3, 264, 2), (1, 1, 264, 1), (16, 100, 264, 8)],
)
def test_split(n_programs, n_steps, wanted, parts):
    assert tiles.split(n_programs, n_steps, wanted) == parts


def test_rows_at_once():
    assert [tiles.rows_at_once(m, False) for m in (1, 16, 17, 64, 65, 4096)] == [16, 16, 64, 64, 128, 128]
    assert tiles.rows_at_once(500, True) == tiles.FP32_ROWS


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_compile_for_chips_that_are_not_here(arch):
    """A100 and H200: Triton's compiler takes every kernel, no register is spilled, shared memory is enough."""
    script = Path(__file__).with_name("compile_quantized_linear.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script), str(arch)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in found} == {*op.KERNELS, "gemm_sum_parts"} and len(found) > 40
    most = {80: 163 << 10, 90: 227 << 10}[arch]
    assert [row for row in found if row["spilled_bytes"] or row["shared_bytes"] > most] == []
