"""int8: the formula, the kernel against it, and proof that nothing but int8 is stored."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.engine.probe import observe
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import NoEffectError, ParetuneError
from paretune.model.layers import Embedding, Linear
from paretune.ops.int8_linear import aten, reference
from paretune.ops.weights.dense import Dense
from paretune.ops.weights.int8_rows import Int8Rows
from paretune.registry import FORMATS
from paretune.transforms.base import Context
from paretune.transforms.int8 import Int8

SHAPES = [1, 8, 63, 64, 768, 1023]
ROWS = [1, 2, 8, 31, 32, 33, 128]
KERNEL = "aten::_weight_int8pack_mm"


# ---- the format


def formula(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """absmax / 127 a row, one row at a time, in fp64."""
    q, scale = np.zeros(w.shape, dtype=np.int64), np.ones(len(w))
    for i, row in enumerate(w.astype(np.float64)):
        if np.abs(row).max() > 0:
            scale[i] = np.abs(row).max() / 127
            q[i] = np.rint(row / scale[i])
    return q, scale


@pytest.mark.parametrize("shape", [(1, 1), (5, 63), (64, 1), (33, 1023), (768, 64)])
def test_equals_the_formula(shape):
    w = torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None]
    weight = Int8Rows.quantize(w)
    q, scale = formula(w.numpy())
    np.testing.assert_allclose(weight.scale.numpy(), scale, rtol=1e-6)
    away = np.abs(weight.q.numpy().astype(np.int64) - q)
    assert away.max() <= 1 and (away > 0).mean() < 1e-3  # fp32 may round a half the other way
    assert (weight.q.abs().amax(1) == 127).all()  # every row uses its whole range
    assert weight.q.dtype == torch.int8 and weight.scale.dtype == torch.float32


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=6))
def test_error_is_at_most_half_a_step(rows):
    w = torch.tensor(rows)
    weight = Int8Rows.quantize(w)
    error = (weight.dequantize().double() - w.double()).abs()
    assert (error <= weight.scale[:, None].double() * (0.5 + 1e-4) + 1e-40).all()


def sqnr(exact, ours) -> float:
    return float(10 * torch.log10(exact.double().square().sum() / (exact.double() - ours.double()).square().sum()))


def test_signal_to_noise_on_gaussian_weights():
    w = torch.randn(256, 768)
    assert sqnr(w, Int8Rows.quantize(w).dequantize()) > 38
    x = torch.randn(8, 768)
    assert sqnr(x @ w.T, Int8Rows.quantize(w).matmul(x)) > 30
    # The bar can be missed: with seven levels a row it is.
    coarse = torch.round(w / w.abs().amax(1, keepdim=True) * 7) * w.abs().amax(1, keepdim=True) / 7
    assert sqnr(w, coarse) < 30


def test_a_zero_row_stays_zero():
    w = torch.randn(4, 16)
    w[2] = 0
    weight = Int8Rows.quantize(w)
    assert torch.equal(weight.dequantize()[2], torch.zeros(16)) and torch.isfinite(weight.scale).all()
    assert (weight.matmul(torch.randn(3, 16))[:, 2] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_refused(bad):
    w = torch.randn(4, 16)
    w[3, 7] = bad
    with pytest.raises(ParetuneError, match="NaN or infinity") as failure:
        Int8Rows.quantize(w)
    assert failure.value.exit_code == 1 and "\n" not in str(failure.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_the_whole_agree_and_carry_the_dtype(dtype):
    weight = Int8Rows.quantize(torch.randn(20, 12).to(dtype))
    index = torch.tensor([[3, 0], [19, 3]])
    whole = weight.dequantize()
    assert weight.compute_dtype == whole.dtype == weight.rows(index).dtype == dtype
    assert torch.equal(weight.rows(index), whole[index])
    assert weight.matmul(torch.randn(2, 5, 12).to(dtype)).dtype == dtype


def test_round_trip_through_tensors():
    weight = Int8Rows.quantize(torch.randn(20, 12).half())
    again = FORMATS.get("int8_rows").from_tensors(weight.to_tensors())
    assert torch.equal(again.q, weight.q) and torch.equal(again.scale, weight.scale)
    assert again.compute_dtype == torch.float16 and again.q.data_ptr() == weight.q.data_ptr()  # no copy
    assert weight.stored_bytes == 20 * 12 + 4 * 20


def test_a_cast_of_the_model_changes_the_compute_dtype_and_no_scale():
    """A saved bf16 + int8 model is loaded, and its recipe applied again: the scales must not be rounded."""
    weight = Int8Rows.quantize(torch.randn(20, 12))
    scale, q = weight.scale.clone(), weight.q.clone()
    holder = Linear(weight).to(torch.bfloat16)
    assert holder.weight.compute_dtype == torch.bfloat16
    assert torch.equal(weight.scale, scale) and weight.scale.dtype == torch.float32 and torch.equal(weight.q, q)
    assert weight.rows(torch.tensor([1])).dtype == torch.bfloat16


# ---- the kernel


def case(n, n_in, n_out, dtype):
    x = torch.randn(n, n_in).to(dtype)
    return x, torch.randint(-127, 128, (n_out, n_in), dtype=torch.int8), torch.rand(n_out) + 0.1


@pytest.mark.parametrize("n_in", SHAPES)
@pytest.mark.parametrize("n_out", [1, 63, 768, 1023])
def test_the_kernel_equals_the_reference(n_in, n_out):
    """Within the rounding of bf16 activations and results, over all rows and dtypes."""
    for n in ROWS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, q, scale = case(n, n_in, n_out, dtype)
            exact = reference.int8_linear(x.double(), q, scale)
            # bf16 keeps 8 bits. The activations are rounded (relative to what is summed: it can cancel), the
            # product and the scaled result.
            summed = reference.int8_linear(x.double().abs(), q.abs(), scale)
            y = aten.int8_linear(x, q, scale)
            assert y.dtype == dtype and y.shape == (n, n_out)
            assert ((y.double() - exact).abs() <= 2**-8 * (2.1 * exact.abs() + summed)).all(), (n, dtype)
            if n * n_out > 700:  # roundings go both ways
                assert float((y.double() - exact).norm()) <= 2**-8 * float(exact.norm()), (n, dtype)


@pytest.mark.parametrize("n", [1, 8, 40])
@pytest.mark.parametrize("n_in", [160, 168])
def test_fp16_does_not_overflow(n, n_in):
    """Sums of activations times integers up to 127 pass 65504, scaled they are small: in every form."""
    x = torch.full((n, n_in), 100.0, dtype=torch.float16)
    weight = Int8Rows.quantize(torch.full((3, n_in), 0.01))
    for form in (aten, reference):
        y = form.int8_linear(x, weight.q, weight.scale)
        assert y.dtype == torch.float16
        torch.testing.assert_close(y.float(), torch.full((n, 3), float(n_in)), rtol=2**-7, atol=0)


@pytest.mark.parametrize("n_in", [1, 8, 63, 72, 96, 1023])
def test_nothing_beyond_the_rows_is_read(n_in):
    """PyTorch's kernel has no tail for widths off its step: it would read (and crash) past the end.

    Activations, weights and scales lie in larger buffers full of poison.
    """
    for n in (1, 3, 32):
        for dtype in (torch.bfloat16, torch.float32):
            x, q, scale = case(n, n_in, 24, dtype)
            poisoned = []
            for tensor, poison in ((x, float("nan")), (q, 111), (scale, float("nan"))):
                buffer = torch.full((tensor.numel() + 4096,), poison, dtype=tensor.dtype)
                inside = buffer[: tensor.numel()].view(tensor.shape)
                poisoned.append(inside.copy_(tensor))
            assert torch.equal(aten.int8_linear(*poisoned), aten.int8_linear(x, q, scale))


def test_narrow_inputs_never_reach_the_kernel(monkeypatch):
    """The same, but certain: a crash depends on where the allocator put the tensors."""
    widths = []
    real = torch._weight_int8pack_mm

    def spy(x, q, scale):
        widths.append(x.size(1))
        return real(x, q, scale)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", spy)
    for n_in in range(1, 130):
        aten.int8_linear(*case(2, n_in, 5, torch.float32))
    assert widths == [16 * i for i in range(1, 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_any_stride(dtype):
    _, q, scale = case(1, 64, 16, dtype)
    wide = torch.randn(2, 3, 200).to(dtype)
    deep = torch.randn(8, 64, 2).to(dtype)
    views = {
        "slice": wide[..., :64],
        "shifted": wide[..., 5:69],
        "transposed": torch.randn(64, 5).to(dtype).t(),
        "every other": deep[..., 0],
        "one": deep[:1, :, 1],
        "expanded": torch.randn(1, 64).to(dtype).expand(4, 64),
        "vector": torch.randn(64).to(dtype),
    }
    for name, x in views.items():
        y = aten.int8_linear(x, q, scale)
        assert y.shape == (*x.shape[:-1], 16), name
        assert torch.equal(y, aten.int8_linear(x.contiguous().clone(), q, scale)), name


def test_scales_are_not_rounded_to_bf16():
    """A rounded scale shifts its whole row by up to 0.4 %, which no averaging takes away."""
    x = torch.ones(1, 16)
    q = torch.full((4000, 16), 8, dtype=torch.int8)  # sums of 128: exact in bf16
    scale = torch.rand(4000) + 1
    assert torch.equal(aten.int8_linear(x, q, scale)[0], 128 * scale)


# ---- the transform


@pytest.fixture(params=["gpt2", "llama", "mistral"])
def family(request):
    return request.param


def fake(kernels=None, compiled=False):
    return SimpleNamespace(
        kernels={KERNEL: 3} if kernels is None else kernels, compiled=compiled, cache_dtype="torch.float32"
    )


def holders(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear | Embedding)}


def stored(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())


def test_every_matrix_becomes_int8(tiny, family):
    model = tiny(family)[0]
    dense = {n: m.weight.dequantize().clone() for n, m in holders(model).items()}
    matrices = sum(w.numel() for w in {id(m.weight): m.weight.values for m in holders(model).values()}.values())
    rest = stored(model) - 4 * matrices
    assert Int8().apply(model, Context()) is model
    assert dense and all(type(m.weight) is Int8Rows for m in holders(model).values())
    for name, module in holders(model).items():
        assert sqnr(dense[name], module.weight.dequantize()) > 30
    rows = sum(w.out_features for w in {id(m.weight): m.weight for m in holders(model).values()}.values())
    assert stored(model) - rest == matrices + 4 * rows  # a byte a value, four a row, no dense copy
    assert (stored(model) - rest) / (4 * matrices) < 0.28
    said = Int8().verify(model, observe(EagerRunner(model)))
    assert f"{matrices + 4 * rows:,} bytes for {matrices:,} weights" in said[0] and KERNEL in said[1]


def test_embeddings_false_leaves_embedding_and_head(tiny, family):
    model = tiny(family)[0]
    before = {n: m.weight for n, m in holders(model).items()}
    Int8(embeddings=False).apply(model, Context())
    kept = {n for n, m in holders(model).items() if m.weight is before[n]}
    assert kept == {"gpt2": {"wte", "wpe", "lm_head"}}.get(family, {"embed_tokens", "lm_head"})
    assert all(type(m.weight) is Int8Rows for n, m in holders(model).items() if n not in kept)
    assert len(holders(model)) > len(kept)
    Int8(embeddings=False).verify(model, observe(EagerRunner(model)))
    with pytest.raises(NoEffectError):  # the whole thing it is not
        Int8().verify(model, fake())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_stays_tied(tiny, family, tied):
    model = tiny(family, tie_word_embeddings=tied)[0]
    Int8().apply(model, Context())
    embedding = getattr(model, model.embedding_name)
    assert (model.lm_head.weight is embedding.weight) == tied
    assert type(model.lm_head.weight) is type(embedding.weight) is Int8Rows


def test_twice_is_once(tiny):
    model = Int8().apply(tiny("gpt2")[0], Context())
    weights = {n: m.weight for n, m in holders(model).items()}
    Int8().apply(model, Context())
    assert all(m.weight is weights[n] for n, m in holders(model).items())


def test_never_applied_is_no_effect(tiny, family):
    model = tiny(family)[0]
    with pytest.raises(NoEffectError, match="layers are not int8"):
        Int8().verify(model, observe(EagerRunner(model)))


def test_one_layer_undone_is_no_effect(tiny):
    model = Int8().apply(tiny("gpt2")[0], Context())
    layer = model.h[1].mlp.c_proj
    layer.weight = Dense(layer.weight.dequantize())
    with pytest.raises(NoEffectError, match=r"1 layers are not int8 rows, h\.1\.mlp\.c_proj first"):
        Int8().verify(model, fake())


def test_a_kept_dense_copy_is_no_effect(tiny):
    model = Int8().apply(tiny("llama")[0], Context())
    weight = model.layers[0].mlp.up_proj.weight
    weight.register_buffer("cached", weight.dequantize())
    with pytest.raises(NoEffectError, match="bytes are stored"):
        Int8().verify(model, fake())


def test_a_profile_without_the_kernel_is_no_effect(tiny):
    model = Int8().apply(tiny("gpt2")[0], Context())
    with pytest.raises(NoEffectError, match=f"shows no {KERNEL}"):
        Int8().verify(model, fake({"aten::linear": 10}))
    assert len(Int8().verify(model, fake({}, compiled=True))) == 1  # a compiled graph names it otherwise
    assert len(Int8().verify(model, fake())) == 2


def test_a_checkpoint_with_nan_is_refused(tiny):
    model = tiny("gpt2")[0]
    model.h[0].attn.c_attn.weight.values.data[5, 5] = float("nan")
    with pytest.raises(ParetuneError, match="NaN"):
        Int8().apply(model, Context())


def test_titles():
    assert (Int8().title, Int8(embeddings=False).title) == ("int8", "int8-linear")
    assert not Int8.exact and Int8().requires("cpu") is None
