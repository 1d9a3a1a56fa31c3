from __future__ import annotations

import math

import pytest

from paretune.records.judge import TOO_NOISY, is_noisy, judge, judge_bytes
from paretune.stats import Interval


@pytest.mark.parametrize(
    ("low", "high", "resolution", "word"),
    [
        (1.05, 1.2, 0.01, "faster"),
        (0.8, 0.9, 0.01, "slower"),
        (0.99, 1.01, 0.01, "indistinguishable"),
        (0.99, 1.10, 0.01, "undecided"),
        (0.99, 1.01, TOO_NOISY, "indistinguishable"),
        (0.99, 1.01, TOO_NOISY + 0.01, "undecided"),  # a machine that cannot tell does not call things equal
        (1.5, 1.6, 0.4, "faster"),  # what goes beyond the noise does on any machine
        (0.4, 0.5, 0.4, "slower"),
        (1.5, 1.6, math.inf, "undecided"),
    ],
)
def test_the_one_rule(low, high, resolution, word):
    assert judge(Interval((low + high) / 2, low, high, 20), resolution) == word


@pytest.mark.parametrize(
    ("ratio", "word"), [(1.02, "faster"), (1.01, "indistinguishable"), (1.0, "indistinguishable"), (0.999, "slower")]
)
def test_bytes_have_no_noise(ratio, word):
    assert judge_bytes(ratio) == word


def test_what_is_too_noisy_is_known_to_be():
    assert [is_noisy(width) for width in (None, 0.1, 0.25, 0.26, math.inf)] == [False, False, False, True, False]
