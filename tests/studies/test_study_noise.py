"""What a study says where this machine was too noisy for its speeds."""

from __future__ import annotations

import pytest

from made_records import resolution, result
from paretune.studies import common


def run_of(half_width, too_noisy=False):
    entries = [resolution(0.01), resolution(half_width), resolution(None)]
    return result([], is_noisy=half_width > 0.25, too_noisy=too_noisy, aa=entries)


def test_a_quiet_machine_leaves_nothing_to_say():
    assert common.noise_of([run_of(0.02), run_of(0.2)]) == {"is_noisy": False, "too_noisy": False, "noise": []}
    assert common.noise_of([]) == {"is_noisy": False, "too_noisy": False, "noise": []}


@pytest.mark.parametrize(
    ("runs", "too_noisy", "words"),
    [
        ([run_of(0.4, True)], True, ["not be judged", "up to 40%", "every speed here is undecided"]),
        ([run_of(0.4, True), run_of(0.02)], False, ["only in part", "up to 40%", "smaller differences"]),
        ([run_of(0.3), run_of(0.5, True)], False, ["only in part", "up to 50%"]),
    ],
)
def test_a_noisy_one_is_told_with_what_stands(runs, too_noisy, words):
    found = common.noise_of(runs)
    assert found["is_noisy"] and found["too_noisy"] is too_noisy
    (sentence,) = found["noise"]
    assert all(word in sentence for word in [*words, "What is not a speed stands."])
