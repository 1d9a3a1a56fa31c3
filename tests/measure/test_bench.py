"""`bench` on a fake clock with fake processes of known cost: the known numbers, verdicts and rows come out."""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

import pytest

from paretune import clock, hardware
from paretune.engine.dispatch import PLAN, Entry, Form, Table
from paretune.errors import UsageError
from paretune.measure import bench as measure
from paretune.measure import bench_group, bench_run, grid, session
from paretune.measure.interleave import SubjectError
from paretune.recipe import Recipe, preset
from paretune.records.bench import BenchResult, BenchRow, Cell
from paretune.records.record import from_json, to_json

TTFT_SEC, TPOT_SEC = 0.1, 0.02
WEIGHTS, KV_PER_TOKEN = 1_000_000, 1000


class FakeProcess:
    """A worker whose slices cost what `speed` says; the twin costs what the baseline does."""

    speed: ClassVar[dict[str, float]] = {}
    wobble: ClassVar[dict[str, list[float]]] = {}
    fails_to_load: ClassVar[set[str]] = set()
    dies_at: ClassVar[dict[str, int]] = {}
    requests: ClassVar[list[dict[str, Any]]] = []
    did: ClassVar[list[tuple[str, str, int]]] = []
    alive: ClassVar[list[str]] = []
    most_alive: ClassVar[int] = 0
    awake: ClassVar[set[str]] = set()
    processes: ClassVar[list[Any]] = []
    slices: ClassVar[list[tuple[str, str, float | None]]] = []
    on_ask: ClassVar[Any] = None
    on_sample: ClassVar[Any] = None

    note = ""

    def __init__(self, name: str, kind: str, log: Any = None, fresh: bool = False) -> None:
        assert not fresh
        self.name, self.kind, self.n, self.slice_sec, self.lost = name, kind, 0, None, False
        FakeProcess.processes.append(self)
        FakeProcess.alive.append(name)
        FakeProcess.awake.add(name)
        FakeProcess.most_alive = max(FakeProcess.most_alive, len(FakeProcess.alive))

    def ask(self, do: str, timeout_sec: float = 120.0, **request: Any) -> dict[str, Any]:
        memory = {"rss_bytes": 10, "rss_peak_bytes": 20, "activation_peak_bytes": 3, "device_used_bytes": None}
        if do == "memory":
            return memory
        assert do in ("start", "shape")
        if FakeProcess.on_ask is not None:
            FakeProcess.on_ask(self, do)
        self._check()
        FakeProcess.did.append((do, self.name, request["workload"]["batch_size"]))
        FakeProcess.requests.append({"name": self.name, **request})
        clock.sleep(1.0)
        if self.name in self.fails_to_load:
            raise SubjectError("out of memory")
        warm = {kind: {"timings_sec": [0.1] * 8, "settled": True} for kind in request["kinds"]}
        return {
            **({"memory": memory} if do == "start" else {}),
            "warm": warm,
            "load_sec": 3.0 if self.name == "int8" else 1.0,
            "compile_sec": 0.0,
            "weights_bytes": WEIGHTS + 50,
            "step_weights_bytes": WEIGHTS,
            "kv_bytes_per_token": KV_PER_TOKEN * request["workload"]["batch_size"],
            "kv_cache_bytes": 4096,
            "compute_dtype": "float32",
            "proof": [f"{self.name} is what it says"],
            "notes": [],
            "threads": {"threads": 2, "inter_op_threads": 1, "usable_cores": 2},
        }

    def sample(self) -> float:
        assert FakeProcess.awake == {self.name}, "one awake at a time"
        self._check()
        if FakeProcess.on_sample is not None:
            FakeProcess.on_sample(self)
        self._check()
        self.n += 1
        FakeProcess.slices.append((self.name, self.kind, self.slice_sec))
        if self.n > self.dies_at.get(self.name, 10**9):
            raise SubjectError("the process was killed")
        clock.sleep(0.1)
        factors = self.wobble.get(self.name, [1.0])
        base = {"ttft": TTFT_SEC, "tpot": TPOT_SEC, "throughput": 0.025}[self.kind]
        return base * factors[self.n % len(factors)] / self.speed.get(self.name, 1.0)

    def _check(self) -> None:
        if self.lost:
            raise SubjectError("the server that forks trials ended, and this trial with it", kind=session.LOST)

    def pause(self) -> None:
        FakeProcess.awake.discard(self.name)

    def resume(self) -> None:
        FakeProcess.awake.add(self.name)

    def close(self) -> None:
        if self.name in FakeProcess.alive:  # may be closed twice
            FakeProcess.alive.remove(self.name)
        FakeProcess.awake.discard(self.name)


class FakeProbe:
    kind, note = "fake", ""

    def __init__(self, threads: int | None = None) -> None: ...

    def __call__(self) -> float:
        assert not FakeProcess.awake
        return 1e10


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    fresh = {"speed": {}, "wobble": {}, "fails_to_load": set(), "dies_at": {}, "requests": [], "did": [], "alive": []}
    fresh |= {"processes": [], "slices": [], "on_ask": None, "on_sample": None}
    for name, value in {**fresh, "most_alive": 0, "awake": set()}.items():
        monkeypatch.setattr(FakeProcess, name, value)
    sweep = ({"bytes": 1 << 20, "threads": 2, "bytes_per_sec": 1e10},)
    ceilings = hardware.Ceilings("cpu", "fake", 2, sweep, {"fp32": 1e11})
    monkeypatch.setattr(bench_group, "TrialProcess", FakeProcess)
    monkeypatch.setattr(session, "prepare", lambda: None)
    monkeypatch.setattr(session, "settle", lambda: None)
    monkeypatch.setattr(hardware, "BandwidthProbe", FakeProbe)
    monkeypatch.setattr(hardware, "ceilings", lambda device, quick: ceilings)
    monkeypatch.setattr(hardware, "set_threads", lambda n: {"threads": n or 2})
    emulated = hardware.DtypeSupport(True, True, 0.5, 0.5, "bf16 is emulated here")
    support = {"bf16": emulated, "fp16": hardware.DtypeSupport(False, False, 0.0, 0.0, "no such kernel")}
    monkeypatch.setattr(hardware, "dtype_support", lambda device="cpu": support)
    monkeypatch.setattr(hardware, "dtype_failure", lambda n, device="cpu": "no such kernel" if n == "fp16" else None)
    with clock.use(clock.FakeClock()):
        yield
    assert not FakeProcess.alive, "every process is closed"


def run(folder, names=("baseline", "int8"), **options) -> dict[str, Any]:
    settings = {"input_lens": [16], "output_lens": [9], "batch_sizes": [1], "min_time_sec": 0.0} | options
    return plain(measure.bench(folder, [(name, preset(name)) for name in names], **settings))


def plain(result: BenchResult) -> dict[str, Any]:
    """What `bench.json` holds: strict JSON, whatever was measured, and readable again."""
    data = to_json(result)
    assert from_json(BenchResult, json.loads(json.dumps(data, allow_nan=False))) == result
    return data


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["config"]: row for row in result["rows"]}


def test_known_costs_give_the_known_numbers(tiny_gpt2_folder):
    FakeProcess.speed = {"int8": 2.0, "bf16": 0.5}
    result = run(tiny_gpt2_folder, ("baseline", "int8", "bf16"), batch_sizes=[4])
    rows = by_name(result)
    base, fast, slow = rows["baseline"], rows["int8"], rows["bf16"]
    assert [row["config"] for row in result["rows"]] == ["baseline", "int8", "bf16", "baseline again"]
    assert base["ttft_sec"] == pytest.approx(TTFT_SEC) and base["tpot_sec"] == pytest.approx(TPOT_SEC)
    assert base["prefill_tokens_per_sec"] == pytest.approx(4 * 16 / TTFT_SEC)
    assert base["decode_tokens_per_sec"] == pytest.approx(4 / TPOT_SEC)
    assert base["throughput_tokens_per_sec"] == pytest.approx(4 * 9 / (TTFT_SEC + 8 * TPOT_SEC))
    for phase in ("prefill", "decode"):
        assert (base[f"{phase}_speedup"], base[f"{phase}_verdict"]) == (1.0, "baseline")
        assert fast[f"{phase}_speedup"] == pytest.approx(2.0) and fast[f"{phase}_verdict"] == "faster"
        assert slow[f"{phase}_speedup"] == pytest.approx(0.5) and slow[f"{phase}_verdict"] == "slower"
        assert fast[f"{phase}_speedup_low"] == pytest.approx(2.0) == fast[f"{phase}_speedup_high"]
    # 2 s more to load, 10 ms a step gained, 4 tokens a step: 800 tokens.
    assert fast["break_even_tokens"] == pytest.approx(800, abs=1)
    assert slow["break_even_tokens"] is None and base["break_even_tokens"] is None
    # 8 steps after 16 tokens see 20.5 on average; the cache of 4 rows is read once a step.
    n_bytes = WEIGHTS + 4 * KV_PER_TOKEN * (16 + 4.5)
    assert base["mbu"] == pytest.approx(n_bytes / TPOT_SEC / 1e10)
    assert "bound by" in base["bound_by"] and "bound by" in base["prefill_bound_by"]
    assert (base["weights_bytes"], base["rss_peak_bytes"], base["activation_peak_bytes"]) == (WEIGHTS + 50, 20, 3)
    assert base["threads"] == 2 and base["proof"] == ["baseline is what it says"]
    assert slow["notes"] == ["bf16 is emulated here"]
    assert base["decode_n"] == 8 and base["decode_p50_sec"] == pytest.approx(TPOT_SEC)
    assert base["decode_p90_sec"] is None  # 8 slices do not carry it


def test_the_twin_is_a_row_that_claims_nothing(tiny_gpt2_folder):
    result = run(tiny_gpt2_folder, ("baseline",))
    twin = by_name(result)["baseline again"]
    assert twin["role"] == "twin" and twin["recipe"] == by_name(result)["baseline"]["recipe"]
    assert {twin["decode_verdict"], twin["prefill_verdict"]} <= {"indistinguishable", "undecided"}
    assert [(e["kind"], e["half_width"]) for e in result["aa"]] == [("ttft", 0.0), ("tpot", 0.0)]
    assert result["too_noisy"] is False


def test_no_claim_is_smaller_than_what_the_twin_differs_by(tiny_gpt2_folder):
    # 5 % faster, on a machine that shows 10 % between two runs of the same thing.
    FakeProcess.speed = {"int8": 1.05, "baseline again": 1.1}
    row = by_name(run(tiny_gpt2_folder))["int8"]
    assert row["decode_speedup"] == pytest.approx(1.05)
    assert row["decode_verdict"] in ("indistinguishable", "undecided")


def test_a_machine_without_resolution_is_too_noisy(tiny_gpt2_folder):
    FakeProcess.wobble = {"baseline again": [1.0, 3.0, 0.4]}
    result = run(tiny_gpt2_folder)
    assert result["too_noisy"] and result["is_noisy"] and by_name(result)["int8"]["decode_verdict"] == "undecided"
    assert by_name(result)["int8"]["decode_n"] == 27  # it went on to the end


def test_what_goes_far_beyond_the_noise_is_decided_all_the_same(tiny_gpt2_folder):
    FakeProcess.wobble = {"baseline again": [1.0, 1.0, 1.8]}
    FakeProcess.speed = {"int8": 10.0}
    result = run(tiny_gpt2_folder)
    (aa,) = [entry for entry in result["aa"] if entry["kind"] == "tpot"]
    assert result["is_noisy"] and not result["too_noisy"] and 0.25 < aa["half_width"] < 1
    assert by_name(result)["int8"]["decode_verdict"] == "faster"


def test_undecided_ones_get_more_blocks_and_decided_ones_stop(tiny_gpt2_folder):
    FakeProcess.wobble = {"int8": [1.0, 1.06]}
    assert by_name(run(tiny_gpt2_folder, min_blocks=8, max_blocks=20))["int8"]["decode_n"] > 8
    FakeProcess.wobble = {}
    assert by_name(run(tiny_gpt2_folder, min_blocks=8, max_blocks=20))["int8"]["decode_n"] == 8
    slow_end = by_name(run(tiny_gpt2_folder, min_blocks=8, max_blocks=20, min_time_sec=60.0))
    assert slow_end["int8"]["decode_n"] == 20  # decided, but not yet measured for long enough


def test_a_config_that_does_not_load_is_a_row_and_the_run_goes_on(tiny_gpt2_folder):
    FakeProcess.fails_to_load = {"bf16"}
    FakeProcess.speed = {"int8": 2.0}
    rows = by_name(run(tiny_gpt2_folder, ("baseline", "bf16", "int8")))
    assert (rows["bf16"]["status"], rows["bf16"]["cause"]) == ("failed", "out of memory")
    assert rows["bf16"]["tpot_sec"] is None and rows["bf16"]["decode_tokens_per_sec"] is None
    assert rows["int8"]["decode_verdict"] == "faster"


def test_a_config_that_dies_while_it_is_sampled_is_a_row(tiny_gpt2_folder):
    FakeProcess.dies_at = {"int8": 10}  # in the first pass, after its warm-up
    rows = by_name(run(tiny_gpt2_folder))
    assert (rows["int8"]["status"], rows["int8"]["cause"]) == ("failed", "the process was killed")
    assert rows["baseline"]["status"] == "measured" and rows["baseline"]["tpot_sec"] == pytest.approx(TPOT_SEC)


def test_a_failed_baseline_leaves_times_without_ratios(tiny_gpt2_folder):
    FakeProcess.fails_to_load = {"baseline"}
    row = by_name(run(tiny_gpt2_folder))["int8"]
    assert row["tpot_sec"] == pytest.approx(TPOT_SEC)
    assert row["decode_speedup"] is None and row["decode_verdict"] is None


def test_all_samples_are_kept_and_written_as_taken(tiny_gpt2_folder, tmp_path):
    log = tmp_path / "samples.jsonl"
    result = run(tiny_gpt2_folder, sample_log=log, input_lens=[8, 16])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == result["samples"]
    assert len(lines) == 2 * 2 * 8 * 3  # cells, kinds, blocks, processes
    keys = {(line["cell"], line["kind"], line["subject"], line["block"]) for line in lines}
    assert len(keys) == len(lines)
    assert {line["bandwidth_before"] for line in lines} == {1e10}
    assert {w["config"] for w in result["warm_up"]} == {"baseline", "int8", "baseline again"}


def test_the_log_on_a_path_that_cannot_be_written_is_one_line(tiny_gpt2_folder, tmp_path):
    with pytest.raises(Exception, match="cannot write") as error:
        run(tiny_gpt2_folder, sample_log=tmp_path / "no" / "folder.jsonl")
    assert "\n" not in str(error.value)


def test_prompts_are_unique_per_cell_and_shared_within_it(tiny_gpt2_folder):
    run(tiny_gpt2_folder, input_lens=[8, 16])
    seeds: dict[int, set[int]] = {}
    for request in FakeProcess.requests:
        seeds.setdefault(request["workload"]["input_len"], set()).add(request["workload"]["seed"])
        # Exact is exact: the twin is not checked again, each cell is (a compiled graph has the shape of one).
        again = request["name"] == "baseline again"
        assert (request["check_prompt"] is None) == again and len(request["check_prompt"] or ()) + 12 <= 64
    assert [len(s) for s in seeds.values()] == [1, 1] and len(set.union(*seeds.values())) == 2


def test_what_cannot_run_is_a_row_and_no_process(tiny_gpt2_folder):
    """Asked once for all cells, before anything is started."""
    rows = by_name(run(tiny_gpt2_folder, ("baseline", "fp16"), input_lens=[8, 16]))
    assert "cannot run here: no such kernel" in rows["fp16"]["cause"]
    assert {r["name"] for r in FakeProcess.requests} == {"baseline", "baseline again"}
    assert all(r["is_checked"] for r in FakeProcess.requests)


def test_what_does_not_fit_the_model_is_a_row_before_any_process_starts(tiny_gpt2_folder, monkeypatch):
    """64 positions hold no window of 256: known before the configurations in front of it are loaded."""
    said, rows = [], {}
    monkeypatch.setattr(FakeProcess, "fails_to_load", {"baseline", "int8"})
    result = run(tiny_gpt2_folder, ("baseline", "int8", "window256"), on_progress=said.append)
    rows = by_name(result)
    assert rows["window256"]["status"] == "failed"
    assert "cannot run here: pattern window:256: a window of 256 is larger" in rows["window256"]["cause"]
    assert not any("starting window256" in line for line in said) and any("starting int8" in line for line in said)


def test_the_budget_ends_the_run_and_says_what_was_not_reached(tiny_gpt2_folder):
    result = run(tiny_gpt2_folder, input_lens=[8, 16, 24], budget_sec=10.0)
    assert clock.now() < 40
    late = [row for row in result["rows"] if row["status"] == "not_reached"]
    assert late and all("budget" in row["cause"] for row in late)
    assert len(result["rows"]) == 3 * 3


def test_memory_that_does_not_hold_all_makes_groups_around_the_baseline(tiny_gpt2_folder, monkeypatch):
    FakeProcess.speed = {"int8": 2.0, "bf16": 0.5}
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: grid.PROCESS_BYTES + int(4.2 * grid.FORKED_BYTES))
    result = run(tiny_gpt2_folder, ("baseline", "int8", "bf16"))
    assert FakeProcess.most_alive == 3
    loaded = [r["name"] for r in FakeProcess.requests]
    assert loaded == ["baseline", "baseline again", "int8", "baseline", "baseline again", "bf16"]
    rows = by_name(result)
    assert len(result["rows"]) == 4 and {e["group"] for e in result["aa"]} == {0, 1}
    assert (rows["int8"]["decode_verdict"], rows["bf16"]["decode_verdict"]) == ("faster", "slower")
    assert rows["bf16"]["group"] == 1


@pytest.mark.parametrize(
    ("available", "expected"),
    [(100, [["a", "b", "c"]]), (48, [["a", "b"], ["c"]]), (1, [["a"], ["b"], ["c"]])],
)
def test_groups_of(available, expected):
    assert grid.groups_of(["a", "b", "c"], each_bytes=10, extra_bytes=3, available=available) == expected


def test_groups_of_the_baseline_alone():
    assert grid.groups_of([], 10, 3, 100) == [[]]


def test_a_sampled_throughput_counts_before_a_derived_one(tiny_gpt2_folder):
    rows = by_name(run(tiny_gpt2_folder, kinds=("throughput",)))
    assert rows["baseline"]["throughput_tokens_per_sec"] == pytest.approx(40)
    assert rows["baseline"]["tpot_sec"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_lens": [60], "output_lens": [9]}, "exceed the context of 64"),
        ({"input_lens": []}, "no workload"),
        ({"kinds": ("latency",)}, "unknown kind"),
        ({"min_blocks": 5, "max_blocks": 4}, "blocks"),
        ({"names": ("int8", "int8")}, "twice"),
        ({"names": ()}, "no configuration"),
    ],
)
def test_wrong_arguments_fail_before_any_process_starts(tiny_gpt2_folder, options, message):
    with pytest.raises(UsageError, match=message):
        run(tiny_gpt2_folder, **options)
    assert not FakeProcess.requests


def test_the_first_config_is_the_baseline_where_none_has_the_name(tiny_gpt2_folder):
    result = run(tiny_gpt2_folder, ("bf16", "int8"))
    assert result["baseline"] == "bf16" and "bf16 again" in by_name(result)


def test_a_cell_is_estimated_above_its_weights(tiny_gpt2_folder):
    from paretune.model import checkpoint

    config = checkpoint.read_config(tiny_gpt2_folder)
    n = grid.n_parameters(config)
    small, large = (grid.trial_bytes(config, n, Cell(8, 8, b)) for b in (1, 64))
    assert grid.PROCESS_BYTES + 4 * n < small < large
    assert (
        grid.trial_bytes(config, n, Cell(8, 8, 1), grid.FORKED_BYTES) == small - grid.PROCESS_BYTES + grid.FORKED_BYTES
    )
    low, high = grid.estimate_sec(2, 1, 2, 8, 27)
    assert 0 < low < high and math.isfinite(high)


def test_what_trials_share_is_counted_once(monkeypatch):
    monkeypatch.setattr(grid.forkserver, "is_possible", lambda: True)
    alone = (0, grid.PROCESS_BYTES)
    assert grid.shared_and_own_bytes([preset("native")]) == (grid.PROCESS_BYTES, grid.FORKED_BYTES)
    compiled = Recipe.from_dict({"transforms": [], "engine": {"runner": "compile"}})
    assert grid.shared_and_own_bytes([preset("native"), compiled]) == alone
    assert grid.shared_and_own_bytes([preset("native")], "cuda") == alone
    assert grid.shared_and_own_bytes([preset("native")], has_peers=True) == alone
    monkeypatch.setattr(grid.forkserver, "is_possible", lambda: False)
    assert grid.shared_and_own_bytes([preset("native")]) == alone


def test_a_process_serves_every_cell_where_it_is_kept(tiny_gpt2_folder):
    FakeProcess.speed, FakeProcess.fails_to_load = {"int8": 2.0}, {"bf16"}
    names, options = ("baseline", "int8", "bf16"), {"batch_sizes": [1, 2], "input_lens": [16, 24]}
    kept = run(tiny_gpt2_folder, names, keeps_processes=True, **options)
    did = FakeProcess.did
    assert [d for d in did if d[0] == "start"] == [
        ("start", n, 1) for n in ("baseline", "baseline again", "int8", "bf16")
    ]
    # What failed once is a row in every cell and is not started again.
    assert [d[1:] for d in did if d[0] == "shape"] == [
        (n, b) for b in (1, 2, 2) for n in ("baseline", "baseline again", "int8")
    ]
    assert [r["cause"] for r in kept["rows"] if r["config"] == "bf16"] == ["out of memory"] * 4
    FakeProcess.did = []
    plain = run(tiny_gpt2_folder, names, **options)
    assert all(d[0] == "start" for d in FakeProcess.did)
    for ours, theirs in zip(kept["rows"], plain["rows"], strict=True):
        assert ours["decode_speedup"] == theirs["decode_speedup"] and ours["mbu"] == theirs["mbu"]


def test_kept_processes_end_where_memory_does_not_hold_all(tiny_gpt2_folder, monkeypatch):
    sizes = iter([64 << 30, 1])
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: next(sizes))
    monkeypatch.setattr(
        bench_run, "groups_of", lambda names, each, extra, n: [names] if n > 32 << 30 else [[n] for n in names]
    )
    run(tiny_gpt2_folder, ("baseline", "int8", "bf16"), batch_sizes=[1, 2], keeps_processes=True)
    assert [d[0] for d in FakeProcess.did] == ["start"] * (4 + 3 + 3)


def test_a_plan_with_a_table_runs_what_it_says_in_each_cell(tiny_gpt2_folder):
    forms = {PLAN: Form(PLAN, preset("bf16"), "lossless"), "int8": Form("int8", preset("bf16_int8"), "lossless")}
    own, other = Entry(PLAN, 1), Entry("int8", 1)
    forms["eager"] = Form("eager", Recipe.from_dict({**preset("bf16").to_dict(), "engine": {"threads": 1}}), "lossless")
    table = Table((1, 4), (25,), forms, (((own, other),), ((Entry("eager", 1), own),)))
    result = run(tiny_gpt2_folder, ("baseline", "bf16"), batch_sizes=[1, 4], tables={"bf16": table})
    rows = {r["batch_size"]: r for r in result["rows"] if r["config"] == "bf16"}
    assert rows[1]["recipe"] == preset("bf16").name and rows[4]["recipe"] == forms["eager"].recipe.name
    assert any("chosen by the plan's table" in n and "regime of batch 4" in n for n in rows[4]["notes"])
    sent = [r["recipe"] for r in FakeProcess.requests if r["name"] == "bf16"]
    assert sent == [preset("bf16").to_dict(), forms["eager"].recipe.to_dict()]


def test_the_bytes_of_a_window_do_not_grow_with_the_context(tiny_gpt2_folder, monkeypatch):
    """What a step must read stays at the window and its prefix; the cost of a prompt at the pairs that are left."""
    real = FakeProcess.ask

    def ask(self, do, timeout_sec=1.0, **request):
        answer = real(self, do, timeout_sec, **request)
        return answer | ({"attention_pattern": "prefix:2+window:8"} if self.name == "int8" and do == "start" else {})

    monkeypatch.setattr(FakeProcess, "ask", ask)
    rows = {(r["config"], r["input_len"]): r for r in run(tiny_gpt2_folder, input_lens=[16, 48])["rows"]}
    assert rows["int8", 48]["decode_bytes"] == rows["int8", 16]["decode_bytes"] == WEIGHTS + KV_PER_TOKEN * 10
    assert rows["baseline", 48]["decode_bytes"] == WEIGHTS + KV_PER_TOKEN * 52.5
    assert rows["int8", 48]["prefill_mfu"] < rows["baseline", 48]["prefill_mfu"]
    assert rows["int8", 48]["decode_mfu"] == rows["int8", 16]["decode_mfu"]


# --- rounds ---------------------------------------------------------------------------------------


def test_every_row_has_every_kind_before_any_has_more(tiny_gpt2_folder):
    FakeProcess.speed = {"int8": 2.0}
    run(tiny_gpt2_folder, ("baseline", "int8", "bf16"))
    n_rows, first = 4, bench_group.FIRST_BLOCKS
    for i, kind in enumerate(("ttft", "tpot")):
        part = FakeProcess.slices[i * n_rows * first : (i + 1) * n_rows * first]
        assert {k for _, k, _ in part} == {kind} and len({name for name, _, _ in part}) == n_rows
        assert {sec for _, _, sec in part} == {bench_group.FIRST_SLICE_SEC}, "every row waits for them: they are short"
    assert {sec for _, _, sec in FakeProcess.slices[2 * n_rows * first :]} == {None}


def test_the_first_rows_are_shown_with_intervals_and_no_verdict_is_asked_of_them(tiny_gpt2_folder):
    FakeProcess.speed = {"int8": 2.0}
    shown: list[list[BenchRow]] = []
    taken: list[int] = []

    def on_first(rows):
        shown.append(rows)
        taken.append(len(FakeProcess.slices))

    run(tiny_gpt2_folder, ("baseline", "int8"), on_first=on_first)
    rows = {row.config: to_json(row) for row in shown[0]}
    assert len(shown) == 1 and taken == [2 * 3 * bench_group.FIRST_BLOCKS]
    assert rows["int8"]["decode_speedup_low"] == pytest.approx(2.0) and rows["int8"]["mbu"] is None
    assert rows["int8"]["prefill_speedup_high"] == pytest.approx(2.0)
    assert {row["decode_verdict"] for row in rows.values()} == {None}


def test_what_is_judged_at_once_has_long_slices(tiny_gpt2_folder):
    """Where there are no more blocks than the first ones, the verdict would rest on short slices alone."""
    run(tiny_gpt2_folder, ("baseline", "int8"), min_blocks=2, max_blocks=bench_group.FIRST_BLOCKS)
    assert {sec for _, _, sec in FakeProcess.slices} == {None}


def test_number_formats_are_timed_after_the_first_rows(tiny_gpt2_folder, monkeypatch):
    did = []
    support = hardware.dtype_support()
    monkeypatch.setattr(hardware, "dtype_support", lambda device="cpu": did.append("timed") or support)
    result = run(tiny_gpt2_folder, ("baseline", "bf16"), on_first=lambda rows: did.append("first"))
    assert did == ["first", "timed"] and by_name(result)["bf16"]["notes"] == ["bf16 is emulated here"]


def test_what_is_decided_sits_out_and_the_yardsticks_do_not(tiny_gpt2_folder):
    FakeProcess.speed, FakeProcess.wobble = {"bf16": 3.0}, {"int8": [1.0, 1.06]}
    rows = by_name(run(tiny_gpt2_folder, ("baseline", "int8", "bf16"), min_blocks=8, max_blocks=20))
    assert rows["bf16"]["decode_verdict"] == "faster" and rows["bf16"]["decode_n"] == 8
    assert rows["int8"]["decode_n"] == rows["baseline"]["decode_n"] == rows["baseline again"]["decode_n"] == 20


def test_a_budget_starves_no_row(tiny_gpt2_folder):
    """Starting four takes 4 s; 8 s are left for two kinds of four rows at 0.13 s each: no row waits for another."""
    result = run(tiny_gpt2_folder, ("baseline", "int8", "bf16"), budget_sec=12.0, min_time_sec=3.0)
    rows = by_name(result)
    assert all(row["status"] == "measured" for row in rows.values())
    for phase in ("prefill", "decode"):
        counts = [row[f"{phase}_n"] for row in rows.values()]
        assert max(counts) - min(counts) <= 1 and min(counts) >= bench_group.FIRST_BLOCKS
    assert all(rows[name]["decode_verdict"] for name in ("int8", "bf16"))


def test_loading_leaves_time_to_measure_what_is_loaded(tiny_gpt2_folder):
    names = ("baseline", "int8", "bf16", "int8_linear", "eager_attn")
    rows = by_name(run(tiny_gpt2_folder, names, budget_sec=5.0))
    assert rows["baseline"]["status"] == rows["int8"]["status"] == "measured"
    late = rows["eager_attn"]
    assert (late["status"], late["cause"]) == ("not_reached", "the time budget ended before its turn")


@pytest.mark.parametrize("budget_sec", [None, 60.0])
def test_progress_names_the_time_that_is_left(tiny_gpt2_folder, budget_sec):
    said: list[str] = []
    FakeProcess.wobble = {"int8": [1.0, 1.06]}
    run(tiny_gpt2_folder, budget_sec=budget_sec, on_progress=said.append, max_blocks=40)
    later = [line for line in said if "block" in line][1:]
    assert later and all(" s left" in line for line in later)
    assert any("0 of 1 decided" in line for line in later)


def test_an_interrupt_goes_up_or_gives_what_is_known(tiny_gpt2_folder):
    def interrupt(process):
        if len(FakeProcess.slices) == 31:
            raise KeyboardInterrupt

    FakeProcess.on_sample = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(tiny_gpt2_folder, input_lens=[8, 16])
    assert not FakeProcess.alive
    FakeProcess.slices = []
    result = run(tiny_gpt2_folder, input_lens=[8, 16], keeps_interrupted=True)
    assert result["interrupted"] and not result["too_noisy"]
    rows = by_name(result)
    assert {row["cell"] for row in rows.values()} == {"8+9 x1"}
    assert rows["int8"]["prefill_n"] == bench_group.FIRST_BLOCKS and rows["int8"]["decode_n"] in (4, 5)
    assert len(result["samples"]) == 31


def test_an_interrupt_while_loading_is_not_called_the_end_of_the_budget(tiny_gpt2_folder):
    def interrupt(process, do):
        if process.name == "int8":
            raise KeyboardInterrupt

    FakeProcess.on_ask = interrupt
    rows = by_name(run(tiny_gpt2_folder, keeps_interrupted=True))
    assert rows["int8"]["cause"] == "it was interrupted before its turn"


@pytest.mark.parametrize("when", ["start", "sample"])
def test_trials_lost_with_the_fork_server_are_started_again(tiny_gpt2_folder, when):
    gone: list[str] = []

    def lose(process):
        gone.append(process.name)
        for other in FakeProcess.processes:
            other.lost = True

    def on_ask(process, do):
        if when == "start" and not gone and process.name == "int8":
            lose(process)

    def on_sample(process):
        if when == "sample" and not gone and len(FakeProcess.slices) == 20:
            lose(process)

    FakeProcess.on_ask, FakeProcess.on_sample, FakeProcess.speed = on_ask, on_sample, {"int8": 2.0}
    said: list[str] = []
    result = run(tiny_gpt2_folder, ("baseline", "int8", "bf16"), on_progress=said.append)
    rows = by_name(result)
    assert gone and any("the server that forks trials ended" in line for line in said)
    assert rows["int8"]["decode_verdict"] == "faster" and not any(row["cause"] for row in rows.values())
    assert {row["prefill_n"] for row in rows.values()} == {8}, "every block is whole"
    keys = [(s["kind"], s["subject"], s["block"]) for s in result["samples"]]
    assert len(set(keys)) == len(keys)


def test_a_single_verdict_stands_on_a_noisy_machine_and_none_is_too_noisy(tiny_gpt2_folder):
    FakeProcess.wobble = {"baseline again": [1.0, 1.0, 1.8], "bf16": [1.0, 1.4, 0.8]}
    result = run(tiny_gpt2_folder, ("baseline", "bf16"))
    assert result["is_noisy"] and result["too_noisy"]
    FakeProcess.speed = {"int8": 10.0}
    result = run(tiny_gpt2_folder, ("baseline", "bf16", "int8"))
    assert result["is_noisy"] and not result["too_noisy"]
