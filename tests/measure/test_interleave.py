"""The scheduler on a fake clock: fake subjects of known cost on a fake host with drift, noise and states."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from paretune import clock, stats
from paretune.errors import ParetuneError
from paretune.measure import interleave
from paretune.measure.interleave import Blocks, Sample, SubjectError, block_order, run_blocks, warm_up

PROBE_SEC = 0.015


def exactly(value: float, n: int) -> stats.Interval:
    """No noise: both bounds are the value, but for the last bits of log and exp."""
    close = pytest.approx(value, rel=1e-12)
    return stats.Interval(close, close, close, n)


class Fake:
    """A subject whose slice takes cost(subject) seconds of the fake clock. `log` is shared: who did what."""

    def __init__(self, name: str, cost: float | Callable[[Fake], float], log: list[str] | None = None) -> None:
        self.name, self.cost, self.log = name, cost, log if log is not None else []
        self.n_samples = 0
        self.is_awake = True

    def sample(self) -> float:
        assert self.is_awake
        start_sec = clock.now()
        self.n_samples += 1
        self.log.append(self.name)
        clock.sleep(self.cost(self) if callable(self.cost) else self.cost)
        return clock.now() - start_sec

    def pause(self) -> None:
        self.is_awake = False

    def resume(self) -> None:
        self.is_awake = True


@pytest.fixture(autouse=True)
def fake_clock():
    with clock.use(clock.FakeClock()) as fake:
        yield fake


def test_known_costs_give_the_known_ratio():
    subjects = [Fake("baseline", 0.25), Fake("fast", 0.125), Fake("slow", 0.5)]
    blocks = Blocks(run_blocks(subjects, rng_seed=0, n_blocks=8).samples)
    assert set(blocks.subjects) == {"baseline", "fast", "slow"}
    assert blocks.values("fast").tolist() == [0.125] * 8
    assert blocks.ratio("baseline", "fast") == exactly(2.0, 8)
    assert blocks.ratio("baseline", "slow") == exactly(0.5, 8)
    assert stats.verdict(blocks.ratio("baseline", "slow")) == "slower"


def test_each_block_holds_every_subject_in_a_fresh_order():
    subjects = [Fake(name, 0.1) for name in "abcd"]
    samples = run_blocks(subjects, rng_seed=1, n_blocks=200).samples
    orders = [tuple(s.subject for s in samples[4 * b : 4 * b + 4]) for b in range(200)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert all(s.block == i // 4 and s.position == i % 4 for i, s in enumerate(samples))
    assert len(set(orders)) == 24  # every permutation comes up
    firsts = [order[0] for order in orders]
    assert all(30 <= firsts.count(name) <= 70 for name in "abcd")
    assert orders != [tuple(block_order(list("abcd"), 2, b)) for b in range(200)]


def test_only_one_is_awake_and_none_during_a_probe():
    subjects: list[Fake] = []

    def cost(subject: Fake) -> float:
        assert [s.name for s in subjects if s.is_awake] == [subject.name]
        return 0.1

    def probe() -> float:
        assert not any(s.is_awake for s in subjects)
        return 1e10

    subjects += [Fake(name, cost) for name in "abc"]
    samples = run_blocks(subjects, rng_seed=0, n_blocks=5, probe=probe).samples
    assert len(samples) == 15 and not any(s.is_awake for s in subjects)
    assert {(s.bandwidth_before, s.bandwidth_after, s.n_repeated) for s in samples} == {(1e10, 1e10, 0)}


def test_drift_that_fools_a_then_b_cancels():
    def drifting(base_sec: float) -> Callable[[Fake], float]:
        return lambda _: base_sec * (1 + clock.now() / 50)  # 2 % slower each second

    def timings(subject: Fake) -> list[float]:
        return [subject.sample() for _ in range(40)]

    a_then_b = stats.speed_ratio(timings(Fake("a", drifting(0.2))), timings(Fake("b", drifting(0.2))))
    assert stats.verdict(a_then_b) == "slower"  # the same thing twice

    samples = run_blocks([Fake("a", drifting(0.2)), Fake("b", drifting(0.2))], rng_seed=0, n_blocks=40).samples
    ratio = Blocks(samples).ratio("a", "b")
    assert stats.verdict(ratio) == "indistinguishable"
    assert ratio.low <= 1 <= ratio.high


def test_a_sample_is_repeated_where_the_probes_differ(fake_clock):
    # One between two slices: it is the last of the first and the first of the second.
    readings = iter([10.0, 13.0, 13.0, 11.9, 5.0, 10.0, 5.0])
    seen: list[Sample] = []
    subject = Fake("a", 0.1)
    run = run_blocks(
        [subject], rng_seed=0, n_blocks=3, probe=lambda: next(readings), on_sample=seen.append, max_repeats=2
    )
    assert run.samples == seen
    assert [s.n_repeated for s in seen] == [1, 0, 2]
    assert (seen[0].bandwidth_before, seen[0].bandwidth_after) == (13.0, 13.0)
    assert (seen[1].bandwidth_before, seen[1].bandwidth_after) == (13.0, 11.9)
    assert (seen[2].bandwidth_before, seen[2].bandwidth_after) == (10.0, 5.0)  # kept, with its probes
    assert next(readings, None) is None and subject.n_samples == 6 and Blocks(seen).n_repeated == 3


def test_a_killed_run_goes_on_in_the_same_order_without_repeats():
    whole = run_blocks([Fake(name, 0.1) for name in "abcd"], rng_seed=7, n_blocks=6).samples
    for n_done in range(len(whole) + 1):
        journal = [json.dumps(s.to_json()) for s in whole[:n_done]]
        done = [Sample.from_json(json.loads(line)) for line in journal]
        new: list[Sample] = []
        subjects = [Fake(name, 0.1) for name in "dcba"]  # in whatever order they were started again
        run = run_blocks(subjects, rng_seed=7, n_blocks=6, done=done, on_sample=new.append)
        key = [(s.subject, s.block, s.position) for s in whole]
        assert [(s.subject, s.block, s.position) for s in new] == key[n_done:]
        assert [(s.subject, s.block, s.position) for s in run.samples] == key


def test_a_sample_is_handed_out_when_taken():
    taken: list[Sample] = []

    def cost(subject: Fake) -> float:
        if len(taken) == 5:
            raise KeyboardInterrupt
        return 0.1

    subjects = [Fake(name, cost) for name in "abc"]
    with pytest.raises(KeyboardInterrupt):
        run_blocks(subjects, rng_seed=0, n_blocks=4, on_sample=taken.append)
    assert len(taken) == 5 and not any(s.is_awake for s in subjects)


def test_later_blocks_continue_the_count():
    subjects = [Fake(name, 0.1) for name in "abc"]
    at_once = run_blocks(subjects, rng_seed=3, n_blocks=6).samples
    run = run_blocks(subjects, rng_seed=3, n_blocks=2)
    run = run_blocks(subjects, rng_seed=3, start_block=2, n_blocks=4, done=run.samples)
    assert [(s.block, s.subject) for s in run.samples] == [(s.block, s.subject) for s in at_once]


def test_the_deadline_starts_no_new_sample(fake_clock):
    run = run_blocks([Fake(name, 0.25) for name in "ab"], rng_seed=0, n_blocks=100, deadline_sec=1.3)
    assert run.is_cut and len(run.samples) == 6 and clock.now() == 1.5
    assert not run_blocks([Fake("a", 0.25)], rng_seed=0, n_blocks=2, deadline_sec=99.0).is_cut
    # Only whole pairs count.
    run = run_blocks([Fake(name, 0.25) for name in "ab"], rng_seed=0, n_blocks=9, deadline_sec=clock.now() + 1.2)
    assert len(run.samples) == 5 and Blocks(run.samples).ratio("a", "b").n == 2


def test_a_failing_subject_is_dropped_and_the_others_go_on():
    def fails(subject: Fake) -> float:
        if subject.n_samples == 3:
            raise SubjectError("out of memory", "use a smaller batch")
        return 0.1

    subjects = [Fake("a", 0.2), Fake("bad", fails), Fake("b", 0.1)]
    run = run_blocks(subjects, rng_seed=0, n_blocks=6)
    assert {name: error.cause for name, error in run.failures.items()} == {"bad": "out of memory"}
    assert [s.block for s in run.samples if s.subject == "bad"] == [0, 1]
    blocks = Blocks(run.samples)
    assert blocks.ratio("a", "b") == exactly(2.0, 6)
    assert blocks.ratio("a", "bad").n == 2
    assert not any(s.is_awake for s in subjects)
    without = [s.subject for s in run.samples if s.subject != "bad"]
    expected = run_blocks([Fake("a", 0.2), Fake("b", 0.1)], rng_seed=0, n_blocks=6).samples
    assert without == [s.subject for s in expected]  # the order of the others does not hang on it


class Dead(Fake):
    def pause(self) -> None:
        if self.n_samples:
            raise SubjectError("no such process")


def test_the_first_cause_is_reported_for_a_dead_worker():
    def crash(_: Fake) -> float:
        raise SubjectError("killed by signal 9")

    run = run_blocks([Dead("dead", crash), Fake("a", 0.1)], rng_seed=0, n_blocks=2)
    assert run.failures["dead"].cause == "killed by signal 9" and len(run.samples) == 2


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_value_that_is_no_duration_is_a_failure(value):
    subject = Fake("a", 0.1)
    subject.sample = lambda: value  # type: ignore[method-assign]
    assert "a" in run_blocks([subject], rng_seed=0, n_blocks=1).failures


def test_warm_up_runs_until_there_is_no_trend():
    subject = Fake("a", lambda s: 0.1 * (1 + 0.7 * 0.7**s.n_samples))
    timings = warm_up(subject)
    assert 14 <= len(timings) <= 22 and not stats.has_trend(timings) and not subject.is_awake
    assert len(warm_up(Fake("flat", 0.1))) == 8
    assert len(warm_up(Fake("flat", 0.1), min_n=12)) == 12


def test_warm_up_ends_and_shows_that_it_did_not_settle():
    subject = Fake("a", lambda s: 0.1 * 1.05**s.n_samples)
    start_sec = clock.now()
    timings = warm_up(subject, max_sec=3.0)
    assert stats.has_trend(timings) and 3.0 <= clock.now() - start_sec < 4.0


def test_samples_survive_json():
    for sample in (Sample("a", 3, 1, 0.25, 1e10, 1.1e10, 2), Sample("é", 0, 0, 1e-9)):
        assert Sample.from_json(json.loads(json.dumps(sample.to_json()))) == sample
    good = Sample("a", 3, 1, 0.25).to_json()
    for change in ({"value_sec": "x"}, {"value_sec": 0.0}, {"value_sec": math.nan}, {"block": None}):
        with pytest.raises(ParetuneError):
            Sample.from_json(good | change)
    with pytest.raises(ParetuneError):
        Sample.from_json({"subject": "a"})


def test_aa_resolution():
    rng = np.random.default_rng(0)
    log = rng.normal(0.0, 0.02, 30)
    samples = [Sample("a", b, 0, 1.0) for b in range(30)] + [Sample("b", b, 1, math.exp(x)) for b, x in enumerate(log)]
    ratio = Blocks(samples).ratio("a", "b")
    resolution = Blocks(samples).aa_resolution("a", "b")
    assert resolution == pytest.approx(max(-math.log(ratio.low), math.log(ratio.high)))
    assert 0.002 < resolution < 0.03
    assert Blocks(samples[:5] + samples[30:35]).aa_resolution("a", "b") == math.inf


class Host:
    """A noisy machine: lognormal noise, spikes of a neighbour, a bandwidth state that flips, a slow drift."""

    def __init__(self, seed: int, flip_per_slice: float = 0.05) -> None:
        self.rng = np.random.default_rng(seed)
        self.flip_per_slice = flip_per_slice
        self.is_slow = False

    def subject(self, name: str, base_sec: float, slow_factor: float = 1.6) -> Fake:
        def cost(_: Fake) -> float:
            self.is_slow ^= self.rng.random() < self.flip_per_slice
            cost_sec = base_sec * math.exp(self.rng.normal(0.0, 0.04)) * (1 + clock.now() / 2000)
            if self.rng.random() < 0.05:
                cost_sec *= 1 + self.rng.exponential(2.0)
            return cost_sec * (slow_factor if self.is_slow else 1.0)

        return Fake(name, cost)

    def probe(self) -> float:
        clock.sleep(PROBE_SEC)
        return (12e9 if self.is_slow else 20e9) * math.exp(self.rng.normal(0.0, 0.03))


def test_false_positives_and_power_over_the_whole_schedule():
    """What is published as the tool's false-positive rate: A/A with delta = 0, the strictest reading."""
    n_runs, n_false, n_false_delta, n_found, n_blocks_used = 400, 0, 0, 0, []
    schedule = stats.looks(8, 40)
    for seed in range(n_runs):
        host = Host(seed)
        subjects = [host.subject("baseline", 0.2), host.subject("twin", 0.2), host.subject("gain", 0.2 / 1.1)]
        samples: list[Sample] = []
        run_blocks(subjects, rng_seed=seed, n_blocks=schedule[-1], probe=host.probe, on_sample=samples.append)
        aa, aa_delta, gain = set(), set(), None
        for i, n in enumerate(schedule):
            blocks = Blocks([s for s in samples if s.block < n])
            level = stats.look_level(i, len(schedule))
            ratio = blocks.ratio("baseline", "twin", level, n_draws=300)
            aa.add(stats.verdict(ratio, delta=0.0))
            aa_delta.add(stats.verdict(ratio))
            word = stats.verdict(blocks.ratio("baseline", "gain", level, n_draws=300))
            if gain is None and word != "undecided":
                gain = word
                n_blocks_used.append(n)
        n_false += bool(aa & {"faster", "slower"})
        n_false_delta += bool(aa_delta & {"faster", "slower"})
        n_found += gain == "faster"
    print(f"\nfalse positives: {n_false} of {n_runs} at delta 0, {n_false_delta} at delta 2 %")
    print(f"10 % gain found: {n_found} of {n_runs}, after {np.median(n_blocks_used):.0f} blocks (median)")
    assert n_false / n_runs <= 0.05
    assert n_false_delta / n_runs <= 0.01
    assert n_found / n_runs >= 0.9


def test_ratios_by_bandwidth_state():
    host = Host(4, flip_per_slice=0.02)
    # Twice as fast where bandwidth is plenty; what reads less memory gains more in the low state.
    subjects = [
        host.subject("baseline", 0.2, slow_factor=2.0),
        host.subject("variant", 0.1, slow_factor=1.25),
    ]
    blocks = Blocks(run_blocks(subjects, rng_seed=4, n_blocks=120, probe=host.probe).samples)
    by_state = blocks.by_state("baseline", "variant")
    assert by_state is not None
    assert by_state[0].value == pytest.approx(3.2, rel=0.05) and by_state[0].low > 2.9
    assert by_state[1].value == pytest.approx(2.0, rel=0.05) and by_state[1].high < 2.2
    assert by_state[0].n + by_state[1].n <= 120


def test_no_states_on_a_steady_host_or_without_probes():
    host = Host(6, flip_per_slice=0.0)
    subjects = [host.subject("a", 0.2), host.subject("b", 0.2)]
    assert Blocks(run_blocks(subjects, rng_seed=6, n_blocks=40, probe=host.probe).samples).by_state("a", "b") is None
    assert Blocks(run_blocks(subjects, rng_seed=6, n_blocks=40).samples).by_state("a", "b") is None


def test_two_subjects_of_one_name_are_a_mistake():
    with pytest.raises(AssertionError):
        run_blocks([Fake("a", 0.1), Fake("a", 0.1)], rng_seed=0, n_blocks=1)


def test_a_subject_error_is_an_error_of_the_house():
    assert issubclass(interleave.SubjectError, ParetuneError)
