"""The real search on a machine made up: what must win wins, and nothing else, whatever breaks on the way."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from fake_race import BASE, MB, START_SEC, Killed, Machine, install, is_confirmation, only, run, windows
from points import recipe_of

from paretune.errors import NoRecipeError, ParetuneError, TooNoisyError
from paretune.measure.interleave import SubjectError
from paretune.records.record import from_json, to_json
from paretune.records.trial import MemoryParts
from paretune.records.tune import TuneResult
from paretune.tune import result as results
from paretune.tune import space as spaces
from paretune.tune.goal import Goal
from paretune.tune.race import BASELINE, TWIN
from paretune.tune.search import CONFIRM_BLOCKS

INT8 = ("sdpa", None, "int8", "eager", None)
INT8_LINEAR = ("sdpa", None, "int8-linear", "eager", None)
BF16 = ("sdpa", "bf16", None, "eager", None)
FP16 = ("sdpa", "fp16", None, "eager", None)
EAGER = ("eager", None, None, "eager", None)
COMPILE = ("sdpa", None, None, "compile:default", None)
BF16_INT8 = ("sdpa", "bf16", "int8", "eager", None)
SIX = (INT8, INT8_LINEAR, BF16, FP16, EAGER, COMPILE)


def name(choice):
    return recipe_of(choice).name


def id_of(choice):
    return recipe_of(choice).hash


@pytest.fixture
def six(monkeypatch):
    """A space of six candidates: a run is short, and every one is reached."""
    return only(monkeypatch, *SIX)


def written(out, folder, *, draws=False):
    """`results.write`, and every file of it read back strictly; what `report.json` and `plan.json` hold.

    Args:
        draws: with the real report and its pictures, which take half a second.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not draws:
            patch.setattr("paretune.report.html.write_report", write_words)
        result = results.write(out, folder, again="paretune tune pocket")

    def no_constant(text):
        raise AssertionError(f"{text} in strict JSON")

    read = json.loads((folder / "report.json").read_text("utf-8"), parse_constant=no_constant)
    plan = json.loads((folder / "plan.json").read_text("utf-8"), parse_constant=no_constant)
    lines = (folder / "trials.jsonl").read_text("utf-8").splitlines()
    trials = [json.loads(line, parse_constant=no_constant) for line in lines]
    page = (folder / "report.html").read_text("utf-8")
    assert read["trials"] == trials and read["verdict"] == result.verdict == plan["verdict"]
    assert read == to_json(from_json(TuneResult, read)) == to_json(result)
    assert read["schema_version"] and read["versions"] and read["hardware"]["id"] and read["command"]
    # Every candidate is a row, in the file and on the page.
    ids = [t["id"] for t in trials]
    assert len(set(ids)) == len(ids)
    assert set(ids) >= {c.id for c in out.space.legal}
    for trial in trials:
        assert trial["status"] in ("measured", "failed", "invalid", "excluded", "not_reached")
        assert (trial["status"] == "measured") == (trial["reason"] is None)
        assert trial["name"] in page or len(trials) > 20
    left = [p.name for p in folder.rglob("*") if "tmp" in p.name or p.name.endswith((".old", ".part"))]
    assert not left, left
    return read, plan


def write_words(result, path):
    """The words of the report without its pictures."""
    from paretune.files import write_text
    from paretune.report import trials, words

    write_text(path, repr([words.top_of(result), words.certainty_of(result), trials.trial_rows(result)]))


def exit_of(result):
    """How the command ends."""
    from paretune.cli.tune import _raise_for

    try:
        _raise_for(from_json(TuneResult, result))
    except KeyboardInterrupt:
        return 130, ""
    except ParetuneError as error:
        return error.exit_code, str(error)
    return 0, ""


def row(result, choice):
    return next(t for t in result["trials"] if t["id"] == id_of(choice))


# -- who wins


def test_a_faster_recipe_within_the_bound_wins_and_is_confirmed_afresh(monkeypatch, tmp_path, six):
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.006, name(BF16): 0.008}))
    out = run(machine, tmp_path / "plan")
    assert (out.kind, out.winner) == ("winner", id_of(INT8))
    speed = out.confirmation.speedup
    assert speed.low < 0.010 / 0.006 < speed.high and speed.verdict == "faster"
    fresh = [(t, s) for t, r, s in machine.started if is_confirmation(t)]
    assert len(fresh) == 4 and len({t for t, _ in fresh}) == 4
    # Fresh prompts: no seed of the search, the same for the two sides of a pair.
    assert {s for _, s in fresh} == {1000, 1001}
    assert {s for t, _, s in machine.started if not is_confirmation(t)} == {0}
    result, plan = written(out, tmp_path / "plan", draws=True)
    assert plan["recipe"] == recipe_of(INT8).to_dict() and plan["outcome"] == "winner"
    assert f"{speed.value:.2f} times as fast" in result["verdict"][0]
    assert exit_of(result) == (0, "")
    # What is told is the confirmation, not the search.
    assert result["confirmation"]["quality"]["protocol"] == "pieces/confirm/fake"
    assert row(result, INT8)["quality"]["protocol"] == "pieces/search/fake"


def test_the_whole_space_under_a_budget(monkeypatch, tmp_path):
    """What does not fit into five minutes is a row all the same; the best combination is found."""
    factors = {"int8": 0.7, "int8-linear": 0.8, "bf16": 0.9, "fp16": 1.5, "eager": 1.3}

    def cost(recipe, trial):
        transforms, _, engine = recipe.partition(", ")
        value = 0.010 * (1.2 if engine.startswith("compile") else 1.0)
        for part in transforms.split(" + "):
            value *= factors.get(part, 1.0)
        return value

    machine = install(monkeypatch, Machine(cost=cost))
    out = run(machine, tmp_path / "plan")
    assert (out.kind, out.winner) == ("winner", id_of(BF16_INT8))
    result, _ = written(out, tmp_path / "plan", draws=True)
    space = result["space"]
    assert space["n_legal"] == 116 and len(result["trials"]) == 116
    counts = [space[f"n_{word}"] for word in ("measured", "failed", "excluded", "not_reached")]
    assert sum(counts) == 116 and space["n_not_reached"] > 0
    assert result["elapsed_sec"] < 330


def test_nothing_is_faster_so_the_baseline_is_kept(monkeypatch, tmp_path, six):
    slower = {name(c): 0.012 for c in SIX}
    machine = install(monkeypatch, Machine(cost=slower))
    out = run(machine, tmp_path / "plan")
    assert (out.kind, out.winner, out.confirmation) == ("baseline", None, None)
    result, plan = written(out, tmp_path / "plan")
    assert plan["recipe"] == spaces.baseline().to_dict()
    assert all(row(result, c)["status"] == "measured" for c in SIX)
    assert all(row(result, c)["speedup"]["verdict"] == "slower" for c in SIX)
    assert exit_of(result) == (0, "")


def test_a_gain_below_delta_is_no_gain(monkeypatch, tmp_path, six):
    """1.2 % faster without any noise: real, and not worth a change."""
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.010 / 1.012}, noise=0.0))
    assert run(machine, tmp_path / "plan").kind == "baseline"


def test_the_fastest_breaks_the_bound_so_the_second_wins(monkeypatch, tmp_path, six):
    machine = install(
        monkeypatch,
        Machine(cost={name(INT8): 0.005, name(BF16): 0.008}, increase={name(INT8): 0.05, name(BF16): 0.001}),
    )
    out = run(machine, tmp_path / "plan")
    assert (out.kind, out.winner) == ("winner", id_of(BF16))
    result, _ = written(out, tmp_path / "plan")
    quality = row(result, INT8)["quality"]
    assert (
        not quality["within_bound"]
        and quality["ppl_increase_upper"] > 0.05
        and "the limit is +1.00%" in quality["reason"]
    )
    assert row(result, BF16)["quality"]["within_bound"]
    from paretune.report.trials import trial_rows

    shown = next(r for r in trial_rows(from_json(TuneResult, result)) if r.id == id_of(INT8))
    assert shown.within_bound is False and shown.judgement != "chosen"


def test_the_bound_holds_for_the_upper_end_not_the_estimate(monkeypatch, tmp_path, six):
    """An increase of just under 1 % cannot be shown to be under 1 %."""
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}, increase={name(INT8): math.log(1.00995)}))
    out = run(machine, tmp_path / "plan")
    quality = out.qualities[id_of(INT8)]
    assert quality.ppl_increase < 0.01 < quality.ppl_increase_upper
    assert out.winner is None


def test_quality_that_holds_on_the_search_text_alone_is_not_enough(monkeypatch, tmp_path, six):
    def increase(recipe, trial):
        return 0.05 if is_confirmation(trial) and recipe == name(INT8) else 0.0

    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005, name(BF16): 0.007}, increase=increase))
    out = run(machine, tmp_path / "plan")
    assert (out.kind, out.winner) == ("winner", id_of(BF16))
    assert any(name(INT8) in n for n in out.notes)


def test_a_tie_goes_to_the_simpler_recipe(monkeypatch, tmp_path):
    names = only(monkeypatch, INT8, BF16_INT8, BF16)
    machine = install(monkeypatch, Machine(cost={names[INT8]: 0.006, names[BF16_INT8]: 0.00599, names[BF16]: 0.011}))
    out = run(machine, tmp_path / "plan")
    assert out.winner == id_of(INT8)


def test_a_clear_gain_beats_simplicity(monkeypatch, tmp_path):
    names = only(monkeypatch, INT8, BF16_INT8)
    machine = install(monkeypatch, Machine(cost={names[INT8]: 0.006, names[BF16_INT8]: 0.0055}))
    assert run(machine, tmp_path / "plan").winner == id_of(BF16_INT8)


def test_winners_curse_what_does_not_hold_afresh_is_not_taken(monkeypatch, tmp_path, six):
    def cost(recipe, trial):
        return 0.006 if recipe == name(INT8) and not is_confirmation(trial) else 0.010

    machine = install(monkeypatch, Machine(cost=cost))
    out = run(machine, tmp_path / "plan")
    assert (out.kind, out.winner, out.confirmation) == ("baseline", None, None)
    assert any(name(INT8) in n and "did not hold" in n for n in out.notes)
    result, plan = written(out, tmp_path / "plan")
    assert plan["recipe"] == spaces.baseline().to_dict()
    assert any("did not hold" in s for s in result["verdict"])
    assert exit_of(result) == (0, "")


def test_a_confirmation_below_delta_is_no_confirmation(monkeypatch, tmp_path, six):
    """The interval has to lie above 1 + delta in the fresh measurement, which is the one reported."""

    def cost(recipe, trial):
        return 0.010 if recipe != name(INT8) else 0.010 / 1.01 if is_confirmation(trial) else 0.008

    machine = install(monkeypatch, Machine(cost=cost, noise=0.001))
    out = run(machine, tmp_path / "plan")
    assert (out.kind, out.winner) == ("baseline", None)


def test_the_next_best_has_its_turn_when_the_first_does_not_hold(monkeypatch, tmp_path, six):
    def cost(recipe, trial):
        if recipe == name(INT8):
            return 0.010 if is_confirmation(trial) else 0.005
        return 0.007 if recipe == name(BF16) else 0.010

    machine = install(monkeypatch, Machine(cost=cost))
    out = run(machine, tmp_path / "plan")
    assert (out.kind, out.winner) == ("winner", id_of(BF16))
    assert 1.38 < out.confirmation.speedup.value < 1.48


def test_an_answer_that_was_there_stays_when_the_winner_does_not_hold(monkeypatch, tmp_path):
    """The leader leaves no other finalist, falls in the confirmation, and the time is over: what was proven equal is
    confirmed all the same."""
    plain, int8 = ("sdpa", None, None, "native", None), ("sdpa", None, "int8", "native", None)
    names = only(monkeypatch, plain, int8)

    def increase(recipe, trial):
        return 0.05 if is_confirmation(trial) and recipe == names[int8] else 0.0

    machine = install(monkeypatch, Machine(cost={names[plain]: 0.005, names[int8]: 0.001}, increase=increase))
    monkeypatch.setattr("paretune.tune.confirm.Confirmer._left", lambda self, share: 0.0)
    out = run(machine, tmp_path / "plan")
    assert (out.kind, out.winner) == ("winner", id_of(plain)) and id_of(int8) in out.refused
    assert 1.9 < out.confirmation.speedup.value < 2.1 and out.confirmation.quality is None
    result, plan = written(out, tmp_path / "plan")
    assert plan["recipe"] == recipe_of(plain).to_dict() and exit_of(result) == (0, "")


def test_finals_that_decide_nothing_leave_the_answer_from_before(monkeypatch, tmp_path):
    """The deadline cuts them after blocks that are too few for their level."""
    plain = ("sdpa", None, None, "native", None)
    names = only(monkeypatch, plain)
    machine = install(monkeypatch, Machine(cost={names[plain]: 0.005}))
    monkeypatch.setattr("paretune.tune.search.Search._finals", lambda self, index, finalists: None)
    out = run(machine, tmp_path / "plan")
    assert (out.kind, out.winner) == ("winner", id_of(plain)) and out.confirmation.speedup.verdict == "faster"


def test_no_false_winner_among_equals(monkeypatch, tmp_path):
    """A/A: everything costs the same. 50 runs, at most 2 of them may take something."""
    only(monkeypatch, INT8, BF16, FP16, EAGER)
    winners, notes = [], 0
    for seed in range(50):
        machine = install(monkeypatch, Machine(noise=0.03, seed=seed), n_draws=1000)
        out = run(machine, tmp_path / f"plan{seed}", budget_sec=120.0)
        winners += [out.winner] if out.winner else []
        notes += len(out.notes)
        assert set(out.race.measured().subjects) >= {BASELINE, TWIN, id_of(INT8)}
    assert len(winners) <= 2, winners


# -- what breaks


@pytest.mark.parametrize(
    ("cause", "when"),
    [
        ("the process was killed (out of memory, most likely)", "load"),
        ("the process was killed (out of memory, most likely)", "sample"),
        ("the process crashed with SIGSEGV", "load"),
        ("no answer within 600 s: stopped", "sample"),
        ("OutOfMemoryError: can't allocate memory: you tried to allocate 99 bytes", "load"),
    ],
)
def test_a_candidate_that_breaks_is_a_row_with_its_cause(monkeypatch, tmp_path, six, cause, when):
    machine = Machine(cost={name(INT8): 0.005, name(BF16): 0.008})
    if when == "load":
        machine.load_error[name(INT8)] = cause
    else:
        machine.sample_error[name(INT8)] = (cause, 3)
    install(monkeypatch, machine)
    out = run(machine, tmp_path / "plan")
    assert (out.kind, out.winner) == ("winner", id_of(BF16))
    result, _ = written(out, tmp_path / "plan")
    broken = row(result, INT8)
    assert (broken["status"], broken["reason"]) == ("failed", cause)
    assert result["space"]["n_failed"] == 1
    # The others were measured as if nothing had been.
    assert all(row(result, c)["status"] == "measured" for c in SIX if c != INT8)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("NoEffectError", "int8 had no effect: 3 layers are not int8, h.0 first. Leave it out of the recipe"),
        ("NotExactError", "sdpa + int8, eager is not exact: token 3 differs. Report it as a bug"),
        ("NoEffectError", "the compiled graph has 2 breaks. Use the eager runner"),
    ],
)
def test_a_transform_without_effect_is_no_trial(monkeypatch, tmp_path, six, kind, cause):
    error = SubjectError(cause, kind=kind)
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}, load_error={name(INT8): error}))
    out = run(machine, tmp_path / "plan")
    assert out.winner is None
    result, _ = written(out, tmp_path / "plan")
    assert row(result, INT8)["status"] == "invalid" and row(result, INT8)["reason"] == cause
    assert id_of(INT8) not in machine.taken


def test_a_candidate_that_breaks_while_it_is_scored(monkeypatch, tmp_path, six):
    from paretune.measure.interleave import SubjectError

    def on_ask(trial, do):
        if do == "score" and trial == id_of(INT8):
            raise SubjectError("no answer within 600 s: stopped")

    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005, name(BF16): 0.008}, on_ask=on_ask))
    out = run(machine, tmp_path / "plan")
    assert out.winner == id_of(BF16)
    result, _ = written(out, tmp_path / "plan")
    assert row(result, INT8)["status"] == "failed" and "600 s" in row(result, INT8)["reason"]


def test_a_finalist_that_breaks_in_the_confirmation_leaves_its_cause(monkeypatch, tmp_path, six):
    """A crash is told with its cause, in the confirmation too."""
    from paretune.measure.interleave import SubjectError

    def on_ask(trial, do):
        if do == "start" and is_confirmation(trial) and not trial.endswith("baseline") and id_of(INT8) in trial:
            raise SubjectError("the process crashed with SIGBUS")

    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005, name(BF16): 0.008}, on_ask=on_ask))
    out = run(machine, tmp_path / "plan")
    assert out.winner == id_of(BF16)
    result, _ = written(out, tmp_path / "plan")
    assert "SIGBUS" in json.dumps(result["verdict"]) + json.dumps(row(result, INT8))


@pytest.mark.parametrize("when", ["start", "sample", "score"])
def test_trials_that_are_lost_with_the_fork_server_are_started_again(monkeypatch, tmp_path, six, when):
    """Nobody's row says that it failed, and every block is whole."""
    lost: list[str] = []

    def lose(trial):
        lost.append(trial)
        machine.lose_all()

    def on_ask(trial, do):
        if do == when and not lost and trial == id_of(INT8):
            lose(trial)

    def on_sample(trial, n):
        if when == "sample" and not lost and n == 20:
            lose(trial)

    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}, on_ask=on_ask, on_sample=on_sample))
    out = run(machine, tmp_path / "plan")
    assert lost and (out.kind, out.winner) == ("winner", id_of(INT8))
    assert not [s.failure for s in out.race.trials.values() if s.failure]
    assert all(out.race.is_whole(event["stage"]) for event in out.race.journal.all("stage"))


def test_what_an_earlier_run_has_started_costs_a_resumed_one_nothing(monkeypatch, tmp_path, six):
    def kill_at(n):
        def on_sample(trial, taken):
            if taken == n:
                raise Killed

        return on_sample

    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}, on_sample=kill_at(20)))
    with pytest.raises(Killed):
        run(machine, tmp_path / "plan")
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}, on_sample=kill_at(1)))
    before = machine.clock.now_sec
    with pytest.raises(Killed):
        run(machine, tmp_path / "plan", resume=True)
    started = [trial for trial, _, _ in machine.started]
    assert len(started) == 8, "the baseline, its twin and the wave"
    lines = [json.loads(line) for line in (tmp_path / "plan" / "samples.jsonl").read_text().splitlines()]
    one, two = lines[-2:]
    assert machine.clock.now_sec - before > 8 * START_SEC["eager"], "starting took its time"
    assert two["elapsed_sec"] - one["elapsed_sec"] < 2, "and the budget did not pay for it"


@pytest.mark.parametrize("when", ["start", "score"])
def test_a_baseline_that_does_not_run_is_one_clear_error(monkeypatch, tmp_path, six, when):
    from paretune.measure.interleave import SubjectError

    def on_ask(trial, do):
        if do == when and trial == BASELINE:
            raise SubjectError("the process crashed with SIGILL")

    lossless = {name(c): 0.011 for c in (EAGER, COMPILE)}  # none is faster, so none scores in the baseline's place
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005, **lossless}, on_ask=on_ask))
    with pytest.raises(ParetuneError) as caught:
        run(machine, tmp_path / "plan")
    assert "baseline" in str(caught.value) and "SIGILL" in str(caught.value)
    assert not machine.alive


def test_a_baseline_that_breaks_later_ends_the_run_with_a_clear_error(monkeypatch, tmp_path, six):
    """Without the baseline no block can be judged: not a result "nothing beat the baseline"."""
    from paretune.measure.interleave import SubjectError

    def on_sample(trial, n):
        if trial == BASELINE and n >= 40:  # near the end of the wave
            raise SubjectError("the process was killed (out of memory, most likely)")

    slower = {name(c): 0.012 for c in SIX} | {name(COMPILE): 0.03}
    machine = install(monkeypatch, Machine(cost=slower, on_sample=on_sample))
    with pytest.raises(ParetuneError) as caught:
        run(machine, tmp_path / "plan")
    assert "baseline" in str(caught.value) and "out of memory" in str(caught.value)


# -- noise, budget, bounds


def test_a_machine_too_noisy_says_so_and_ends_with_5(monkeypatch, tmp_path, six):
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.008}, noise=1.2))
    out = run(machine, tmp_path / "plan")
    assert out.too_noisy and out.winner is None
    result, plan = written(out, tmp_path / "plan")
    assert any("too noisy" in s for s in result["verdict"])
    assert plan["recipe"] == spaces.baseline().to_dict()
    code, line = exit_of(result)
    assert code == TooNoisyError.exit_code == 5 and "\n" not in line


def test_too_noisy_is_said_with_min_speedup_too(monkeypatch, tmp_path, six):
    """Nobody knows whether a recipe reaches it: 5, not "no recipe reaches it" (3)."""
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.008}, noise=1.2))
    out = run(machine, tmp_path / "plan", min_speedup=1.5)
    assert exit_of(to_json(results.result_of(out)))[0] == 5


def test_a_speedup_that_nothing_reaches(monkeypatch, tmp_path, six):
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.007}))
    out = run(machine, tmp_path / "plan", min_speedup=3.0)
    assert (out.kind, out.winner) == ("none", id_of(INT8))
    result, plan = written(out, tmp_path / "plan", draws=True)
    assert plan["outcome"] == "none" and plan["recipe"] == recipe_of(INT8).to_dict()
    code, line = exit_of(result)
    assert code == NoRecipeError.exit_code == 3 and "3" in line and "speed-up" in line
    # It met the quality bound: the report must not say that it did not.
    page = (tmp_path / "plan" / "report.html").read_text("utf-8")
    assert "outside the limit" not in page and "No candidate met the quality limit" not in page


def test_min_speedup_where_nothing_wins(monkeypatch, tmp_path, six):
    machine = install(monkeypatch, Machine())
    out = run(machine, tmp_path / "plan", min_speedup=2.0)
    assert (out.kind, out.winner) == ("none", None)
    result, plan = written(out, tmp_path / "plan")
    assert plan["recipe"] == spaces.baseline().to_dict()
    assert exit_of(result)[0] == 3


def test_the_line_of_exit_3_is_the_reason_and_not_some_note(monkeypatch, tmp_path, six):
    def cost(recipe, trial):
        return 0.006 if recipe == name(INT8) and not is_confirmation(trial) else 0.010

    machine = install(monkeypatch, Machine(cost=cost))
    out = run(machine, tmp_path / "plan", min_speedup=1.5)
    assert out.notes and out.kind == "none"
    code, line = exit_of(to_json(results.result_of(out)))
    assert code == 3 and "speed-up" in line


def test_winner_and_baseline_are_explained_by_a_profile(monkeypatch, tmp_path, six):
    """The same rules as `profile`, run in the processes of the confirmation; other rows get what their figures give."""
    out = run(install(monkeypatch, Machine(cost={name(INT8): 0.005})), tmp_path)
    result, _ = written(out, tmp_path)
    rows = {t["id"]: t for t in result["trials"]}
    assert rows[id_of(INT8)]["explanations"][0]["sentence"] == f"{name(INT8)} was taken apart in decode"
    assert rows[BASELINE]["explanations"][0]["sentence"] == f"{BASE} was taken apart in decode"
    other = rows[id_of(EAGER)]["explanations"]
    assert other and all(e["sentence"] and "taken apart" not in e["text"] for e in other)
    assert rows[id_of(EAGER)]["tpot_roofline_sec"] > 0


def test_a_profile_that_fails_costs_nothing_but_its_words(monkeypatch, tmp_path, six):
    machine = Machine(cost={name(INT8): 0.005}, why_error={name(INT8): "the profiler died"})
    out = run(install(monkeypatch, machine), tmp_path)
    result, _ = written(out, tmp_path)
    assert result["outcome"] == "winner" and result["confirmation"]["n_processes"] == 2
    row = next(t for t in result["trials"] if t["id"] == id_of(INT8))
    assert row["status"] == "measured" and row["explanations"]


@pytest.mark.parametrize("budget", [0.5, 8.0, 20.0])
def test_a_tiny_budget_ends_with_the_baseline_and_says_why(monkeypatch, tmp_path, six, budget):
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}))
    before = machine.clock.now()
    out = run(machine, tmp_path / "plan", budget_sec=budget)
    assert (out.kind, out.winner) == ("baseline", None) and not out.too_noisy
    result, plan = written(out, tmp_path / "plan")
    assert any("budget" in s for s in result["verdict"]), result["verdict"]
    assert plan["recipe"] == spaces.baseline().to_dict()
    assert exit_of(result) == (0, "")
    assert machine.clock.now() - before < budget + 60


@pytest.mark.parametrize("budget", range(24, 80, 8))
def test_a_short_budget_is_never_called_noise(monkeypatch, tmp_path, six, budget):
    """Fewer than six A/A blocks give no resolution; the machine is as quiet as any."""
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}))
    out = run(machine, tmp_path / "plan", budget_sec=float(budget))
    assert not out.too_noisy
    result = to_json(results.result_of(out))
    assert not any("noisy" in s or "inf" in s for s in result["verdict"]), result["verdict"]
    json.dumps(result, allow_nan=False)
    if out.winner is None:
        assert any("budget" in s or "Nothing" in s for s in result["verdict"])


@pytest.mark.parametrize("objective", ["ttft", "throughput"])
def test_other_times(monkeypatch, tmp_path, six, objective):
    machine = install(monkeypatch, Machine(cost={name(BF16): 0.007}))
    out = run(machine, tmp_path / "plan", objective=objective)
    assert (out.kind, out.winner) == ("winner", id_of(BF16))
    result, _ = written(out, tmp_path / "plan")
    throughput = row(result, BF16)["throughput_tokens_per_sec"]
    assert (throughput is not None) == (objective == "throughput")
    if throughput:
        assert throughput == pytest.approx(1 / 0.007, rel=0.02)


@pytest.mark.parametrize("objective", ["memory", "size"])
def test_objectives_in_bytes_take_the_smallest_within_the_bound(monkeypatch, tmp_path, six, objective):
    machine = install(
        monkeypatch,
        Machine(
            cost={name(INT8): 0.02, name(BF16): 0.011, name(FP16): 0.011},
            weights={name(INT8): 7 * MB, name(INT8_LINEAR): 10 * MB, name(BF16): 14 * MB, name(FP16): 14 * MB},
            increase={name(INT8): 0.2},
        ),
    )
    out = run(machine, tmp_path / "plan", objective=objective)
    assert (out.kind, out.winner) == ("winner", id_of(INT8_LINEAR))
    expected = 33 / 15 if objective == "memory" else 28 / 10
    assert out.ratio(out.winner).value == pytest.approx(expected)
    result, _ = written(out, tmp_path / "plan")
    assert f"{expected:.2f} times smaller" in result["verdict"][0]
    assert "weights take 10.0 MB instead of 28.0 MB" in " ".join(result["verdict"])


@pytest.mark.parametrize("objective", ["memory", "size"])
def test_equal_bytes_keep_the_baseline(monkeypatch, tmp_path, six, objective):
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}))
    out = run(machine, tmp_path / "plan", objective=objective)
    assert (out.kind, out.winner) == ("baseline", None)
    written(out, tmp_path / "plan")


def test_a_row_is_called_bounded_only_where_the_bound_holds(monkeypatch, tmp_path, six):
    """Labels: bounded means measured within the bound."""
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005, name(BF16): 0.008}, increase={name(INT8): 0.05}))
    result = to_json(results.result_of(run(machine, tmp_path / "plan")))
    assert row(result, BF16)["label"] == "bounded"
    assert row(result, EAGER)["label"] == row(result, COMPILE)["label"] == "lossless"
    assert row(result, INT8)["label"] != "bounded"


# -- ended early, continued


@pytest.mark.parametrize("at", [0, 20, 45, 60, 90])
def test_ctrl_c_writes_what_is_known(monkeypatch, tmp_path, six, at):
    def on_sample(trial, n):
        if n == at:
            raise KeyboardInterrupt

    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}, on_sample=on_sample))
    out = run(machine, tmp_path / "plan")
    assert out.kind == "interrupted"
    result, plan = written(out, tmp_path / "plan")
    assert plan["outcome"] == "interrupted"
    assert exit_of(result)[0] == 130
    assert not any("budget was too short" in s for s in result["verdict"]), "it was not the budget"
    if at >= 60:  # in the finals: gated and surely faster
        assert out.winner == id_of(INT8)
        assert plan["recipe"] == recipe_of(INT8).to_dict()
        assert "not confirmed yet" in result["verdict"][0]
    if at <= 20:
        assert plan["recipe"] == spaces.baseline().to_dict()


@pytest.mark.parametrize("do", ["ready", "start"])
def test_ctrl_c_before_anything_was_measured(monkeypatch, tmp_path, six, do):
    def on_ask(trial, asked):
        if asked == do:
            raise KeyboardInterrupt

    machine = install(monkeypatch, Machine(on_ask=on_ask))
    out = run(machine, tmp_path / "plan")
    assert out.kind == "interrupted" and out.winner is None
    result, plan = written(out, tmp_path / "plan")
    assert plan["recipe"] == spaces.baseline().to_dict() and exit_of(result)[0] == 130
    assert not any("budget was too short" in s for s in result["verdict"]), "it was not the budget"


def test_an_interrupted_run_goes_on_with_resume(monkeypatch, tmp_path, six):
    def on_sample(trial, n):
        if n == 50:
            machine.on_sample = None
            raise KeyboardInterrupt

    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}, on_sample=on_sample))
    assert run(machine, tmp_path / "plan").kind == "interrupted"
    out = run(machine, tmp_path / "plan", resume=True)
    assert (out.kind, out.winner) == ("winner", id_of(INT8))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("at", [0, 1, 23, 41, 60, 95, 118])
def test_a_killed_run_goes_on_without_loss_or_repetition(monkeypatch, tmp_path, six, at):
    folder = tmp_path / "plan"
    n_killed = 0

    def on_sample(trial, n):
        nonlocal n_killed
        if n == at and not n_killed:
            n_killed += 1
            raise Killed

    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005, name(BF16): 0.008}, on_sample=on_sample))
    with pytest.raises(Killed):
        run(machine, folder)
    kept = lines_of(folder)
    assert len(kept) == at == len(machine.taken)
    # The kill also cut a line that was on its way.
    with open(folder / "samples.jsonl", "a", encoding="utf-8") as f:
        f.write('{"subject": "bas')
    out = run(machine, folder, resume=True)
    assert (out.kind, out.winner) == ("winner", id_of(INT8))
    after = lines_of(folder)
    assert after[:at] == kept
    atoms = [(s["block"], s["subject"]) for s in after]
    assert len(set(atoms)) == len(atoms) == len(machine.taken)
    written(out, folder)


def test_killed_again_and_again(monkeypatch, tmp_path, six):
    """Each process lives for eleven samples; in the end all of them made one whole run."""
    folder = tmp_path / "plan"
    born = [0]

    def on_sample(trial, n):
        if n - born[0] == 11:
            raise Killed

    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}, on_sample=on_sample))
    out = None
    for _ in range(40):
        born[0] = len(machine.taken)
        try:
            out = run(machine, folder, resume=born[0] > 0, budget_sec=3000.0)
            break
        except Killed:
            continue
    assert out is not None and out.winner == id_of(INT8)
    atoms = [(s["block"], s["subject"]) for s in lines_of(folder)]
    assert len(set(atoms)) == len(atoms) == len(machine.taken)


def test_a_finished_run_resumed_measures_nothing_again(monkeypatch, tmp_path, six):
    folder = tmp_path / "plan"
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}))
    first = run(machine, folder)
    n, n_started = len(machine.taken), len(machine.started)
    again = run(machine, folder, resume=True)
    assert (again.kind, again.winner) == (first.kind, first.winner)
    assert again.confirmation.speedup == first.confirmation.speedup
    assert len(machine.taken) == n
    # What is known needs no process: starting those that compile would eat the rest of the budget.
    assert len(machine.started) == n_started, machine.started[n_started:]


def test_resume_starts_no_candidate_whose_samples_are_there(monkeypatch, tmp_path, six):
    folder = tmp_path / "plan"

    def on_sample(trial, n):
        if is_confirmation(trial):
            machine.on_sample = None
            raise Killed

    # The compiled form is lossless and faster: the baseline's text is scored with it, that of the confirmation too.
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005, name(COMPILE): 0.009}, on_sample=on_sample))
    with pytest.raises(Killed):
        run(machine, folder)
    n_started = len(machine.started)
    run(machine, folder, resume=True)
    fresh = {t for t, _, _ in machine.started[n_started:] if not is_confirmation(t)}
    assert not fresh - {BASELINE, TWIN, id_of(COMPILE)}, "candidates were started although nothing was left to measure"


def test_a_failure_is_remembered_over_a_kill(monkeypatch, tmp_path, six):
    folder = tmp_path / "plan"

    def on_sample(trial, n):
        if n == 40:
            machine.on_sample = None
            raise Killed

    machine = install(
        monkeypatch,
        Machine(cost={name(BF16): 0.008}, load_error={name(INT8): "the process crashed with SIGSEGV"}),
    )
    machine.on_sample = on_sample
    with pytest.raises(Killed):
        run(machine, folder)
    out = run(machine, folder, resume=True)
    result, _ = written(out, folder)
    assert row(result, INT8)["reason"] == "the process crashed with SIGSEGV"
    assert sum(t == id_of(INT8) for t, _, _ in machine.started) == 1


def test_resume_where_the_space_has_shrunk_is_no_crash(monkeypatch, tmp_path):
    """The compiler went away between the runs."""
    folder = tmp_path / "plan"
    only(monkeypatch, INT8, COMPILE)

    def on_sample(trial, n):
        if n == 5:
            machine.on_sample = None
            raise Killed

    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}, on_sample=on_sample))
    with pytest.raises(Killed):
        run(machine, folder)
    only(monkeypatch, INT8)
    try:
        out = run(machine, folder, resume=True)
    except ParetuneError as error:
        assert "\n" not in str(error)  # a refusal in one line is fine too
    else:
        assert out.winner == id_of(INT8)


def test_resume_on_another_machine_is_refused(monkeypatch, tmp_path, six):
    """Numbers of two machines never share a row."""
    from paretune import hardware

    folder = tmp_path / "plan"

    def on_sample(trial, n):
        if n == 5:
            machine.on_sample = None
            raise Killed

    machine = install(monkeypatch, Machine(on_sample=on_sample))
    with pytest.raises(Killed):
        run(machine, folder)
    real = hardware.fingerprint()
    monkeypatch.setattr(hardware, "fingerprint", lambda: {**real, "cpu_model": "another"})
    with pytest.raises(ParetuneError) as caught:
        run(machine, folder, resume=True)
    assert str(folder) in str(caught.value)


def test_resume_after_the_text_changed_is_refused(monkeypatch, tmp_path, six):
    """The key holds the path of the text; its words count."""
    from paretune.tune.search import Search

    folder = tmp_path / "plan"
    folder.mkdir()
    text = tmp_path / "text.txt"
    text.write_text("one", "utf-8")
    machine = install(monkeypatch, Machine())
    real = windows()
    monkeypatch.setattr(
        Search, "_windows", lambda self, config, text: {s: w + len(text.read_text("utf-8")) for s, w in real.items()}
    )
    Search("pocket", Goal(), folder, text=text, resume=False, say=print).journal.close()
    text.write_text("another", "utf-8")
    assert not machine.started
    with pytest.raises(ParetuneError):
        Search("pocket", Goal(), folder, text=text, resume=True, say=print)


def test_resume_of_another_goal_is_refused(monkeypatch, tmp_path, six):
    machine = install(monkeypatch, Machine())
    run(machine, tmp_path / "plan", budget_sec=20.0)
    with pytest.raises(ParetuneError) as caught:
        run(machine, tmp_path / "plan", resume=True, budget_sec=20.0, objective="size")
    assert caught.value.exit_code == 2


# -- order of things


def test_blocks_hold_the_baseline_its_twin_and_every_candidate_once(monkeypatch, tmp_path, six):
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}))
    out = run(machine, tmp_path / "plan")
    samples = out.race.journal.samples
    for stage in out.race.journal.all("stage"):
        blocks = range(stage["first"], stage["first"] + stage["n_blocks"])
        orders = set()
        for block in blocks:
            subjects = [s.subject for s in samples if s.block == block]
            assert sorted(subjects) == sorted(stage["trials"])
            orders.add(tuple(subjects))
        assert len(orders) > 1, "the order is drawn anew in each block"
        if not stage["stage"].startswith("confirm"):
            assert {BASELINE, TWIN} <= set(stage["trials"])
    for s in samples:
        assert s.bandwidth_before and s.bandwidth_after


def test_the_winner_had_its_samples_before_the_gate_and_again_after(monkeypatch, tmp_path, six):
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}))
    out = run(machine, tmp_path / "plan")
    values = out.race.measured()
    assert len(values.values(id_of(INT8))) >= 14
    fresh = [n for n in values.subjects if is_confirmation(n)]
    assert len(fresh) == 4 and all(len(values.values(n)) == CONFIRM_BLOCKS for n in fresh)


def test_memory_for_few_makes_waves_small_and_reaches_all(monkeypatch, tmp_path, six):
    from paretune import hardware

    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}))
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: (1900 - 450 * len(machine.alive)) * MB)
    out = run(machine, tmp_path / "plan", budget_sec=600.0)
    waves = out.race.journal.all("wave")
    assert max(len(w["trials"]) for w in waves) == 1 and len(waves) == 6
    assert out.winner == id_of(INT8)


@pytest.mark.parametrize("window_len", [257, 641, 5000])
@pytest.mark.parametrize("n_positions", [48, 64, 100, 128, 192, 200, 256, 1024])
def test_the_windows_of_any_context_carry_a_bound(n_positions, window_len):
    """Forty blocks in both halves, or the text is refused: never a run in which nothing can pass."""
    from types import SimpleNamespace

    from paretune.evaluate.perplexity import MIN_BLOCKS, count_blocks
    from paretune.tune.search import Search

    one = Search.__new__(Search)
    one.tokenizer, one.window_len = SimpleNamespace(encode=lambda text: list(range(30000))), window_len
    splits = one._windows(SimpleNamespace(n_positions=n_positions, vocab_size=30000), None)
    for cut in splits.values():
        n, length = cut.shape
        half = length // 2
        assert length == min(window_len, n_positions) and n * length < 20_000
        assert min(count_blocks(n, half), count_blocks(n, length - 1 - half)) >= MIN_BLOCKS


def test_the_name_of_the_baseline_in_this_file():
    assert spaces.baseline().name == BASE


def test_a_plan_runs_with_the_threads_it_was_measured_with(monkeypatch, tmp_path, six):
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}))
    out = run(machine, tmp_path / "plan", threads=1)
    _, plan = written(out, tmp_path / "plan")
    assert plan["recipe"]["engine"]["threads"] == 1


def test_a_simpler_recipe_that_misses_the_speedup_is_no_equal_of_one_that_reaches_it(monkeypatch, tmp_path):
    only(monkeypatch, INT8, BF16_INT8)
    cost = {name(INT8): 0.010 / 1.97, name(BF16_INT8): 0.010 / 2.03}
    machine = install(monkeypatch, Machine(cost=cost, noise=0.02))
    out = run(machine, tmp_path / "plan", min_speedup=2.0)
    assert (out.kind, out.winner) == ("winner", id_of(BF16_INT8)), out.notes


def test_a_window_wins_a_long_request_with_its_measured_loss_and_not_without_it(monkeypatch, tmp_path):
    """Gated like all else: the same speed with a loss over the bound is refused."""
    window = ("window:256", None, None, "native", None)
    for i, loss in enumerate((0.002, 0.03)):
        only(monkeypatch, window, INT8)
        cost = {name(window): 0.004, name(INT8): 0.008}
        machine = install(monkeypatch, Machine(cost=cost, increase={name(window): loss}))
        out = run(machine, tmp_path / f"plan{i}", input_len=600, output_len=40)
        assert out.winner == id_of(window if i == 0 else INT8)
        result, plan = written(out, tmp_path / f"plan{i}")
        assert row(result, window)["label"] == ("bounded" if i == 0 else None)
        assert plan["recipe"]["transforms"][0]["name"] == ("mechanism" if i == 0 else "attention")


@pytest.mark.parametrize(("input_len", "length", "n_check"), [(128, 257, 48), (600, 633, 304)])
def test_quality_is_measured_at_the_length_of_a_request_that_a_window_shortens(
    monkeypatch, tmp_path, input_len, length, n_check
):
    from paretune.tune.search import Search

    real = Search._windows
    machine = install(monkeypatch, Machine())
    monkeypatch.setattr(Search, "_windows", real)
    monkeypatch.setattr("paretune.tune.search.Tokenizer", lambda folder: SimpleNamespace(encode=lambda t: [5] * 20000))
    tmp_path.joinpath("plan").mkdir()
    one = Search("pocket", Goal(input_len=input_len), tmp_path / "plan", text=None, resume=False, say=lambda s: None)
    one.journal.close()
    assert one.out.quality_len == length and one.windows["confirm"].size(1) == length
    assert len(one.out.race.check_prompt) == n_check
    assert sum("mechanism" in c.options for c in one.out.space.legal) == (0 if length == 257 else 24)
    assert not machine.started


# -- memory


def test_a_model_that_does_not_fit_twice_is_refused_in_one_line(monkeypatch, tmp_path, six):
    machine = install(monkeypatch, Machine())
    monkeypatch.setattr("paretune.hardware.available_memory_bytes", lambda: 600 << 20)
    with pytest.raises(ParetuneError) as caught:
        run(machine, tmp_path / "plan")
    assert "side by side" in str(caught.value) and "0.6 GB are free" in str(caught.value)
    assert not machine.started and not list((tmp_path / "plan").iterdir())


@pytest.mark.parametrize(("shared", "fits"), [(None, 2), (0, 2), (300 << 20, 6)])
def test_pages_that_trials_share_take_no_room(monkeypatch, shared, fits):
    """A peak of 400 MB, of which 300 are the fork server's: 1,200 MB free hold six (a wave) and not two."""
    from paretune.tune.search import Search

    memory = MemoryParts(0, None, None, 400 << 20, 400 << 20, shared_bytes=shared)
    baseline = SimpleNamespace(facts=SimpleNamespace(memory=memory, weights_bytes=0))
    search = SimpleNamespace(out=SimpleNamespace(race=SimpleNamespace(trials={BASELINE: baseline})))
    monkeypatch.setattr("paretune.hardware.available_memory_bytes", lambda: 1200 << 20)
    assert Search._room(search) == fits


def test_where_two_fit_the_twin_makes_room_and_the_resolution_is_known_all_the_same(monkeypatch, tmp_path):
    only(monkeypatch, INT8, BF16)
    machine = install(monkeypatch, Machine(cost={name(INT8): 0.005}))
    monkeypatch.setattr("paretune.hardware.available_memory_bytes", lambda: (850 - 150 * len(machine.alive)) << 20)
    most = [0]

    def on_sample(trial, n):
        most[0] = max(most[0], len(machine.alive))

    machine.on_sample = on_sample
    out = run(machine, tmp_path / "plan")
    assert (out.kind, out.winner) == ("winner", id_of(INT8))
    assert most[0] <= 2 and math.isfinite(out.resolution)
