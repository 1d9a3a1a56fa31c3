"""Every legal combination is in the space once, and sooner or later each has its turn."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune import hardware
from paretune.hardware import DtypeSupport
from paretune.recipe import Recipe, preset
from paretune.tune import space as spaces

GOOD = DtypeSupport(True, False, 1.5, 1.5, "good")
# Written out here, not taken from the module: what issue 2 lists as the first transforms and runners.
ATTENTION = ["sdpa", "eager"]
DTYPES = [None, "bf16", "fp16"]
INT8 = [None, {"name": "int8", "embeddings": True}, {"name": "int8", "embeddings": False}]
# Fast in native code alone.
NATIVE_QUANTIZE = [
    {"name": "groups", "bits": 4, "group": 32, "head_bits": 8},
    {"name": "groups", "bits": 8, "group": 128, "head_bits": 8, "activation_bits": 8},
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
    monkeypatch.setattr(hardware, "dtype_support", lambda device="cpu": support)
    return support


def test_every_legal_combination_once(machine):
    space = spaces.build("cpu")
    expected = {r.hash for r in all_recipes()} - {preset("baseline").hash}
    ids = [c.id for c in space.legal]
    assert len(expected) == 2 * 3 * 3 * 4 + (6 + 3) * 4 - 1
    assert len(ids) == len(set(ids)) == len(expected)
    assert set(ids) == expected
    assert {reason for _, reason in space.illegal} == {spaces.SAME_ATTENTION, spaces.ALL_QUANTISED}


def test_baseline_is_no_candidate(machine):
    space = spaces.build("cpu")
    assert spaces.baseline() == preset("baseline")
    assert spaces.baseline().hash not in {c.id for c in space.legal}
    assert all(c.changes for c in space.legal)


def test_without_a_compiler_what_compiles_is_illegal_with_the_reason(machine, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")
    monkeypatch.setattr(hardware, "dtype_support", lambda device="cpu": machine)
    space = spaces.build("cpu")
    assert len(space.legal) == 2 * 3 * 3 - 1
    assert all("compile" in name or "native" in name for name, _ in space.illegal)
    assert all("compiler" in reason or "PARETUNE_NO_COMPILER" in reason for _, reason in space.illegal)
    assert all(c.recipe.engine.runner == "eager" for c in space.legal)


def test_a_dtype_that_does_not_work_is_illegal_with_the_reason(machine):
    machine["fp16"] = DtypeSupport(False, False, 0.0, 0.0, "fp16 does not work here: no such kernel")
    space = spaces.build("cpu")
    assert len(space.legal) == 2 * 2 * 3 * 4 + (4 + 3) * 4 - 1
    known = (spaces.SAME_ATTENTION, spaces.ALL_QUANTISED)
    without = [(name, reason) for name, reason in space.illegal if reason not in known]
    assert len(without) >= 2 * 3 * 4
    assert all("fp16" in name and "no such kernel" in reason for name, reason in without)
    assert len({name for name, _ in space.illegal}) == len(space.illegal)


def test_an_emulated_dtype_is_legal(machine):
    machine["bf16"] = DtypeSupport(True, True, 0.3, 0.3, "bf16 is emulated here")
    assert len(spaces.build("cpu").legal) == 107


def test_a_cache_that_the_heads_do_not_fill_is_illegal_with_the_reason(machine):
    odd = SimpleNamespace(**vars(GPT2) | {"head_dim": 13})
    space = spaces.build("cpu", odd, 160)
    assert len(space.legal) == 107 - 9 and all(c.choice[4] != "int4" for c in space.legal)
    own = [name for name, reason in space.illegal if reason == "a 4-bit cache needs an even head size, not 13"]
    assert len(own) == 2 * 3 * 5 and all("int4 cache" in name for name in own)


# -- the order


def wave(space, tried=(), singles=None, start=None, budget=1e9, size=5):
    return spaces.next_wave(space, set(tried), singles or {}, start or {}, budget, size)


def test_cheap_changes_alone_come_first(machine):
    space = spaces.build("cpu")
    order = wave(space, size=98)
    assert sum(len(c.changes) == 1 for c in space.legal) == 1 + 2 + 2 + 4
    # What only native code runs fast is looked at with the native runner: int4, w8a8 and three caches.
    cheap = [c for c in space.legal if c.single and c.choice[3] in ("eager", "native")]
    assert len(cheap) == 1 + 2 + 2 + 1 + 5
    assert order[:11] == sorted(cheap, key=order.index)


def test_a_runner_is_looked_at_beside_the_combinations_of_cheap_changes(machine):
    """It starts slowly, and is not left for a budget that ends before: default before freeze before autotune."""
    space = spaces.build("cpu")
    tried = [c.id for c in space.legal if c.single and c.choice[3] in ("eager", "native")]
    gains = {"precision": 0.25, "quantize": 0.25, "attention": -0.1}
    singles = {change: gains[change[0]] for c in space.legal for change in c.changes.items() if change[0] in gains}
    chosen = wave(space, tried, singles, size=5)
    alone = [c.choice[3] for c in chosen if len(c.changes) == 1]
    assert alone and alone[0] == "compile:default"
    assert any(len(c.changes) == 2 for c in chosen)


def test_what_was_measured_decides_which_combination_is_next(machine):
    space = spaces.build("cpu")
    tried = [c.id for c in space.legal if c.single]
    singles = {
        ("attention", "eager"): -0.5,
        ("precision", "bf16"): -0.5,
        ("precision", "fp16"): 0.6,
        ("quantize", "int8"): 0.1,
        ("quantize", "int8-linear"): 0.5,
        ("runner", "native"): -0.5,
        ("runner", "compile:default"): -0.5,
        ("runner", "compile:freeze"): -0.5,
        ("runner", "compile:max-autotune"): -0.5,
    }
    first = wave(space, tried, singles, size=1)[0]
    assert first.changes == {"precision": "fp16", "quantize": "int8-linear"}
    # Gains that are predicted to be losses wait until nothing better is left.
    promising = wave(space, tried, singles, size=98)
    assert all(spaces.predicted_log_gain(c, singles) > 0 for c in promising)


def test_nothing_promising_is_left_so_the_rest_is_measured_too(machine):
    space = spaces.build("cpu")
    tried = [c.id for c in space.legal if c.single]
    singles = {change: -1.0 for c in space.legal for change in c.changes.items()}
    rest = wave(space, tried, singles)
    assert 1 <= len(rest) <= 5 and not {c.id for c in rest} & set(tried)


def test_what_is_measured_for_want_of_better_respects_the_budget_too(machine):
    space = spaces.build("cpu")
    tried = [c.id for c in space.legal if len(c.changes) == 1 or c.choice[3] == "eager"]
    singles = {change: -1.0 for c in space.legal for change in c.changes.items()}
    rest = wave(space, tried, singles, start=dict.fromkeys(spaces.RUNNERS, 30.0), budget=40.0)
    assert len(rest) == 1


@settings(max_examples=60, deadline=None)
@given(
    tried=st.sets(st.integers(0, 106)),
    gains=st.lists(st.floats(-2, 2), min_size=14, max_size=14),
    starts=st.lists(st.floats(0.5, 200), min_size=5, max_size=5),
    budget=st.floats(0, 400),
    size=st.integers(1, 8),
)
def test_a_wave_repeats_nothing_and_respects_size_and_budget(tried, gains, starts, budget, size):
    space = full_space()
    changes = sorted({change for c in space.legal for change in c.changes.items()})
    singles = dict(zip(changes, gains, strict=True))
    start = dict(zip(spaces.RUNNERS, starts, strict=True))
    done = {space.legal[i].id for i in tried}
    chosen = spaces.next_wave(space, done, singles, start, budget, size)
    ids = [c.id for c in chosen]
    assert len(set(ids)) == len(ids) <= size
    assert not set(ids) & done
    assert sum(start[c.choice[3]] for c in chosen) <= budget + 1e-9
    possible = [c for c in space.legal if c.id not in done and start[c.choice[3]] <= budget]
    assert bool(chosen) == bool(possible)


@settings(max_examples=25, deadline=None)
@given(gains=st.lists(st.floats(-3, 3), min_size=14, max_size=14), size=st.integers(1, 8))
def test_with_time_enough_every_candidate_has_its_turn(gains, size):
    space = full_space()
    changes = sorted({change for c in space.legal for change in c.changes.items()})
    singles = dict(zip(changes, gains, strict=True))
    tried: list[str] = []
    while chosen := spaces.next_wave(space, set(tried), singles, {}, 1e9, size):
        tried += [c.id for c in chosen]
    assert sorted(tried) == sorted(c.id for c in space.legal)


def test_a_candidate_without_a_number_does_not_spoil_the_order(machine):
    """A wave that the deadline cut in its first block leaves a ratio of NaN."""
    space = spaces.build("cpu")
    singles = {change: -0.5 for c in space.legal for change in c.changes.items()}
    singles |= {("quantize", "int8"): math.nan, ("quantize", "int8-linear"): 0.9, ("precision", "fp16"): 0.6}
    tried = [c.id for c in space.legal if c.single]
    first = wave(space, tried, singles, size=1)[0]
    assert first.changes == {"precision": "fp16", "quantize": "int8-linear"}


def full_space():
    """The whole space without asking this machine (hypothesis runs it often)."""
    choices = itertools.product(spaces.ATTENTION, spaces.PRECISION, spaces.QUANTIZE, spaces.RUNNERS, spaces.CACHE)
    return spaces.Space(
        [
            spaces.Candidate(c, spaces.recipe_of(c))
            for c in choices
            if c != spaces.BASELINE
            and not (c[0] == "eager" and c[3] == "native")
            and not (c[3] != "native" and (c[4] or ("quantize", c[2]) in spaces.NATIVE_ONLY))
            and not (c[3] == "native" and c[1] and c[2] in ("int8", "int4", "w8a8"))
        ]
    )


# -- mechanisms: what attention computes


GPT2 = SimpleNamespace(alibi=False, attention_pattern=SimpleNamespace(is_dense=True), head_dim=64)


def test_mechanisms_are_candidates_for_requests_that_a_window_shortens(machine):
    plain, space = spaces.build("cpu"), spaces.build("cpu", GPT2, 640)
    added = [c for c in space.legal if c.id not in {p.id for p in plain.legal}]
    # Each of three alone through PyTorch, and in native code with each quantisation or none.
    assert len(added) == 3 * (1 + 5) and len(space.legal) == 107 + 18
    assert len({c.id for c in space.legal}) == len(space.legal)
    for c in added:
        mechanism, attention = c.recipe.transforms[:2]
        assert (mechanism.name, attention.name) == ("mechanism", "attention") and c.recipe.changes_numbers
        assert mechanism.title == c.choice[0]
    names = {c.recipe.name for c in added}
    assert {"window:256 + sdpa, eager", "prefix:16+window:256 + sdpa + int4-g32, native"} <= names
    assert sum("alibi" in n for n in names) == 6
    # Each is looked at alone: through PyTorch and, the native runner's own gain aside, in native code.
    assert {c.single for c in added if c.choice[2] is None} == {("attention", m) for m in spaces.MECHANISMS}
    assert all(c.single is None for c in added if c.choice[2] is not None)


@pytest.mark.parametrize(
    ("config", "n_tokens", "words"),
    [
        (GPT2, 160, "a window of 256 skips nothing in a request of 160 tokens"),
        (GPT2, 256, "skips nothing"),
        (SimpleNamespace(**vars(GPT2) | {"alibi": True}), 640, "mechanism of its own"),
        (
            SimpleNamespace(**vars(GPT2) | {"attention_pattern": SimpleNamespace(is_dense=False)}),
            640,
            "mechanism of its own",
        ),
    ],
)
def test_where_mechanisms_are_of_no_use_they_are_illegal_with_the_reason(machine, config, n_tokens, words):
    space = spaces.build("cpu", config, n_tokens)
    assert len(space.legal) == 107
    own = [(name, reason) for name, reason in space.illegal if any(m in name for m in spaces.MECHANISMS)]
    assert len(own) == 18 and all(words in reason for _, reason in own)


def test_without_a_compiler_mechanisms_run_through_pytorch_alone(machine, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")
    monkeypatch.setattr(hardware, "dtype_support", lambda device="cpu": machine)
    space = spaces.build("cpu", GPT2, 640)
    assert sum(c.choice[0] in spaces.MECHANISMS for c in space.legal) == 3


# -- a GPU


@pytest.fixture
def gpu(machine, monkeypatch):
    """A GPU that can do everything."""
    monkeypatch.setattr(spaces.op, "unavailable_reason", lambda device: None)


def test_what_a_gpu_is_offered(gpu):
    space = spaces.build("cuda")
    choices = {c.choice for c in space.legal}
    # Two attentions, three dtypes, five ways to quantise, three runners; the baseline is none of them.
    assert len(space.legal) == len(choices) == 2 * 3 * 5 * 3 - 1
    assert {c[2] for c in choices} == {None, "int8", "int8-linear", "int4", "nf4"}
    assert {c[3] for c in choices} == {"eager", "compile:default", "compile:reduce-overhead"}
    nf4 = next(c.recipe for c in space.legal if c.choice == ("sdpa", "bf16", "nf4", "eager", None))
    assert [t.name for t in nf4.transforms] == ["attention", "precision", "nf4", "int8"]
    # What cannot win there is told, not tried.
    assert {reason for _, reason in space.illegal} == {spaces.NOT_ON_GPU["w8a8"]}
    assert all(c.choice[3] in spaces.DEFAULT_START_SEC for c in space.legal)
    assert len(spaces.build("cuda", GPT2, 640).legal) == len(space.legal) + len(spaces.MECHANISMS)


def test_without_kernels_a_gpu_is_offered_no_quantised_weights(gpu, monkeypatch):
    monkeypatch.setattr(spaces.op, "unavailable_reason", lambda device: "Triton is not installed")
    space = spaces.build("cuda")
    assert {c.choice[2] for c in space.legal} == {None}
    reasons = {reason for _, reason in space.illegal}
    assert reasons == {spaces.NOT_ON_GPU["w8a8"], "dequantised at every call: Triton is not installed"}
