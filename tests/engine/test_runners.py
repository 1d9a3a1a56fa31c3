"""Runners: the compiled one gives the oracle's tokens from two graphs, and what really ran is reported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from paretune.engine.exact import TIE_MARGIN
from paretune.engine.generate import generate, naive_generate
from paretune.engine.probe import PROMPT_LEN, observe
from paretune.engine.runners.compiled import CAPACITY_STEP, MODES, CompileRunner
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import NoEffectError, ParetuneError, UsageError
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.native_build import compiler
from paretune.recipe import EngineOptions, Recipe
from paretune.registry import RUNNERS
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.int8 import Int8
from paretune.transforms.precision import Precision

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
GPT2 = {"model_type": "gpt2", "vocab_size": 97, "n_positions": 160, "n_layer": 1, "n_head": 2, "n_embd": 32}
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 97,
    "max_position_embeddings": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "sliding_window": 8,
}
LLAMA = {k: v for k, v in MISTRAL.items() if k != "sliding_window"} | {"model_type": "llama"}


def model_of(hf, *transforms):
    """A model whose greedy text does not repeat one token: larger weights than an initialiser's."""
    model = checkpoint.new(ModelConfig.from_hf(hf))
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.copy_(0.4 * torch.randn(p.shape, generator=g) + (p.dim() == 1))
    return Recipe(transforms).apply(model, Context())


def prompt_of(n, seed=0):
    return torch.randint(1, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def assert_oracle_tokens(runner, prompts, n):
    result = generate(runner, prompts, n)
    for prompt, generation in zip(prompts, result.generations, strict=True):
        expected, margins = naive_generate(runner.model, prompt, n)
        first = next((i for i, (a, b) in enumerate(zip(generation.tokens, expected, strict=True)) if a != b), None)
        assert first is None or margins[first] < TIE_MARGIN
        assert n < 20 or len(set(expected)) > 2


@pytest.fixture(scope="module")
def compiled():
    """One compiled runner for the module: each graph costs seconds."""
    torch._dynamo.reset()
    counters.clear()
    yield CompileRunner(model_of(GPT2, Attention("sdpa")))
    torch._dynamo.reset()


@needs_compiler
def test_compiled_life(compiled):
    """One story, as every graph costs seconds: two graphs, the oracle's tokens, no more compilation."""
    before = torch._inductor.config.save_config_portable()
    assert_oracle_tokens(compiled, [prompt_of(9)], 20)  # 19 decode steps
    first = graphs()
    assert first == 2, "prefill and decode are one graph each"
    assert sum(counters["graph_break"].values()) == 0
    with torch._dynamo.config.patch(error_on_recompile=True):  # decode, at every position of the cache
        assert_oracle_tokens(compiled, [prompt_of(9, seed=1)], 100)
        assert_oracle_tokens(compiled, [prompt_of(10, seed=2)], 20)
    for n in (2, 3, 17, 33, 63, 64, 65, 120):  # prompt lengths
        assert_oracle_tokens(compiled, [prompt_of(n, seed=n)], 3)
    assert graphs() - first <= 2
    # Incremental logits, verification included, equal the model's own.
    tokens = torch.tensor([prompt_of(24)])
    cache = compiled.new_cache(1, 30)
    parts = [compiled.forward(t, cache, "all") for t in tokens.split([9, 1, 1, 4, 1, 8], dim=1)]
    assert cache.host_lengths == (24,)
    with torch.inference_mode():
        assert_close(torch.cat(parts, dim=1), compiled.model(tokens), atol=1e-4, rtol=1e-4)
    cache.truncate_(10)
    again = compiled.forward(tokens[:, 10:11], cache, "all")
    assert torch.equal(again, parts[2])
    # The compiler's global settings are as they were.
    assert torch._inductor.config.save_config_portable() == before
    # What the probe says of it.
    seen = observe(compiled)
    assert seen.compiled and seen.graph_breaks == 0 and seen.cache_dtype == "torch.float32"
    assert seen.runner == {"runner": "compile", "mode": "default"}


@needs_compiler
def test_inference_mode_does_not_compile_again(compiled):
    """`check_exact` and the trial's worker call the same runner, one in inference mode and one not."""
    assert_oracle_tokens(compiled, [prompt_of(9)], 3)
    known = graphs()
    with torch.inference_mode():
        assert_oracle_tokens(compiled, [prompt_of(9)], 3)
    assert graphs() == known


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        (LLAMA, (Attention("sdpa"),), "default"),
        (MISTRAL, (), "default"),
        (MISTRAL, (Attention("sdpa"),), "freeze"),
        (GPT2, (Attention("sdpa"),), "freeze"),
        (GPT2, (Attention("sdpa"),), "max-autotune"),
        (GPT2, (Attention("sdpa"),), "reduce-overhead"),
    ],
    ids=lambda c: f"{c[0]['model_type']}-{c[2]}-{len(c[1])}",
)
def test_every_family_and_mode(case):
    hf, transforms, mode = case
    torch._dynamo.reset()
    counters.clear()
    before = torch._inductor.config.save_config_portable()
    runner = CompileRunner(model_of(hf, *transforms), mode)
    assert_oracle_tokens(runner, [prompt_of(9)], 20)
    assert graphs() == 2 and sum(counters["graph_break"].values()) == 0
    assert_oracle_tokens(runner, [prompt_of(9), prompt_of(20), prompt_of(3)], 20)  # a batch: graphs of its own
    assert graphs() <= 4
    assert torch._inductor.config.save_config_portable() == before
    torch._dynamo.reset()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_compiles_what_transforms_make(dtype, embeddings):
    """int8 and 16 bits under the compiler, with prompts on both sides of the int8 kernel's limit of rows."""
    torch._dynamo.reset()
    precision = () if dtype == "fp32" else (Precision(dtype),)
    eager = EagerRunner(model_of(GPT2, Attention("sdpa"), *precision, Int8(embeddings)))
    runner = CompileRunner(eager.model)
    exact = model_of(GPT2)
    for n in (9, 40):
        tokens = torch.tensor([prompt_of(n)])
        outputs = []
        for r in (runner, eager):
            cache = r.new_cache(1, n + 1)
            outputs.append(torch.cat([r.forward(t, cache, "all") for t in tokens.split([n - 1, 1], dim=1)], dim=1))
        with torch.inference_mode():
            truth = exact(tokens)
        errors = [float((o.float() - truth).norm() / truth.norm()) for o in outputs]
        assert errors[0] <= 2 * errors[1] + 1e-6 and errors[1] < 0.05
    torch._dynamo.reset()


def test_requires_a_compiler(monkeypatch):
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")
    assert "C++ compiler" in CompileRunner.requires("cpu")
    assert CompileRunner.requires("cuda") is None
    assert EagerRunner.requires("cpu") is None
    assert "C++ compiler" in Recipe(engine=EngineOptions("compile")).requires("cpu")
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "0")
    assert (CompileRunner.requires("cpu") is None) == (compiler() is not None)


def test_unknown_mode():
    with pytest.raises(UsageError, match="the compile runner has no mode 'fast'") as failure:
        CompileRunner(model_of(GPT2), "fast")
    assert all(mode in str(failure.value) for mode in MODES)


def test_modes_are_what_they_say():
    assert MODES["default"] == {} and MODES["freeze"] == {"freezing": True}
    assert MODES["max-autotune"]["max_autotune"] is True


def test_capacity_is_rounded_up_so_that_few_shapes_are_compiled():
    runner = CompileRunner(model_of(GPT2))
    assert [runner.new_cache(1, n).capacity for n in (1, CAPACITY_STEP, CAPACITY_STEP + 1, 10**6)] == [
        CAPACITY_STEP,
        CAPACITY_STEP,
        160,  # the context
        160,
    ]
    assert runner.new_cache(2, 5).static and not EagerRunner(runner.model).new_cache(2, 5).static


def test_a_cache_of_another_runner_is_refused():
    model = model_of(GPT2)
    with pytest.raises(AssertionError, match="another runner"):
        CompileRunner(model).forward(torch.tensor([[1]]), EagerRunner(model).new_cache(1, 4))


def test_the_registry_knows_them():
    assert [RUNNERS.get(name).name for name in RUNNERS.names()] == RUNNERS.names()


@pytest.mark.parametrize("hf", [GPT2, LLAMA, MISTRAL], ids=lambda hf: hf["model_type"])
def test_eager_forward_is_the_model(hf):
    model = model_of(hf)
    runner, tokens = EagerRunner(model), torch.tensor([prompt_of(20)])
    with torch.inference_mode():
        expected = model(tokens)
    assert_close(runner.forward(tokens, runner.new_cache(1, 20), "all"), expected)
    assert_close(runner.forward(tokens, runner.new_cache(1, 20)), expected[:, -1:])
    assert runner.describe() == {"runner": "eager"} and runner.dtype == torch.float32


def test_observe_reports_what_ran():
    model = model_of(GPT2, Attention("sdpa"))
    n = sum(p.numel() for p in model.parameters())
    seen = observe(EagerRunner(model))
    assert seen.runner == {"runner": "eager"} and not seen.compiled and seen.graph_breaks == 0
    assert seen.cache_dtype == "torch.float32"
    assert seen.bytes_by_dtype == {"float32": 4 * n}  # the tied head counts once
    assert seen.kernels["aten::scaled_dot_product_attention"] == 2  # one layer, one prefill and one decode step
    assert seen.kernels["aten::embedding"] == 4
    plain = observe(EagerRunner(model_of(GPT2)))
    assert not [k for k in plain.kernels if "scaled_dot_product" in k] and plain.kernels["aten::softmax"] == 2


def test_observe_sees_the_formats():
    model = model_of(GPT2, Precision("bf16"), Int8())
    seen = observe(EagerRunner(model))
    assert seen.cache_dtype == "torch.bfloat16"
    int8 = sum(w.q.numel() for w in {id(m): m for m in model.modules() if hasattr(m, "q")}.values())
    assert seen.bytes_by_dtype["int8"] == int8 and seen.bytes_by_dtype["float32"] > 0
    assert set(seen.bytes_by_dtype) == {"int8", "float32", "bfloat16"}
    assert seen.kernels["aten::_weight_int8pack_mm"] == 2 * 5


def test_observe_reads_the_cache_that_really_is_there():
    class Odd(EagerRunner):
        def new_cache(self, batch_size, capacity):
            cache = super().new_cache(batch_size, capacity)
            for layer in cache.layers:
                layer.k, layer.v = layer.k.double(), layer.v.double()
            return cache

        def forward(self, tokens, cache, logits="last"):
            return torch.zeros(1, 1, 97)

    assert observe(Odd(model_of(GPT2))).cache_dtype == "torch.float64"


def test_observe_on_a_context_shorter_than_its_prompt():
    short = GPT2 | {"n_positions": PROMPT_LEN - 2}
    assert observe(EagerRunner(model_of(short))).kernels


def test_observe_refuses_nan():
    model = model_of(GPT2)
    model.ln_f.weight.data[0] = float("nan")
    with pytest.raises(ParetuneError, match="NaN or infinity") as failure:
        observe(EagerRunner(model))
    assert not isinstance(failure.value, NoEffectError)


def test_two_runners_share_nothing_but_the_model():
    model = model_of(GPT2)
    a, b = EagerRunner(model), EagerRunner(copy.deepcopy(model))
    tokens = torch.tensor([[1, 2, 3]])
    cache = a.new_cache(1, 4)
    a.forward(tokens, cache)
    assert b.new_cache(1, 4).host_lengths == (0,) and cache.host_lengths == (3,)
