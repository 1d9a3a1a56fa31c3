"""One run of `bench`: its settings, what it has measured, and its cells, each in as many groups as memory asks for."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from paretune import clock, files, hardware, stats
from paretune.engine.dispatch import Table
from paretune.measure.bench_group import Group
from paretune.measure.bench_rows import Trial
from paretune.measure.grid import groups_of, shared_and_own_bytes, trial_bytes
from paretune.measure.peers.subject import Peers
from paretune.measure.session import TrialProcess
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.recipe import Recipe
from paretune.records.bench import BenchRow, BenchSample, Cell, Resolution, WarmUp
from paretune.records.record import to_json


@dataclass
class Run:
    """One call of `bench`: its settings, and what it has measured so far.

    Args:
        deadline: the moment of `clock.now()` that ends it; None: none.
        measure_ceilings: gives the limits of the machine; called once, when the first rows have a result.
        on_first: called with the rows as soon as each has an interval of every kind. Nothing is judged in them.
    """

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
    measure_ceilings: Callable[[], hardware.Ceilings]
    deadline: float | None
    on_first: Callable[[list[BenchRow]], None] | None = None
    loading_counts: bool = True
    keeps_processes: bool = False
    tables: dict[str, Table] = field(default_factory=dict)
    ceilings: hardware.Ceilings | None = None
    log: IO[str] | None = None
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # of kept processes
    kept: dict[str, TrialProcess] = field(default_factory=dict)
    # Why not, by recipe and folder.
    asked: dict[tuple[str, str], str | None] = field(default_factory=dict)
    checked: set[tuple[int, str, str]] = field(default_factory=set)  # cell, recipe and folder that are exact
    failed: dict[str, Trial] = field(default_factory=dict)  # what failed once is not started again for each cell
    rows: list[BenchRow] = field(default_factory=list)
    aa: list[Resolution] = field(default_factory=list)
    samples: list[BenchSample] = field(default_factory=list)
    warm_ups: list[WarmUp] = field(default_factory=list)

    @property
    def twin(self) -> str:
        return f"{self.baseline} again"

    @property
    def level(self) -> float:
        return stats.look_level(0, len(self.schedule))

    def run(self, cells: Sequence[Cell]) -> None:
        """Measures all cells. What interrupts it goes up when the rows so far are kept."""
        with contextlib.ExitStack() as scratch:
            references = scratch.enter_context(tempfile.TemporaryDirectory(prefix="paretune-references-"))
            with self.stack:
                for i, cell in enumerate(cells):
                    CellRun(self, cell, i, n_left=len(cells) - i, references=references).run()

    def known_ceilings(self) -> hardware.Ceilings:
        if self.ceilings is None:
            self.say("measuring the ceilings of this machine")
            self.ceilings = self.measure_ceilings()
        return self.ceilings

    def keep(self, line: BenchSample) -> None:
        """A sample, on disk the moment it is taken."""
        self.samples.append(line)
        if self.log is not None:
            try:
                self.log.write(json.dumps(to_json(line)) + "\n")
                self.log.flush()
            except OSError as error:
                raise files.write_error(self.log.name, error) from None

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
            self.asked[key] = recipe.why_not(self.device, config)
        reason = self.asked[key]
        cause = None if reason is None else f"{recipe.name} cannot run here: {reason}"
        return Trial(name, recipe, notes=list(notes), cause=cause)


class CellRun:
    """One workload of the grid, in as many groups as memory asks for."""

    def __init__(self, run: Run, cell: Cell, index: int, n_left: int, references: str) -> None:
        self.of, self.cell, self.index, self.n_left, self.references = run, cell, index, n_left, references

    def run(self) -> None:
        of = self.of
        shared, own = shared_and_own_bytes(of.configs.values(), of.device, bool(of.peers.engines))
        each = trial_bytes(of.config, of.n_params, self.cell, own)
        # While it loads: the file's tensors beside the model; while it is checked: a reference and an fp32 twin.
        extra = shared + 3 * 4 * of.n_params
        names = [*of.configs, *of.peers.engines]
        challengers = [name for name in names if name != of.baseline]
        # What kept processes hold is theirs already.
        available = hardware.available_memory_bytes() + len(of.kept) * (own + 4 * of.n_params)
        groups = groups_of(challengers, each, extra, available)
        if len(groups) > 1 and of.keeps_processes:
            of.keeps_processes = False
            of.stack.close()
            of.kept.clear()
        for g, names_of_group in enumerate(groups):
            share = len(groups) - g + (self.n_left - 1) * len(groups)
            until = None if of.deadline is None else clock.now() + max(0.0, of.deadline - clock.now()) / share
            group = Group(self, g, [of.baseline, of.twin, *names_of_group], until)
            ended = "the time budget ended"
            try:
                group.run()
            except KeyboardInterrupt:
                ended = "it was interrupted"
                raise
            finally:
                of.rows += group.rows(ended)
                of.aa += group.resolutions()
