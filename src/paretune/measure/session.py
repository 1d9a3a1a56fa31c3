"""The parent's side of a trial: starts the worker, asks it, stops it while others are measured."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paretune import clock
from paretune.errors import ParetuneError
from paretune.measure.interleave import SubjectError

WORKER = "paretune.measure.worker"


class TrialProcess:
    """One recipe in a process of its own; a `Subject` of the interleaver.

    Args:
        name: the trial's id.
        kind: what `sample` measures (`workload.KINDS`).
        module: the worker's module.
        log: where the worker's standard error goes.
        command: starts another worker instead, in an environment of its own: program and arguments.
        environment: variables of the worker beside the parent's.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        log: Path | None = None,
        module: str = WORKER,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.kind = name, kind
        self._log_path = log
        self._log = open(log, "wb") if log else subprocess.DEVNULL  # noqa: SIM115 - closed in `close`
        # Folders are given as absolute paths; nothing else of the parent is inherited but its environment.
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module] if command is None else list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,  # Ctrl-C in the terminal reaches the parent only
            )
        except OSError as error:
            raise SubjectError(f"the process could not be started: {error.strerror}") from None
        self._pending = b""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, do: str, **request: Any) -> None:
        """Sends a request without waiting for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # ValueError: closed after a time-out
            raise self._died() from None

    def receive(self, timeout_sec: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            SubjectError: the worker failed, died or did not answer in time; the message is the cause.
        """
        line = self._read_line(timeout_sec)
        answer = json.loads(line)
        if not answer.pop("ok"):
            raise SubjectError(answer["reason"], kind=answer.get("kind", ""))
        return answer

    def ask(self, do: str, timeout_sec: float = 120.0, **request: Any) -> dict[str, Any]:
        self.send(do, **request)
        return self.receive(timeout_sec)

    def sample(self) -> float:
        return self.ask("sample", kind=self.kind)["sec"]

    def pause(self) -> None:
        if self.alive:
            os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        if self.alive:
            os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends the worker, stopped or not."""
        if self.alive:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # a request was still in the buffer
                    continue
        if self._log_path is not None:
            self._log.close()  # type: ignore[union-attr]

    def _read_line(self, timeout_sec: float) -> bytes:
        assert self._process.stdout is not None
        deadline = clock.now() + timeout_sec
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                left = deadline - clock.now()
                if left <= 0 or not selector.select(left):
                    self.close()
                    raise SubjectError(f"no answer within {timeout_sec:.0f} s: stopped")
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise self._died()
                self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return line

    def _died(self) -> ParetuneError:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return SubjectError("the process was killed (out of memory, most likely)")
        if code < 0:
            return SubjectError(f"the process crashed with {signal.Signals(-code).name}")
        return SubjectError(f"the process ended with exit code {code}{self._last_words()}")

    def _last_words(self) -> str:
        if self._log_path is None or not self._log_path.is_file():
            return ""
        lines = self._log_path.read_text("utf-8", errors="replace").strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""
