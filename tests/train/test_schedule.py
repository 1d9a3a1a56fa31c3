"""The learning rate's ends, and options that make no sense."""

from __future__ import annotations

import pytest

from paretune.errors import UsageError
from paretune.train.schedule import TrainOptions, cosine, learning_rate, plain_options, warm_up


def rates(**kwargs) -> list[float]:
    return [learning_rate(i, **kwargs) for i in range(kwargs["steps"])]


def test_warm_up_then_cosine_to_the_floor():
    got = rates(peak=2.0, steps=100, warmup_steps=10, min_ratio=0.05)
    assert got[0] == pytest.approx(0.2)
    assert got[9] == 2.0 == max(got)
    assert got[-1] == pytest.approx(0.1)
    assert got[:10] == sorted(got[:10])
    assert got[9:] == sorted(got[9:], reverse=True)
    assert got[54] == pytest.approx(1.05)  # half-way between peak and floor


def test_no_warm_up_starts_at_the_peak():
    got = rates(peak=1.0, steps=11, min_ratio=0.0)
    assert got[0] == 1.0
    assert got[5] == pytest.approx(0.5)
    assert got[-1] == pytest.approx(0.0)


def test_one_step_and_beyond_the_end():
    assert rates(peak=3.0, steps=1) == [3.0]
    assert learning_rate(99, peak=1.0, steps=10, min_ratio=0.05) == pytest.approx(0.05)


def test_parts():
    assert warm_up(0, 0) == 1.0
    assert warm_up(0, 4) == 0.25
    assert cosine(-1, 0.1) == 1.0
    assert cosine(2, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"grad_accumulation": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"clip": float("inf")},
        {"min_learning_rate": 1.5},
        {"betas": (0.9, 1.0)},
        {"warmup_steps": 10, "steps": 10},
        {"dtype": "int8"},
        {"seed": -1},
        {"eval_every": -5},
    ],
)
def test_wrong_options_name_the_flag(wrong):
    name = next(iter(wrong))
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is "):
        TrainOptions(**wrong)


def test_plain_options_survive_json():
    import json

    plain = plain_options(TrainOptions())
    assert json.loads(json.dumps(plain)) == plain
