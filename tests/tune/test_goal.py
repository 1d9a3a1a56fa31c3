"""What a user may write as a bound, a budget and a goal."""

from __future__ import annotations

import math

import pytest

from paretune.errors import UsageError
from paretune.records.record import to_json
from paretune.tune.goal import OBJECTIVES, Goal, parse_duration, parse_percent


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1%", 0.01),
        ("0.01", 0.01),
        ("0", 0.0),
        ("0%", 0.0),
        ("2.5%", 0.025),
        (".5%", 0.005),
        ("150%", 1.5),
        ("1e-3", 1e-3),
        ("1 %", 0.01),
    ],
)
def test_parse_percent(text, value):
    assert parse_percent(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["", "%", "one", "1%%", "%1", "1,5%", "-1%", "-0.01", "nan", "nan%", "inf", "1e400%"])
def test_parse_percent_error_names_the_text(text):
    with pytest.raises(UsageError) as caught:
        parse_percent(text)
    assert repr(text) in str(caught.value) and caught.value.cure
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90.0),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("1h30m", 5400.0),
        ("1h1m1s", 3661.0),
        ("1.5m", 90.0),
        ("45", 45.0),
        ("0.5", 0.5),
    ],
)
def test_parse_duration(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "5 m", "5x", "m5", "-5m", "1h-30m", "5m!", "0", "0s", "0h0m", "inf", "nan", "1e3", "9" * 400]
)
def test_parse_duration_error_names_the_text(text):
    with pytest.raises(UsageError) as caught:
        parse_duration(text)
    assert repr(text) in str(caught.value) and caught.value.cure


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_goal_sample_kind(objective):
    goal = Goal(objective=objective)
    assert goal.sample_kind == (objective if objective in ("tpot", "ttft", "throughput") else "tpot")
    assert goal.in_bytes == (objective in ("memory", "size"))
    assert Goal(**to_json(goal)) == goal


def test_goal_unknown_objective_lists_the_known():
    with pytest.raises(UsageError) as caught:
        Goal(objective="latency")
    assert "latency" in str(caught.value) and all(o in str(caught.value) for o in OBJECTIVES)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_goal_min_speedup_is_a_finite_number_above_zero(value):
    """NaN and infinity would run for the whole budget and then fail on writing strict JSON."""
    with pytest.raises(UsageError):
        Goal(min_speedup=value)


@pytest.mark.parametrize(
    "bad",
    [
        {"budget_sec": 0.0},
        {"budget_sec": -1.0},
        {"budget_sec": math.inf},
        {"max_ppl_increase": -0.1},
        {"max_ppl_increase": math.nan},
        {"max_ppl_increase": math.inf},
    ],
)
def test_goal_of_the_python_api_is_checked_too(bad):
    """`paretune.tune(budget_sec=...)` goes past `parse_duration`."""
    with pytest.raises(UsageError):
        Goal(**bad)
