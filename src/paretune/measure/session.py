"""The parent's side of a trial: starts the worker, asks it, stops it while others are measured.

Workers are forked from a server that has imported their libraries (`forkserver.py`). Where that is not possible, or a
newly executed process is asked for, they are started with `python -m`. A worker is a module with a function `main()`;
`preload()`, where it has one, imports what the worker will need.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from paretune import clock
from paretune.errors import ParetuneError
from paretune.measure import forkserver
from paretune.measure.interleave import SubjectError

WORKER = "paretune.measure.worker"
LOST = "Lost"  # kind of a `SubjectError`: the process is gone by no fault of its own, and may be started again


Process = subprocess.Popen[bytes] | forkserver.ForkedProcess


class _Server:
    """The fork server of this process: started when the first trial is, started anew where what it has read is old."""

    def __init__(self) -> None:
        self.server: forkserver.ForkServer | None = None
        self.failure = "" if forkserver.is_possible() else "unknown on this system"
        self.is_told = bool(self.failure)  # what cannot be forked at all was said before

    def get(self) -> forkserver.ForkServer:
        """Raises `ForkFailed`."""
        if self.failure:
            raise forkserver.ForkFailed(self.failure)
        server = self.server
        if server is None or not server.is_owned or server.environment != forkserver.read_at_import():
            server = self.server = forkserver.ForkServer()  # processes of an older one keep it until they end
        return server

    def give_up(self, error: forkserver.ForkFailed) -> str:
        """Forks no more; gives the line to say, once."""
        self.failure, self.server = str(error), None
        line = "" if self.is_told else f"the server that forks trials failed ({error}): trials are newly executed"
        self.is_told = True
        return line


_fork = _Server()


def prepare(module: str = WORKER) -> None:
    """Lets a worker's libraries be imported beside what the caller does; failures show when a trial is started."""
    try:
        _fork.get().prepare(module)
    except forkserver.ForkFailed:
        return


def settle(module: str = WORKER) -> None:
    """Waits until nothing is imported beside the caller any more: before the first thing that it times itself."""
    try:
        _fork.get().settle(module)
    except forkserver.ForkFailed:
        return


class TrialProcess:
    """One recipe in a process of its own; a `Subject` of the interleaver.

    Args:
        name: the trial's id.
        kind: what `sample` measures (`workload.KINDS`).
        module: the worker's module.
        log: where the worker's standard error goes.
        command: starts another worker instead, in an environment of its own: program and arguments.
        environment: variables of the worker beside the parent's.
        fresh: executes the worker anew, as for figures of a cold start, and for devices that do not survive a fork.

    Attributes:
        slice_sec: how long a sample is at least; None: as the worker has it.
        note: what the user has to be told of how it was started, mostly "".
    """

    def __init__(
        self,
        name: str,
        kind: str,
        log: Path | None = None,
        module: str = WORKER,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> None:
        self.name, self.kind, self.note = name, kind, ""
        self.slice_sec: float | None = None
        self._log_path = log
        self._pending = b""
        variables = {**os.environ, **(environment or {})}
        with open(log or os.devnull, "wb") as errors:
            if command is not None:
                self._process: Process = _executed(command, variables, errors)
            elif fresh:
                self._process = _executed(_command(module), variables, errors)
            else:
                self._process = self._forked(module, variables, errors)

    def _forked(self, module: str, variables: Mapping[str, str], errors: IO[bytes]) -> Process:
        try:
            return _fork.get().fork(module, errors.fileno(), variables)
        except forkserver.ForkFailed as error:
            self.note = _fork.give_up(error)
        return _executed(_command(module), variables, errors)

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
        least = {} if self.slice_sec is None else {"min_sec": self.slice_sec}
        return self.ask("sample", kind=self.kind, **least)["sec"]

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends the worker, stopped or not."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # a request was still in the buffer
                    continue

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
        if isinstance(self._process, forkserver.ForkedProcess) and self._process.is_lost:
            return SubjectError("the server that forks trials ended, and this trial with it", kind=LOST)
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


def _command(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def _executed(command: Sequence[str], environment: Mapping[str, str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C in the terminal reaches the parent only
        )
    except OSError as error:
        raise SubjectError(f"the process could not be started: {error.strerror}") from None
