"""Every legal combination is in the space once, and what is not says why."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from points import MECHANISMS, choice_of

from paretune import hardware
from paretune.engine.decode.drafts.base import ON_TEXT
from paretune.hardware import DtypeSupport
from paretune.model import checkpoint
from paretune.ops.quantized_linear import op
from paretune.recipe import Recipe, preset
from paretune.transforms.attention import SAME_ATTENTION
from paretune.transforms.groups import NOTHING_ON_A_GPU
from paretune.transforms.precision import CACHE_ALONE
from paretune.tune import space as spaces

GOOD = DtypeSupport(True, False, 1.5, 1.5, "good")
# Written out here, not taken from the module: what issue 2 lists as the first transforms and runners.
ATTENTION = ["sdpa", "eager"]
DTYPES = [None, "bf16", "fp16"]
INT8 = [None, {"name": "int8", "embeddings": True}, {"name": "int8", "embeddings": False}]
# Fast in native code alone.
NATIVE_QUANTIZE = [
    {"name": "groups", "bits": 4, "group": 32, "head_bits": 8},
    {"name": "groups", "bits": 8, "group": 64, "head_bits": 8},
    {"name": "groups", "bits": 8, "group": 128, "head_bits": 8, "activation_bits": 8},
    {"name": "groups", "bits": 7, "group": 128, "head_bits": 8, "activation_bits": 7},
]
CACHES = [None, "bf16", "int8", "int4"]
ENGINES = [
    {"runner": "eager"},
    {"runner": "native"},
    *({"runner": "compile", "compile_mode": m} for m in ("default", "freeze", "max-autotune")),
]


def all_recipes():
    for attention, dtype, int8, engine in itertools.product(ATTENTION, DTYPES, INT8, ENGINES):
        transforms = [{"name": "attention", "form": attention}]
        transforms += [{"name": "precision", "dtype": dtype}] if dtype else []
        transforms += [int8] if int8 else []
        if engine["runner"] == "native":
            continue  # below
        yield Recipe.from_dict({"transforms": transforms, "engine": engine})
    # One form of attention; where every weight is quantised, the dtype changes the cache alone: a choice of its own.
    natively = [(dtype, q) for dtype in DTYPES for q in (None, INT8[2])]
    natively += [(None, q) for q in (INT8[1], *NATIVE_QUANTIZE)]
    for (dtype, quantize), cache in itertools.product(natively, CACHES):
        transforms = [{"name": "attention", "form": "sdpa"}]
        transforms += [{"name": "precision", "dtype": dtype}] if dtype else []
        transforms += [quantize] if quantize else []
        engine = {"runner": "native"} | ({"cache_dtype": cache} if cache else {})
        yield Recipe.from_dict({"transforms": transforms, "engine": engine})


@pytest.fixture
def machine(monkeypatch):
    """A machine that can do everything."""
    support = {"fp32": GOOD, "bf16": GOOD, "fp16": GOOD}
    monkeypatch.delenv("PARETUNE_NO_COMPILER", raising=False)
    monkeypatch.setattr("paretune.native_build.compiler", lambda: "c++")
    monkeypatch.setattr("paretune.ops.native.program.library", lambda: None)
    _patch(monkeypatch, support)
    return support


def _patch(monkeypatch, support):
    monkeypatch.setattr(hardware, "dtype_support", lambda device="cpu": support)
    reasons = lambda name, device="cpu": None if support[name].works else support[name].reason  # noqa: E731
    monkeypatch.setattr(hardware, "dtype_failure", reasons)


def test_every_legal_combination_once(machine):
    space = spaces.build("cpu")
    expected = {r.hash for r in all_recipes()} - {preset("baseline").hash}
    ids = [c.id for c in space.legal]
    assert len(expected) == 2 * 3 * 3 * 4 + (6 + 5) * 4 - 1
    assert len(ids) == len(set(ids)) == len(expected)
    assert set(ids) == expected
    assert {reason for _, reason in space.illegal} == {SAME_ATTENTION, CACHE_ALONE, ON_TEXT}


def test_baseline_is_no_candidate(machine):
    space = spaces.build("cpu")
    assert spaces.baseline() == preset("baseline")
    assert spaces.baseline().hash not in {c.id for c in space.legal}
    assert all(c.changes for c in space.legal)


def test_without_a_compiler_what_compiles_is_illegal_with_the_reason(machine, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")
    _patch(monkeypatch, machine)
    space = spaces.build("cpu")
    assert len(space.legal) == 2 * 3 * 3 - 1
    without = [(name, reason) for name, reason in space.illegal if reason != ON_TEXT]
    assert all("compile" in name or "native" in name for name, _ in without)
    assert all("compiler" in reason or "PARETUNE_NO_COMPILER" in reason for _, reason in without)
    assert all(c.recipe.engine.runner == "eager" for c in space.legal)


def test_a_dtype_that_does_not_work_is_illegal_with_the_reason(machine):
    machine["fp16"] = DtypeSupport(False, False, 0.0, 0.0, "fp16 does not work here: no such kernel")
    space = spaces.build("cpu")
    assert len(space.legal) == 2 * 2 * 3 * 4 + (4 + 5) * 4 - 1
    known = (SAME_ATTENTION, CACHE_ALONE, ON_TEXT)
    without = [(name, reason) for name, reason in space.illegal if reason not in known]
    assert len(without) >= 2 * 3 * 4
    assert all("fp16" in name and "no such kernel" in reason for name, reason in without)
    assert len({name for name, _ in space.illegal}) == len(space.illegal)


def test_an_emulated_dtype_is_legal(machine):
    machine["bf16"] = DtypeSupport(True, True, 0.3, 0.3, "bf16 is emulated here")
    assert len(spaces.build("cpu").legal) == 115


def test_a_cache_that_the_heads_do_not_fill_is_illegal_with_the_reason(machine):
    odd = replace(GPT2, n_embd=13 * GPT2.n_head, head_dim=13)
    space = spaces.build("cpu", odd, 160)
    assert len(space.legal) == 115 - 11 and all(c.changes.get("cache") != "kv4" for c in space.legal)
    own = [name for name, reason in space.illegal if reason == "a 4-bit cache needs an even head size, not 13"]
    assert len(own) == 2 * 3 * 7 and all("int4 cache" in name for name in own)


def test_numbers_are_what_the_runner_and_exact_attention_leave(machine):
    by_choice = {choice_of(c): c for c in spaces.build("cpu", GPT2, 640).legal}
    plain = by_choice["eager", None, "int8", "compile:default", None]
    assert plain.numbers == {("quantize", "int8")} == by_choice["sdpa", None, "int8", "native", None].numbers
    cached = by_choice["sdpa", None, "int8", "native", "int8"]
    assert plain.numbers < cached.numbers and cached.weights == plain.numbers
    window = by_choice["window:256", None, "int8", "native", None]
    assert window.numbers == {("mechanism", "mechanism(window:256)"), ("quantize", "int8")}
    assert window.weights != cached.weights


# -- mechanisms: what attention computes


GPT2 = checkpoint.published("gpt2")


def test_mechanisms_are_candidates_for_requests_that_a_window_shortens(machine):
    plain, space = spaces.build("cpu"), spaces.build("cpu", GPT2, 640)
    added = [c for c in space.legal if c.id not in {p.id for p in plain.legal}]
    # Each of three alone through PyTorch, and in native code with each quantisation or none.
    assert len(added) == 3 * (1 + 7) and len(space.legal) == 115 + 24
    assert len({c.id for c in space.legal}) == len(space.legal)
    for c in added:
        mechanism, attention = c.recipe.transforms[:2]
        assert (mechanism.name, attention.name) == ("mechanism", "attention") and c.recipe.changes_numbers
        assert mechanism.title == choice_of(c)[0]
    names = {c.recipe.name for c in added}
    assert {"window:256 + sdpa, eager", "prefix:16+window:256 + sdpa + int4-g32, native"} <= names
    assert sum("alibi" in n for n in names) == 8
    # Each is looked at alone: through PyTorch and, the native runner's own gain aside, in native code.
    assert {c.single for c in added if "quantize" not in c.options} == {
        ("mechanism", "mechanism(window:256)"),
        ("mechanism", "mechanism(prefix:16+window:256)"),
        ("mechanism", "alibi"),
    }
    assert all(c.single is None for c in added if "quantize" in c.options)


@pytest.mark.parametrize(
    ("config", "n_tokens", "words"),
    [
        (GPT2, 160, "a window of 256 skips nothing in a request of 160 tokens"),
        (GPT2, 256, "skips nothing"),
        (replace(GPT2, alibi=True), 640, "mechanism of its own"),
        (replace(GPT2, pattern="window:128"), 640, "mechanism of its own"),
    ],
)
def test_where_mechanisms_are_of_no_use_they_are_illegal_with_the_reason(machine, config, n_tokens, words):
    space = spaces.build("cpu", config, n_tokens)
    assert len(space.legal) == 115
    own = [(name, reason) for name, reason in space.illegal if any(m in name for m in MECHANISMS)]
    assert len(own) == 24 and all(words in reason for _, reason in own)


def test_without_a_compiler_mechanisms_run_through_pytorch_alone(machine, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")
    _patch(monkeypatch, machine)
    space = spaces.build("cpu", GPT2, 640)
    assert sum("mechanism" in c.options for c in space.legal) == 3


# -- a GPU


@pytest.fixture
def gpu(machine, monkeypatch):
    """A GPU that can do everything."""
    monkeypatch.setattr(op, "unavailable_reason", lambda device: None)


def test_what_a_gpu_is_offered(gpu):
    space = spaces.build("cuda")
    choices = {choice_of(c) for c in space.legal}
    # Two attentions, three dtypes, six ways to quantise, three runners; the baseline is none of them.
    assert len(space.legal) == len(choices) == 2 * 3 * 6 * 3 - 1
    assert {c[2] for c in choices} == {None, "int8", "int8-linear", "int4", "int8_groups(group=64)", "nf4"}
    assert {c[3] for c in choices} == {"eager", "compile:default", "compile:reduce-overhead"}
    nf4 = next(c.recipe for c in space.legal if choice_of(c) == ("sdpa", "bf16", "nf4", "eager", None))
    assert [t.name for t in nf4.transforms] == ["attention", "precision", "nf4", "int8"]
    # What cannot win there is told, not tried.
    assert {reason for _, reason in space.illegal} == {ON_TEXT, *(NOTHING_ON_A_GPU.format(bits) for bits in (7, 8))}
    assert all(c.runner.start_sec > 0 for c in space.legal)
    assert len(spaces.build("cuda", GPT2, 640).legal) == len(space.legal) + len(MECHANISMS)


def test_without_kernels_a_gpu_is_offered_no_quantised_weights(gpu, monkeypatch):
    monkeypatch.setattr(op, "unavailable_reason", lambda device: "Triton is not installed")
    space = spaces.build("cuda")
    assert {c.changes.get("quantize") for c in space.legal} == {None}
    reasons = {reason for _, reason in space.illegal}
    assert reasons == {
        ON_TEXT,
        *(NOTHING_ON_A_GPU.format(bits) for bits in (7, 8)),
        "dequantised at every call: Triton is not installed",
    }
