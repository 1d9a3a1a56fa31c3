"""What the workers share: JSON lines, the slices of `measure.workload`, and how an engine looks to them.

Standard library and NumPy only, and nothing of Paretune but two files of the same kind, loaded by path: the one clock
and what a process says of itself. The requests and answers are those of `paretune.measure.worker`, and beside them
`convert`, `logits`, `greedy` and `nll`. Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Handler = Callable[[dict[str, Any]], dict[str, Any]]
MIN_SAME_TOKENS = 4  # of one prompt in every row of a batch: fewer is another computation, not rounding


class Refused(Exception):
    """What this peer cannot do; the message is one clause that says why."""


def _module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"peer_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_PARETUNE = Path(__file__).resolve().parents[3]
clock = _module("clock", _PARETUNE / "clock.py")
process = _module("process", _PARETUNE / "process.py")


class Engine:
    """A peer's model with a cache for B sequences, greedy.

    A subclass says how a prompt is read, how one step is taken and how the cache goes back. One that can only generate
    whole (CTranslate2) gives `phases` instead.
    """

    first: Any = None  # what `prefill` chose, in the peer's own form

    def prefill(self, prompts: list[list[int]]) -> Any:
        """Reads `prompts [B, T]` into an emptied cache and gives the token chosen for each row."""
        raise NotImplementedError

    def step(self, chosen: Any) -> Any:
        """One decode step of all rows: the tokens chosen before in, the next ones out."""
        raise NotImplementedError

    def rewind(self) -> None:
        """The cache as it was after the last `prefill`. Not timed."""
        raise NotImplementedError

    def ids(self, chosen: Any) -> list[int]:
        """The chosen tokens as plain numbers."""
        return [int(i) for i in np.asarray(chosen).ravel()]

    def logits(self, tokens: list[int]) -> np.ndarray:
        """fp32 `[T, V]` of one sequence, teacher-forced. What is in the cache may be lost."""
        raise NotImplementedError

    def phases(self, prompts: list[list[int]], n_steps: int) -> tuple[float, float, list[list[int]]]:
        """One request: seconds to the first token, seconds of `n_steps` steps after it, tokens `[B][1 + n_steps]`."""
        started = clock.now()
        chosen = self.prefill(prompts)
        between = clock.now()
        rows = [self.ids(chosen)]
        stepping = 0.0
        for _ in range(n_steps):
            before = clock.now()
            chosen = self.step(chosen)
            stepping += clock.now() - before
            rows.append(self.ids(chosen))
        return between - started, stepping, [list(row) for row in zip(*rows, strict=True)]

    # What `phases` alone gives; engines that can step have a form without its bookkeeping.

    def prefill_sec(self, prompts: list[list[int]]) -> float:
        started = clock.now()
        self.first = self.prefill(prompts)
        return clock.now() - started

    def decode_sec(self, prompts: list[list[int]], n_steps: int) -> float:
        if self.first is None:
            self.first = self.prefill(prompts)
        self.rewind()
        started = clock.now()
        chosen = self.first
        for _ in range(n_steps):
            chosen = self.step(chosen)
        return clock.now() - started

    def request_sec(self, prompts: list[list[int]], n_steps: int) -> float:
        started = clock.now()
        chosen = self.first = self.prefill(prompts)
        for _ in range(n_steps):
            chosen = self.step(chosen)
        return clock.now() - started


class PeerTrial:
    """What a worker holds between requests.

    Args:
        open_engine: `(request) -> (engine, what it says of itself)`: `proof`, `notes`, `version`, bytes.
        convert: `(request)`: writes the checkpoint in the peer's form into the folder `out`; None where it reads it.
    """

    def __init__(
        self,
        open_engine: Callable[[dict[str, Any]], tuple[Engine, dict[str, Any]]],
        convert: Handler | None = None,
    ) -> None:
        self.open_engine, self.convert_handler = open_engine, convert
        self.engine: Any = None
        self.request: dict[str, Any] = {}

    def ready(self, request: dict[str, Any]) -> dict[str, Any]:
        return {}

    def convert(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.convert_handler is not None, "this peer reads the checkpoint as it is"
        return self.convert_handler(request)

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Opens the model and runs both phases once; the answer is what the report says about the trial."""
        self.request = request
        started = clock.now()
        self.engine, said = self.open_engine(request)
        load_sec = clock.now() - started
        self.sample({"kind": "ttft"})
        self.sample({"kind": "tpot"})
        return {"load_sec": load_sec, "compile_sec": 0.0, "notes": [], **said}

    def sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds per unit over one slice, by the rules and at the positions of `measure.workload.Bench`."""
        settings, workload = self.request["slice"], self.request["workload"]
        prompts, n_new = self.request["prompts"], workload["output_len"]
        n_decode = max(1, min(settings["decode_steps"], n_new - 1))
        run, n_units = {
            "ttft": (lambda: self.engine.prefill_sec(prompts), 1),
            "tpot": (lambda: self.engine.decode_sec(prompts, n_decode), n_decode),
            "throughput": (lambda: self.engine.request_sec(prompts, n_new - 1), workload["batch_size"] * n_new),
        }[request["kind"]]
        n, elapsed = 0, 0.0
        with clock.quiet():
            while elapsed < settings["min_sec"]:
                elapsed += run()
                n += 1
        return {"sec": elapsed / (n * n_units)}

    def memory(self, request: dict[str, Any]) -> dict[str, Any]:
        """The process now and its peak during one request."""
        process.give_back_free_memory()
        is_reset = process.reset_peak_rss()
        self.sample({"kind": "throughput"})
        peak = process.peak_rss_bytes()
        return {"rss_bytes": process.rss_bytes(), "rss_peak_bytes": peak, "is_peak_of_request": is_reset}

    def logits(self, request: dict[str, Any]) -> dict[str, Any]:
        """Writes the teacher-forced logits of `sequences`, fp32 `[sum of T, V]`, to `path` (.npy)."""
        rows = [np.asarray(self.engine.logits(tokens), dtype=np.float32) for tokens in request["sequences"]]
        np.save(request["path"], np.concatenate(rows), allow_pickle=False)
        self.engine.first = None  # the cache holds something else now
        return {"shape": [sum(len(row) for row in rows), int(rows[0].shape[-1])]}

    def nll(self, request: dict[str, Any]) -> dict[str, Any]:
        """Writes -log p(token), nats, float64 `[N, T - 1]`, of the windows `[N][T]` to `path` (.npy).

        Each window is one teacher-forced prefill of its first T - 1 tokens, on its own: the loss of every token but
        the first. Nothing is said of numbers that are not finite; who reads them judges them.
        """
        rows = []
        for window in request["windows"]:
            logits = np.asarray(self.engine.logits(window[:-1]))
            rows.append(token_nll(logits, np.asarray(window[1:])))
        self.engine.first = None
        np.save(request["path"], np.stack(rows), allow_pickle=False)
        return {"n": len(rows)}

    def greedy(self, request: dict[str, Any]) -> dict[str, Any]:
        """`n` greedy tokens after `prompt`, the same prompt in every row of the batch.

        Raises:
            Refused: rows of one batch disagree: the peer's batch is not what it is taken for.
        """
        n_rows = self.request["workload"]["batch_size"]
        _, _, rows = self.engine.phases([request["prompt"]] * n_rows, request["n"] - 1)
        self.engine.first = None
        needed = min(MIN_SAME_TOKENS, len(rows[0]))
        if any(row[:needed] != rows[0][:needed] for row in rows):
            raise Refused(f"{n_rows} rows of one prompt give different tokens")
        return {"tokens": rows[0]}

    def handlers(self) -> dict[str, Handler]:
        verbs = ("ready", "convert", "load", "sample", "memory", "logits", "greedy", "nll")
        return {verb: getattr(self, verb) for verb in verbs}


def token_nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p(target), nats, float64 `[T]`, of logits `[T, V]`."""
    out = np.empty(len(targets))
    for i, (row, target) in enumerate(zip(logits, targets, strict=True)):  # a row at a time: [T, V] in fp64 is large
        wide = row.astype(np.float64)
        highest = wide.max()
        out[i] = highest + np.log(np.exp(wide - highest).sum()) - wide[target]
    return out


def serve(handlers: dict[str, Handler]) -> None:
    """Answers requests until standard input closes."""
    process.serve(handlers, (Refused,))


def folder_bytes(path: str | Path) -> int:
    """Bytes of the files below a folder."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
