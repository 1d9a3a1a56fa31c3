"""Native products and programs against PyTorch: odd shapes, every format, every family, steps of any shape."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from paretune import native_build
from paretune.engine.load import load_recipe, prove
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.runners.native import MAX_ROWS, NativeRunner
from paretune.errors import NoEffectError, UsageError
from paretune.model import checkpoint
from paretune.model.layers import ACTIVATION_FUNCTIONS
from paretune.ops.native.program import ACTIVATIONS, CannotLower, products
from paretune.ops.weights.dense import Dense
from paretune.ops.weights.int8_rows import Int8Rows
from paretune.recipe import preset
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.int8 import Int8
from paretune.transforms.precision import Precision
from paretune.tune import space as spaces

pytestmark = pytest.mark.skipif(native_build.unavailable_reason() is not None, reason="no C++ compiler")

FORMATS = {
    "fp32": Dense,
    "bf16": lambda w: Dense(w.bfloat16()),
    "fp16": lambda w: Dense(w.half()),
    "int8": Int8Rows.quantize,
}
FAMILIES = ("gpt2", "llama", "mistral")


# -- products


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n_in", [1, 7, 63, 64, 768, 1023])
@pytest.mark.parametrize("n_out", [1, 7, 8, 9, 50])
def test_products(name, n_in, n_out):
    """Against float64 on the stored numbers. The error of a sum of n products of unit normals is about
    sqrt(n) * 2^-24; 8 times that leaves room for the order of additions."""
    g = torch.Generator().manual_seed(n_in * 100 + n_out)
    weight = FORMATS[name](torch.randn(n_out, n_in, generator=g))
    exact = weight.dequantize().double()
    if name == "int8":
        exact = weight.q.double() * weight.scale.double()[:, None]
    for m in (1, 2, 3, 4, 6, 7, 13):
        x = torch.randn(m, n_in, generator=g)
        got = products(weight, x).double()
        assert float((got - x.double() @ exact.T).abs().max()) < 8 * n_in**0.5 * 2**-24 * 4


@pytest.mark.parametrize("name", FORMATS)
def test_products_do_not_depend_on_the_number_of_rows(name):
    """Bit for bit: a batch gives each row what it gets alone."""
    g = torch.Generator().manual_seed(1)
    weight, x = FORMATS[name](torch.randn(27, 331, generator=g)), torch.randn(17, 331, generator=g)
    together = products(weight, x)
    for m in range(17):
        assert torch.equal(together[m : m + 1], products(weight, x[m : m + 1]))


def test_nan_and_infinity_are_not_lost():
    w = torch.randn(9, 33)
    w[4, 32] = float("nan")
    w[5, 0] = float("inf")
    got = products(Dense(w), torch.ones(2, 33))
    assert got[:, 4].isnan().all() and got[:, 5].isinf().all()
    assert got[:, [0, 1, 2, 3, 6, 7, 8]].isfinite().all()


# -- whole models


def runners_of(folder, *transforms):
    """The same transformed weights under PyTorch and native."""
    model = checkpoint.load(folder)
    for transform in (Attention("sdpa"), *transforms):
        model = transform.apply(model, Context())
    return EagerRunner(model), NativeRunner(model)


def logits_of(runner, tokens, pieces):
    cache = runner.new_cache(tokens.size(0), tokens.size(1))
    return torch.cat([runner.forward(t, cache, "all").float() for t in tokens.split(pieces, dim=1)], dim=1)


@pytest.fixture(params=FAMILIES)
def folder(request):
    return request.getfixturevalue(f"tiny_{request.param}_folder")


@pytest.mark.parametrize("pieces", [[12, 1, 1, 1, 8], [1] * 23, [3, 13, 7]])
def test_fp32_equals_pytorch(folder, pieces, tiny_tokens):
    eager, native = runners_of(folder)
    torch.testing.assert_close(logits_of(native, tiny_tokens, pieces), logits_of(eager, tiny_tokens, pieces))
    assert native.n_native_steps == len(pieces)


@pytest.mark.parametrize(
    "transforms", [(Precision("bf16"),), (Precision("fp16"),), (Int8(),), (Int8(embeddings=False),)]
)
def test_other_formats_are_nearer_to_fp32_than_pytorch_is(folder, transforms, tiny_tokens):
    """Native activations are fp32 where PyTorch's are rounded: the error against the fp32 model may not be larger."""
    pieces = [12, 1, 1, 1, 8]
    exact = logits_of(EagerRunner(checkpoint.load(folder)), tiny_tokens, pieces).double()
    eager, native = runners_of(folder, *transforms)
    errors = [float((logits_of(r, tiny_tokens, pieces).double() - exact).norm()) for r in (native, eager)]
    assert errors[0] <= 1.1 * errors[1]
    assert errors[0] > 0


def test_rows_are_bit_equal_alone_and_in_a_batch_of_unequal_prompts(folder):
    _, native = runners_of(folder)
    g = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 131, (n,), generator=g) for n in (9, 1, 4)]
    cache = native.new_cache(3, 20)
    padded = torch.zeros(3, 9, dtype=torch.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache.stage_([len(p) for p in prompts])
    first = native.forward(padded, cache)
    step = torch.tensor([[3], [4], [5]])
    second = native.forward(step, cache)
    for b, prompt in enumerate(prompts):
        alone = native.new_cache(1, 20)
        assert torch.equal(native.forward(prompt[None], alone)[0], first[b])
        assert torch.equal(native.forward(step[b : b + 1], alone)[0], second[b])


def test_many_tokens_a_step_are_bit_equal_to_single_ones_and_roll_back(folder):
    _, native = runners_of(folder)
    tokens = torch.randint(0, 131, (1, 20), generator=torch.Generator().manual_seed(2))
    together = logits_of(native, tokens, [20])
    assert torch.equal(together, logits_of(native, tokens, [1] * 20))
    cache = native.new_cache(1, 20)
    native.forward(tokens, cache)
    cache.truncate_(7)
    assert torch.equal(native.forward(tokens[:, 7:11], cache, "all"), together[:, 7:11])


def test_long_steps_of_plain_weights_go_through_pytorch_on_the_same_cache(folder):
    eager, native = runners_of(folder)
    assert native.describe()["longer_steps"] == "PyTorch"
    tokens = torch.randint(0, 131, (1, MAX_ROWS + 9), generator=torch.Generator().manual_seed(2))
    pieces = [MAX_ROWS + 1] + [1] * 8
    torch.testing.assert_close(logits_of(native, tokens, pieces), logits_of(eager, tokens, pieces))
    assert native.n_native_steps == 8


def test_long_steps_of_other_weights_go_in_chunks_with_the_same_bits(folder):
    _, native = runners_of(folder, Int8())
    native.prefill = "native"  # as it is chosen for 16 bits on a processor that lacks them
    tokens = torch.randint(0, 131, (3, 50), generator=torch.Generator().manual_seed(2))
    single = logits_of(native, tokens, [1] * 50)
    assert torch.equal(logits_of(native, tokens, [50]), single)
    # Rows of unequal length, each ending in another chunk; the padding is not held.
    cache = native.new_cache(3, 55)
    cache.stage_([50, 1, 17])
    got = native.forward(tokens, cache)
    assert cache.host_lengths == (50, 1, 17)
    assert torch.equal(got, torch.stack([single[0, 49:50], single[1, :1], single[2, 16:17]]))
    step = native.forward(torch.tensor([[5], [6], [7]]), cache)
    alone = native.new_cache(1, 55)
    native.forward(tokens[2:, :17], alone)
    assert torch.equal(native.forward(torch.tensor([[7]]), alone), step[2:])


@pytest.mark.parametrize("has_it", [True, False])
def test_who_prefills_is_decided_by_the_processor_and_said(tiny_gpt2_folder, monkeypatch, has_it):
    monkeypatch.setattr("paretune.hardware.has_instruction", lambda dtype: has_it)
    for transforms, expected in (((), "PyTorch"), ((Int8(),), "PyTorch"), ((Precision("bf16"),), None)):
        _, native = runners_of(tiny_gpt2_folder, *transforms)
        assert native.describe()["longer_steps"] == (expected or ("PyTorch" if has_it else "native"))


def test_a_long_step_that_does_not_fit_leaves_the_cache_alone(tiny_gpt2_folder):
    _, native = runners_of(tiny_gpt2_folder, Int8())
    native.prefill = "native"
    cache = native.new_cache(1, 40)
    with pytest.raises(UsageError, match="do not fit"):
        native.forward(torch.zeros(1, 41, dtype=torch.int64), cache)
    assert cache.host_lengths == (0,)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_give_the_same_bits(folder, threads, tiny_tokens):
    """Also more of them than there are cores, or heads."""
    _, reference = runners_of(folder)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, native = runners_of(folder)
        assert native.describe()["threads"] == threads
        assert torch.equal(logits_of(native, tiny_tokens, 8), logits_of(reference, tiny_tokens, 8))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(tiny, name, tiny_tokens):
    """In a whole model, against PyTorch's own; and every activation that models may have is there."""
    assert set(ACTIVATIONS) == set(ACTIVATION_FUNCTIONS)
    hf = {"gelu_tanh": "gelu_new", "gelu": "gelu", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu"}[name]
    _, _, folder = tiny("gpt2", activation_function=hf)
    eager, native = runners_of(folder)
    assert native.config.activation == name
    torch.testing.assert_close(logits_of(native, tiny_tokens, 8), logits_of(eager, tiny_tokens, 8))


def test_a_strange_token_is_an_error_and_no_crash(tiny_gpt2_folder):
    _, native = runners_of(tiny_gpt2_folder)
    for token in (-1, 131, 2**40):
        with pytest.raises(IndexError, match="vocabulary"):
            native.forward(torch.tensor([[token]]), native.new_cache(1, 4))


def test_a_batch_that_is_not_the_caches_is_refused_and_any_integer_type_is_read(tiny_gpt2_folder):
    _, native = runners_of(tiny_gpt2_folder)
    with pytest.raises(AssertionError, match="2 x 1 tokens on a cache of 1 rows"):
        native.forward(torch.tensor([[1], [2]]), native.new_cache(1, 4))
    with pytest.raises(AssertionError):
        native.forward(torch.zeros(1, 0, dtype=torch.int64), native.new_cache(1, 4))
    tokens = torch.tensor([[3, 0, 7]])
    wanted = native.forward(tokens, native.new_cache(1, 4))
    assert torch.equal(native.forward(tokens.int(), native.new_cache(1, 4)), wanted)


def test_other_weights_are_noticed(tiny_gpt2_folder):
    eager, native = runners_of(tiny_gpt2_folder)
    tokens = torch.tensor([[3, 0, 7]])
    native.forward(tokens, native.new_cache(1, 4))
    layer = native.model.h[1].mlp.c_fc
    layer.weight = Dense(layer.weight.values * 2)
    got = native.forward(tokens, native.new_cache(1, 4))
    torch.testing.assert_close(got, eager.forward(tokens, eager.new_cache(1, 4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_a_team_of_its_own(tiny_gpt2_folder):
    _, native = runners_of(tiny_gpt2_folder)
    token = torch.tensor([[3]])
    native.forward(token, native.new_cache(1, 4))
    child = os.fork()
    if child == 0:
        ok = native.forward(token, native.new_cache(1, 4)).isfinite().all()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_too_many_sequences_are_not_proved(tiny_gpt2_folder):
    """They run, in PyTorch: a row named native would be a lie."""
    loaded = load_recipe(tiny_gpt2_folder, preset("native"))
    assert "whole steps run in native code" in " ".join(prove(loaded, MAX_ROWS)[0])
    loaded = load_recipe(tiny_gpt2_folder, preset("native"))
    with pytest.raises(NoEffectError, match="33 sequences"):
        prove(loaded, MAX_ROWS + 1)
    space = spaces.build("cpu", MAX_ROWS + 1)
    assert MAX_ROWS == spaces.MAX_NATIVE_BATCH
    assert not any(c.recipe.engine.runner == "native" for c in space.legal)


def test_working_memory_is_counted(tiny_gpt2_folder):
    _, native = runners_of(tiny_gpt2_folder)
    widths = native.config.n_embd * 5 + native.config.n_inner
    assert native.buffer_bytes >= 4 * MAX_ROWS * widths


def test_what_has_no_native_form_is_named(tiny_gpt2_folder):
    model = checkpoint.load(tiny_gpt2_folder)
    model.h[1].attn.attention = lambda q, k, v, cache, spec: q
    with pytest.raises(CannotLower, match="layer 1: native code has no attention form"):
        NativeRunner(model)
    model = checkpoint.load(tiny_gpt2_folder)
    model.h[1].mlp.c_fc.weight = Dense(model.h[1].mlp.c_fc.weight.values.double())
    with pytest.raises(CannotLower, match="no weight format dense"):
        NativeRunner(model)


def test_weights_are_not_copied(tiny_gpt2_folder):
    """One stored copy: what is changed in the model is changed in the program."""
    _, native = runners_of(tiny_gpt2_folder)
    token = torch.tensor([[3]])
    before = native.forward(token, native.new_cache(1, 4))
    native.model.lm_head.weight.values.mul_(0.5)
    native.model.wte.weight.values.mul_(1.0)
    after = native.forward(token, native.new_cache(1, 4))
    assert not torch.equal(before, after)


def test_without_a_compiler_the_reason_is_said(monkeypatch):
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")
    assert "PARETUNE_NO_COMPILER" in NativeRunner.requires("cpu")
    monkeypatch.delenv("PARETUNE_NO_COMPILER")
    assert NativeRunner.requires("cpu") is None and "CPU" in NativeRunner.requires("cuda")
    monkeypatch.setenv("PARETUNE_ISA", "mmx")
    assert "mmx" in NativeRunner.requires("cpu")


@pytest.mark.parametrize("path", ["portable", "avx2"])
def test_slower_paths_give_the_same_numbers(path, tiny_gpt2_folder):
    """The code of a processor without AVX-512, and without AVX at all, in a process of its own."""
    code = """
import sys, torch
from pathlib import Path
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.runners.native import NativeRunner
from paretune.model import checkpoint
from paretune.ops.native import program
from paretune.transforms.base import Context
from paretune.transforms.int8 import Int8
from paretune.transforms.precision import Precision
tokens = torch.randint(0, 131, (2, 23), generator=torch.Generator().manual_seed(7))
exact = None
for transforms in ((), (Precision("bf16"),), (Precision("fp16"),), (Int8(),)):
    model = checkpoint.load(Path(sys.argv[1]))
    for t in transforms:
        model = t.apply(model, Context())
    out = []
    for runner in (EagerRunner(model), NativeRunner(model)):
        cache = runner.new_cache(2, 23)
        out.append(torch.cat([runner.forward(t, cache, "all").double() for t in tokens.split(8, dim=1)], dim=1))
    exact = out[0] if exact is None else exact
    errors = [float((o - exact).norm() / exact.norm()) for o in out]
    assert errors[1] <= 1.1 * errors[0] + 1e-6, (transforms, errors)
print(program.isa())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_gpt2_folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PARETUNE_ISA": path},
    )
    assert done.returncode == 0, done.stderr
    has_avx2 = {"avx2", "fma"} <= native_build.cpu_info()[1]
    assert done.stdout.strip() == (path if has_avx2 else "portable")
