"""Configurations side by side on a grid of workloads: interleaved blocks, one process each, verdicts.

Every cell of the grid (input length x output length x batch) has a process per configuration and one more for
the baseline again: what those two differ by is what this machine resolves now (A/A). `bench_rows` turns what
was measured into the rows of the result.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from paretune import clock, files, hardware, stats
from paretune.engine.dispatch import Table
from paretune.errors import UsageError
from paretune.measure import environment
from paretune.measure.bench_rows import DEFINITIONS, MAX_AA, Cell, Pass, Trial, make_row
from paretune.measure.interleave import Sample, SubjectError, run_blocks, warm_up
from paretune.measure.peers.catalogue import Engine
from paretune.measure.peers.subject import INVALID, Peers
from paretune.measure.session import TrialProcess
from paretune.measure.workload import KINDS, MIN_SLICE_SEC, Workload
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.recipe import Recipe

MIN_BLOCKS, MAX_BLOCKS, MIN_TIME_SEC = 8, 27, 3.0
LOAD_TIMEOUT_SEC = 900.0  # max-autotune compiles for minutes
WARM_UP_SEC = 10.0
CHECK_TOKENS, CHECK_STEPS = 32, 12  # of the exactness check before anything is timed
PROCESS_BYTES = 450 << 20  # an interpreter with PyTorch
MEMORY_SHARE = 0.9
_LOAD_GUESS_SEC, _BLOCK_GUESS_SEC = 6.0, 0.2  # of the estimate only

Config = tuple[str, Recipe]


def cells_of(
    n_positions: int, input_lens: Sequence[int], output_lens: Sequence[int], batch_sizes: Sequence[int]
) -> list[Cell]:
    """The grid, smaller workloads first as given.

    Raises:
        UsageError: a workload that does not fit the model, or an empty list.
    """
    cells = [Cell(i, o, b) for b in batch_sizes for i in input_lens for o in output_lens]
    if not cells:
        raise UsageError("there is no workload to measure", "Give --input-len, --output-len and --batch-size")
    for cell in cells:
        Workload(cell.input_len, cell.output_len, cell.batch_size).check(n_positions)
    return list(dict.fromkeys(cells))


def n_parameters(config: ModelConfig) -> int:
    return sum(p.numel() for p in checkpoint.build(config).parameters())


def trial_bytes(config: ModelConfig, n_params: int, cell: Cell) -> int:
    """What one process takes at rest, from above: fp32 weights, cache, the largest activations."""
    rows = cell.batch_size * cell.input_len
    kv = 2 * config.n_layer * config.n_kv_head * config.head_dim
    cache = 4 * kv * cell.batch_size * (cell.input_len + cell.output_len)
    scores = 4 * config.n_head * rows * cell.input_len
    logits = 4 * cell.batch_size * config.vocab_size
    return (
        PROCESS_BYTES + 4 * n_params + cache + 2 * scores + 2 * logits + 4 * rows * 3 * (config.n_inner + config.n_embd)
    )


def groups_of(challengers: Sequence[str], each_bytes: int, extra_bytes: int, available: int) -> list[list[str]]:
    """Splits the challengers so that each group fits into memory beside the baseline and its twin.

    Args:
        extra_bytes: what one of them takes more while it loads and is checked (one at a time does).
        available: bytes that may be taken now.
    """
    room = int((MEMORY_SHARE * available - extra_bytes) // each_bytes) - 2
    size = max(1, room)  # a single one that does not fit fails with its cause
    return [list(challengers[i : i + size]) for i in range(0, len(challengers), size)] or [[]]


def estimate_sec(n_configs: int, n_cells: int, n_kinds: int, min_blocks: int, max_blocks: int) -> tuple[float, float]:
    """Seconds that a run takes at least and at most, for small models (a slice of a large one takes longer)."""
    n = n_configs + 1
    fixed = n * (_LOAD_GUESS_SEC + n_kinds * 10 * MIN_SLICE_SEC)
    low, high = (n_cells * (fixed + n_kinds * b * n * _BLOCK_GUESS_SEC) for b in (min_blocks, max_blocks))
    return low, high


def bench(
    folder: Path,
    configs: Sequence[Config],
    *,
    input_lens: Sequence[int] = (128,),
    output_lens: Sequence[int] = (32,),
    batch_sizes: Sequence[int] = (1,),
    baseline: str = "baseline",
    kinds: Sequence[str] = ("ttft", "tpot"),
    min_blocks: int = MIN_BLOCKS,
    max_blocks: int = MAX_BLOCKS,
    min_time_sec: float = MIN_TIME_SEC,
    budget_sec: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    on_progress: Callable[[str], None] | None = None,
    sample_log: Path | None = None,
    folders: Mapping[str, Path] | None = None,
    engines: Sequence[Engine] = (),
    loading_counts: bool = True,
    keeps_processes: bool = False,
    tables: Mapping[str, Table] | None = None,
) -> dict[str, Any]:
    """Measures every configuration against the baseline on every cell of the grid.

    Args:
        configs: names and recipes; all rows carry the name.
        baseline: the configuration that the others are compared with; the first where none has this name.
        kinds: what is sampled, each in a pass of its own (`workload.KINDS`).
        min_blocks, max_blocks: after how many blocks the first and the last look is taken.
        min_time_sec: how long a configuration is sampled at least in a pass, its probes included.
        budget_sec: for everything; what is not reached then is said to be so.
        on_progress: called with a line, only while nothing is being timed.
        sample_log: a JSON line for every sample, written the moment it is taken.
        folders: the checkpoint of a configuration where it is not `folder` (a plan's converted one).
        engines: peers that are measured beside the configurations, on the checkpoint of `folder`.
        loading_counts: whether `budget_sec` also holds loading, converting and checking; else they come on top.
        keeps_processes: a process serves all cells of its configuration, where memory holds them all: for large grids.
            Proof and check of exactness are those of the first cell.
        tables: of configurations that choose their form by regime; each cell runs what the table says, and says so.

    Returns:
        strict JSON: the head of a result file, `rows`, `aa`, `samples`, `ceilings`, `definitions`, `too_noisy`.

    Raises:
        UsageError: wrong arguments, before any process starts.
    """
    assert not (keeps_processes and tables), "a kept process runs one recipe"
    names = [name for name, _ in configs]
    if not names:
        raise UsageError("there is no configuration to measure", "Give --config")
    all_names = names + [engine.name for engine in engines]
    if len(set(all_names)) != len(all_names):
        twice = next(n for n in all_names if all_names.count(n) > 1)
        raise UsageError(f"config {twice!r} is given twice", "Name each configuration once")
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"unknown kind {kind!r}", f"Known: {', '.join(KINDS)}")
    if not 1 <= min_blocks <= max_blocks:
        raise UsageError(f"{min_blocks} to {max_blocks} blocks", "The first has to be 1 or more, the second no less")
    config = checkpoint.read_config(folder)
    cells = cells_of(config.longest, input_lens, output_lens, batch_sizes)
    header = environment.header(seed=seed)
    say = on_progress or (lambda line: None)
    threads_read = hardware.set_threads(threads)
    say("measuring the ceilings of this machine")
    ceilings = hardware.ceilings(device, quick=True)
    run = _Run(
        folder=Path(folder),
        config=config,
        n_params=n_parameters(config),
        configs=dict(configs),
        peers=Peers(engines, Path(folder), config, threads_read["threads"], say),
        folders={k: Path(v) for k, v in (folders or {}).items()},
        baseline=baseline if baseline in names else names[0],
        kinds=tuple(kinds),
        schedule=stats.looks(min_blocks, max_blocks),
        min_time_sec=min_time_sec,
        seed=seed,
        device=device,
        threads=threads,
        probe=hardware.BandwidthProbe(threads) if device == "cpu" else None,
        say=say,
        ceilings=ceilings,
        deadline=None if budget_sec is None else clock.now() + budget_sec,
        loading_counts=loading_counts,
        keeps_processes=keeps_processes,
        tables=dict(tables or {}),
    )
    with _log(sample_log) as log, run.stack:
        run.log = log
        for i, cell in enumerate(cells):
            run.cell(cell, i, n_left=len(cells) - i)
    widths = [entry["half_width"] for entry in run.aa if entry["half_width"] is not None]
    return {
        **header,
        "model": {"name": folder.name, "family": config.family, "n_parameters": run.n_params},
        "device": device,
        "threads": threads_read,
        "baseline": run.baseline,
        "configs": {name: recipe.to_dict() for name, recipe in configs},
        "engines": [engine.name for engine in engines],
        "cells": [asdict(cell) for cell in cells],
        "settings": {
            "kinds": list(kinds),
            "looks_after_blocks": run.schedule,
            "level": run.level,
            "delta": stats.DELTA,
            "min_time_sec": min_time_sec,
            "budget_sec": budget_sec,
        },
        "ceilings": ceilings.to_json(),
        "probe": None if run.probe is None else {"kind": run.probe.kind, "note": run.probe.note},
        "rows": run.rows,
        "aa": run.aa,
        "samples": run.samples,
        "warm_up": run.warm_ups,
        "definitions": DEFINITIONS,
        "too_noisy": any(width > MAX_AA for width in widths),
    }


@contextlib.contextmanager
def _log(path: Path | None) -> Iterator[IO[str] | None]:
    if path is None:
        yield None
        return
    try:
        handle = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise files.write_error(path, error) from None
    with handle:
        yield handle


@dataclass
class _Run:
    """One call of `bench`: its settings, and what it has measured so far."""

    folder: Path
    config: ModelConfig
    n_params: int
    configs: dict[str, Recipe]
    peers: Peers
    folders: dict[str, Path]
    baseline: str
    kinds: tuple[str, ...]
    schedule: list[int]
    min_time_sec: float
    seed: int
    device: str
    threads: int | None
    probe: hardware.BandwidthProbe | None
    say: Callable[[str], None]
    ceilings: hardware.Ceilings
    deadline: float | None
    loading_counts: bool = True
    keeps_processes: bool = False
    tables: dict[str, Table] = field(default_factory=dict)
    log: IO[str] | None = None
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # of kept processes
    kept: dict[str, TrialProcess] = field(default_factory=dict)
    # Why not, and notes, by recipe and folder.
    asked: dict[tuple[str, str], tuple[str | None, list[str]]] = field(default_factory=dict)
    checked: set[tuple[int, str, str]] = field(default_factory=set)  # cell, recipe and folder that are exact
    failed: dict[str, Trial] = field(default_factory=dict)  # what failed once is not started again for each cell
    rows: list[dict[str, Any]] = field(default_factory=list)
    aa: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    warm_ups: list[dict[str, Any]] = field(default_factory=list)

    @property
    def twin(self) -> str:
        return f"{self.baseline} again"

    @property
    def level(self) -> float:
        return stats.look_level(0, len(self.schedule))

    def trial_of(self, name: str, cell: Cell) -> Trial:
        if name in self.peers.engines:
            return Trial(name, None, labels=self.peers.labels(name))
        config = self.baseline if name == self.twin else name
        table = self.tables.get(config)
        if table is None:
            recipe = self.configs[config]
            return self._trial(name, recipe)
        # Second copies of the weights are not granted: what shares the plan's own can run.
        shared = [f.name for f in table.forms.values() if not f.weights_bytes]
        length = cell.input_len + cell.output_len
        left = functools.partial(hardware.memory_left, self.device)
        choice = table.choose(cell.batch_size, length, "plan", left, shared)
        recipe = table.forms[choice.form].recipe
        return self._trial(name, recipe, f"chosen by the plan's table: {choice}")

    def _trial(self, name: str, recipe: Recipe, *notes: str) -> Trial:
        """A trial that has failed already where its recipe cannot run this model here."""
        folder = self.folders.get(name, self.folder)
        key = recipe.hash, str(folder)
        if key not in self.asked:  # once, not by each of its processes
            config = self.config if folder == self.folder else checkpoint.read_config(folder)
            self.asked[key] = recipe.why_not(self.device, config), recipe.notes(self.device)
        reason, own_notes = self.asked[key]
        cause = None if reason is None else f"{recipe.name} cannot run here: {reason}"
        return Trial(name, recipe, notes=[*notes, *own_notes], cause=cause)

    def cell(self, cell: Cell, index: int, n_left: int) -> None:
        """Measures one cell, in as many groups as memory asks for."""
        each = trial_bytes(self.config, self.n_params, cell)
        # While it loads: the file's tensors beside the model; while it is checked: a reference and an fp32 twin.
        extra = 3 * 4 * self.n_params
        names = [*self.configs, *self.peers.engines]
        challengers = [name for name in names if name != self.baseline]
        # What kept processes hold is theirs already.
        available = hardware.available_memory_bytes() + len(self.kept) * (PROCESS_BYTES + 4 * self.n_params)
        groups = groups_of(challengers, each, extra, available)
        if len(groups) > 1 and self.keeps_processes:
            self.keeps_processes = False
            self.stack.close()
            self.kept.clear()
        for g, group in enumerate(groups):
            share = len(groups) - g + (n_left - 1) * len(groups)
            until = None if self.deadline is None else clock.now() + max(0.0, self.deadline - clock.now()) / share
            trials = self._group(cell, index, g, [self.baseline, self.twin, *group], until)
            shown = [t for t in trials if g == 0 or t.name in group]
            first = trials[0]
            order = {name: i for i, name in enumerate([*self.configs, self.twin, *self.peers.engines])}
            for trial in sorted(shown, key=lambda t: order[t.name]):
                row = make_row(trial, first, self.twin, cell, self.config, self.ceilings)
                self.rows.append({**row, "group": g})

    def _group(self, cell: Cell, index: int, g: int, names: list[str], until: float | None) -> list[Trial]:
        trials = {name: self.trial_of(name, cell) for name in names}
        if until is not None and clock.now() >= until:
            return list(trials.values())
        with contextlib.ExitStack() as own:
            stack = self.stack if self.keeps_processes else own
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paretune-bench-")))
            processes: dict[str, TrialProcess] = {}
            started = clock.now()
            for i, trial in enumerate(trials.values()):
                if trial.cause is not None:
                    continue
                if trial.name in self.failed:
                    trial.cause, trial.is_invalid = self.failed[trial.name].cause, self.failed[trial.name].is_invalid
                    continue
                self.say(f"{cell.title}: loading {trial.name}")
                was_kept = trial.name in self.kept
                try:
                    processes[trial.name] = self._load(stack, cell, index, trial, scratch / f"{i}.log")
                except SubjectError as error:
                    trial.cause, trial.is_invalid = str(error), error.kind == INVALID
                    # What fails at the shape of one cell may do at another's: it starts anew there.
                    if self.keeps_processes and not was_kept:
                        self.failed[trial.name] = trial
            if until is not None and self.deadline is not None and not self.loading_counts:
                until, self.deadline = (t + clock.now() - started for t in (until, self.deadline))
            for k, kind in enumerate(self.kinds):
                left = None if until is None else max(0.0, until - clock.now()) / (len(self.kinds) - k)
                self._pass(cell, g, kind, processes, trials, None if left is None else clock.now() + left)
            for name, process in processes.items():
                if trials[name].cause is None:
                    self.say(f"{cell.title}: memory of {name}")
                    with contextlib.suppress(SubjectError):  # the speed was measured; the memory is not known then
                        process.resume()
                        trials[name].memory = process.ask("memory")
                        process.pause()
        return list(trials.values())

    def _load(self, stack: contextlib.ExitStack, cell: Cell, index: int, trial: Trial, log: Path) -> TrialProcess:
        """A loaded process, asleep; one that fails is closed, because it may still be awake and hold memory."""
        # One seed a cell: its prompts are its own, and the same for all configurations.
        workload = Workload(**asdict(cell), seed=_seed(self.seed, "prompt", str(index)))
        is_peer = trial.recipe is None
        kept = self.kept.pop(trial.name, None)
        if kept is not None and kept.alive:
            try:
                kept.resume()
                trial.loaded = kept.ask("shape", LOAD_TIMEOUT_SEC, workload=asdict(workload))
                kept.pause()
            except SubjectError:
                kept.close()
                raise
            self.kept[trial.name] = kept
            return kept
        process = (
            self.peers.start(trial.name, self.kinds[0], workload, log)
            if is_peer
            else TrialProcess(trial.name, self.kinds[0], log=log)
        )
        stack.callback(process.close)
        try:
            if is_peer:
                trial.loaded = self.peers.load(process, workload)
            else:
                request = self._request(trial, workload, index)
                trial.loaded = process.ask("load", LOAD_TIMEOUT_SEC, **request)
                self.checked.add((index, trial.recipe.hash, request["folder"]))  # type: ignore[union-attr]
            process.pause()
            if self.keeps_processes and not is_peer:
                self.kept[trial.name] = process
            return process
        except SubjectError:
            process.close()
            raise
        finally:
            if is_peer:
                trial.labels = self.peers.labels(trial.name)

    def _request(self, trial: Trial, workload: Workload, index: int) -> dict[str, Any]:
        """What a process is asked to load; the twin and the baseline of later groups were checked already."""
        recipe = trial.recipe
        assert recipe is not None
        n_check = max(1, min(CHECK_TOKENS, self.config.n_positions - CHECK_STEPS))
        folder = str(self.folders.get(trial.name, self.folder).resolve())
        prompt = [(7919 * i + 13) % self.config.vocab_size for i in range(1, n_check + 1)]
        return {
            "folder": folder,
            "recipe": recipe.to_dict(),
            "workload": asdict(workload),
            "device": self.device,
            "threads": self.threads,
            "is_checked": True,
            "check_prompt": None if (index, recipe.hash, folder) in self.checked else prompt,
        }

    def _pass(
        self,
        cell: Cell,
        g: int,
        kind: str,
        processes: dict[str, TrialProcess],
        trials: dict[str, Trial],
        until: float | None,
    ) -> None:
        """Samples one kind of slice until all is decided, or blocks or time run out."""
        alive = [name for name in processes if trials[name].cause is None]
        where = {"cell": cell.title, "kind": kind, "group": g}
        share = 4 * len(alive) if self.keeps_processes else 4  # kept ones have run before
        for name in alive:
            processes[name].kind = kind
            left = WARM_UP_SEC if until is None else min(WARM_UP_SEC, max(0.0, until - clock.now()) / share)
            self.say(f"{cell.title}: warming up {name} ({kind})")
            try:
                timings = warm_up(processes[name], max_sec=left)
            except SubjectError as error:
                trials[name].cause = str(error)
                continue
            self.warm_ups.append({**where, "config": name, "timings_sec": timings})
            if stats.has_trend(timings):
                trials[name].notes.append(f"{kind}: timings still drifted after {left:.0f} s of warm-up")
        result = Pass(kind, self.level)
        started, done, first = clock.now(), 0, g * self.schedule[-1]

        def keep(sample: Sample) -> None:
            line = {**where, **sample.to_json()}
            self.samples.append(line)
            if self.log is not None:
                try:
                    self.log.write(json.dumps(line) + "\n")
                    self.log.flush()
                except OSError as error:
                    raise files.write_error(self.log.name, error) from None

        for n in self.schedule:
            subjects = [processes[name] for name in alive if trials[name].cause is None]
            if not subjects:
                break
            self.say(f"{cell.title}: {kind}, {done} of at most {self.schedule[-1]} blocks")
            run = run_blocks(
                subjects,
                rng_seed=_seed(self.seed, cell.title, kind),
                n_blocks=n - done,
                start_block=first + done,
                probe=self.probe,
                deadline_sec=until,
                on_sample=keep,
            )
            for name, failure in run.failures.items():
                trials[name].cause = str(failure)
            result.samples += run.samples
            done, result.is_cut = n, run.is_cut
            enough = (clock.now() - started) / len(subjects) >= self.min_time_sec
            if run.is_cut or (enough and self._decided(result, alive, trials)):
                break
        result.n_blocks = done
        for trial in trials.values():
            trial.passes[kind] = result
        half_width = result.resolution(self.baseline, self.twin)
        ratio = result.blocks.ratio(self.baseline, self.twin, self.level)
        word = result.verdict(self.baseline, self.twin, self.twin)
        known = half_width if half_width != float("inf") else None
        self.aa.append({**where, "half_width": known, "ratio": ratio.to_json(), "verdict": word})

    def _decided(self, result: Pass, alive: list[str], trials: dict[str, Trial]) -> bool:
        """The twin is not asked whether it is decided: it is the yardstick, and has to be one."""
        names = [n for n in alive if n not in (self.baseline, self.twin) and trials[n].cause is None]
        if trials[self.baseline].cause is not None:
            return True
        if trials[self.twin].cause is None and result.resolution(self.baseline, self.twin) > MAX_AA:
            return False
        return all(result.verdict(self.baseline, self.twin, name) != "undecided" for name in names)


def _seed(seed: int, *words: str) -> int:
    text = "\0".join([str(seed), *words])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
