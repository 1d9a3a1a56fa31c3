"""A machine made up for tests of the search: trials of known cost on a clock of our own.

Not a test file: `test_search.py` imports it. Whatever the real `Search` asks of processes, the probe and the hardware
is answered here, deterministically; a run of minutes takes a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from points import Choice, candidate

from paretune import clock, hardware, stats
from paretune.engine.runners.compiled import CompileRunner
from paretune.engine.runners.native import NativeRunner
from paretune.evaluate.fidelity import PhaseScores, Scores
from paretune.hardware import Ceilings, DtypeSupport
from paretune.measure.interleave import SubjectError
from paretune.measure.session import LOST
from paretune.recipe import Recipe
from paretune.records.explanation import Explanation
from paretune.records.record import to_json
from paretune.tune import space as spaces
from paretune.tune.goal import Goal
from paretune.tune.search import Search

BASE = "sdpa, eager"
START_SEC = {"eager": 3.0, "native": 3.0, "compile": 12.0}
SLICE_SEC = 0.12
DRAWS = stats._bootstrap_draws
MB = 1_000_000


class Killed(BaseException):
    """`kill -9`, as far as a test can have it: nothing catches it."""


@dataclass
class Machine:
    """What each recipe costs and does here.

    Args:
        cost: seconds per unit by the name of the recipe, or a function (recipe name, trial id) -> seconds.
        noise: standard deviation of the log of a timing.
        increase: log perplexity over the baseline by recipe name (default 0).
        weights: stored bytes by recipe name.
        load_error: cause, or the error itself, by recipe name.
        why_error: cause by recipe name, of its profile alone.
        sample_error: (cause, after how many samples) by recipe name.
        on_sample: called with (trial id, count of all samples so far) before a sample is given.
    """

    cost: dict[str, float] | Callable[[str, str], float] = field(default_factory=dict)
    noise: float = 0.005
    increase: dict[str, float] | Callable[[str, str], float] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    load_error: dict[str, str | SubjectError] = field(default_factory=dict)
    sample_error: dict[str, tuple[str, int]] = field(default_factory=dict)
    why_error: dict[str, str] = field(default_factory=dict)
    on_sample: Callable[[str, int], None] | None = None
    on_ask: Callable[[str, str], None] | None = None
    seed: int = 0
    default_cost: float = 0.010

    def __post_init__(self) -> None:
        self.clock = clock.FakeClock(1000.0)
        self.taken: list[str] = []  # the trial of each timed slice of a block
        self.started: list[tuple[str, str, int]] = []  # trial, recipe, seed of the prompts
        self.alive: list[FakeProcess] = []
        self.awake: set[str] = set()

    def cost_of(self, recipe: str, trial: str) -> float:
        if callable(self.cost):
            return self.cost(recipe, trial)
        return self.cost.get(recipe, self.default_cost)

    def increase_of(self, recipe: str, trial: str) -> float:
        if callable(self.increase):
            return self.increase(recipe, trial)
        return self.increase.get(recipe, 0.0)

    def lose_all(self) -> None:
        """The fork server ends, and every process with it."""
        for process in list(self.alive):
            process.close()
            process.lost = True


class FakeProcess:
    """Stands in for `TrialProcess`."""

    machine: Machine

    note = ""
    lost = False

    def __init__(self, name: str, kind: str, log: Path | None = None, module: str = "", fresh: bool = False) -> None:
        assert module == "paretune.tune.worker" and fresh == is_confirmation(name)
        self.name, self.kind = name, kind
        self.alive, self.recipe, self.seed, self.n_samples = True, "", 0, 0
        self.queue: list[tuple[str, dict[str, Any]]] = []
        key = f"{self.machine.seed}/{name}/{len(self.machine.started)}"
        self.random = np.random.default_rng(zlib.crc32(key.encode()))
        self.machine.alive.append(self)
        self.machine.awake.add(name)
        if log is not None:
            assert log.parent.is_dir()

    # -- the protocol

    def _check(self) -> None:
        if self.lost:
            raise SubjectError("the server that forks trials ended, and this trial with it", kind=LOST)

    def send(self, do: str, **request: Any) -> None:
        self._check()
        assert self.alive, f"{self.name} was ended"
        json.dumps(request)  # it goes over a pipe
        self.queue.append((do, request))

    def receive(self, timeout_sec: float) -> dict[str, Any]:
        assert timeout_sec > 0
        do, request = self.queue.pop(0)
        assert self.name in self.machine.awake, f"{self.name} was asked while it slept"
        if self.machine.on_ask:
            self.machine.on_ask(self.name, do)
        self._check()
        return getattr(self, f"_{do}")(request)

    def ask(self, do: str, timeout_sec: float = 120.0, **request: Any) -> dict[str, Any]:
        self.send(do, **request)
        return self.receive(timeout_sec)

    def sample(self) -> float:
        machine = self.machine
        self._check()
        assert machine.awake == {self.name}, f"{machine.awake} run while {self.name} is timed"
        if machine.on_sample:
            machine.on_sample(self.name, len(machine.taken))
        self._check()
        cause, after = machine.sample_error.get(self.recipe, ("", -1))
        if after >= 0 and self.n_samples >= after:
            self.close()
            raise SubjectError(cause)
        self.n_samples += 1
        machine.taken.append(self.name)
        machine.clock.now_sec += SLICE_SEC
        return self._seconds()

    def pause(self) -> None:
        self.machine.awake.discard(self.name)

    def resume(self) -> None:
        if self.alive:
            self.machine.awake.add(self.name)

    def close(self) -> None:
        self.alive = False
        self.machine.awake.discard(self.name)
        if self in self.machine.alive:
            self.machine.alive.remove(self)

    # -- the answers

    def _seconds(self) -> float:
        noise = math.exp(self.random.normal(0.0, self.machine.noise)) if self.machine.noise else 1.0
        return self.machine.cost_of(self.recipe, self.name) * noise

    def _ready(self, request: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _start(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = self._load(request)
        self.machine.clock.now_sec += 1.0
        timings = [self._seconds() for _ in range(8)]
        warm = {kind: {"timings_sec": timings, "settled": True} for kind in request["kinds"]}
        side = {kind: self._sample({"kind": kind})["sec"] for kind in request["side"]}
        parts = {"load": 0.5, "convert": 0.0, "calibrate": 0.0, "warm": 1.0}
        return answer | {"memory": self._memory({}), "warm": warm, "side_sec": side, "start_parts_sec": parts}

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        recipe = Recipe.from_dict(request["recipe"])
        self.recipe, self.seed = recipe.name, request["workload"]["seed"]
        self.machine.started.append((self.name, self.recipe, self.seed))
        sec = START_SEC[recipe.engine.runner]
        self.machine.clock.now_sec += sec
        if self.recipe in self.machine.load_error:
            error = self.machine.load_error[self.recipe]
            raise error if isinstance(error, SubjectError) else SubjectError(error)
        weights = self.machine.weights.get(self.recipe, 28 * MB)
        return {
            "load_sec": 0.5,
            "compile_sec": sec if recipe.engine.runner == "compile" else 0.0,
            "proof": [f"{self.recipe} did what it says"],
            "notes": [],
            "runner": {"runner": recipe.engine.runner},
            "bytes_by_dtype": {"float32": weights},
            "kv_cache_bytes": 2 * MB,
            "weights_bytes": weights,
            "step_weights_bytes": weights,
            "kv_bytes_per_token": 2 * MB / 160,
            "compute_dtype": "float32",
            "threads": {"threads": 2},
        }

    def _sample(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"sec": self._seconds() * (4 if request["kind"] == "ttft" else 1)}

    def _memory(self, request: dict[str, Any]) -> dict[str, Any]:
        weights = self.machine.weights.get(self.recipe, 28 * MB)
        return {
            "weights_bytes": weights,
            "kv_cache_bytes": 2 * MB,
            "activation_peak_bytes": 3 * MB,
            "rss_bytes": 300 * MB,
            "rss_peak_bytes": 400 * MB,
            "device_allocated_bytes": None,
            "device_reserved_bytes": None,
            "device_used_bytes": None,
        }

    def _score(self, request: dict[str, Any]) -> dict[str, Any]:
        self.machine.clock.now_sec += 1.5
        windows = np.load(request["windows"])[request["start"] : request["stop"]]
        shift = self.machine.increase_of(self.recipe, self.name)
        scores_of(windows, request["text_name"], shift, self.recipe).save(request["out"])
        return {"score_sec": 1.5}

    def _why(self, request: dict[str, Any]) -> dict[str, Any]:
        self.machine.clock.now_sec += 2.0
        Ceilings.from_json(request["ceilings"])
        if self.recipe in self.machine.why_error:
            raise SubjectError(self.machine.why_error[self.recipe])
        text = f"{self.recipe} was taken apart in {request['phase']}"
        found = Explanation("Python", 0.5, text, "another")
        return {"explanations": [to_json(found)], "sec": self._seconds()}


def scores_of(windows: np.ndarray, text_name: str, shift: float, recipe: str) -> Scores:
    """Scores whose mean negative log-likelihood is `shift` above the baseline's; that of the baseline itself is 0."""
    n = len(windows)
    shared = np.random.default_rng(int(windows.sum()) % 2**32)
    own = np.random.default_rng(zlib.crc32(recipe.encode()))
    parts = {}
    for phase, s in (("prefill", 128), ("decode", 128)):
        base = shared.gamma(4.0, 1.0, (n, s))
        noise = own.normal(0.0, 0.002, (n, s)) if shift else 0.0
        parts[phase] = PhaseScores(
            nll=(base + shift + noise).astype(np.float32),
            top1=np.zeros((n, s), np.int32),
            kept=np.arange(4),
            log_probs=np.full((4, 2), math.log(0.5), np.float32),
        )
    return Scores(f"{text_name}/fake", hashlib.sha256(windows.tobytes()).hexdigest(), **parts)


class FakeProbe:
    """A bandwidth that never changes."""

    machine: Machine

    def __init__(self, threads: int | None = None, n_bytes: int | None = None) -> None: ...

    def __call__(self) -> float:
        assert not self.machine.awake, f"{self.machine.awake} run during the probe"
        self.machine.clock.now_sec += 0.015
        return 1e10


def install(monkeypatch, machine: Machine, n_draws: int = 200) -> Machine:
    """Puts the machine and its clock in the place of the real ones; an earlier machine goes.

    Args:
        n_draws: of the bootstrap; fewer than the real 2,000 for the sake of time. The exact interval beside it stays.
    """
    good = {d: DtypeSupport(True, False, 1.5, 1.5, "good") for d in ("fp32", "bf16", "fp16")}
    rows = tuple(
        {"bytes": n << 20, "threads": 2, "bytes_per_sec": 1e10, "kind": "fake", "samples": [1e10], "state": "high"}
        for n in (4, 64)
    )
    ceilings = Ceilings("cpu", "fake", 2, rows, {"fp32": 1e11, "bf16": 1e11, "fp16": 1e11}, 1e11)
    process = type("Process", (FakeProcess,), {"machine": machine})
    probe = type("Probe", (FakeProbe,), {"machine": machine})
    monkeypatch.setattr(stats, "_bootstrap_draws", lambda v, f, n, seed: DRAWS(v, f, min(n, n_draws), seed))
    monkeypatch.setattr(clock, "_clock", machine.clock)
    monkeypatch.setattr("paretune.tune.race.TrialProcess", process)
    monkeypatch.setattr(hardware, "BandwidthProbe", probe)
    monkeypatch.setattr(hardware, "ceilings", lambda device="cpu", quick=False: ceilings)
    monkeypatch.setattr(hardware, "dtype_support", lambda device="cpu": good)
    monkeypatch.setattr(hardware, "dtype_failure", lambda name, device="cpu": None)
    monkeypatch.setattr(hardware, "set_threads", lambda n=None: {"threads": 2})
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 64 << 30)
    for runner in (CompileRunner, NativeRunner):
        monkeypatch.setattr(runner, "requires", staticmethod(lambda device: None))
    monkeypatch.setattr("paretune.tune.journal.os.fsync", lambda fd: None)
    monkeypatch.setattr(Search, "_windows", lambda self, config, text: windows())
    monkeypatch.setattr("paretune.tune.search.Tokenizer", lambda folder: None)
    return machine


def windows() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return {s: torch.randint(0, 8000, (64, 257), generator=random) for s in ("search", "confirm")}


def only(monkeypatch, *choices: Choice) -> dict[tuple, str]:
    """Makes the space these candidates alone; gives their names."""
    legal = [candidate(*c) for c in choices]
    monkeypatch.setattr(spaces, "build", lambda *about: spaces.Space(list(legal)))
    return {choice: c.recipe.name for choice, c in zip(choices, legal, strict=True)}


def run(machine: Machine, folder: Path, resume: bool = False, **goal: Any) -> Any:
    """The outcome of a whole run."""
    folder.mkdir(exist_ok=True)
    options = {"budget_sec": 300.0, **goal}
    one = Search("pocket", Goal(**options), folder, text=None, resume=resume, say=lambda line: None)
    try:
        return one.run()
    finally:
        one.journal.close()
        assert not machine.alive, "processes are left"


def is_confirmation(trial: str) -> bool:
    return trial.startswith("confirm")
