"""The configurations that `bench` measures side by side in one cell: started, sampled in rounds, made into rows.

A round takes blocks of every kind of slice, so that every configuration has a first result of every kind before any has
a second one. From then on only what is undecided goes on, with the baseline and its twin in each block.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune import clock, stats
from paretune.measure.bench_rows import Pass, Trial, estimate_of, make_row
from paretune.measure.interleave import Sample, SubjectError, run_blocks, warm_up
from paretune.measure.peers.subject import INVALID
from paretune.measure.session import LOST, TrialProcess
from paretune.measure.workload import Workload
from paretune.recipe import Recipe
from paretune.records.bench import BenchRow, BenchSample, Resolution, WarmUp
from paretune.records.judge import TOO_NOISY

if TYPE_CHECKING:
    from paretune.measure.bench_run import CellRun

FIRST_BLOCKS = stats.MIN_BLOCKS  # after these there is an interval to show, though nothing is judged yet
FIRST_SLICE_SEC = 0.05  # of these blocks: every row waits for them, and they are shown before anything is judged
LOAD_TIMEOUT_SEC = 900.0  # max-autotune compiles for minutes
WARM_UP_SEC = 10.0
CHECK_TOKENS, CHECK_STEPS = 32, 12  # of the exactness check before anything is timed
LOADING_SHARE = 0.6  # of the time: what is not loaded by then leaves the rest to what is


class Group:
    """Configurations that are measured side by side in one cell, the baseline and its twin among them."""

    def __init__(self, cell_run: CellRun, g: int, names: Sequence[str], until: float | None) -> None:
        self.of, self.cell, self.index, self.g = cell_run.of, cell_run.cell, cell_run.index, g
        self.references, self.n_cells_left = cell_run.references, cell_run.n_left
        self.until = until
        self.trials = {name: self.of.trial_of(name, self.cell) for name in names}
        self.processes: dict[str, TrialProcess] = {}
        self.passes: dict[str, Pass] = {}
        self.spent_sec: dict[tuple[str, str], float] = {}  # of sampling, by kind and name, probes included
        self.has_notes = False

    # -- what it gives

    def rows(self, ended: str, trials: Mapping[str, Trial] | None = None) -> list[BenchRow]:
        """Args:
        ended: what ended the run, where something is missing.
        trials: by name; None: those of the group.
        """
        of, trials = self.of, trials or self.trials
        order = {name: i for i, name in enumerate([*of.configs, of.twin, *of.peers.engines])}
        shown = [t for t in trials.values() if self.g == 0 or t.name not in (of.baseline, of.twin)]
        first = trials[of.baseline]
        return [
            make_row(trial, first, of.twin, self.cell, of.config, of.ceilings, ended, self.g)
            for trial in sorted(shown, key=lambda t: order[t.name])
        ]

    def resolutions(self) -> list[Resolution]:
        """What the baseline differs from itself by, for each kind."""
        of, out = self.of, []
        for kind, result in self.passes.items():
            half_width = result.resolution(of.baseline, of.twin)
            ratio = result.blocks.ratio(of.baseline, of.twin, of.level)
            word = result.verdict(of.baseline, of.twin, of.twin)
            known = half_width if half_width != float("inf") else None
            out.append(Resolution(self.cell.title, self.g, kind, known, estimate_of(ratio), word))
        return out

    # -- the run

    def run(self) -> None:
        of = self.of
        if self.until is not None and clock.now() >= self.until:
            return
        with contextlib.ExitStack() as own:
            stack = of.stack if of.keeps_processes else own
            self.scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paretune-bench-")))
            self.stack = stack
            started = clock.now()
            self._load_all()
            if self.until is not None and of.deadline is not None and not of.loading_counts:
                loading_sec = clock.now() - started
                self.until, of.deadline = self.until + loading_sec, of.deadline + loading_sec
            self._sample()
            for name, process in self.processes.items():
                trial = self.trials[name]
                if trial.cause is None and not trial.memory:
                    with contextlib.suppress(SubjectError):  # the speed was measured; the memory is not known then
                        process.resume()
                        trial.memory = process.ask("memory")
                        process.pause()
            of.known_ceilings()
            self._ask_notes()

    def _load_all(self) -> None:
        of, started = self.of, clock.now()
        for i, trial in enumerate(self.trials.values()):
            if trial.cause is not None:
                continue
            if trial.name in of.failed:
                trial.cause, trial.is_invalid = of.failed[trial.name].cause, of.failed[trial.name].is_invalid
                continue
            if self.until is not None and of.loading_counts:
                share = (clock.now() - started) / max(self.until - started, 1e-9)
                # The baseline and its twin are what the others are compared with.
                if share > LOADING_SHARE and i >= 2:
                    continue
            of.say(f"{self.cell.title}: starting {trial.name} ({i + 1} of {len(self.trials)}){self._left_text()}")
            was_kept = trial.name in of.kept
            try:
                self.processes[trial.name] = self._start(trial, self.scratch / f"{i}.log")
            except SubjectError as error:
                trial.cause, trial.is_invalid = str(error), error.kind == INVALID
                # What fails at the shape of one cell may do at another's: it starts anew there.
                if of.keeps_processes and not was_kept:
                    of.failed[trial.name] = trial

    def _start(self, trial: Trial, log: Path) -> TrialProcess:
        try:
            return self._load(trial, log)
        except SubjectError as error:
            if error.kind != LOST:
                raise
            self.of.say(f"{trial.name}: {error.cause}")
        return self._load(trial, log)  # newly executed: it cannot be lost with the fork server again

    def _load(self, trial: Trial, log: Path) -> TrialProcess:
        """A process that is loaded and warm, asleep; one that fails is closed, because it may still be awake and hold
        memory."""
        # One seed a cell: its prompts are its own, and the same for all configurations.
        of = self.of
        workload = Workload(**asdict(self.cell), seed=seed_of(of.seed, "prompt", str(self.index)))
        kept = of.kept.pop(trial.name, None)
        if kept is not None and kept.alive:
            try:
                kept.resume()
                self._loaded(trial, kept.ask("shape", LOAD_TIMEOUT_SEC, workload=asdict(workload), **self._warming()))
                kept.pause()
            except SubjectError:
                kept.close()
                raise
            of.kept[trial.name] = kept
            return kept
        if trial.recipe is None:
            return self._load_peer(trial, workload, log)
        process = TrialProcess(trial.name, of.kinds[0], log=log, fresh=of.device != "cpu")
        self.stack.callback(process.close)
        if process.note:
            of.say(process.note)
            trial.notes.append(process.note)
        try:
            request = self._request(trial, trial.recipe, workload)
            self._loaded(trial, process.ask("start", LOAD_TIMEOUT_SEC, **request))
            of.checked.add((self.index, trial.recipe.hash, request["folder"]))
            process.pause()
        except SubjectError:
            process.close()
            raise
        if of.keeps_processes:
            of.kept[trial.name] = process
        return process

    def _load_peer(self, trial: Trial, workload: Workload, log: Path) -> TrialProcess:
        of = self.of
        process = of.peers.start(trial.name, of.kinds[0], workload, log)
        self.stack.callback(process.close)
        try:
            trial.loaded = of.peers.load(process, workload)
            process.pause()
            for kind in of.kinds:
                process.kind = kind
                left = self._warm_sec()
                of.say(f"{self.cell.title}: warming up {trial.name} ({kind})")
                timings = warm_up(process, max_sec=left)
                self._warmed(trial, kind, timings, not stats.has_trend(timings), left)
            return process
        except SubjectError:
            process.close()
            raise
        finally:
            trial.labels = of.peers.labels(trial.name)

    def _request(self, trial: Trial, recipe: Recipe, workload: Workload) -> dict[str, Any]:
        """What a process is asked to start; the twin and the baseline of later groups were checked already."""
        of = self.of
        n_check = max(1, min(CHECK_TOKENS, of.config.n_positions - CHECK_STEPS))
        folder = str(of.folders.get(trial.name, of.folder).resolve())
        prompt = [(7919 * i + 13) % of.config.vocab_size for i in range(1, n_check + 1)]
        return {
            "folder": folder,
            "recipe": recipe.to_dict(),
            "workload": asdict(workload),
            "device": of.device,
            "threads": of.threads,
            "is_checked": True,
            "check_prompt": None if (self.index, recipe.hash, folder) in of.checked else prompt,
            "references": self.references,
            **self._warming(),
        }

    def _warming(self) -> dict[str, Any]:
        return {"kinds": list(self.of.kinds), "warm_sec": self._warm_sec()}

    def _warm_sec(self) -> float:
        if self.until is None or not self.of.loading_counts:
            return WARM_UP_SEC
        return min(WARM_UP_SEC, max(0.0, self.until - clock.now()) / (2 * len(self.trials)))

    def _loaded(self, trial: Trial, answer: dict[str, Any]) -> None:
        for kind, warm in answer.pop("warm").items():
            self._warmed(trial, kind, warm["timings_sec"], warm["settled"], self._warm_sec())
        trial.memory = answer.pop("memory", {})
        trial.loaded = answer

    def _warmed(self, trial: Trial, kind: str, timings: list[float], is_settled: bool, sec: float) -> None:
        self.of.warm_ups.append(WarmUp(self.cell.title, kind, self.g, trial.name, timings))
        if not is_settled:
            trial.notes.append(f"{kind}: timings still drifted after {sec:.0f} s of warm-up")

    # -- sampling

    @property
    def alive(self) -> list[str]:
        return [name for name in self.processes if self.trials[name].cause is None]

    def _sample(self) -> None:
        """Rounds of all kinds until all is decided, or blocks or time run out."""
        of = self.of
        self.passes = {kind: Pass(kind, of.level) for kind in of.kinds}
        for trial in self.trials.values():
            trial.passes = dict(self.passes)
        first = min(FIRST_BLOCKS, of.schedule[0])
        for n_blocks in sorted({first, *of.schedule}):
            for i, kind in enumerate(of.kinds):
                result = self.passes[kind]
                names = self._due(result)
                if not names:
                    continue
                of.say(self._progress(n_blocks, names))
                left = None if self.until is None else max(0.0, self.until - clock.now()) / (len(of.kinds) - i)
                self._blocks(result, names, n_blocks, None if left is None else clock.now() + left)
            if n_blocks == first:
                self._show_first()
            if self.until is not None and clock.now() >= self.until:
                return
            if not any(self._due(result) for result in self.passes.values()):
                return

    def _show_first(self) -> None:
        of = self.of
        if of.on_first is not None:
            # Each interval by itself at 95 %: nothing is decided by it, so it pays for no further looks.
            passes = {kind: replace(result, level=stats.LEVEL) for kind, result in self.passes.items()}
            trials = {name: replace(trial, passes=passes) for name, trial in self.trials.items()}
            of.on_first([row.without_verdicts() for row in self.rows("it goes on", trials)])
        # Not before: they take seconds, and every row waits for them.
        of.known_ceilings()
        self._ask_notes()

    def _ask_notes(self) -> None:
        """What has to be known of the recipes, such as what a number format is worth here, which is timed."""
        if not self.has_notes:
            self.has_notes = True
            for trial in self.trials.values():
                trial.notes += trial.recipe.notes(self.of.device) if trial.recipe else []

    def _due(self, result: Pass) -> list[str]:
        """Who is in the next blocks: what is undecided or was not sampled for long enough, with the baseline and its
        twin; nobody where all is done. The twin is not asked whether it is decided: it is the yardstick, and has to
        be one."""
        of, alive = self.of, self.alive
        if of.baseline not in alive:
            # Times without ratios: once round, since nothing will ever be decided.
            return [] if result.n_blocks >= of.schedule[0] else alive
        yardsticks = [name for name in (of.baseline, of.twin) if name in alive]
        if result.n_blocks < of.schedule[0]:
            return alive
        is_blunt = of.twin in alive and result.resolution(of.baseline, of.twin) > TOO_NOISY

        def is_open(name: str) -> bool:
            if self.spent_sec.get((result.kind, name), 0.0) < of.min_time_sec:
                return True
            return result.verdict(of.baseline, of.twin, name) == "undecided"

        due = [name for name in alive if name not in yardsticks and is_open(name)]
        if not due:
            short = any(self.spent_sec.get((result.kind, name), 0.0) < of.min_time_sec for name in yardsticks)
            return yardsticks if is_blunt or short else []
        return [name for name in alive if name in due or name in yardsticks]

    def _blocks(self, result: Pass, names: Sequence[str], n_blocks: int, until: float | None) -> None:
        """Samples `names` until there are `n_blocks` blocks; those that are lost with the fork server are started
        again, and their blocks completed."""
        of, started = self.of, clock.now()
        first = self.g * of.schedule[-1]
        for name in names:
            process = self.processes[name]
            process.kind = result.kind
            # No verdict may rest on short slices alone: where a look is taken of the first blocks, theirs are long.
            is_shown_only = result.n_blocks < FIRST_BLOCKS < of.schedule[0]
            process.slice_sec = FIRST_SLICE_SEC if is_shown_only else None
        is_whole = False
        while not is_whole:
            run = run_blocks(
                [self.processes[name] for name in names if self.trials[name].cause is None],
                rng_seed=seed_of(of.seed, self.cell.title, result.kind),
                n_blocks=n_blocks - result.n_blocks,
                start_block=first + result.n_blocks,
                probe=of.probe,
                deadline_sec=until,
                on_sample=lambda sample: self._keep(result, sample),
                done=result.samples,
            )
            lost = [name for name, failure in run.failures.items() if failure.kind == LOST]
            for name, failure in run.failures.items():
                if name in lost:
                    self._restart(self.trials[name], result.kind)
                else:
                    self.trials[name].cause = str(failure)
            is_whole = not lost
        result.is_cut = run.is_cut
        result.n_blocks = n_blocks
        for name in names:
            key = result.kind, name
            self.spent_sec[key] = self.spent_sec.get(key, 0.0) + (clock.now() - started) / len(names)

    def _keep(self, result: Pass, sample: Sample) -> None:
        result.samples.append(sample)
        self.of.keep(BenchSample(self.cell.title, self.g, result.kind, **vars(sample)))

    def _restart(self, trial: Trial, kind: str) -> None:
        self.of.say(f"{trial.name}: the server that forks trials ended: started again")
        try:
            self.processes[trial.name] = self._load(trial, self.scratch / f"{trial.name}-again.log")
            self.processes[trial.name].kind = kind
        except SubjectError as error:
            trial.cause = str(error)

    # -- progress

    def _progress(self, n_blocks: int, names: Sequence[str]) -> str:
        of = self.of
        n_rows = len([n for n in self.alive if n not in (of.baseline, of.twin)])
        open_rows = {n for result in self.passes.values() for n in self._due(result)} - {of.baseline, of.twin}
        decided = f", {n_rows - len(open_rows)} of {n_rows} decided" if n_rows else ""
        return f"{self.cell.title}: up to block {n_blocks} of at most {of.schedule[-1]}{decided}{self._left_text()}"

    def _left_text(self) -> str:
        """The time that is left: of the budget, or what it takes at most if things go on as they did."""
        of = self.of
        if of.deadline is not None:
            return f"; {max(0.0, of.deadline - clock.now()):.0f} s left"
        done = [r for r in self.passes.values() if r.n_blocks]
        if not done:
            return ""
        left = 0.0
        for result in self.passes.values():
            like = result if result.n_blocks else done[0]
            a_slice = sum(self.spent_sec.get((like.kind, n), 0.0) for n in self.alive) / max(1, len(like.samples))
            left += a_slice * len(self._due(result)) * (of.schedule[-1] - result.n_blocks)
        more = f" in this cell, {self.n_cells_left - 1} more" if self.n_cells_left > 1 else ""
        return f"; at most {left:.0f} s left{more}"


def seed_of(seed: int, *words: str) -> int:
    """A seed of its own for each use."""
    text = "\0".join([str(seed), *words])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
