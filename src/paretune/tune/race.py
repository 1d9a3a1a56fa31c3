"""Trials in their processes: started, asked, raced in blocks, scored; all of it through the journal."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from paretune import clock, hardware
from paretune.errors import NoEffectError, NotExactError
from paretune.evaluate.fidelity import Scores
from paretune.files import write_bytes
from paretune.measure.interleave import Blocks, SubjectError, run_blocks
from paretune.measure.session import LOST, TrialProcess
from paretune.measure.workload import Workload
from paretune.recipe import Recipe
from paretune.records.explanation import Explanation
from paretune.records.record import from_json, to_json
from paretune.records.trial import TrialFacts
from paretune.tune.goal import Goal
from paretune.tune.journal import Journal

WORKER = "paretune.tune.worker"
CONFIRMATION = "confirm"  # how the ids of trials begin that are measured again in new processes
REFERENCES = "references"  # folder of what trials are checked against
BASELINE, TWIN = "baseline", "baseline-again"
START_TIMEOUT_SEC = 600.0
WARM_UP_SEC = 4.0
KEEP_POSITIONS = 256  # at which the whole distribution is kept, for the KL divergence: 50 MB of 50,000 words


@dataclass
class TrialState:
    """What is known of one trial."""

    id: str
    recipe: Recipe
    process: TrialProcess | None = None
    facts: TrialFacts | None = None
    failure: str | None = None
    failure_kind: Literal["failed", "invalid"] = "failed"  # invalid: no effect, or not exact
    start_sec: float = 0.0
    seed: int = 0
    is_known: bool = False  # an earlier run has started it, and this one not yet


class Race:
    """All trials of a run. Nothing else runs while one of them is timed."""

    def __init__(self, goal: Goal, folder: Path, model_folder: Path, journal: Journal, say: Callable[[str], None]):
        self.goal, self.folder, self.model_folder, self.journal, self.say = goal, folder, model_folder, journal, say
        self.trials: dict[str, TrialState] = {}
        self.probe: hardware.BandwidthProbe | None = None
        self.check_prompt: list[int] = []
        for name in ("logs", "scores", REFERENCES):
            (folder / name).mkdir(exist_ok=True)

    # -- life of the processes

    def add(self, id: str, recipe: Recipe, seed: int | None = None) -> TrialState:
        """Registers a trial (once) and takes over what the journal knows of it."""
        if id not in self.trials:
            state = TrialState(id, recipe, seed=self.goal.seed if seed is None else seed)
            loaded, failed = self.journal.find("loaded", trial=id), self.journal.find("failed", trial=id)
            if loaded:
                state.facts = from_json(TrialFacts, loaded["facts"], f"the journal's entry of {id}")
                state.start_sec, state.is_known = loaded["start_sec"], True
            if failed and id not in (BASELINE, TWIN):  # without these nothing goes on: a resumed run tries them again
                state.failure, state.failure_kind = failed["reason"], failed["kind"]
            self.trials[id] = state
        return self.trials[id]

    def start(self, ids: Sequence[str]) -> None:
        """Starts the processes that are not running yet; a failure becomes a row.

        They load and warm up one by one: two that compute at once would wait for each other's threads and spoil each
        other's load and compile times. What an earlier run has started and paid for, a resumed one does not pay again.
        """
        waiting = [self.trials[i] for i in ids if not self.trials[i].failure and self.trials[i].process is None]
        if not waiting:
            return
        known = [state for state in waiting if state.is_known]
        with self.journal.paused() if known else contextlib.nullcontext():
            self._start(known)
        self._start([state for state in waiting if state not in known])
        self.start(ids)  # those that were lost with the fork server; newly executed ones cannot be

    def _start(self, waiting: Sequence[TrialState]) -> None:
        began = clock.now()
        for state in waiting:
            try:
                state.process = self._spawn(state)
            except SubjectError as error:
                self._ended(state, error)
        for state in waiting:  # newly executed ones import their libraries side by side
            self._guard(state, lambda process: process.receive(START_TIMEOUT_SEC))
            if state.process is not None:
                state.process.pause()
        import_sec = (clock.now() - began) / max(1, len(waiting))
        for state in waiting:
            if state.process is None:
                continue
            self.say(f"starting {state.recipe.name}")
            began = clock.now()
            self._guard(state, functools.partial(self._load, state))
            state.is_known = False
            if state.facts is not None and not self.journal.find("loaded", trial=state.id):
                state.start_sec = import_sec + clock.now() - began
                self.journal.record("loaded", trial=state.id, facts=to_json(state.facts), start_sec=state.start_sec)

    def _spawn(self, state: TrialState) -> TrialProcess:
        log = self.folder / "logs" / f"{state.id}.log"
        # A process that is confirmed shares nothing with those of the search; CUDA does not survive a fork.
        fresh = state.id.startswith(CONFIRMATION) or self.goal.device != "cpu"
        process = TrialProcess(state.id, self.goal.sample_kind, log, WORKER, fresh=fresh)
        if process.note:
            self.say(process.note)
        process.send("ready")
        return process

    def _load_request(self, state: TrialState) -> dict[str, Any]:
        g = self.goal
        workload = Workload(g.input_len, g.output_len, g.batch_size, state.seed)
        return {
            "folder": str(self.model_folder.resolve()),
            "recipe": state.recipe.to_dict(),
            "device": g.device,
            "threads": g.threads,
            "workload": workload.__dict__,
            "check_prompt": self.check_prompt,
            "references": str((self.folder / REFERENCES).resolve()),
            "is_checked": True,  # the space was asked `requires` once, on a quiet machine
            "kinds": [g.sample_kind],
            "warm_sec": WARM_UP_SEC,
            "side": ["ttft", "tpot"],  # beside the objective
        }

    def _load(self, state: TrialState, process: TrialProcess) -> None:
        process.resume()
        answer = process.ask("start", START_TIMEOUT_SEC, **self._load_request(state))
        process.pause()
        if state.facts is None:
            warm = answer.pop("warm")[self.goal.sample_kind]
            notes = [*answer.get("notes", ()), *state.recipe.notes(self.goal.device)]
            if process.note:
                notes.append(process.note)
            if not warm["settled"]:
                notes.append(f"its timings still drifted after {WARM_UP_SEC:.0f} s of warming up")
            settled = {"warm_settled": warm["settled"], "n_warm": len(warm["timings_sec"])}
            state.facts = from_json(TrialFacts, {**answer, "notes": notes, **settled}, "its process's answer")

    def _guard(self, state: TrialState, act: Callable[[TrialProcess], Any]) -> Any:
        """Runs `act` on the trial's process, if it has one; what goes wrong with it is its row's cause."""
        if state.failure or state.process is None:
            return None
        try:
            return act(state.process)
        except SubjectError as error:
            self._ended(state, error)
            return None

    def _ended(self, state: TrialState, error: SubjectError) -> None:
        if error.kind == LOST:  # no fault of its own: it is started again when it is needed
            self.say(f"{state.recipe.name}: {error.cause}")
            self.stop(state.id)
        else:
            self.fail(state, error)

    def fail(self, state: TrialState, error: SubjectError) -> None:
        """Ends a trial; one that had no effect or is not exact is invalid, any other has failed."""
        invalid = error.kind in (NoEffectError.__name__, NotExactError.__name__)
        state.failure, state.failure_kind = str(error), "invalid" if invalid else "failed"
        self.journal.record("failed", trial=state.id, reason=state.failure, kind=state.failure_kind)
        self.say(f"{state.recipe.name} failed: {state.failure}")
        self.stop(state.id)

    def why(self, id: str, ceilings: hardware.Ceilings) -> list[Explanation] | None:
        """Explanations of a trial from a quick profile in its process; None where that does not run any more.

        A profile that fails ends nothing: the trial has its times.
        """
        known, state = self.journal.find("why", trial=id), self.trials[id]
        if known:
            return _explanations(known)
        if state.process is None or state.facts is None:
            return None
        phase = "prefill" if self.goal.objective == "ttft" else "decode"
        state.process.resume()
        try:
            threads = state.facts.threads or {}
            answer = state.process.ask("why", phase=phase, ceilings=ceilings.to_json(), threads=threads)
        except SubjectError as error:
            self.say(f"{state.recipe.name} could not be profiled: {error}")
            self.stop(id)  # it may be in the middle of anything; started again when it is needed
            return None
        state.process.pause()
        self.journal.record("why", trial=id, explanations=answer["explanations"])
        return _explanations(answer)

    def stop(self, id: str) -> None:
        state = self.trials[id]
        if state.process is not None:
            state.process.close()
            state.process = None

    def stop_all(self) -> None:
        for id in self.trials:
            self.stop(id)

    def alive(self, ids: Sequence[str]) -> list[str]:
        return [i for i in ids if i in self.trials and not self.trials[i].failure]

    # -- speed

    def blocks(self, stage: str, ids: Sequence[str], n_blocks: int, deadline_sec: float | None) -> bool:
        """Measures `n_blocks` blocks of these trials, or what is missing of them.

        Args:
            deadline_sec: of the budget's clock (`journal.elapsed_sec`).

        Returns:
            whether all blocks are there.
        """
        ids = self.alive(ids)
        known = self.journal.find("stage", stage=stage)
        if known:
            first, n_blocks = known["first"], known["n_blocks"]
            ids = self.alive(known["trials"])  # a block is not filled up later with trials that were not in it
        else:
            first = 1 + max((s.block for s in self.journal.samples), default=-1)
            self.journal.record("stage", stage=stage, first=first, n_blocks=n_blocks, trials=list(ids))
        taken = {(s.block, s.subject) for s in self.journal.samples}
        missing = [i for i in ids for b in range(first, first + n_blocks) if (b, i) not in taken]
        if not missing:
            return True
        if deadline_sec is not None and self.journal.elapsed_sec >= deadline_sec:
            return False
        self.start(ids)
        subjects = [self.trials[i].process for i in self.alive(ids)]
        if self.probe is None:
            self.probe = hardware.BandwidthProbe(self.goal.threads)
        run = run_blocks(
            [s for s in subjects if s is not None],
            rng_seed=self.goal.seed,
            start_block=first,
            n_blocks=n_blocks,
            probe=self.probe if self.goal.device == "cpu" else None,
            deadline_sec=None if deadline_sec is None else clock.now() + deadline_sec - self.journal.elapsed_sec,
            on_sample=self.journal.add_sample,
            done=list(self.journal.samples),
        )
        for name, error in run.failures.items():
            self._ended(self.trials[name], error)
        if any(error.kind == LOST for error in run.failures.values()):
            return self.blocks(stage, ids, n_blocks, deadline_sec)
        return not run.is_cut

    def is_whole(self, stage: str) -> bool:
        """Whether every sample of a stage is in the journal (those of trials that failed aside)."""
        known = self.journal.find("stage", stage=stage)
        if not known:
            return False
        taken = {(s.block, s.subject) for s in self.journal.samples}
        blocks = range(known["first"], known["first"] + known["n_blocks"])
        return all((b, i) in taken for i in self.alive(known["trials"]) for b in blocks)

    def measured(self) -> Blocks:
        return Blocks(self.journal.samples)

    # -- quality

    def scores_path(self, id: str, split: str, start: int, stop: int) -> Path:
        """Where the scores of a trial on windows `start` to `stop` lie."""
        return self.folder / "scores" / f"{id}.{split}.{start}-{stop}.npz"

    def score(
        self, id: str, split: str, windows: torch.Tensor, text_name: str, start: int = 0, stop: int | None = None
    ) -> Scores | None:
        """Scores of a trial on windows `start` to `stop` of a text, from disk where they are there already.

        None where the trial failed.
        """
        stop = windows.size(0) if stop is None else stop
        out = self.scores_path(id, split, start, stop)
        state = self.trials[id]
        about = {"trial": id, "split": split, "start": start, "stop": stop}
        if not (out.is_file() and self.journal.find("scored", **about)):
            path = self.folder / "scores" / f"windows.{split}.npy"
            if not path.is_file():
                write_bytes(path, _npy(windows))
            self.start([id])
            if state.process is None:
                return None
            self.say(f"scoring {state.recipe.name} on windows {start + 1} to {stop} of the {split} text")
            state.process.resume()
            answer = self._guard(
                state,
                lambda process: process.ask(
                    "score",
                    timeout_sec=START_TIMEOUT_SEC,
                    windows=str(path.resolve()),
                    start=start,
                    stop=stop,
                    out=str(out.resolve()),
                    batch_size=self.goal.batch_size,
                    keep_positions=max(2, KEEP_POSITIONS * (stop - start) // windows.size(0)),
                    text_name=text_name,
                ),
            )
            if answer is None or state.process is None:
                # Started and scored again where it was lost with the fork server.
                return None if state.failure else self.score(id, split, windows, text_name, start, stop)
            state.process.pause()
            self.journal.record("scored", **about, **answer)
        return Scores.load(out)


def _explanations(line: dict[str, Any]) -> list[Explanation]:
    """Of an answer, or of a line of the journal."""
    return [from_json(Explanation, one, "an explanation") for one in line["explanations"]]


def _npy(windows: torch.Tensor) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, windows.numpy())
    return buffer.getvalue()
