"""Forms by regime: the real `bench` on processes made up, from the grid to the table that the plan carries."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import ClassVar

import pytest
from fake_race import MB, Machine, install, only

from paretune import hardware
from paretune.engine.dispatch import PLAN, Form
from paretune.engine.plan import read_plan
from paretune.errors import ParetuneError, UsageError
from paretune.measure import bench as measure
from paretune.measure import bench_group, session
from paretune.recipe import Recipe, preset
from paretune.report import regimes as report
from paretune.report.html import render_report
from paretune.tune import regimes
from paretune.tune import space as spaces
from paretune.tune.goal import Goal
from paretune.tune.run import run

BF16 = ("sdpa", "bf16", None, "eager", None)
PLAN_NAME, EAGER, NATIVE, BASE = "sdpa + bf16, eager", "eager + bf16, eager", "native + bf16, eager", "sdpa, eager"


class Process:
    """A worker of `bench`: seconds a token by recipe, batch and length; bytes too."""

    speed: ClassVar[dict] = {}
    failing: ClassVar[dict] = {}
    loads: ClassVar[list] = []
    shapes: ClassVar[list] = []
    alive_names: ClassVar[list] = []
    clock = None

    note = ""

    def __init__(self, name, kind, log=None, fresh=False):
        self.name, self.kind, self.alive, self.n = name, kind, True, 0
        self.alive_names.append(name)

    def ask(self, do, timeout_sec=1.0, **request):
        if do == "memory":
            shape = self.workload
            n_bytes = MB * shape["batch_size"] * (shape["input_len"] + shape["output_len"]) // 64
            return {
                "kv_cache_bytes": n_bytes,
                "activation_peak_bytes": (3 if "eager +" in self.recipe else 1) * n_bytes,
            }
        self.workload = request["workload"]
        if do == "start":
            self.recipe = Recipe.from_dict(request["recipe"]).name
            self.loads.append((self.name, request["check_prompt"]))
            if self.recipe in self.failing:
                from paretune.measure.interleave import SubjectError

                raise SubjectError(self.failing[self.recipe])
        else:
            assert do == "shape"
        self.shapes.append((self.name, self.workload["batch_size"], self.workload["input_len"]))
        warm = {kind: {"timings_sec": [0.01] * 8, "settled": True} for kind in request["kinds"]}
        facts = {"warm": warm, "load_sec": 1.0, "compile_sec": 0.0, "weights_bytes": MB, "kv_bytes_per_token": 100.0}
        return {**facts, "compute_dtype": "float32", "threads": {"threads": 2}, "proof": [], "notes": []}

    def sample(self):
        self.clock.now_sec += 0.2
        self.n += 1
        shape = self.workload["batch_size"], self.workload["input_len"] + self.workload["output_len"]
        factor = self.speed.get((self.recipe, *shape), 1.0)
        return 0.01 / factor * (1 + 0.001 * (self.n % 3))

    def pause(self): ...

    def resume(self): ...

    def close(self):
        if self.alive:
            self.alive = False
            self.alive_names.remove(self.name)


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """`tune(speed) -> result`: bf16 wins the search; then the grid, at the given speeds."""
    name = only(monkeypatch, BF16)[BF16]
    assert name == PLAN_NAME

    def call(speed=None, failing=None, folder=tmp_path / "plan", resume=False, wins=True, **goal):
        machine = install(monkeypatch, Machine(cost={name: 0.005 if wins else 0.01}, weights={name: 14 * MB}))
        own = {"speed": speed or {}, "failing": failing or {}, "loads": [], "shapes": [], "alive_names": []}
        process = type("Process", (Process,), {**own, "clock": machine.clock})
        monkeypatch.setattr(bench_group, "TrialProcess", process)
        monkeypatch.setattr(session, "prepare", lambda: None)
        monkeypatch.setattr(session, "settle", lambda: None)
        monkeypatch.setattr(hardware.BandwidthProbe, "kind", "fake", raising=False)
        monkeypatch.setattr(hardware.BandwidthProbe, "note", "", raising=False)
        monkeypatch.setattr("paretune.native_build.unavailable_reason", lambda: None)
        monkeypatch.setattr("paretune.report.html.write_report", lambda result, path: path.write_text("-", "utf-8"))
        call.process = process
        result = run("pocket", Goal(**{"regimes": "1,8x128,1024", "input_len": 96, **goal}), folder, resume=resume)
        assert not process.alive_names, "processes are left"
        return result

    return call


def found(result):
    return result.regimes


def cell(result, batch_size, length):
    return next(c for c in result.regimes.cells if (c.batch_size, c.length) == (batch_size, length))


def test_the_grid_becomes_a_table_that_the_plan_runs_by(tune, tmp_path):
    speed = {(EAGER, 1, 128): 1.3, (NATIVE, 8, 1024): 1.5, (EAGER, 8, 1024): 0.5, (EAGER, 8, 128): 0.7}
    speed |= {(NATIVE, 8, 128): 0.7, (BASE, 8, 128): 0.4, (NATIVE, 1, 128): 0.8, (BASE, 1, 1024): 2.0}
    result = tune(speed)
    process = tune.process
    # A process a form, and one more for the resolution; each is loaded and checked once, then has other shapes.
    assert sorted(n for n, _ in process.loads) == sorted([PLAN, f"{PLAN} again", EAGER, NATIVE, BASE])
    # The twin runs the plan's recipe, which was checked.
    assert all((prompt is None) == name.endswith(" again") for name, prompt in process.loads)
    shapes = {(b, n + 32) for _, b, n in process.shapes}
    assert shapes == {(1, 128), (1, 1024), (8, 128), (8, 1024)}
    assert len(process.shapes) == 5 * 4
    assert cell(result, 1, 128).best == EAGER and not cell(result, 1, 128).is_tie
    assert cell(result, 8, 1024).best == NATIVE
    assert cell(result, 8, 128).best == PLAN and not cell(result, 8, 128).is_tie, "all others are slower"
    assert cell(result, 1, 1024).best == BASE, "it is drawn, though it needs a second copy"
    assert cell(result, 1, 1024).runs == PLAN and cell(result, 8, 1024).runs == NATIVE
    plan = read_plan(tmp_path / "plan")
    assert plan.file.dispatch == result.regimes.table
    table = plan.table
    assert table is not None and table.forms[PLAN].recipe == plan.recipe and table.forms[PLAN].label == "bounded"
    assert table.forms[EAGER].ppl_increase_upper == result.confirmation.quality.ppl_increase_upper
    assert table.forms[BASE].label == "lossless" and table.forms[BASE].weights_bytes == 28 * MB
    assert table.choose(1, 100).form == EAGER and table.choose(8, 2000).form == NATIVE
    assert table.choose(1, 1024).form == PLAN, "another number format: only if it is asked for"
    assert table.choose(1, 1024, "lossless").form == BASE
    # Bytes are those that were measured: cache and activations.
    first = table.cells[1][1][0]
    assert (first.form, first.n_bytes) == (NATIVE, 2 * MB * 8 * 1024 // 64)
    assert any("At batch 8 and 1024 tokens native" in s and "1.50 times" in s for s in result.verdict)
    lines = (tmp_path / "plan" / regimes.SAMPLES).read_text("utf-8").splitlines()
    assert len(lines) >= 4 * 5 * 8 and json.loads(lines[0])["kind"] == "tpot", "what the goal asks for"
    left = dict(result.regimes.left_out)
    assert "compiled anew for each length" in left["flex attention"] and "CUDA" in left["flash_attn attention"]


def test_what_cannot_be_told_apart_is_a_tie_and_the_simpler_stands_first(tune):
    near = {(EAGER, 1, 128): 1.5, (NATIVE, 1, 128): 1.5}
    result = tune({**near, **{(n, 1, 1024): 0.5 for n in (EAGER, NATIVE, BASE)}}, regimes="1x128,1024")
    tie, sure = cell(result, 1, 128), cell(result, 1, 1024)
    assert tie.is_tie and tie.best in (EAGER, NATIVE) and [e.form for e in tie.ranked][2] == PLAN
    assert not sure.is_tie and sure.best == PLAN
    picture = report.crossover(found(result)).decode()
    assert "(tie)" in picture and picture.count("plan's own") == 1
    assert report.GREY in picture


def test_forms_that_fail_or_are_not_reached_are_rows_and_not_in_the_table(tune, tmp_path):
    result = tune({(NATIVE, 1, 128): 1.4}, failing={EAGER: "out of memory"}, regimes="1,8x128,512")
    cells = result.regimes.cells
    assert {f.status for c in cells for f in c.figures if f.form == EAGER} == {"failed"}
    assert sum(n == EAGER for n, _ in tune.process.loads) == 1, "what failed is not started again"
    assert all(EAGER not in [e.form for e in c.ranked] for c in cells)
    assert {c.status for c in cells} == {"measured"}
    late = [replace(found(result).cells[0], status="not_reached", best=PLAN)]
    assert "not reached" in " ".join(report.sentences(replace(found(result), cells=late)))
    assert "out of memory" in report.rows_of(found(result))[0]["others"]
    page = render_report(result)
    assert "Choice by regime" in page and "out of memory" in page and "a second copy of the weights" in page
    assert (tmp_path / "plan" / "plan.json").is_file()


def test_a_resumed_run_does_not_measure_again(tune):
    first = tune({(EAGER, 1, 128): 1.3}, regimes="1x128")
    again = tune(regimes="1x128", resume=True)
    assert again.regimes == first.regimes and not tune.process.loads


def test_without_a_winner_the_baseline_has_its_forms(tune):
    result = tune({("eager, eager", 1, 128): 1.4}, wins=False, regimes="1x128")
    assert result.winner_id is None
    forms = {f.name: f for f in result.regimes.forms}
    assert set(forms) == {PLAN, "eager, eager", "native, eager"} and forms[PLAN].label == "lossless"
    assert cell(result, 1, 128).best == "eager, eager"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ParetuneError("no room", "Make room")], ids=["ctrl-c", "error"])
def test_whatever_happens_beside_it_there_is_a_plan(tune, monkeypatch, tmp_path, error):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(measure, "bench", fails)
    result = tune()
    plan = read_plan(tmp_path / "plan")
    assert plan.table is None and plan.recipe.name == PLAN_NAME
    assert result.regimes.interrupted == isinstance(error, KeyboardInterrupt)
    assert any("No choice by regime" in s for s in plan.file.verdict)
    assert "No map" in render_report(result)


def outcome(recipe, monkeypatch, **goal):
    """An outcome whose winner is `recipe`, without a search."""
    from types import SimpleNamespace

    def state(r):
        return SimpleNamespace(recipe=r, facts=SimpleNamespace(weights_bytes=7 * MB), failure=None)

    quality = SimpleNamespace(ppl_increase_upper=0.004)
    trials = {"baseline": state(spaces.baseline()), "w": state(recipe)}
    return SimpleNamespace(
        winner="w", goal=Goal(regimes="auto", **goal), race=SimpleNamespace(trials=trials), qualities={},
        confirmation=SimpleNamespace(quality=quality), quality_len=512, kind="winner",
    )  # fmt: skip


def test_the_native_runner_has_one_form_of_attention_and_gated_windows_beside_it(monkeypatch):
    from types import SimpleNamespace

    plan = preset("native_int8")
    out = outcome(plan, monkeypatch)
    window = Recipe.from_dict(
        {"transforms": [{"name": "mechanism", "pattern": "window:64"}, *plan.to_dict()["transforms"]],
         "engine": {"runner": "native"}}
    )  # fmt: skip
    worse = preset("native_alibi")
    for id, recipe, within in (("a", window, True), ("b", worse, False)):
        out.race.trials[id] = SimpleNamespace(recipe=recipe, facts=SimpleNamespace(weights_bytes=5), failure=None)
        out.qualities[id] = SimpleNamespace(within_bound=within, ppl_increase_upper=0.008, reason="over the bound")
    forms, left_out = regimes.forms_of(out)
    assert list(forms) == [PLAN, "sdpa, eager", window.name]
    assert forms[window.name] == Form(window.name, window, "bounded", 0.008, longest=512)
    assert forms["sdpa, eager"].weights_bytes == 7 * MB, "packed weights are of no use to PyTorch"
    reasons = dict(left_out)
    assert "only one attention" in reasons["eager attention"] and reasons[worse.name] == "over the bound"


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "--regimes"), ("1x", "--regimes"), ("0x128", "1 or more"), ("1,2", "--regimes"), ("ax128", "--regimes")],
)
def test_a_grid_that_is_none(text, words):
    with pytest.raises(UsageError, match=words):
        Goal(regimes=text)


def test_the_grid_of_a_goal():
    assert regimes.grid_of(Goal(regimes="8,1x1024,128,128"), 1024) == ((1, 8), (128, 1024))
    assert regimes.grid_of(Goal(regimes="auto"), 1024) == ((1, 8), (128, 512, 1024))
    assert regimes.grid_of(Goal(regimes="auto", output_len=512), 4096) == ((1, 8), (2048,))
    with pytest.raises(UsageError, match=r"length of 32.*--output-len is 32"):
        regimes.grid_of(Goal(regimes="1x32"), 1024)
    with pytest.raises(UsageError, match="the context is 1024"):
        regimes.grid_of(Goal(regimes="1x2048"), 1024)
