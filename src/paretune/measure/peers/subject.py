"""Peers as subjects of `bench`: started in their environments, converted for, checked, then sampled like our own."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from paretune import clock, files, hardware
from paretune.errors import ParetuneError
from paretune.measure.bench_rows import Labels
from paretune.measure.interleave import SubjectError
from paretune.measure.peers import agreement, convert, envs
from paretune.measure.peers.catalogue import INPUTS, Engine, refusal
from paretune.measure.session import TrialProcess
from paretune.measure.workload import DECODE_SLICE, MIN_SLICE_SEC, Workload, draw_prompts
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.records.bench import Agreement

CONVERT_TIMEOUT_SEC, LOAD_TIMEOUT_SEC, CHECK_TIMEOUT_SEC = 3600.0, 900.0, 600.0
WINDOWS_AT_ONCE = 4  # scored between two looks at the clock
INVALID = "Invalid"  # the kind of a `SubjectError`: the peer runs, but it is not the same model


class Peers:
    """The peers of one `bench` run on one checkpoint.

    Args:
        threads: set in every peer.
        say: called with a line, only while nothing is timed.
    """

    def __init__(
        self, engines: Sequence[Engine], folder: Path, config: ModelConfig, threads: int, say: envs.Say
    ) -> None:
        self.engines = {engine.name: engine for engine in engines}
        self.folder, self.config, self.threads, self.say = folder, config, threads, say
        self._reference: agreement.Reference | None = None
        self._agreements: dict[str, Agreement] = {}
        self._explanations: dict[str, str] = {}
        self._converted: dict[str, Path] = {}

    def labels(self, name: str) -> Labels:
        """What every row of that peer carries, measured or not."""
        engine = self.engines[name]
        return Labels(engine.peer.name, engine.format, self._agreements.get(name))

    def start(self, name: str, kind: str, workload: Workload, log: Path) -> TrialProcess:
        """The peer's process, nothing loaded yet; the checkpoint is converted first where the cache lacks it.

        Raises:
            SubjectError: it is not installed, does not take this model, or the conversion failed.
        """
        engine = self.engines[name]
        reason = refusal(engine, self.config, workload.input_len + workload.output_len)
        if reason:
            raise SubjectError(reason)
        if not engine.peer.reads_checkpoint:
            self._converted[name] = self._convert(engine, log.with_suffix(".convert.log"))
        return self._process(engine, kind, log)

    def load(self, process: TrialProcess, workload: Workload) -> dict[str, Any]:
        """Loads, and compares with our fp32 eager before anything is timed.

        Raises:
            SubjectError: it failed, with the cause; of kind `INVALID` where it is not the same model.
        """
        engine = self.engines[process.name]
        length, n_prompt, n_greedy = agreement.lengths(self.config)
        answer = self._load(process, workload, max(length, n_prompt + n_greedy))
        self._check(process, engine)
        return answer

    def losses(self, name: str, windows: Sequence[Sequence[int]], scratch: Path, cap_sec: float) -> np.ndarray:
        """-log p, nats, of every token but the first of each window, in a process of its own, one window at a time.

        Args:
            windows: token ids, `[N][T]`.
            scratch: a folder for what the process writes.
            cap_sec: of scoring; what was scored when it is over is given.

        Returns:
            float64 `[n, T - 1]` of the first n windows.

        Raises:
            SubjectError: it could not be started, loaded or asked.
        """
        length = len(windows[0])
        workload = Workload(length - 1, 1)  # as long as a window: what a model cannot hold is refused
        process = self.start(name, "ttft", workload, scratch / "log")
        with contextlib.closing(process):
            self._load(process, workload, length)
            deadline = clock.now() + cap_sec
            scored: list[np.ndarray] = []
            path = scratch / "nll.npy"
            for i in range(0, len(windows), WINDOWS_AT_ONCE):
                part = [list(window) for window in windows[i : i + WINDOWS_AT_ONCE]]
                left = deadline - clock.now()
                if left <= 0:
                    break
                process.ask("nll", CHECK_TIMEOUT_SEC, windows=part, path=str(path))
                values = np.load(path, allow_pickle=False)
                if values.shape != (len(part), length - 1) or values.dtype != np.float64:
                    raise SubjectError(f"losses {list(values.shape)} instead of {[len(part), length - 1]}")
                scored.append(values)
        return np.concatenate(scored) if scored else np.empty((0, length - 1))

    def _load(self, process: TrialProcess, workload: Workload, n_tokens: int) -> dict[str, Any]:
        """Loads the model with a cache for `n_tokens` at least."""
        engine = self.engines[process.name]
        request: dict[str, Any] = {
            "folder": str(self.folder.resolve()),
            "config": convert.request_config(self.config),
            "format": engine.format,
            "threads": self.threads,
            "workload": asdict(workload),
            "prompts": draw_prompts(workload, self.config.vocab_size).tolist(),
            "capacity": max(workload.input_len + workload.output_len, n_tokens),
            "slice": {"min_sec": MIN_SLICE_SEC, "decode_steps": DECODE_SLICE},
        }
        if engine.peer.reads_checkpoint:
            disk_bytes = sum(path.stat().st_size for path in checkpoint.weight_files(self.folder))
        else:
            request["converted"] = str(self._converted[engine.name])
            disk_bytes = envs.bytes_below(self._converted[engine.name])
        answer = process.ask("load", LOAD_TIMEOUT_SEC, **request)
        return {**answer, "disk_bytes": disk_bytes}

    def _process(self, engine: Engine, kind: str, log: Path) -> TrialProcess:
        try:
            command = envs.command(engine.peer)
        except ParetuneError as error:
            raise SubjectError(error.cause, error.cure) from None
        environment = {"OMP_NUM_THREADS": str(self.threads)}
        return TrialProcess(engine.name, kind, log=log, command=command, environment=environment)

    def _convert(self, engine: Engine, log: Path) -> Path:
        """In a process of its own: what a conversion takes is not the memory of the engine."""
        try:
            files.ensure_folder(convert.models_folder())
            target = convert.existing(self.folder, engine)
            if target is not None:
                return target
            with contextlib.closing(self._process(engine, "ttft", log)) as process:

                def ask(do: str, **request: Any) -> dict[str, Any]:
                    return process.ask(do, CONVERT_TIMEOUT_SEC, **request)

                return convert.converted(self.folder, self.config, engine, self.threads, ask, self.say)
        except SubjectError as error:
            if not error.kind:  # not installed, killed, timed out: no word of the conversion is needed
                raise
            raise SubjectError(f"the conversion failed: {error.cause}", error.cure, error.kind) from None
        except ParetuneError as error:  # the cache folder is full or read-only: the other rows go on
            raise SubjectError(f"the conversion failed: {error.cause}", error.cure) from None

    def _check(self, process: TrialProcess, engine: Engine) -> None:
        if self._reference is None:
            self.say("our fp32 eager, for the comparison of tokens")
            self._reference = agreement.make_reference(self.folder, self.config, self.threads)
        reference = self._reference
        # For every workload: the worker also holds the rows of its batch against each other.
        greedy = process.ask("greedy", CHECK_TIMEOUT_SEC, prompt=reference.prompt, n=len(reference.greedy))
        if engine.name not in self._agreements:
            with tempfile.TemporaryDirectory(prefix="paretune-peer-") as scratch:
                path = Path(scratch) / "logits.npy"
                process.ask("logits", CHECK_TIMEOUT_SEC, sequences=reference.sequences, path=str(path))
                logits = np.load(path, allow_pickle=False)
            try:
                found = agreement.compare(reference, logits, greedy["tokens"], engine.bits)
            except ValueError as error:
                raise SubjectError(f"{engine.name} gives {error}", kind=INVALID) from None
            self._agreements[engine.name] = found
        cause = agreement.shortfall(self._agreements[engine.name], engine.bits)
        if cause:
            raise SubjectError(f"{cause}{self._explained(engine, reference)}", kind=INVALID)

    def _explained(self, engine: Engine, reference: agreement.Reference) -> str:
        """What of a format makes it fall short, as further sentences; nothing where it is not known."""
        format = engine.peer.formats[engine.format]
        said = "" if format.inputs is None else self._rounding(engine, format.inputs, reference)
        if format.saturates and _lacks_dot_products():
            said += ". This processor has no dot-product instruction, without which its 8-bit products saturate"
        return said

    def _rounding(self, engine: Engine, inputs: str, reference: agreement.Reference) -> str:
        """Whether the way in which a format rounds inputs is what makes it fall short."""
        if engine.name not in self._explanations:
            self.say(f"our fp32 eager with inputs rounded as {engine.name} does, for the cause")
            share = agreement.share_with_inputs(self.folder, reference, inputs, engine.bits, self.threads)
            least = agreement.LEAST_TOP1[engine.bits]
            told = "that is its cause" if share < least else "that alone is not its cause"
            self._explanations[engine.name] = (
                f". This format rounds the inputs of a matrix to {INPUTS[inputs]}; our own fp32 with its inputs "
                f"rounded like that, and nothing else, agrees at {share:.1%}: {told}"
            )
        return self._explanations[engine.name]


def _lacks_dot_products() -> bool:
    """Whether this is an x86 processor on which libraries add pairs of 8-bit products in 16 bits."""
    available = set(hardware.instruction_sets())
    return "avx2" in available and not {"avx512_vnni", "avx_vnni"} & available
