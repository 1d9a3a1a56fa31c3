"""NF4, LLM.int8 and fp8 weights, against bitsandbytes and the formulas."""

from __future__ import annotations

import pytest
import torch

from paretune.errors import CheckpointError, ParetuneError
from paretune.ops.int8_linear import mixed, reference
from paretune.ops.weights.base import is_finite
from paretune.ops.weights.dense import Dense
from paretune.ops.weights.fp8 import Fp8
from paretune.ops.weights.int8_rows import Int8Rows
from paretune.ops.weights.int_groups import IntGroups
from paretune.ops.weights.mixed_int8 import MixedInt8
from paretune.ops.weights.nf4 import CODES, NF4, dynamic_map
from paretune.ops.weights.sparse8 import Sparse8
from paretune.registry import FORMATS

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes has no build for this platform")
functional = bnb.functional

WIDTHS = (1, 31, 72, 100, 127, 129, 192, 576, 960, 1600)
SHAPES = [(1, 64), (3, 128), (128, 256), (100, 768), (96, 3072)]
MAKE = {
    "nf4": NF4.quantize,
    "mixed_int8": lambda w: MixedInt8.quantize(w, 6.0),
    "mixed_int8 with columns": lambda w: MixedInt8.quantize(w, 6.0, torch.tensor([1, 7])),
    "fp8": Fp8.quantize,
}


def numbers(kind, shape):
    w = torch.rand(shape) * 1e-3 if kind == "uniform" else torch.randn(shape)
    if kind == "zeros":
        w[shape[0] // 2] = 0
    return w


# ---- what all formats say


def without_small_ones(w):
    """int8 rows of which a half became zeros."""
    rows = Int8Rows.quantize(torch.where(w.abs() > 0.67, w, 0.0))
    return Sparse8.of(rows.q, rows.scale, torch.float32)


ALL = {
    **MAKE,
    "sparse8": without_small_ones,
    "dense": Dense,
    "int8_rows": Int8Rows.quantize,
    "int_groups": lambda w: IntGroups.quantize(w, 4, 32),
    "int_groups with minimum": lambda w: IntGroups.quantize(w, 8, 64, minimum=True),
    "int_groups, byte inputs": lambda w: IntGroups.quantize(w, 8, 128, activation_bits=7),
}


@pytest.mark.parametrize("kind", ALL)
def test_rows_matter_only_where_a_format_says_so(kind):
    """A row alone, beside 15 and beside 63 others, of which one holds an outlier."""
    torch.manual_seed(0)
    weight = ALL[kind](torch.randn(96, 256))
    x = torch.randn(64, 256)
    x[40, 100] = 60.0
    whole = weight.linear(x)
    for n in (1, 16):
        parts = torch.cat([weight.linear(part) for part in x.split(n)])
        error = float((parts - whole).norm() / whole.norm())
        assert (error > 1e-4) == weight.rows_matter, (n, error)
    assert {weight.format for weight in (make(torch.randn(16, 64)) for make in ALL.values())} == set(FORMATS.names())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_none_is_found_wherever_it_is(bad, dtype):
    values = torch.randn(7, 331).to(dtype)
    assert is_finite(values) and is_finite(values[:, :0])
    for at in (0, 17, 1000, 7 * 331 - 1):
        broken = values.clone()
        broken.view(-1)[at] = bad
        assert not is_finite(broken) and not is_finite(broken.t())


# ---- NF4


def test_the_tables_are_those_of_bitsandbytes():
    assert torch.equal(torch.tensor(CODES), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "uniform", "zeros"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_equals_bitsandbytes_bit_for_bit(shape, kind, dtype):
    w = numbers(kind, shape).to(dtype)
    q, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = NF4.quantize(w)
    theirs = torch.stack((q.view(-1) >> 4, q.view(-1) & 15), dim=-1).view(shape)
    assert torch.equal(ours.integers(), theirs)
    assert torch.equal(ours.scale_of_scales, state.state2.absmax) and ours.offset == state.offset
    if ours.scale.numel() > 1:  # one scale is all offset: its code times zero
        assert torch.equal(ours.scale.view(-1), state.absmax.view(-1))
    values = functional.dequantize_4bit(q, state)
    assert values.dtype == dtype and torch.equal(ours.dequantize(), values)


def test_nf4_bytes():
    weight = NF4.quantize(torch.randn(256, 1024))
    n_blocks = 256 * 1024 // 64
    assert weight.stored_bytes == 256 * 1024 // 2 + n_blocks + 4 * n_blocks // 256 + 4 + 4
    assert 8 * weight.stored_bytes / (256 * 1024) < 4.13


@pytest.mark.parametrize("n_in", WIDTHS)
def test_nf4_of_any_width(n_in):
    """A block ends with its row: padded with zeros to whole blocks, bitsandbytes has the same codes and sizes."""
    w = numbers("normal", (5, n_in))
    ours = NF4.quantize(w)
    padded = torch.nn.functional.pad(w, (0, -n_in % 64))
    q, state = functional.quantize_4bit(padded, blocksize=64, quant_type="nf4")
    theirs = torch.stack((q.view(-1) >> 4, q.view(-1) & 15), dim=-1).view(padded.shape)
    assert torch.equal(ours.integers(), theirs[:, :n_in])
    # Sizes of blocks are within half a step of the dynamic map, 1/64 of the largest difference from their mean.
    sizes = state.absmax.view(5, -1)
    assert float((ours.absmax() - sizes).abs().max()) <= float((sizes - sizes.mean()).abs().max()) / 32
    again = NF4.from_tensors({k: v.clone() for k, v in ours.to_tensors().items()})
    assert again.in_features == n_in and torch.equal(again.dequantize(), ours.dequantize())
    index = torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(ours.rows(index), ours.dequantize()[index])
    n_blocks = 5 * -(-n_in // 64)
    assert ours.stored_bytes == 5 * -(-n_in // 2) + n_blocks + 4 * -(-n_blocks // 256) + 8


def test_nf4_folders_of_older_versions_load():
    """They hold no width, which was even then."""
    weight = NF4.quantize(torch.randn(4, 128))
    older = {k: v for k, v in weight.to_tensors().items() if k != "layout"}
    assert torch.equal(NF4.from_tensors(older).dequantize(), weight.dequantize())


def test_nf4_scales_fit_fp16():
    with pytest.raises(ParetuneError, match="too large for fp16 scales"):
        NF4.quantize(torch.full((1, 64), 1e5))


# ---- LLM.int8


def outlier_inputs(n, n_in, *at):
    x = torch.randn(n, n_in).half().float()  # bitsandbytes rounds its inputs to fp16
    for i in at:
        x[0, i] = 40.0
    return x


@pytest.mark.parametrize("n", [2, 7, 33])
@pytest.mark.parametrize("at", [(), (3,), (0, 17, 63)])
def test_llm_int8_equals_bitsandbytes(n, at):
    """Up to its fp16, 2^-11 of what is summed, and an input that falls to the other side of a half."""
    w, x = torch.randn(48, 64).half().float(), outlier_inputs(n, 64, *at)
    weight = MixedInt8.quantize(w, 6.0)
    # The operators, since `bnb.matmul` does not round inputs on a CPU.
    ours, of_rows, _ = functional.int8_vectorwise_quant(w.half())
    assert torch.equal(weight.q, ours)
    a, of_inputs, large = functional.int8_vectorwise_quant(x.half(), threshold=6.0)
    assert large.tolist() == list(at)
    mixed_mm = torch.ops.bitsandbytes.int8_mixed_scaled_mm
    theirs = mixed_mm(x.half(), a, ours, of_inputs, of_rows, large, None)[0].float()
    summed = x.abs() @ w.abs().T
    assert ((weight.matmul(x) - theirs).abs() <= 2**-9 * summed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [[], [5], [0, 30, 62]])
@pytest.mark.parametrize(("n_in", "n_out"), [(63, 1), (64, 17), (130, 48)])
def test_the_mixed_kernel_equals_the_reference(dtype, columns, n_in, n_out):
    """Sums of integers are exact, those of outliers are fp32; both results are rounded to their dtype."""
    w = torch.randn(n_out, n_in)
    weight = MixedInt8.quantize(w, 6.0, torch.tensor(columns, dtype=torch.int64))
    for n, at in ((1, ()), (5, (2,)), (40, (0, 5, 9))):
        x = outlier_inputs(n, n_in, *at).to(dtype)
        args = (x, weight.q, weight.scale, weight.threshold, weight.columns, weight.side)
        exact = reference.mixed_int8_linear(*args).double()
        got = mixed.mixed_int8_linear(*args)
        assert got.dtype == dtype and got.shape == (n, n_out)
        bound = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        scale = x.double().abs() @ weight.dequantize().double().abs().T
        assert ((got.double() - exact).abs() <= bound * exact.abs() + 2**-21 * scale).all()


def test_an_outlier_does_not_coarsen_the_others():
    """What LLM.int8 is for: without the threshold one large input takes the bits of its whole row."""
    w, x = torch.randn(64, 128), outlier_inputs(8, 128, 11)
    x[:, 11] = 400.0
    exact = x @ w.T

    def error(weight):
        return float((weight.matmul(x) - exact).norm() / exact.norm())

    w_error = float((x @ MixedInt8.quantize(w, 6.0).dequantize().T - exact).norm() / exact.norm())
    assert error(MixedInt8.quantize(w, 6.0)) < 1.2 * w_error
    kept = MixedInt8.quantize(w, 6.0, torch.tensor([11]))
    assert torch.equal(kept.dequantize()[:, 11], w[:, 11].half().float())
    assert error(kept) < 0.2 * error(MixedInt8.quantize(w, 6.0))  # the outlier's own weights were what was rough
    small = x.clone()
    small[:, 11] = 0
    rough = MixedInt8.quantize(w, 1e9)  # nothing is an outlier
    assert float((rough.matmul(x) - rough.matmul(x - small) - small @ w.T).norm() / (small @ w.T).norm()) > 0.1


def test_llm_int8_has_a_native_form_only_where_inputs_in_16_bits_are_enough():
    w = torch.randn(16, 64)
    form = MixedInt8.quantize(w, 6.0).native()
    assert form is not None and form.kind == "int8" and form.activation_bits == 16
    assert MixedInt8.quantize(w, 6.0, torch.tensor([3])).native() is None


# ---- fp8


def test_fp8_rounds_to_e4m3():
    """Three bits of mantissa: half a step is 2^-4 of a number, or of the smallest normal one."""
    w = torch.randn(32, 96)
    weight = Fp8.quantize(w)
    step = torch.maximum(w.abs(), weight.scale[:, None] * 2**-6) * 2**-4
    assert ((weight.dequantize() - w).abs() <= step * 1.001).all()
    assert weight.stored_bytes == 32 * 96 + 4 * 32
    assert (weight.values.float().abs().amax(1) == 448).all()


# ---- all


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interface(name, dtype):
    weight = MAKE[name](torch.randn(24, 128).to(dtype))
    whole, index = weight.dequantize(), torch.tensor([[3, 0], [23, 3]])
    assert weight.compute_dtype == whole.dtype == weight.rows(index).dtype == dtype
    assert torch.equal(weight.rows(index), whole[index])
    x = torch.randn(2, 3, 128).to(dtype)
    assert weight.matmul(x).shape == (2, 3, 24) and weight.matmul(x).dtype == dtype
    again = FORMATS.get(weight.format).from_tensors({k: v.clone() for k, v in weight.to_tensors().items()})
    assert torch.equal(again.dequantize(), whole) and torch.equal(again.matmul(x), weight.matmul(x))
    assert again.stored_bytes == weight.stored_bytes
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    stored = {k: v.clone() for k, v in weight.to_tensors().items() if v.numel()}
    weight.to(other)  # the compute dtype alone
    assert weight.compute_dtype == other
    assert all(torch.equal(weight.to_tensors()[k].float(), v.float()) for k, v in stored.items())


@pytest.mark.parametrize("n_in", WIDTHS)
@pytest.mark.parametrize("name", ["nf4", "mixed_int8", "fp8", "int8_rows"])
def test_any_width_and_back_from_a_folder(name, n_in):
    """PyTorch's forms against the stored numbers in float64, within what each rounds.

    Sums are fp32; few rows of int8 go through bf16 inputs and results, 2^-9 each; LLM.int8 rounds inputs to the nearest
    of 127 steps of their row's largest."""
    make = MAKE.get(name, Int8Rows.quantize)
    g = torch.Generator().manual_seed(n_in)
    w, x = torch.randn(17, n_in, generator=g), torch.randn(7, n_in, generator=g)
    weight = make(w)
    again = FORMATS.get(weight.format).from_tensors({k: v.clone() for k, v in weight.to_tensors().items()})
    assert again.in_features == n_in and torch.equal(again.dequantize(), weight.dequantize())
    values = weight.dequantize().double()
    exact = x.double() @ values.T
    allowed = (2**-8 if name == "int8_rows" else 2**-20) * (x.double().abs() @ values.abs().T)  # of what is summed
    if name == "mixed_int8":
        allowed += x.double().abs().amax(1, keepdim=True) / 254 * values.abs().sum(1)
    for m in (1, 2, 7):
        assert ((weight.matmul(x[:m]) - exact[:m]).abs() <= allowed[:m]).all()


@pytest.mark.parametrize(
    ("name", "part", "value", "match"),
    [
        ("nf4", "q", None, "'q' is missing"),
        ("nf4", "layout", torch.tensor([120], dtype=torch.int32), "do not hold 120 inputs"),
        ("nf4", "scale", torch.zeros(24, 3, dtype=torch.uint8), "'scale' has shape"),
        ("nf4", "scale_of_scales", torch.zeros(7), "'scale_of_scales' has shape"),
        ("nf4", "offset", torch.zeros(1).half(), "'offset' is torch.float16"),
        ("mixed_int8", "limit", torch.tensor([-1.0]), "threshold is -1.0"),
        ("mixed_int8 with columns", "columns", torch.tensor([1, 128]), "not among 128 inputs"),
        ("mixed_int8 with columns", "side", torch.zeros(24, 3).half(), "'side' has shape"),
        ("fp8", "values", torch.zeros(24, 128), "'values' is torch.float32, not float8_e4m3fn"),
        ("fp8", "scale", torch.zeros(23), "'scale' has shape"),
    ],
)
def test_damaged_parts_are_named(name, part, value, match):
    stored = MAKE[name](torch.randn(24, 128)).to_tensors() | {part: value}
    kind = FORMATS.get(name.split()[0])
    with pytest.raises(CheckpointError, match=match):
        kind.from_tensors({k: t for k, t in stored.items() if t is not None})


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused(name, bad):
    for column in (1, 90):
        w = torch.randn(4, 128)
        w[2, column] = bad
        with pytest.raises(ParetuneError, match="NaN or infinity"):
            MAKE[name](w)


@pytest.mark.parametrize("name", MAKE)
def test_zero_rows_stay_zero(name):
    w = torch.randn(6, 128)
    w[2] = 0
    weight = MAKE[name](w)
    assert (weight.dequantize()[2] == 0).all() and torch.isfinite(weight.dequantize()).all()
    assert (weight.matmul(torch.randn(3, 128))[:, 2] == 0).all()
    assert (MAKE[name](torch.zeros(6, 128)).dequantize() == 0).all()
