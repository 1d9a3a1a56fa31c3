"""The same kernels compiled, on a GPU: real tiles, shapes and masks, graphs, and what an interpreter cannot show."""

from __future__ import annotations

import pytest
import torch
from quantized_layers import MAKE

from paretune.ops.quantized_linear import op, reference, tiles
from paretune.ops.weights.int8_rows import Int8Rows

pytestmark = pytest.mark.gpu

# Relative to fp64: fp32 sums; then weights and results rounded to nearest, 2^-12 and 2^-9 each, with room.
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.fixture(autouse=True)
def _device():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    assert op.unavailable_reason("cuda") is None
    torch.cuda.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what `torch.empty` gives with NaN
    yield
    torch.use_deterministic_algorithms(False)


def layer(name, n_out, n_in):
    return MAKE[name](torch.randn(n_out, n_in, device="cuda")).cuda()


def check(weight, x, bias=None, **options):
    kind = "nf4" if weight.format == "nf4" else f"int{weight.bits}"
    if options:
        from paretune.ops.quantized_linear import triton

        form = (*weight.gpu(), bias)
        got = triton.quantized_linear(x, *form, format=kind, group=weight.group, **options)
    else:
        got = weight.linear(x, bias)
    exact = reference.linear(x.double(), weight.dequantize().double(), None if bias is None else bias.double())
    error = (got.double() - exact).abs()
    assert got.dtype == x.dtype and bool(got.isfinite().all())
    assert float(error.norm() / exact.norm()) < LIMITS[x.dtype]
    assert float(error.max() / exact.abs().max()) < 4 * LIMITS[x.dtype]
    return got


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", MAKE)
def test_compiled_kernels(name, dtype):
    """The tiles that the tuner chooses, at every class of rows."""
    weight = layer(name, 1030, 1152)
    for n_rows in (1, 2, 7, 16, 17, 63, 64, 65, 200):
        x, bias = torch.randn(n_rows, 1152, device="cuda").to(dtype), torch.randn(1030, device="cuda").to(dtype)
        check(weight, x, bias)
        check(weight, x)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", MAKE)
def test_every_tile_and_split_on_a_gpu(name, dtype):
    weight = layer(name, 261, 384)
    for parts in (1, 3, 8):
        for tile in tiles.GEMV_TILES:
            check(weight, torch.randn(1, 384, device="cuda").to(dtype), tile=tile, parts=parts)
        for rows, choices in tiles.GEMM_TILES.items():
            for tile in tiles.FP32_TILES if dtype == torch.float32 else choices:
                check(weight, torch.randn(rows - 3, 384, device="cuda").to(dtype), tile=tile, parts=parts)


@pytest.mark.parametrize("shape", [(33, 7), (70, 101), (3, 1), (1, 16), (129, 130)])
def test_odd_widths_of_rows(shape):
    weight = layer("int8 rows", *shape)
    for dtype in LIMITS:
        for n_rows in (1, 5, 33):
            check(weight, torch.randn(n_rows, shape[1], device="cuda").to(dtype) + 1)


def test_strides_of_inputs():
    weight = layer("int4", 64, 128)
    x = torch.randn(3, 131, 128, device="cuda").half()
    for inputs in (x[:, -1:], x[:, ::2], x[:, :, :].transpose(0, 1), torch.randn(128, 9, device="cuda").half().T):
        check(weight, inputs)
    check(weight, torch.randn(5, 200, device="cuda").half()[:, 3:131])  # rows that begin at odd addresses


def test_places_beyond_32_bits():
    """2.2 GB of one matrix: offsets of its last rows do not fit into 32 bits."""
    n_out, n_in = 537_000, 4096
    q = torch.randint(-127, 128, (n_out, n_in), dtype=torch.int8, device="cuda")
    weight = Int8Rows(q, torch.rand(n_out, device="cuda"), torch.float16)
    last = Int8Rows(q[-64:].clone(), weight.scale[-64:].clone(), torch.float32)
    for n_rows in (1, 5):
        x = torch.randn(n_rows, n_in, device="cuda").half() * 0.01
        exact = reference.linear(x.double(), last.dequantize().double())
        torch.testing.assert_close(weight.linear(x)[:, -64:].double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", MAKE)
def test_a_graph_replays_and_the_host_never_waits(name):
    weight = layer(name, 512, 512)
    for n_rows in (1, 4, 100):
        x = torch.randn(n_rows, 512, device="cuda").bfloat16()
        expected = weight.linear(x)  # tiles are chosen
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            weight.linear(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = weight.linear(x)
        for _ in range(2):
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, expected), "the same inputs give the same bits"


def test_torch_compile_on_a_gpu():
    weight, bias = layer("int4", 512, 512), torch.randn(512, device="cuda").bfloat16()
    for options in ({}, {"triton.cudagraphs": True}):
        compiled = torch.compile(lambda x: torch.relu(weight.linear(x, bias)), fullgraph=True, options=options)
        with torch.no_grad():
            x = torch.randn(1, 512, device="cuda").bfloat16()
            for _ in range(3):
                assert torch.equal(compiled(x), torch.relu(weight.linear(x, bias)))
        torch._dynamo.reset()


def test_no_dequantised_copy_is_made():
    weight = layer("int4", 4096, 4096)
    x = torch.randn(1, 4096, device="cuda").bfloat16()
    weight.linear(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weight.linear(x)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


@pytest.mark.parametrize("transform", ["int8", "groups", "nf4"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_proves_its_kernels(family, transform, tiny):
    from paretune.engine.load import load_recipe, prove
    from paretune.recipe import Recipe

    width = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
    _, _, folder = tiny(family, **width)
    data = [{"name": "precision", "dtype": "bf16"}, {"name": transform}]
    loaded = load_recipe(folder, Recipe.from_dict({"transforms": data}), "cuda")
    said, probe = prove(loaded)
    assert any(name in sentence for sentence in said for name in op.KERNELS)
    assert {"quantized_gemv", "quantized_gemm"} <= set(probe.kernels)
