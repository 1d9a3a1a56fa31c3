"""Known answers, exact tables, and coverage on simulated noise (fixed seeds, no clock)."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from paretune import stats


def test_bootstrap_is_reproducible_and_brackets_the_statistic():
    values = np.random.default_rng(0).normal(5.0, 1.0, 50)
    interval = stats.bootstrap(values, np.mean, seed=3)
    assert interval == stats.bootstrap(values, np.mean, seed=3)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low < interval.value < interval.high
    # The normal theory width, 2 * 1.96 * s / sqrt(n), within a tenth.
    expected = 2 * 1.96 * values.std() / math.sqrt(50)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.1)


def test_bootstrap_resamples_whole_rows():
    sums_and_counts = np.array([[4.0, 2.0], [9.0, 3.0], [20.0, 5.0]])

    def ratio(draws, axis):
        totals = draws.sum(axis=axis)
        return totals[:, 0] / totals[:, 1]

    interval = stats.bootstrap(sums_and_counts, ratio)
    assert interval.value == pytest.approx(3.3)
    assert interval.low >= 2.0 and interval.high <= 4.0


def test_bootstrap_does_not_depend_on_how_the_draws_are_cut(monkeypatch):
    values = np.arange(40.0)
    whole = stats.bootstrap(values, np.median, n_draws=300)
    monkeypatch.setattr(stats, "_DRAW_CELLS", 40 * 7)
    assert stats.bootstrap(values, np.median, n_draws=300) == whole


def test_interval_is_strict_json():
    interval = stats.Interval(1.1, 0.0, math.inf, 3)
    assert json.loads(json.dumps(interval.to_json(), allow_nan=False)) == {
        "value": 1.1,
        "low": 0.0,
        "high": None,
        "n": 3,
    }


def test_speed_ratio_of_known_costs():
    drift = np.linspace(1.0, 3.0, 20)
    ratio = stats.speed_ratio(2.0 * drift, 1.6 * drift)
    assert ratio.value == ratio.low == ratio.high == pytest.approx(1.25)
    assert ratio.n == 20


def test_speed_ratio_says_nothing_below_six_blocks():
    assert stats.speed_ratio([2.0] * 5, [1.0] * 5) == stats.Interval(pytest.approx(2.0), 0.0, math.inf, 5)
    assert stats.speed_ratio([2.0] * 6, [1.0] * 6).low == pytest.approx(2.0)
    # 99 % needs more: 2 * 0.5**7 > 0.01 >= 2 * 0.5**8.
    assert stats.speed_ratio([2.0] * 7, [1.0] * 7, level=0.99).high == math.inf
    assert stats.speed_ratio([2.0] * 8, [1.0] * 8, level=0.99).high == pytest.approx(2.0)
    empty = stats.speed_ratio([], [])
    assert (empty.n, empty.low, empty.high) == (0, 0.0, math.inf) and math.isnan(empty.value)


@pytest.mark.parametrize("bad", [[1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf], [1.0]])
def test_speed_ratio_refuses_what_is_no_duration(bad):
    with pytest.raises(AssertionError):
        stats.speed_ratio([1.0, 1.0], bad)


@pytest.mark.parametrize(("n", "rank"), [(5, None), (6, 1), (8, 1), (9, 2), (20, 6), (100, 40)])
def test_order_statistic_ranks(n, rank):
    # The table of confidence intervals of a median, e.g. Conover, Practical Nonparametric Statistics, A3.
    assert stats._order_rank(n, 0.95) == rank


def test_speed_ratio_covers_with_few_blocks():
    rng = np.random.default_rng(1)
    for n in (6, 8, 12):
        hits = 0
        for _ in range(400):
            ratio = stats.speed_ratio(rng.lognormal(size=n), rng.lognormal(size=n) / 1.1, n_draws=200)
            hits += ratio.low <= 1.1 <= ratio.high
        assert hits / 400 >= 0.94, n


@pytest.mark.parametrize(
    ("low", "high", "resolution", "word"),
    [
        (1.03, 1.09, 0.0, "faster"),
        (0.80, 0.97, 0.0, "slower"),
        (0.99, 1.01, 0.0, "indistinguishable"),
        (0.98, 1.02, 0.0, "indistinguishable"),
        (1.01, 1.05, 0.0, "undecided"),
        (0.95, 1.05, 0.0, "undecided"),
        (1.03, 1.09, 0.05, "undecided"),
        (1.03, 1.04, 0.05, "indistinguishable"),
        (1.06, 1.09, 0.05, "faster"),
        (0.0, math.inf, 0.0, "undecided"),
        (1.5, 1.6, math.inf, "undecided"),
        (0.0, math.inf, 2.0, "undecided"),
    ],
)
def test_verdict(low, high, resolution, word):
    assert stats.verdict(stats.Interval(1.0, low, high, 20), 0.02, resolution) == word


def test_verdict_of_nothing_is_undecided():
    assert stats.verdict(stats.speed_ratio([], [])) == "undecided"


def test_looks_grow_and_each_can_decide():
    assert stats.looks(8, 64) == [8, 12, 18, 27, 41, 64]
    assert stats.looks(30, 30) == [30]
    assert stats.looks(1, 3) == [3]
    for first, last in [(1, 10), (6, 30), (6, 40), (10, 200), (6, 6), (7, 8)]:
        schedule = stats.looks(first, last)
        assert schedule == sorted(set(schedule)) and schedule[-1] == last
        for i, n in enumerate(schedule):
            assert stats._order_rank(n, stats.look_level(i, len(schedule))) is not None, (schedule, n)


def test_look_levels_share_the_error():
    levels = [stats.look_level(i, 5) for i in range(5)]
    assert sum(1 - level for level in levels) == pytest.approx(0.05)
    with pytest.raises(AssertionError):
        stats.look_level(5, 5)


def test_faster_p_value_is_the_sign_test():
    baseline, variant = np.full(10, 1.1), np.ones(10)
    assert stats.faster_p_value(baseline, variant, 0.02) == 2.0**-10
    assert stats.faster_p_value(baseline, variant, 0.2) == 1.0
    assert stats.faster_p_value(variant, variant, 0.0) == 1.0  # ties count against
    variant = variant.copy()
    variant[:2] = 2.0
    assert stats.faster_p_value(baseline, variant, 0.02) == pytest.approx((1 + 10 + 45) / 1024)


def test_faster_p_value_agrees_with_the_interval():
    rng = np.random.default_rng(2)
    for _ in range(50):
        baseline, variant = rng.lognormal(0.3, 0.5, 20), rng.lognormal(0.0, 0.5, 20)
        if stats.speed_ratio(baseline, variant, n_draws=200).low > 1.02:
            assert stats.faster_p_value(baseline, variant, 0.02) <= 0.025


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]  # Holm's own steps
    assert stats.holm([0.04, 0.01]) == [True, True]
    assert stats.holm([0.03, 0.03]) == [False, False]  # the first step fails, so the second is not taken
    assert stats.holm([0.05]) == [True]
    assert stats.holm([]) == []
    with pytest.raises(AssertionError):
        stats.holm([math.nan])


def test_mann_kendall_is_exact():
    # Kaarsemaker & van Wijngaarden 1953; Kendall, Rank Correlation Methods, table 1.
    assert stats._mann_kendall_tail(4, 6) == pytest.approx(1 / 24)
    assert stats._mann_kendall_tail(8, 16) == pytest.approx(0.031, abs=5e-4)
    assert stats._mann_kendall_tail(8, 18) == pytest.approx(0.016, abs=5e-4)
    assert stats._mann_kendall_tail(8, -28) == 1.0


def test_trend_of_a_warm_up():
    warm = [1.0 + 0.7 * 0.7**i for i in range(30)]
    n_needed = next(n for n in range(1, 31) if not stats.has_trend(warm[:n]))
    # What is left over the window is then about 1 %, and the mean of what follows is warm.
    assert 15 <= n_needed <= 22
    assert np.mean(warm[n_needed:]) < 1.003


def test_trend_needs_a_window_and_a_size():
    assert stats.has_trend([1.0] * 7)
    assert not stats.has_trend([1.0] * 8)
    assert not stats.has_trend([1.0 + 0.001 * i for i in range(8)])  # 0.7 % in no noise: harmless
    assert stats.has_trend([1.0 + 0.003 * i for i in range(8)])
    assert stats.has_trend([1.0 - 0.003 * i for i in range(8)])
    assert not stats.has_trend([1.7] + [1.0] * 7)  # the slow first one: the rest is warm
    assert stats.has_trend([5.0, 4.0] + [1.0 + 0.003 * i for i in range(8)])
    assert not stats.has_trend([9.0, 8.0] + [1.0] * 8)


def test_trend_false_alarms_are_rare():
    rng = np.random.default_rng(3)
    alarms = sum(stats.has_trend(list(rng.lognormal(0.0, 0.1, 8))) for _ in range(2000))
    assert alarms / 2000 <= 0.08  # 2 * 0.0305 exactly, the test's steps being coarse


@pytest.mark.parametrize(("q", "n"), [(50, 6), (90, 36), (95, 72), (99, 368), (99.9, 3688), (10, 36)])
def test_percentile_rule(q, n):
    assert stats.percentile_min_n(q) == n
    assert stats.percentile(np.arange(n - 1), q) is None
    assert stats.percentile(np.arange(n), q) == pytest.approx(q / 100 * (n - 1))


def test_percentile_is_in_percent():
    with pytest.raises(AssertionError):
        stats.percentile(np.arange(100), 0.9)


@pytest.mark.parametrize(
    ("level", "df", "value"),
    [(0.95, 1, 6.3138), (0.95, 2, 2.9200), (0.975, 7, 2.3646), (0.95, 30, 1.6973), (0.99, 39, 2.4258)],
)
def test_student_t_table(level, df, value):
    assert stats._student_t(level, df) == pytest.approx(value, abs=5e-5)


def test_upper_mean_of_known_values():
    assert stats.upper_mean([0.5, 0.5, 0.5]) == 0.5
    values = np.random.default_rng(4).normal(0.0, 1.0, 40)
    t_bound = values.mean() + stats._student_t(0.95, 39) * values.std(ddof=1) / math.sqrt(40)
    assert t_bound - 1e-12 <= stats.upper_mean(values) < t_bound + 0.1
    assert stats.upper_mean(values) == stats.upper_mean(values)
    assert stats.upper_mean(values, level=0.99) > stats.upper_mean(values)


def test_upper_mean_needs_two_blocks():
    assert stats.upper_mean([0.0, 1.0]) > 1.0
    for values, block in [([1.0], 1), ([], 1), ([1.0] * 7, 4)]:
        with pytest.raises(AssertionError):
            stats.upper_mean(values, block=block)


def test_upper_mean_over_blocks_sees_the_correlation_of_neighbours():
    rng = np.random.default_rng(5)
    values = np.repeat(rng.normal(0.0, 1.0, 40), 128) + rng.normal(0.0, 0.1, 40 * 128)
    naive, blocked = (stats.upper_mean(values, block=b, n_draws=500) - values.mean() for b in (1, 128))
    assert blocked > 8 * naive  # sqrt(128) = 11.3 in the limit


@pytest.mark.parametrize("skewed", [False, True])
def test_upper_mean_covers(skewed):
    rng = np.random.default_rng(6)
    draw = (lambda: rng.exponential(1.0, 40) - 1.0) if skewed else (lambda: rng.normal(0.0, 1.0, 40))
    hits = sum(stats.upper_mean(draw(), n_draws=400) >= 0.0 for _ in range(400))
    assert hits / 400 >= 0.93


def test_bandwidth_states_are_found():
    rng = np.random.default_rng(7)
    state = (np.arange(60) // 13) % 2
    bandwidth = np.where(state == 1, 20e9, 13e9) * rng.lognormal(0.0, 0.04, 60)
    bandwidth[5] *= 0.2  # an outlier has no state of its own
    assert stats.bandwidth_states(bandwidth) == state.tolist()


def test_bandwidth_states_are_not_invented():
    rng = np.random.default_rng(8)
    families = [
        lambda: rng.lognormal(0.0, 0.05, 60),
        lambda: rng.lognormal(0.0, 0.5, 60),
        lambda: rng.uniform(1.0, 3.0, 60),
        lambda: np.exp(-rng.exponential(0.3, 60)),
        lambda: np.where(np.arange(60) < 30, 1.0, 1.2) * rng.lognormal(0.0, 0.02, 60),  # too close
        lambda: np.where(np.arange(60) < 5, 1.0, 2.0) * rng.lognormal(0.0, 0.02, 60),  # too rare
    ]
    for i, draw in enumerate(families):
        assert sum(stats.bandwidth_states(draw()) is not None for _ in range(100)) <= 5, i
    for few in ([], [1.0], [1.0, 2.0], [1.0] * 10 + [2.0] * 10):
        assert stats.bandwidth_states(few) is None
    assert stats.bandwidth_states([1.0] * 15 + [2.0] * 15) == [0] * 15 + [1] * 15
