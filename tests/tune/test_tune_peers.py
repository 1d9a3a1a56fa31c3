"""Other engines beside the winner: what is asked of `bench`, what is said of its answer, and that the plan survives."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fake_race import MB, Machine, install, only

import made_records as made
from paretune import clock
from paretune.engine.plan import read_plan
from paretune.errors import ParetuneError, UsageError
from paretune.evaluate.fidelity import Scores
from paretune.measure import bench as measure
from paretune.measure import bench_group
from paretune.records.bench import PHASES, Agreement
from paretune.records.peers import PeerQuality
from paretune.records.record import to_json
from paretune.report.html import render_report
from paretune.tune import peer_quality, peers
from paretune.tune.goal import Goal
from paretune.tune.run import run

INT8 = ("sdpa", None, "int8", "eager", None)
ENGINE = "llama.cpp:Q8_0"
AGREEMENT = Agreement(0.981, 1.0, 0.0123, 64, 64, 256)


class FakeBench:
    """Stands in for `bench`: ratios over the winner by name of the engine, or a cause, or an error for all."""

    def __init__(self, speed=None, causes=None, error=None, our_cause="", noisy=False):
        self.speed, self.causes, self.error = speed or {}, causes or {}, error
        self.our_cause, self.noisy, self.calls = our_cause, noisy, []

    def __call__(self, folder, configs, **options):
        self.calls.append({"folder": folder, "configs": configs, **options})
        if self.error:
            raise self.error
        phase = PHASES[options["kinds"][0]]
        rows = []
        for i, (name, _) in enumerate(configs):
            role, cause = ("baseline", self.our_cause) if i == 0 else ("", "")
            rows.append(made.row(name, role, cause, tpot_sec=0.004 * (i + 1)))
        rows.append(replace(rows[0], config=f"{configs[0][0]} again", role="twin"))
        for engine in options["engines"]:
            about = {"engine_version": "1.2", "rss_peak_bytes": 5 * MB}
            if engine.name in self.causes:
                row = made.row(engine.name, "peer", self.causes[engine.name], **about)
            else:
                row = made.row(engine.name, "peer", tpot_sec=0.002, agreement=AGREEMENT, **about)
                if not self.our_cause:
                    row = replace(row, **{phase: made.phase(*self.speed[engine.name])})
            rows.append(row)
        return made.result(rows, aa=[made.resolution(0.4 if self.noisy else 0.013)], too_noisy=self.noisy)


class FakeQuality:
    """Stands in for `peer_quality.measure`: (increase, its bound), a reason why it is not known, or an error."""

    def __init__(self, increase=(0.0008, 0.0029), error=None):
        self.increase, self.error, self.calls = increase, error, []

    def __call__(self, folder, engines, windows, baseline_nll, limit, *, threads, say, on_result):
        assert baseline_nll.shape == (len(windows), windows.shape[1] - 1) and threads >= 1
        self.calls.append({"engines": [e.name for e in engines], "windows": windows, "baseline_nll": baseline_nll})
        found = {}
        for engine in engines:
            if self.error:
                raise self.error
            if isinstance(self.increase, str):
                result = PeerQuality.unknown(self.increase)
            else:
                value, upper = self.increase
                base = 20.0
                result = PeerQuality(
                    perplexity=base * (1 + value),
                    baseline_perplexity=base,
                    ppl_increase=value,
                    ppl_increase_upper=upper,
                    n_windows=len(windows),
                    keeps_bound=upper <= limit,
                    quality_reason="measured",
                )
            found[engine.name] = result
            on_result(engine.name, result)
        return found


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """`tune(bench, **goal) -> result`: a search on a machine made up, its peers measured by `bench`."""
    name = only(monkeypatch, INT8)[INT8]

    def score_again(*_):
        raise AssertionError("the baseline was scored on these windows in the confirmation")

    def call(bench, folder=tmp_path / "plan", wins=True, resume=False, gone=None, quality=None, **goal):
        monkeypatch.setattr(peer_quality, "measure", quality or FakeQuality())
        if wins:
            monkeypatch.setattr(peer_quality, "baseline_losses", score_again)
        else:  # nothing was confirmed
            losses = lambda folder, recipe, windows, threads: np.ones((len(windows), windows.shape[1] - 1))  # noqa: E731
            monkeypatch.setattr(peer_quality, "baseline_losses", losses)
        install(monkeypatch, Machine(cost={name: 0.005 if wins else 0.01}, weights={name: 9 * MB}))
        monkeypatch.setattr(measure, "bench", bench)
        monkeypatch.setattr(peers, "missing", lambda goal: gone or {})
        monkeypatch.setattr("paretune.report.html.write_report", lambda result, path: path.write_text("-", "utf-8"))
        options = {"budget_sec": 300.0, "engines": (ENGINE,), **goal}
        return run("pocket", Goal(**options), folder, resume=resume)

    call.winner = name
    return call


def said(result):
    return " ".join(result.verdict)


def test_what_is_asked_of_bench_and_the_shape_of_the_answer(tune, tmp_path):
    bench = FakeBench({ENGINE: (0.5, 0.4, 0.625, "slower")})
    result = tune(bench, threads=2, input_len=64, output_len=16)
    (call,) = bench.calls
    assert [(n, r.name) for n, r in call["configs"]] == [("winner", tune.winner), ("baseline", "sdpa, eager")]
    assert call["baseline"] == "winner" and call["kinds"] == ("tpot",) and call["budget_sec"] == 45.0
    assert call["input_lens"] == (64,) and call["output_lens"] == (16,) and call["batch_sizes"] == (1,)
    assert call["threads"] == 2 and call["device"] == "cpu" and not call["loading_counts"]
    assert [e.name for e in call["engines"]] == [ENGINE]
    written = json.loads((tmp_path / "plan" / "report.json").read_text("utf-8"))
    assert written["peers"] == [to_json(row) for row in result.peers] and written["goal"]["engines"] == [ENGINE]
    (row,) = written["peers"]
    assert row["keeps_bound"] is True and row["ppl_increase_upper"] == 0.0029 and row["quality_reason"] == "measured"
    assert row["engine"] == ENGINE and row["format"] == "Q8_0" and row["cause"] is None
    assert row["ratio"] == pytest.approx({"value": 2.0, "low": 1.6, "high": 2.5}) and row["verdict"] == "slower"
    assert row["agreement"]["logits_rel_rms"] == 0.0123 and row["agreement"]["greedy_n"] == 64
    measured = written["peers_measured"]
    assert measured["reference"] == tune.winner and measured["aa_half_width"] == 0.013
    assert measured["reference_sec"] == 0.004 and measured["baseline_sec"] == 0.008
    plan = read_plan(tmp_path / "plan")
    assert plan.recipe.name == f"{tune.winner} x2" and plan.file.verdict == result.verdict


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        (
            (1.25, 1.2, 1.3, "faster"),
            ["llama.cpp:Q8_0 won: ", "1.25 times as fast", "1.20 to 1.30", "format Q8_0", "logit error of 1.23%",
             "98.1%", "It keeps your perplexity bound of 1 %", "is 20.02, +0.08%", "at most +0.29%",
             "A plan cannot run llama.cpp: this plan runs the best of"],
        ),
        ((0.5, 0.4, 0.625, "slower"), ["llama.cpp:Q8_0 is slower: ", "2.00 times as fast", "1.60 to 2.50"]),
        ((1.0, 0.99, 1.01, "indistinguishable"), ["no difference beyond noise", "1.00 times", "0.99 to 1.01"]),
        ((1.1, 0.9, 1.3, "undecided"), ["is undecided", "1.10 times as fast", "0.90 to 1.30"]),
        ((1.1, None, None, "undecided"), ["is undecided", "too few samples for an interval"]),
    ],
    ids=lambda v: str(v[3]) if isinstance(v, tuple) else "",
)  # fmt: skip
def test_each_verdict_has_its_sentence(tune, speed, words):
    result = tune(FakeBench({ENGINE: speed}))
    for word in words:
        assert word in said(result), said(result)
    assert "perplexity bound of 1 %" in said(result)
    assert ("won: " in said(result)) == (speed[3] == "faster")
    page = render_report(result)
    assert "Beside other engines" in page and ENGINE in page
    assert ("another engine is faster" in page) == (speed[3] == "faster")
    json.dumps(to_json(result), allow_nan=False)


def test_a_peer_that_cannot_be_measured_is_a_row_with_its_cause(tune):
    other = "onnxruntime:int8"
    bench = FakeBench({ENGINE: (0.5, 0.4, 0.6, "slower")}, {other: "onnxruntime is not installed"})
    quality = FakeQuality()
    result = tune(bench, engines=f"{ENGINE},{other}", quality=quality)
    first, second = map(to_json, result.peers)
    assert first["verdict"] == "slower"
    assert second == second | {"status": "failed", "cause": "onnxruntime is not installed", "verdict": None,
                               "ratio": None, "agreement": None, "keeps_bound": None}  # fmt: skip
    assert quality.calls[0]["engines"] == [ENGINE], "what was not timed is not scored"
    assert "onnxruntime:int8 was not compared: onnxruntime is not installed." in result.verdict
    page = render_report(result)
    assert "onnxruntime is not installed" in page and "failed" in page


def test_where_no_peer_is_installed_nothing_is_started(tune, monkeypatch, tmp_path):
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))
    gone = peers.missing(Goal(engines=(ENGINE,)))
    assert "not installed" in gone[ENGINE] and "paretune peers install llama.cpp" in gone[ENGINE]
    assert "\n" not in gone[ENGINE] and peers.missing(Goal()) == {}
    result = tune(FakeBench(error=AssertionError("bench was called")), gone=gone)
    assert result.peers[0].status == "failed" and result.peers[0].cause == gone[ENGINE]
    assert "llama.cpp:Q8_0 was not compared: llama.cpp is not installed" in said(result)
    assert "Nothing was measured beside other engines" in render_report(result)


@pytest.mark.parametrize(
    ("quality", "keeps", "words", "badge"),
    [
        (FakeQuality((0.002, 0.004)), True, ["won: ", "It keeps your perplexity bound of 1 %", "+0.40%"], True),
        (FakeQuality((0.27, 0.30)), False, ["is faster: ", "It does not keep your perplexity bound of 1 %"], False),
        (FakeQuality((0.008, 0.013)), False, ["is faster: ", "It is not shown to keep your perplexity bound"], False),
        (FakeQuality("it was slow"), None, ["won: ", "bound of 1 % is not known: it was slow."], True),
        (FakeQuality(error=ParetuneError("no room", "-")), None, ["baseline could not be scored: no room."], True),
    ],
)
def test_what_a_faster_engine_does_to_perplexity_is_said(tune, quality, keeps, words, badge):
    result = tune(FakeBench({ENGINE: (1.25, 1.2, 1.3, "faster")}), quality=quality)
    assert result.peers[0].quality.keeps_bound is keeps
    for word in words:
        assert word in said(result), said(result)
    page = render_report(result)
    assert ("another engine is faster" in page) == badge, "what breaks the bound is not a rival"
    assert "Keeps the bound" in page and {True: "yes", False: "no", None: "not known"}[keeps] in page
    json.dumps(to_json(result), allow_nan=False)


def test_peers_are_scored_on_the_windows_of_the_confirmation_beside_its_baseline(tune, tmp_path):
    quality = FakeQuality()
    tune(FakeBench({ENGINE: (0.5, 0.4, 0.6, "slower")}), quality=quality)
    (call,) = quality.calls
    windows = np.load(tmp_path / "plan" / "scores" / "windows.confirm.npy")
    np.testing.assert_array_equal(call["windows"].numpy(), windows)
    scored = (tmp_path / "plan" / "scores").glob("*.confirm.0-*.npz")
    (base,) = [path for path in scored if not path.name.startswith("confirm-")]  # by the baseline or a lossless form
    scores = Scores.load(base)
    np.testing.assert_array_equal(call["baseline_nll"][:, :128], scores.prefill.nll)
    np.testing.assert_array_equal(call["baseline_nll"][:, 128:], scores.decode.nll)


def test_scoring_that_was_interrupted_keeps_the_times_and_goes_on(tune):
    slower = {ENGINE: (0.5, 0.4, 0.6, "slower")}
    first = tune(FakeBench(slower), quality=FakeQuality(error=KeyboardInterrupt()))
    assert first.peers_measured.interrupted and first.peers[0].verdict == "slower"
    assert "is not known: scoring was interrupted." in said(first)
    again = FakeQuality()
    second = tune(FakeBench(error=AssertionError("timed twice")), resume=True, quality=again)
    assert len(again.calls) == 1 and second.peers[0].quality.keeps_bound is True
    assert not second.peers_measured.interrupted
    third = tune(
        FakeBench(error=AssertionError("timed twice")), resume=True, quality=FakeQuality(error=AssertionError())
    )
    assert third.peers == second.peers


def test_nothing_won_and_a_peer_is_faster(tune):
    bench = FakeBench({ENGINE: (1.5, 1.4, 1.6, "faster")})
    result = tune(bench, wins=False)
    assert result.outcome == "baseline"
    assert [n for n, _ in bench.calls[0]["configs"]] == ["baseline"]
    assert "won: " in said(result) and "best of our own recipes, sdpa, eager" in said(result)
    page = render_report(result)
    assert "Keep the baseline; another engine is faster" in page


@pytest.mark.parametrize("objective", ["memory", "size"])
def test_objectives_in_bytes_say_that_peers_are_compared_in_time_only(tune, objective):
    bench = FakeBench({ENGINE: (0.5, 0.4, 0.6, "slower")})
    result = tune(bench, objective=objective)
    assert bench.calls[0]["kinds"] == ("tpot",)
    assert f"compared in time per output token only, not in {objective}." in said(result)
    assert "output token only" in peers.announcement(Goal(objective=objective, engines=(ENGINE,)))


@pytest.mark.parametrize(
    ("bench", "cause"),
    [
        (FakeBench(error=ParetuneError("the disk is full", "Free some")), "the comparison failed: the disk is full"),
        (FakeBench(our_cause="it was killed"), "failed beside it: it was killed"),
    ],
)
def test_a_comparison_that_fails_keeps_the_plan(tune, tmp_path, bench, cause):
    result = tune(bench)
    assert result.outcome == "winner" and cause in result.peers[0].cause
    assert result.peers[0].verdict is None
    assert read_plan(tmp_path / "plan").recipe.name == tune.winner


def test_ctrl_c_during_the_comparison_keeps_the_plan(tune, tmp_path):
    folder = tmp_path / "plan"

    def bench(*_, **__):
        assert read_plan(folder).recipe.name == tune.winner, "the plan is there before the peers are measured"
        raise KeyboardInterrupt

    result = tune(bench)
    assert result.outcome == "winner" and result.peers_measured.interrupted
    assert "llama.cpp:Q8_0 was not compared: the comparison was interrupted." in result.verdict
    assert read_plan(folder).recipe.name == tune.winner

    from paretune.cli.tune import _raise_for

    with pytest.raises(KeyboardInterrupt):
        _raise_for(result)


def test_a_noisy_machine_is_told(tune):
    result = tune(FakeBench({ENGINE: (1.2, 0.8, 1.5, "undecided")}, noisy=True))
    assert "too noisy while the peers were measured" in said(result)


def test_without_engines_nothing_is_measured(tune):
    result = tune(FakeBench(error=AssertionError("bench was called")), engines=())
    assert result.peers == [] and result.peers_measured is None
    assert "Beside other engines" not in render_report(result)


def test_a_resumed_run_has_the_same_engines_and_measures_only_what_is_open(tune, tmp_path):
    slower = {ENGINE: (0.5, 0.4, 0.6, "slower")}
    first = tune(FakeBench(slower, {ENGINE: "it is not installed"}))
    with pytest.raises(UsageError, match="another run"):
        tune(FakeBench(slower), resume=True, engines=())
    with pytest.raises(UsageError, match="another run"):
        tune(FakeBench(slower), resume=True, engines=("openvino:int8",))
    again = FakeBench(slower)
    second = tune(again, resume=True, engines=[ENGINE])  # installed since
    assert len(again.calls) == 1 and second.peers[0].verdict == "slower"
    assert second.elapsed_sec == pytest.approx(first.elapsed_sec, abs=0.01), "the comparison is not of the budget"
    third = tune(FakeBench(error=AssertionError("measured twice")), resume=True)
    assert third.peers == second.peers and third.winner_id == first.winner_id


def test_the_engines_of_a_goal():
    assert Goal().engines == () and to_json(Goal())["engines"] == []
    assert Goal(engines="paretune").engines == ()
    assert Goal(engines="paretune, llama.cpp:q8_0,llama.cpp:Q8_0").engines == (ENGINE,)
    assert Goal(engines=["openvino"]).engines == ("openvino:fp32", "openvino:int8", "openvino:int4")


@pytest.mark.parametrize(
    ("given", "device", "words"),
    [
        ("vllama", "cpu", ["unknown engine 'vllama'", "llama.cpp"]),
        ("llama.cpp:Q9", "cpu", ["no format 'Q9'", "llama.cpp:Q8_0"]),
        ("paretune:int8", "cpu", ["'paretune:int8'", "searched"]),
        (" ,", "cpu", ["--engine is empty"]),
        ("", "cpu", ["--engine is empty"]),
        (ENGINE, "cuda", ["on the CPU", "'cuda'", "--device cpu"]),
    ],
)
def test_engines_that_are_usage_errors(given, device, words):
    with pytest.raises(UsageError) as caught:
        Goal(engines=given, device=device)
    for word in words:
        assert word in str(caught.value)


def test_the_time_is_a_share_of_the_budget_and_at_least_enough():
    assert peers.timing_sec(Goal(budget_sec=60, engines=(ENGINE,))) == 40
    assert peers.timing_sec(Goal(budget_sec=600, engines=(ENGINE,))) == 90
    assert peers.timing_sec(Goal(budget_sec=60, engines="llama.cpp,openvino")) == 90
    assert "on top of the budget" in peers.announcement(Goal(engines=(ENGINE,)))


@pytest.mark.parametrize("loading_counts", [True, False])
def test_loading_is_or_is_not_of_the_time_of_bench(monkeypatch, loading_counts):
    """With 30 s of timing and 100 s of loading, the pass has 30 s or nothing."""
    fake = clock.FakeClock(1000.0)
    monkeypatch.setattr(clock, "_clock", fake)
    left = []

    def load_all(self):
        fake.now_sec += 100

    monkeypatch.setattr(bench_group.Group, "_load_all", load_all)
    monkeypatch.setattr(bench_group.Group, "_sample", lambda self: left.append(max(0.0, self.until - clock.now())))
    of = SimpleNamespace(deadline=1030.0, loading_counts=loading_counts, keeps_processes=False, known_ceilings=list)
    one = object.__new__(bench_group.Group)
    one.of, one.until, one.processes, one.has_notes = of, 1030.0, {}, True
    one.run()
    assert left == [0.0 if loading_counts else 30.0]
    assert of.deadline == (1030.0 if loading_counts else 1130.0)
