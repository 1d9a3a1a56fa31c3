"""In which order candidates have their turn, and that each has it once."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from made_outcome import candidate, choices, estimator, outcome
from points import choice_of

from paretune.tune.propose import (
    FIRST_WAVE,
    Proposer,
    _next_plain,
    predicted_log_gain,
)

NATIVE = ("sdpa", None, None, "native", None)
LINEAR = "int8(embeddings=false)"
PLAIN = [c for c in choices() if c[3] != "native"]


def wave(out, size=6, budget=1e9, sec_of=None):
    return [choice_of(c) for c in Proposer(out, estimator(out)).next_wave(budget, size, sec_of or {})]


def test_the_first_wave_is_small_and_holds_the_form_that_is_proven_equal():
    first = wave(outcome({}))
    assert len(first) == FIRST_WAVE and first[0] == NATIVE
    # The rest are the kinds of weights that read the least, each once, with the cache as it is.
    kinds = [c[2] for c in first[1:]]
    assert kinds[0] == "int4" and len(set(kinds)) == 3 and set(kinds) <= {"int4", "int8", "w8a8", "w7a7"}
    assert all(c[3] == "native" and c[4] is None for c in first)


def test_caches_wait_for_their_kind_of_weights_and_leave_with_it():
    int4 = ("sdpa", None, "int4", "native", None)
    seen = {c: 0.001 for c in choices() if c[3] == "native" and c[4] is None}
    out = outcome(seen)
    out.rejected[candidate(*int4).id] = "perplexity rises by at least +20.0% after 3 windows; the limit is +1.00%"
    order = wave(out, size=99)
    assert order and all(c[3] == "native" and c[4] for c in order)
    assert not any(c[2] == "int4" for c in order)
    assert candidate("sdpa", None, "int4", "native", "int8").id in out.excluded


def test_what_was_measured_orders_the_caches():
    seen = {NATIVE: 0.004, ("sdpa", None, "int8", "native", None): 0.001, ("sdpa", None, "w8a8", "native", None): 0.002}
    # Nothing surely leads (none was gated), so that nothing is excluded.
    cached = [(*c[:4], "int8") for c in seen]
    order = wave(outcome(seen, legal=[*seen, *cached]), size=99)
    kinds = [c[2] for c in order]
    assert kinds.index("int8") < kinds.index("w8a8") < kinds.index(None)


def test_native_forms_queue_with_the_others_where_the_runner_does_not_pay():
    out = outcome({NATIVE: 0.011})
    order = wave(out, size=12)
    assert {c[3] for c in order[:5]} != {"native"}
    assert any(c[3] == "eager" for c in order[:6])


def test_changes_alone_that_start_at_once_come_first_where_nothing_is_native():
    out = outcome({}, legal=PLAIN)
    order = wave(out, size=5)
    assert set(order) == {
        ("eager", None, None, "eager", None),
        ("sdpa", "bf16", None, "eager", None),
        ("sdpa", "fp16", None, "eager", None),
        ("sdpa", None, "int8", "eager", None),
        ("sdpa", None, "int8-linear", "eager", None),
    }


def plain_wave(tried=(), singles=None, start=None, budget=1e9, size=5):
    left = [candidate(*c) for c in PLAIN]
    left = [c for c in left if c.id not in set(tried)]
    return _next_plain(left, singles or {}, budget, size, start or {})


def test_a_runner_is_looked_at_beside_the_combinations_of_cheap_changes():
    """It starts slowly, and is not left for a budget that ends before: default before freeze before autotune."""
    every = [candidate(*c) for c in PLAIN]
    tried = [c.id for c in every if c.single and c.is_plain]
    gains = {"precision": 0.25, "quantize": 0.25, "attention": -0.1}
    singles = {change: gains[change[0]] for c in every for change in c.changes.items() if change[0] in gains}
    chosen = plain_wave(tried, singles)
    alone = [choice_of(c)[3] for c in chosen if len(c.changes) == 1]
    assert alone and alone[0] == "compile:default"
    assert any(len(c.changes) == 2 for c in chosen)


def test_what_was_measured_decides_which_combination_is_next():
    every = [candidate(*c) for c in PLAIN]
    tried = [c.id for c in every if c.single]
    singles = {change: -0.5 for c in every for change in c.changes.items()}
    singles |= {("precision", "fp16"): 0.6, ("quantize", "int8"): 0.1, ("quantize", LINEAR): 0.5}
    first = plain_wave(tried, singles, size=1)[0]
    assert first.changes == {"precision": "fp16", "quantize": LINEAR}
    # Gains that are predicted to be losses wait until nothing better is left.
    assert all(predicted_log_gain(c, singles) > 0 for c in plain_wave(tried, singles, size=98))


def test_a_candidate_without_a_number_does_not_spoil_the_order():
    """A wave that the deadline cut in its first block leaves a ratio of NaN."""
    every = [candidate(*c) for c in PLAIN]
    singles = {change: -0.5 for c in every for change in c.changes.items()}
    singles |= {("quantize", "int8"): math.nan, ("quantize", LINEAR): 0.9, ("precision", "fp16"): 0.6}
    first = plain_wave([c.id for c in every if c.single], singles, size=1)[0]
    assert first.changes == {"precision": "fp16", "quantize": LINEAR}


def test_nothing_promising_is_left_so_the_rest_is_measured_too():
    every = [candidate(*c) for c in PLAIN]
    tried = [c.id for c in every if c.single]
    singles = {change: -1.0 for c in every for change in c.changes.items()}
    rest = plain_wave(tried, singles)
    assert 1 <= len(rest) <= 5 and not {c.id for c in rest} & set(tried)


@settings(max_examples=60, deadline=None)
@given(
    tried=st.sets(st.integers(0, len(PLAIN) - 1)),
    gains=st.lists(st.floats(-2, 2), min_size=14, max_size=14),
    starts=st.lists(st.floats(0.5, 200), min_size=5, max_size=5),
    budget=st.floats(0, 400),
    size=st.integers(1, 8),
)
def test_a_wave_repeats_nothing_and_respects_size_and_budget(tried, gains, starts, budget, size):
    every = [candidate(*c) for c in PLAIN]
    changes = sorted({change for c in every for change in c.changes.items()})
    singles = dict(zip(changes, gains, strict=False))
    start = dict(zip([*dict.fromkeys(c.runner.name for c in every)], starts, strict=False))
    done = {every[i].id for i in tried}
    chosen = plain_wave(done, singles, start, budget, size)
    ids = [c.id for c in chosen]
    assert len(set(ids)) == len(ids) <= size
    assert not set(ids) & done
    assert sum(start[c.runner.name] for c in chosen) <= budget + 1e-9
    possible = [c for c in every if c.id not in done and start[c.runner.name] <= budget]
    assert bool(chosen) == bool(possible)


def test_with_time_enough_every_candidate_is_measured_or_excluded():
    """The loop of the search without its race: each candidate is proposed once or has a reason."""
    random = __import__("random").Random(3)
    seen: dict = {}
    while True:
        out = outcome(seen)
        chosen = wave(out)
        if not chosen:
            break
        assert not set(chosen) & set(seen)
        seen |= {c: (0.001 if c[3] == "native" else 0.009) * random.uniform(0.8, 1.2) for c in chosen}
    left = {candidate(*c).id for c in choices() if c not in seen}
    assert left == set(out.excluded) and left and len(seen) > 25
    assert all(any(ch.isdigit() for ch in why) for why in out.excluded.values())


def test_the_time_that_is_left_bounds_a_wave():
    out = outcome({})
    sec_of = dict.fromkeys({candidate(*c).runner.name for c in choices()}, 3.0) | {"blocks": 2.0}
    assert len(wave(out, budget=11.0, sec_of=sec_of)) == 2
    assert wave(out, budget=4.0, sec_of=sec_of) == []
