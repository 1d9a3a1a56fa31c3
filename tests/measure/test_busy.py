"""A busy machine is told by counts: of this process, and of all that waits."""

from __future__ import annotations

import pytest

from paretune import clock
from paretune.measure import busy
from paretune.measure.busy import Busy, BusyWatch, words, words_of, words_of_facts


@pytest.mark.parametrize(
    ("preemptions", "pressure", "said"),
    [
        (99.0, 0.29, []),
        (None, None, []),
        (100.0, None, ["this process lost its processor 100 times a second"]),
        (None, 0.3, ["some program waited for a processor in 30 % of the time"]),
        (5.0, 1.7, ["some program waited for a processor in 100 % of the time"]),
    ],
)
def test_words(preemptions, pressure, said):
    assert words(preemptions, pressure) == said


def test_words_of_counts_and_of_a_profile():
    assert words_of(Busy(2.0, 400, 0, 0.1)) == ["this process lost its processor 200 times a second"]
    assert words_of(Busy(0.0, 400, 0, None)) == words_of(Busy(2.0, None, None, None)) == []
    profiled = {"whole": {"sec": 0.01}, "facts": {"preemptions": 3.0, "cpu_pressure": 0.0}}
    assert words_of_facts(profiled) == ["this process lost its processor 300 times a second"]
    assert words_of_facts({}) == []


def test_the_watch_takes_differences(monkeypatch):
    """Of the process's own counters, and of the system's waiting time by the clock."""
    waited, used = iter([5.0, 6.5]), iter([(10, 100), (70, 400)])

    class Usage:
        def __init__(self, n, faults):
            self.ru_nivcsw, self.ru_minflt = n, faults

    monkeypatch.setattr(busy, "_waited_sec", lambda: next(waited))
    monkeypatch.setattr(busy, "usage", lambda: Usage(*next(used)))
    with clock.use(clock.FakeClock()):
        watch = BusyWatch()
        clock.sleep(3.0)
        seen = watch()
    assert (seen.preemptions, seen.page_faults) == (60, 300)
    assert seen.sec == pytest.approx(3.0) and seen.pressure == pytest.approx(0.5)


def test_the_system_answers_or_is_silent(monkeypatch):
    seen = BusyWatch()()
    assert seen.sec >= 0 and (seen.pressure is None or seen.pressure >= 0)
    monkeypatch.setattr(busy, "usage", lambda: None)
    assert BusyWatch()().preemptions is None
