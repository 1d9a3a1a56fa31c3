"""What cannot win is excluded with figures that hold; what may win is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_outcome import candidate, estimator, outcome

from paretune.tune.bounds import MARGIN, ROOFLINE_SLACK, Bounds

NATIVE = ("sdpa", None, None, "native", None)
INT8 = ("sdpa", None, "int8", "native", None)
INT8_KV8 = ("sdpa", None, "int8", "native", "int8")
PLAIN_INT8 = ("sdpa", None, "int8", "eager", None)
PLAIN_BF16 = ("sdpa", "bf16", None, "eager", None)
COMPILE = ("sdpa", None, None, "compile:default", None)


def reason(out, *choice):
    return Bounds(out, estimator(out)).reason(candidate(*choice))


def test_without_a_leader_nothing_is_excluded():
    out = outcome({NATIVE: 0.010, PLAIN_INT8: 0.011})
    assert out.leader() is None
    bounds = Bounds(out, estimator(out))
    assert all(bounds.reason(c) is None for c in out.space.legal)


def test_a_recipe_that_reads_longer_than_the_leader_takes_is_excluded_with_both_times():
    """28 MB at 10 GB/s are 2.9 ms, eight tenths of them more than the 1.5 ms of the leader."""
    out = outcome({NATIVE: 0.0015})
    floor = estimator(out).floor_sec(candidate("eager", None, None, "compile:default", None).recipe)
    assert ROOFLINE_SLACK * floor > 0.0016
    said = reason(out, "eager", None, None, "compile:default", None)
    assert said and f"{floor * 1e3:.3g} ms" in said and "1.5 ms at most" in said
    # int8 reads a quarter: it may still win.
    assert reason(out, *INT8) is None


def test_a_roofline_that_is_near_excludes_nothing():
    """The ceiling may have been measured in a slow moment."""
    out = outcome({NATIVE: 0.0027})
    floor = estimator(out).floor_sec(candidate(*COMPILE).recipe)
    assert 0.0027 < floor < 0.0027 / ROOFLINE_SLACK
    assert reason(out, "sdpa", None, None, "native", "bf16") is None


def test_changes_alone_in_plain_pytorch_are_always_measured():
    out = outcome({NATIVE: 0.0001})
    assert reason(out, *PLAIN_INT8) is None and reason(out, *PLAIN_BF16) is None
    assert reason(out, "eager", None, None, "eager", None) is None


def test_parts_that_gave_little_are_excluded_together_with_their_figures():
    out = outcome({NATIVE: 0.005, PLAIN_INT8: 0.09, PLAIN_BF16: 0.08}, base_sec=0.1, noise=0.0)
    said = reason(out, "sdpa", "bf16", "int8", "eager", None)
    assert said and "bf16 1.25x" in said and "int8 1.11x" in said
    product = MARGIN * (10 / 8) * (10 / 9)
    assert f"{product:.2f}x" in said and "20.00x" in said


@pytest.mark.parametrize(("leader_sec", "is_excluded"), [(0.0046, True), (0.0050, False)])
def test_the_margin_is_kept(leader_sec, is_excluded):
    """1.25 x 1.11 x 1.5 = 2.08: out against 2.17x, in against 2.00x."""
    out = outcome({NATIVE: leader_sec, PLAIN_INT8: 0.009, PLAIN_BF16: 0.008}, noise=0.0)
    assert bool(reason(out, "sdpa", "bf16", "int8", "eager", None)) is is_excluded


def test_a_part_that_is_not_known_keeps_its_combinations_in():
    out = outcome({NATIVE: 0.005, PLAIN_BF16: 0.08}, base_sec=0.1)
    assert reason(out, "sdpa", "bf16", "int8", "eager", None) is None


def test_a_mode_of_the_compiler_is_bounded_by_another_that_was_measured():
    out = outcome({NATIVE: 0.005, COMPILE: 0.08, PLAIN_INT8: 0.09}, base_sec=0.1, noise=0.0)
    said = reason(out, "sdpa", None, "int8", "compile:max-autotune", None)
    assert said and "compile 1.25x" in said
    # Alone it is bounded by its own kind too.
    assert "compile 1.25x" in reason(out, "sdpa", None, None, "compile:freeze", None)


def test_an_unmeasured_compiler_is_bounded_by_the_roofline_of_the_baseline():
    out = outcome({NATIVE: 0.001, PLAIN_INT8: 0.1}, base_sec=0.1, noise=0.0)
    said = reason(out, "sdpa", None, "int8", "compile:default", None)
    assert said and "the baseline at its roofline" in said


def test_effects_in_pytorch_say_nothing_of_native_forms():
    """int8 gives 1.1x in PyTorch and more than 3x beside the native runner."""
    out = outcome({NATIVE: 0.0020, INT8_KV8: 0.0006, PLAIN_INT8: 0.009, ("sdpa", None, None, "native", "int8"): 0.0019})
    assert out.leader() is None or out.leader() == candidate(*NATIVE).id  # int8 was not gated
    assert reason(out, *INT8) is None


def test_native_parts_are_taken_beside_the_native_runner():
    native_bf16 = ("sdpa", "bf16", None, "native", None)
    cached = ("sdpa", None, None, "native", "int8")
    int8 = ("sdpa", None, "int8-linear", "native", None)
    out = outcome({NATIVE: 0.004, native_bf16: 0.0039, cached: 0.0041, int8: 0.0003}, noise=0.0)
    out.qualities[candidate(*int8).id] = _Within()
    assert out.leader() == candidate(*int8).id
    said = reason(out, "sdpa", "bf16", None, "native", "int8")
    assert said and ("beside it" in said or "reading its" in said)


class _Within:
    within_bound = True


def test_what_adds_to_a_rejected_recipe_is_excluded_with_its_figures():
    int4 = ("sdpa", None, "int4", "native", None)
    out = outcome({int4: 0.001})
    out.rejected[candidate(*int4).id] = "perplexity rises by at least +20.0% after 3 windows; the limit is +1.00%"
    said = reason(out, "sdpa", None, "int4", "native", "int8")
    assert said and "which changes less" in said and "+20.0%" in said
    assert reason(out, *INT8) is None and reason(out, *INT8_KV8) is None
    # The same numbers through another runner are out too; a smaller change is not.
    assert "the same numbers" in reason(out, *_with_runner(int4, "compile:default"))


def _with_runner(choice, runner):
    return (*choice[:3], runner, choice[4])


def test_bytes_are_compared_where_the_goal_is_size():
    int4 = ("sdpa", None, "int4", "native", None)
    out = outcome({int4: 0.001}, objective="size")
    id = candidate(*int4).id
    state = out.race.trials[id]
    state.facts = replace(state.facts, memory=replace(state.facts.memory, weights_bytes=5 << 20))
    out.qualities[id] = _Within()
    assert out.leader() == id
    assert "MB or more" in reason(out, *INT8)
    assert reason(out, "sdpa", None, "int4", "native", "int8") is None
