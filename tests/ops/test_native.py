"""Native products and programs against PyTorch: odd shapes, every format, every family, steps of any shape."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import os
import subprocess
import sys
import weakref

import pytest
import torch

from paretune import native_build
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.runners.native import NativeRunner
from paretune.errors import ParetuneError, UsageError
from paretune.model import checkpoint
from paretune.model.layers import ACTIVATION_FUNCTIONS, Embedding, Linear
from paretune.ops.native import packed as native_packed
from paretune.ops.native.packed import PackedWeight, pack
from paretune.ops.native.program import ACTIVATIONS, CannotLower
from paretune.ops.weights.dense import Dense
from paretune.ops.weights.int8_rows import Int8Rows
from paretune.ops.weights.int_groups import IntGroups
from paretune.ops.weights.mixed_int8 import MixedInt8
from paretune.ops.weights.nf4 import CODES, NF4
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.groups import Groups
from paretune.transforms.int8 import Int8
from paretune.transforms.precision import Precision

pytestmark = pytest.mark.skipif(native_build.unavailable_reason() is not None, reason="no C++ compiler")

FORMATS = {
    "fp32": Dense,
    "bf16": lambda w: Dense(w.bfloat16()),
    "fp16": lambda w: Dense(w.half()),
    "int8": Int8Rows.quantize,
    "int8 groups": lambda w: IntGroups.quantize(w, 8, 32),
    "int8 groups, 8-bit inputs": lambda w: IntGroups.quantize(w, 8, 64, activation_bits=8),
    "int8 groups, 7-bit inputs": lambda w: IntGroups.quantize(w, 8, 32, activation_bits=7),
    "7 bits, 7-bit inputs": lambda w: IntGroups.quantize(w, 7, 128, activation_bits=7),
    "7 bits with minimum, 7-bit inputs": lambda w: IntGroups.quantize(w, 7, 64, minimum=True, activation_bits=7),
    "int4": lambda w: IntGroups.quantize(w, 4, 32),
    "int4 with minimum": lambda w: IntGroups.quantize(w, 4, 64, minimum=True),
    "int4, 8-bit inputs": lambda w: IntGroups.quantize(w, 4, 128, activation_bits=8),
    "int4, 7-bit inputs": lambda w: IntGroups.quantize(w, 4, 32, activation_bits=7),
    "int4 with minimum, 7-bit inputs": lambda w: IntGroups.quantize(w, 4, 128, minimum=True, activation_bits=7),
}
FORMATS["nf4"] = NF4.quantize
INTEGER_INPUTS = {"nf4": 16, "int8": 16, "int8 groups": 16, "int4": 16, "int4 with minimum": 16}
INTEGER_INPUTS |= {name: int(name.split(", ")[1][0]) for name in FORMATS if ", " in name}

FAMILIES = ("gpt2", "llama", "mistral")


def native_isa():
    return native_packed.isa()


# -- products


def packed(weight):
    return next(pack([weight]))


def by_input(scales, weight):
    return scales.double().repeat_interleave(weight.group, dim=1)[:, : weight.in_features]


def numbers(weight):
    """The stored numbers in float64."""
    if isinstance(weight, Int8Rows | MixedInt8):
        return weight.q.double() * weight.scale.double()[:, None]
    if isinstance(weight, IntGroups):
        out = (weight.integers().double() - weight.lowest) * by_input(weight.scale, weight)
        return out if weight.minimum is None else out + by_input(weight.minimum, weight)
    if isinstance(weight, NF4):  # native code has the codes in steps of 1/1023 and the scales in fp16
        codes = torch.round(torch.tensor(CODES).double() * 1023) / 1023
        scales = by_input(weight.absmax().half(), weight)
        return codes[weight.integers().int()] * scales
    return weight.values.double()


def rounded(x, bits):
    """Inputs as integer formats see them: 128 share a scale, and of 7 bits a zero."""
    padded = torch.nn.functional.pad(x, (0, -x.size(1) % 128)).unflatten(-1, (-1, 128))
    limit = 32767 if bits == 16 else 127
    low, high = padded.amin(-1, keepdim=True).clamp(max=0), padded.amax(-1, keepdim=True).clamp(min=0)
    size = high - low if bits == 7 else torch.maximum(high, -low)
    factor = torch.where(size > 0, torch.full_like(size, limit) / size, torch.zeros_like(size))
    least = torch.round(low * factor) if bits == 7 else torch.full_like(size, -limit)
    q = torch.round(padded * factor).maximum(least).minimum(least + limit if bits == 7 else -least)
    return (q.double() * (size / limit).double()).flatten(-2)[:, : x.size(1)]


WIDTHS = (1, 31, 72, 100, 127, 129, 192, 576, 960, 1600)


@pytest.fixture
def poisoned():
    """Memory that is not written holds NaN, or the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def grouped():
    """Every way to round in groups, by what a layer of it is called."""
    for bits, minimum, inputs in itertools.product((4, 7, 8), (False, True), (16, 8, 7)):
        for group in (32, 64, 128):
            form = {"minimum": minimum, "activation_bits": inputs}
            name = f"int{bits}-g{group}{'-min' if minimum else ''}-a{inputs}"
            yield name, inputs, functools.partial(IntGroups.quantize, bits=bits, group=group, **form)
    yield "nf4", 16, NF4.quantize
    yield "int8 rows", 16, Int8Rows.quantize
    yield "llm.int8", 16, functools.partial(MixedInt8.quantize, threshold=6.0)


@pytest.mark.parametrize(("name", "inputs", "make"), list(grouped()), ids=lambda x: x if isinstance(x, str) else "")
def test_any_width(poisoned, name, inputs, make):
    """The last group of a row is shorter: products against float64, the same bits alone and together, nothing lost.

    The bound is that of `test_products`."""
    for n_in in WIDTHS:
        g = torch.Generator().manual_seed(n_in)
        weight = make(torch.randn(33, n_in, generator=g))
        native, x = packed(weight), torch.randn(33, n_in, generator=g)
        seen, exact = rounded(x, inputs), numbers(weight)
        together = native.matmul(x)
        bound = 4 * min(n_in, 256) * max(1, n_in / 256) ** 0.5 * 2**-24 + 2**-20
        assert float((together.double() - seen @ exact.T).abs().max()) < bound, n_in
        for n_rows in (1, 2, 7):
            assert torch.equal(native.matmul(x[:n_rows]), together[:n_rows]), (n_in, n_rows)
        before, after = weight.to_tensors(), native.to_tensors()
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before), n_in
        if weight.format != "nf4":  # whose native numbers are steps of 1/1023
            index = torch.tensor([0, 32, 7])
            assert torch.equal(native.rows(index), weight.rows(index)), n_in


def cases():
    for name in FORMATS:
        for n_in in (
            (128, 768, 1152) if "4" in name or "groups" in name or "7" in name else (1, 7, 63, 64, 130, 768, 1023)
        ):
            for n_out in (1, 15, 16, 17, 63, 200):
                yield name, n_in, n_out


@pytest.mark.parametrize(("name", "n_in", "n_out"), list(cases()))
def test_products(name, n_in, n_out):
    """Against float64 on the stored numbers, and for integers on the rounded inputs.

    A chain of n fp32 sums of unit normals is off by about n * 2^-24 / sqrt(2); chains are 256 long; six times that for
    the largest of many. A processor that multiplies bf16 rounds the inputs to it: 2^-8 each."""
    g = torch.Generator().manual_seed(n_in * 100 + n_out)
    weight = FORMATS[name](torch.randn(n_out, n_in, generator=g))
    exact, native = numbers(weight), packed(weight)
    rounds = name == "bf16" and "bf16" in native_isa()
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 100):
        x = torch.randn(m, n_in, generator=g)
        seen = rounded(x, INTEGER_INPUTS[name]) if name in INTEGER_INPUTS else x.double()
        got = native.matmul(x).double()
        bound = 4 * min(n_in, 256) * max(1, n_in / 256) ** 0.5 * 2**-24 + 2**-20
        bound += n_in**0.5 * 2**-6 if rounds else 0
        assert float((got - seen @ exact.T).abs().max()) < bound


@pytest.mark.parametrize("bits", [16, 8, 7])
def test_inputs_of_integer_formats_are_rounded_little(bits):
    """16 bits: less than bf16's 2^-9 of the largest, far; 8 bits: half a step of 1/127; 7 bits: of twice that."""
    g = torch.Generator().manual_seed(3)
    w, x = torch.randn(64, 512, generator=g), torch.randn(9, 512, generator=g) * 10
    if bits == 16:
        x[:, 5] = 300.0  # an outlier takes the resolution of its 128 neighbours only
    weight = IntGroups.quantize(w, 8, 32, activation_bits=bits)
    error = packed(weight).matmul(x).double() - x.double() @ numbers(weight).T
    size = float((x.double() @ numbers(weight).T).norm())
    assert float(error.norm()) / size < {16: 1e-4, 8: 2e-2, 7: 3e-2}[bits]


@pytest.mark.parametrize("name", [name for name in INTEGER_INPUTS if INTEGER_INPUTS[name] < 16])
def test_pytorchs_form_rounds_inputs_to_bytes_too(name):
    """So that a recipe is held to a reference of its own numbers; a number between two steps may go either way."""
    g = torch.Generator().manual_seed(6)
    weight, x = FORMATS[name](torch.randn(40, 256, generator=g)), torch.randn(7, 256, generator=g)
    x[3] = 0
    got, reference = packed(weight).matmul(x), weight.matmul(x)
    assert float((got - reference).norm() / reference.norm()) < 1e-3
    assert float((got - x @ weight.dequantize().T).norm() / reference.norm()) > 3e-3


@pytest.mark.parametrize("name", FORMATS)
def test_products_do_not_depend_on_the_number_of_rows(name):
    """Bit for bit: a batch gives each row what it gets alone, by whatever tiles it is computed."""
    g = torch.Generator().manual_seed(1)
    native, x = packed(FORMATS[name](torch.randn(91, 384, generator=g))), torch.randn(217, 384, generator=g)
    together = native.matmul(x)
    for m in (0, 1, 95, 96, 100, 216):
        assert torch.equal(together[m : m + 1], native.matmul(x[m : m + 1]))
    for n in (2, 5, 7, 8, 11, 13, 40):
        assert torch.equal(together[:n], native.matmul(x[:n]))


@pytest.mark.parametrize("name", FORMATS)
def test_packing_loses_nothing(name):
    g = torch.Generator().manual_seed(4)
    weight = FORMATS[name](torch.randn(37, 128, generator=g))
    native = packed(weight)
    before, after = weight.to_tensors(), native.to_tensors()
    assert before.keys() == after.keys() and native.format == weight.format
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert torch.equal(native.dequantize(), weight.dequantize())
    index = torch.tensor([[0, 36], [5, 5]])
    # Steps of 1/1023 of a scale in fp16; as the whole, NF4 gives itself back bit for bit.
    slack = 1e-3 * float(weight.dequantize().abs().max()) if weight.format == "nf4" else 0
    torch.testing.assert_close(native.rows(index), weight.rows(index), rtol=0, atol=slack)
    with pytest.raises(IndexError):
        native.rows(torch.tensor([37]))
    # Rows rounded up to 16; integers, 16-bit scales and nothing else.
    assert native.stored_bytes <= -(-weight.stored_bytes * 48 // 37) + 64 + (
        48 * 128 // 64 * 2 if name == "nf4" else 0
    )  # fp16 scales beside the 8-bit ones


@pytest.mark.parametrize("name", FORMATS)
def test_nan_and_infinity_are_not_lost(name):
    """In the weight or in the input: NaN comes out, where it belongs."""
    g = torch.Generator().manual_seed(5)
    w, x = torch.randn(20, 256, generator=g), torch.randn(9, 256, generator=g)
    native = packed(FORMATS[name](w))
    x[4, 200] = float("nan")
    x[6, 3] = float("inf")
    got = native.matmul(x)
    good = [0, 1, 2, 3, 5, 7, 8]
    assert not got[4].isfinite().any() and not got[6].isfinite().any() and got[good].isfinite().all()
    if name in ("fp32", "bf16", "fp16"):
        w[4, 32], w[5, 0] = float("nan"), float("inf")
        got = packed(FORMATS[name](w)).matmul(x[:3].abs())
        assert got[:, 4].isnan().all() and got[:, 5].isinf().all()
        assert got[:, [0, 1, 2, 3, 6, 7, 8]].isfinite().all()
    else:
        w[4, 32] = float("nan")
        with pytest.raises(ParetuneError, match="NaN"):
            FORMATS[name](w)


def test_a_zero_input_and_a_tiny_one():
    """Nothing is divided by zero, nothing overflows."""
    for name in INTEGER_INPUTS:
        native = packed(FORMATS[name](torch.randn(16, 128)))
        assert torch.equal(native.matmul(torch.zeros(2, 128)), torch.zeros(2, 16))
        assert native.matmul(torch.full((1, 128), 1e-38)).abs().max() < 1e-30
        assert native.matmul(torch.full((1, 128), 1e30)).isfinite().all()


# -- whole models


def runners_of(folder, *transforms):
    """The same transformed weights under PyTorch and native."""
    model = checkpoint.load(folder)
    for transform in (Attention("sdpa"), *transforms):
        model = transform.apply(model, Context())
    return EagerRunner(copy.deepcopy(model)), NativeRunner(model)


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


@pytest.mark.parametrize("transforms", [(), (Precision("bf16"),), (Int8(),), (Groups(head_bits=0, group=32),)])
def test_long_steps_go_in_pieces_with_the_same_bits(folder, transforms, monkeypatch):
    monkeypatch.setattr("paretune.engine.runners.native.MAX_ROWS", 20)
    try:
        _, native = runners_of(folder, *transforms)
    except UsageError:
        pytest.skip("groups do not divide this model")
    tokens = torch.randint(0, 131, (3, 50), generator=torch.Generator().manual_seed(2))
    single = logits_of(native, tokens, [1] * 50)
    assert torch.equal(logits_of(native, tokens, [50]), single)
    # Rows of unequal length, each ending in another piece; the padding is not held.
    cache = native.new_cache(3, 55)
    cache.stage_([50, 1, 17])
    got = native.forward(tokens, cache)
    assert cache.host_lengths == (50, 1, 17)
    assert torch.equal(got, torch.stack([single[0, 49:50], single[1, :1], single[2, 16:17]]))
    cache.truncate_(0)
    cache.stage_([50, 1, 17])
    assert native.greedy(tokens, cache) == got[:, 0].argmax(-1).tolist()
    step = native.forward(torch.tensor([[5], [6], [7]]), cache)
    alone = native.new_cache(1, 55)
    native.forward(tokens[2:, :17], alone)
    assert torch.equal(native.forward(torch.tensor([[7]]), alone), step[2:])


def test_a_long_step_that_does_not_fit_leaves_the_cache_alone(tiny_gpt2_folder, monkeypatch):
    monkeypatch.setattr("paretune.engine.runners.native.MAX_ROWS", 20)
    _, native = runners_of(tiny_gpt2_folder, Int8())
    cache = native.new_cache(1, 40)
    with pytest.raises(UsageError, match="do not fit"):
        native.forward(torch.zeros(1, 41, dtype=torch.int64), cache)
    assert cache.host_lengths == (0,)


# -- attention over the cache

# Heads a key, one key head for all, more heads a key than are worked on together, odd head dimensions, a window.
SHAPES = {
    "gpt2": ("gpt2", {"n_positions": 700}),
    "odd heads": ("gpt2", {"n_embd": 39, "n_head": 3, "n_positions": 700}),
    "grouped": ("llama", {"max_position_embeddings": 700}),
    "one key head": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 700}),
    "many heads a key": (
        "llama",
        {"hidden_size": 160, "num_attention_heads": 20, "num_key_value_heads": 1, "max_position_embeddings": 700},
    ),
    "window": ("mistral", {"sliding_window": 300, "max_position_embeddings": 700}),
}


@pytest.mark.parametrize(
    ("cache_dtype", "shape"),
    [
        (dtype, shape)
        for dtype in ("fp32", "bf16", "fp16", "int8", "int4")
        for shape in SHAPES
        if (dtype, shape) != ("int4", "odd heads")
    ],
)
def test_long_contexts(tiny, cache_dtype, shape):
    """Several chunks of 256 positions, against PyTorch on a cache of the same dtype.

    And bit-equal in any pieces, on any number of threads."""
    family, changes = SHAPES[shape]
    _, _, folder = tiny(family, **changes)
    eager, native = runners_of(folder)
    for runner in (eager, native):
        runner.set_cache_dtype_(cache_dtype)
    tokens = torch.randint(0, 131, (2, 600), generator=torch.Generator().manual_seed(11))
    wanted = logits_of(eager, tokens, [590] + [1] * 10)
    got = logits_of(native, tokens, [590] + [1] * 10)
    # PyTorch's prefill reads its own rounded cache too, so both see the same numbers; a value that lies between two
    # 16-, 8- or 4-bit numbers may be stored as the one or the other; of 4 bits that is a fifteenth of a group's range.
    size = float(wanted.norm())
    allowed = {"fp32": 1e-5, "fp16": 2e-4, "bf16": 2e-3, "int8": 4e-3, "int4": 3e-2}[cache_dtype]
    assert float((got - wanted).norm()) / size < allowed
    pieces = [3, 250, 8, 300, 1, 17, 21]
    assert torch.equal(logits_of(native, tokens, pieces), got)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            other = NativeRunner(copy.deepcopy(native.model))
        finally:
            torch.set_num_threads(before)
        other.set_cache_dtype_(cache_dtype)
        assert torch.equal(logits_of(other, tokens, pieces), got)


@pytest.mark.parametrize("cache_dtype", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_what_lies_behind_a_rows_end_is_never_read(tiny, cache_dtype):
    _, _, folder = tiny("llama", max_position_embeddings=700)
    _, native = runners_of(folder)
    native.set_cache_dtype_(cache_dtype)
    tokens = torch.randint(0, 131, (2, 300), generator=torch.Generator().manual_seed(12))
    outs = []
    for poisoned in (False, True):
        cache = native.new_cache(2, 400)
        for layer in cache.layers if poisoned else ():
            for values in (layer.k, layer.v):
                values.fill_(float("nan") if values.is_floating_point() else 77)
            if layer.k_scale is not None:
                layer.k_scale.fill_(float("nan"))
                layer.v_scale.fill_(float("nan"))
        cache.stage_([300, 270])
        first = native.forward(tokens, cache)
        outs.append(
            torch.cat([first, native.forward(tokens[:, :1], cache), native.forward(tokens[:, :3], cache, "all")], 1)
        )
    assert outs[1].isfinite().all() and torch.equal(*outs)


def test_int8_cache_stores_what_it_says(tiny_llama_folder):
    _, native = runners_of(tiny_llama_folder)
    eager = EagerRunner(checkpoint.load(tiny_llama_folder, torch.float32))
    tokens = torch.tensor([[3, 9, 27]])
    caches = []
    for runner in (eager, native):
        runner.set_cache_dtype_("int8")
        cache = runner.new_cache(1, 8)
        runner.forward(tokens, cache)
        caches.append(cache)
    for ours, theirs in zip(caches[1].layers[:1], caches[0].layers[:1], strict=True):
        torch.testing.assert_close(ours.k_scale, theirs.k_scale)
        assert (ours.k.int() - theirs.k.int()).abs().max() <= 1
        assert ours.k[:, :, :3].abs().amax(-1).eq(127).all() and ours.k[:, :, 3:].eq(0).all()


def test_the_best_token_is_the_first_of_the_largest(tiny_gpt2_folder):
    _, native = runners_of(tiny_gpt2_folder)
    tokens = torch.randint(0, 131, (5, 9), generator=torch.Generator().manual_seed(13))
    logits = native.forward(tokens, native.new_cache(5, 10))[:, 0]
    assert native.greedy(tokens, native.new_cache(5, 10)) == logits.argmax(-1).tolist()
    # All alike: token 0. All NaN: token 0, as torch.argmax says.
    model = native.model
    width = model.config.n_embd
    for value in (0.0, float("nan")):
        model.lm_head.weight = Dense(torch.full((131, width), value))
        assert native.greedy(tokens, native.new_cache(5, 10)) == [0] * 5


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
    layer.weight = Dense(layer.weight.dequantize() * 2)
    eager.model.h[1].mlp.c_fc.weight.values.mul_(2)
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


def test_working_memory_is_counted(tiny_gpt2_folder):
    _, native = runners_of(tiny_gpt2_folder)
    before = native.buffer_bytes
    native.forward(torch.zeros(1, 30, dtype=torch.int64), native.new_cache(1, 30))
    widths = native.config.n_embd * 5 + native.config.n_inner
    assert native.buffer_bytes >= before + 4 * 29 * widths


def test_what_has_no_native_form_is_named(tiny_gpt2_folder):
    model = checkpoint.load(tiny_gpt2_folder)
    model.h[1].attn.attention = lambda q, k, v, cache, spec: q
    with pytest.raises(CannotLower, match="layer 1: native code has no attention form"):
        NativeRunner(model)
    model = checkpoint.load(tiny_gpt2_folder)
    model.h[1].mlp.c_fc.weight = Dense(model.h[1].mlp.c_fc.weight.values.double())
    with pytest.raises(CannotLower, match="no weight format dense"):
        NativeRunner(model)


def test_there_is_one_copy_of_the_weights(tiny_gpt2_folder):
    """The packed one; the model's own are let go, tied ones are packed once, and all of it is counted."""
    model = checkpoint.load(tiny_gpt2_folder, torch.float32)
    plain = weakref.ref(model.h[0].mlp.c_fc.weight)
    native = NativeRunner(model)
    gc.collect()
    assert plain() is None
    holders = [m for m in model.modules() if isinstance(m, Linear | Embedding)]
    assert all(isinstance(m.weight, PackedWeight) for m in holders)
    assert model.lm_head.weight is model.wte.weight
    stored = sum(w.stored_bytes for w in {id(m.weight): m.weight for m in holders}.values())
    dense = sum(p.numel() * 4 for p in checkpoint.load(tiny_gpt2_folder, torch.float32).parameters())
    assert stored >= 0.9 * dense
    assert native.model is model


def test_a_packed_model_is_saved_as_what_it_was(tiny_gpt2_folder, tmp_path):
    model = Int8().apply(checkpoint.load(tiny_gpt2_folder, torch.float32), Context())
    native = NativeRunner(copy.deepcopy(model))
    for name, m in (("plain", model), ("packed", native.model)):
        (tmp_path / name).mkdir()
        checkpoint.save(m, tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "packed")]
    assert files[0] == files[1]


def test_without_a_compiler_the_reason_is_said(monkeypatch):
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")
    assert "PARETUNE_NO_COMPILER" in NativeRunner.requires("cpu")
    monkeypatch.delenv("PARETUNE_NO_COMPILER")
    assert NativeRunner.requires("cpu") is None and "CPU" in NativeRunner.requires("cuda")
    monkeypatch.setenv("PARETUNE_ISA", "mmx")
    assert "mmx" in NativeRunner.requires("cpu")


@pytest.mark.parametrize("path", ["portable", "avx2"])
def test_slower_paths_give_the_same_numbers(path, tiny):
    """The code of a processor without AVX-512, and without AVX at all, in a process of its own."""
    code = """
import copy, sys, torch
from pathlib import Path
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.runners.native import NativeRunner
from paretune.model import checkpoint
from paretune.ops.native import packed
from paretune.transforms.base import Context
from paretune.transforms.groups import Groups
from paretune.transforms.int8 import Int8
from paretune.transforms.precision import Precision
tokens = torch.randint(0, 131, (2, 23), generator=torch.Generator().manual_seed(7))
exact = None
eight = Groups(bits=8, activation_bits=8)
for transforms in ((), (Precision("bf16"),), (Precision("fp16"),), (Int8(),), (Groups(),), (eight,), "int4 cache"):
    cache_dtype, transforms = ("int4", ()) if transforms == "int4 cache" else (None, transforms)
    model = checkpoint.load(Path(sys.argv[1]))
    for t in transforms:
        model = t.apply(model, Context())
    out = []
    for runner in (EagerRunner(copy.deepcopy(model)), NativeRunner(model)):
        if cache_dtype:
            runner.set_cache_dtype_(cache_dtype)
        cache = runner.new_cache(2, 23)
        out.append(torch.cat([runner.forward(t, cache, "all").double() for t in tokens.split(8, dim=1)], dim=1))
    exact = out[0] if exact is None else exact
    errors = [float((o - exact).norm() / exact.norm()) for o in out]
    bytes_of_inputs = 0.02 if "activation_bits=8" in str(transforms) else 0
    assert errors[1] <= 1.1 * errors[0] + 1e-6 + bytes_of_inputs, (transforms, cache_dtype, errors)
print(packed.isa())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny("gpt2", n_embd=64, n_head=4)[2])],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PARETUNE_ISA": path},
    )
    assert done.returncode == 0, done.stderr
    has_avx2 = {"avx2", "fma"} <= native_build.cpu_info()[1]
    assert done.stdout.strip().split()[0] == (path if has_avx2 else "portable")


@pytest.mark.slow
@pytest.mark.parametrize("path", ["portable", "avx2"])
def test_all_of_this_on_slower_paths(path):
    """Every test of this file on the code of other processors: formats, shapes, caches, bits."""
    if native_build.cpu_info()[1] >= {"avx512f"} or path == "portable":
        environment = {**os.environ, "PARETUNE_ISA": path}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", __file__]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout[-4000:]
    else:
        pytest.skip("this processor runs the AVX2 path anyway")
