"""The gate: what is far over the bound leaves early, what is accepted had its 40 windows, nothing is scored twice."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fake_race import scores_of
from made_outcome import candidate, outcome

from paretune.errors import ParetuneError
from paretune.tune.gate import LOOKS, Gate
from paretune.tune.race import BASELINE

INT8 = ("sdpa", None, "int8", "native", None)
INT4 = ("sdpa", None, "int4", "native", None)
NATIVE = ("sdpa", None, None, "native", None)
WINDOWS = torch.arange(40 * 257).reshape(40, 257)


class Journal:
    def __init__(self):
        self.events = []

    def find(self, event, **match):
        hits = [e for e in self.events if e["event"] == event and all(e.get(k) == v for k, v in match.items())]
        return hits[-1] if hits else None

    def record(self, event, **data):
        self.events.append({"event": event, **data})


def gate_of(out, shifts, failing=()):
    """A gate whose trials lose `shifts` nats a token; gives it and the list of what was scored."""
    scored = []
    ids = {candidate(*choice).id: shift for choice, shift in shifts.items()} | {BASELINE: 0.0}

    def score(id, split, windows, text_name, start, stop):
        if id in [f if f == BASELINE else candidate(*f).id for f in failing]:
            out.race.trials[id].failure = "the process crashed with SIGSEGV"
            return None
        scored.append((id, start, stop))
        return scores_of(windows[start:stop].numpy(), text_name, ids[id], id)

    out.race.score, out.race.journal = score, Journal()
    return Gate(out, WINDOWS, "pieces", lambda line: None), scored


def test_far_over_the_bound_is_seen_in_three_windows():
    out = outcome({INT4: 0.001})
    gate, scored = gate_of(out, {INT4: math.log(1.27)})
    assert gate.judge(candidate(*INT4).id) is False
    assert {stop for _, _, stop in scored} == {LOOKS[0]}
    figures = out.rejected[candidate(*INT4).id]
    assert "after 3 windows" in figures and "the limit is +1.00%" in figures
    quality = out.qualities[candidate(*INT4).id]
    assert not quality.within_bound and quality.ppl_increase == pytest.approx(0.27, abs=0.01)


def test_acceptance_takes_all_windows_and_the_upper_end():
    out = outcome({INT8: 0.001})
    gate, scored = gate_of(out, {INT8: 0.0008})
    assert gate.judge(candidate(*INT8).id) is True
    ours = [part for part in scored if part[0] != BASELINE]
    assert [p[1:] for p in ours] == gate.parts and ours[-1][2] == 40
    quality = out.qualities[candidate(*INT8).id]
    assert quality.n_windows == 40 and quality.ppl_increase_upper <= 0.01


def test_just_over_the_bound_is_turned_away_at_the_last_look_at_least():
    out = outcome({INT8: 0.001})
    gate, _ = gate_of(out, {INT8: math.log(1.0101)})
    assert gate.judge(candidate(*INT8).id) is False and candidate(*INT8).id in out.rejected


def test_parts_give_what_the_whole_gives():
    """The score of a text in parts is that of the text: the losses of all windows in their order."""
    from paretune.evaluate.fidelity import joined

    whole = [scores_of(WINDOWS[a:b].numpy(), "t", 0.01, "x") for a, b in ((0, 3), (3, 8), (8, 40))]
    one = joined(whole)
    assert one.prefill.nll.shape == (40, 128)
    np.testing.assert_array_equal(one.decode.nll, np.concatenate([s.decode.nll for s in whole]))
    assert one.prefill.kept.tolist() == [*range(4), *(3 * 128 + i for i in range(4)), *(8 * 128 + i for i in range(4))]
    assert len({s.text_hash for s in [one, *whole]}) == 4


def test_lossless_forms_are_not_scored():
    out = outcome({NATIVE: 0.001})
    gate, scored = gate_of(out, {NATIVE: 0.0})
    assert gate.judge(candidate(*NATIVE).id) is True and not scored


def test_the_baseline_is_scored_by_the_fastest_form_that_gives_its_tokens():
    out = outcome({NATIVE: 0.003, INT8: 0.001, ("sdpa", None, None, "compile:default", None): 0.008})
    gate, scored = gate_of(out, {NATIVE: 0.0, INT8: 0.0})
    gate.judge(candidate(*INT8).id)
    assert {id for id, _, _ in scored} == {candidate(*NATIVE).id, candidate(*INT8).id}
    assert out.scorer == candidate(*NATIVE).id


def test_a_slower_lossless_form_does_not_score():
    out = outcome({NATIVE: 0.02, INT8: 0.001})
    gate, scored = gate_of(out, {NATIVE: 0.0, INT8: 0.0})
    gate.judge(candidate(*INT8).id)
    assert {id for id, _, _ in scored} == {BASELINE, candidate(*INT8).id}


def test_where_the_scorer_breaks_the_baseline_scores_itself():
    out = outcome({NATIVE: 0.003, INT8: 0.001})
    gate, scored = gate_of(out, {NATIVE: 0.0, INT8: 0.0}, failing=[NATIVE])
    assert gate.judge(candidate(*INT8).id) is True
    assert BASELINE in {id for id, _, _ in scored} and out.scorer == BASELINE


def test_a_baseline_that_cannot_be_scored_is_one_clear_error():
    out = outcome({INT8: 0.001})
    gate, _ = gate_of(out, {INT8: 0.0}, failing=[BASELINE])
    with pytest.raises(ParetuneError, match="the baseline cannot be scored: the process crashed"):
        gate.judge(candidate(*INT8).id)


def test_without_time_there_is_no_judgement():
    out = outcome({INT8: 0.001})
    gate, scored = gate_of(out, {INT8: 0.0})
    answers = iter([True, True, False])
    assert gate.judge(candidate(*INT8).id, lambda: next(answers)) is None
    assert candidate(*INT8).id not in out.qualities and {stop for _, _, stop in scored} == {3, 8}


def judged_on_noise(loss: float, seed: int) -> tuple[bool | None, bool]:
    """The judgement of a candidate whose windows differ in what they lose, as texts do, and whether it was early."""
    out = outcome({INT8: 0.001})
    gate, scored = gate_of(out, {INT8: 0.0})
    base = gate.out.race.score

    def noisy(id, split, windows, text_name, start, stop):
        scores = base(id, split, windows, text_name, start, stop)
        if id == BASELINE:
            return scores
        random = np.random.default_rng([seed, start])
        for phase in (scores.prefill, scores.decode):
            np.add(
                phase.nll,
                math.log1p(loss) + random.normal(0, 0.02, (len(phase.nll), 1)),
                out=phase.nll,
                casting="same_kind",
            )
        return scores

    gate.out.race.score = noisy
    said = gate.judge(candidate(*INT8).id)
    return said, not any(stop == 40 for _, _, stop in scored)


def test_the_lower_bound_rejects_what_lies_on_the_limit_rarely(monkeypatch):
    """Of 60 candidates that lose exactly what is allowed, at most a tenth leaves for being over it."""
    monkeypatch.setattr("paretune.tune.gate.NO_CHANCE", 0.0)
    assert sum(judged_on_noise(0.01, seed)[1] for seed in range(60)) <= 6


def test_what_the_whole_text_would_accept_is_rarely_turned_away(monkeypatch):
    early = [seed for seed in range(60) if judged_on_noise(0.004, seed)[1]]
    monkeypatch.setattr("paretune.tune.gate.LOOKS", ())
    assert sum(bool(judged_on_noise(0.004, seed)[0]) for seed in early) <= 3


def test_what_has_no_chance_is_turned_away_early_with_figures():
    """1.3 % where 1 % is allowed: too near the limit for the lower bound, too far for the upper one."""
    said = [judged_on_noise(0.013, seed) for seed in range(20)]
    assert not any(accepted for accepted, _ in said) and sum(early for _, early in said) >= 15
