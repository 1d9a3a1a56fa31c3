"""A process that has imported what trials need and forks one for each: libraries are imported once, not by every trial.

The server (`python -m paretune.measure.forkserver FD`) is newly executed, so nothing that its parent has computed, and
no thread of it, is in it. It computes nothing itself: it imports and forks, and before each fork it makes sure that it
has a single thread, since a forked process has none of the others and could wait for them for ever. Imported pages are
shared with the trials until one of the two writes to them.

Requests and the ends of pipes come over a socket pair that has no name in the file system. When the parent ends the
server is killed, stopped or not, and with it go the trials (PR_SET_PDEATHSIG). The thread that started the server
counts as its parent: when that alone ends, another thread has to start a server of its own (`is_owned`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import IO, Any, NoReturn

from paretune import clock
from paretune.process import die_with_parent

START_TIMEOUT_SEC = 120.0  # of the first fork, which waits for the imports
_MESSAGE_BYTES = 1 << 17
_DONE = "done"  # the answer to a request that asks for imports alone
# Read by the interpreter and by libraries while they are imported; what else of the environment changes later is
# given to each trial.
_READ_AT_IMPORT = ("PYTHON", "LD_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH", "TRITON", "KINETO_")


class ForkFailed(Exception):
    """The server cannot fork; the message says why, as a clause."""


class ForkedProcess:
    """A forked trial, asked as a `subprocess.Popen`.

    Attributes:
        pid: of the process.
        stdin, stdout: its pipes.
        returncode: None while it runs; below zero the signal that ended it.
        is_lost: the server ended first, and this process with it: nobody knows how.
    """

    def __init__(self, server: ForkServer, pid: int, stdin: IO[bytes], stdout: IO[bytes], report: _Report) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None
        self.is_lost = False
        self._server = server  # it lives as long as one of its processes is asked for
        self._report = report
        try:
            self._pidfd: int | None = os.pidfd_open(pid)
        except ProcessLookupError:  # it ended already
            self._pidfd = None

    def poll(self) -> int | None:
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises `subprocess.TimeoutExpired`."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"trial {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Does nothing where the process has ended. Through a handle, not a number that another process may have."""
        if self.poll() is None and self._pidfd is not None:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                return

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout_sec: float | None) -> int | None:
        if self.returncode is None:
            try:
                line = self._report.line(timeout_sec)
            except TimeoutError:
                return None
            self.is_lost = line is None
            self.returncode = -signal.SIGKILL if line is None else int(line)
            self._report.close()
            if self._pidfd is not None:
                os.close(self._pidfd)
                self._pidfd = None
        return self.returncode

    def __del__(self) -> None:
        if getattr(self, "returncode", 0) is None:
            self._report.close()
            if self._pidfd is not None:
                os.close(self._pidfd)


class _Report:
    """The read end of a pipe on which the server writes a trial's process id, or why there is none, and its end."""

    def __init__(self, fd: int) -> None:
        self._fd, self._pending = fd, b""

    def line(self, timeout_sec: float | None) -> str | None:
        """The next line; None where the server is gone. Raises `TimeoutError`."""
        end = None if timeout_sec is None else clock.now() + timeout_sec
        with selectors.DefaultSelector() as selector:
            selector.register(self._fd, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(None if end is None else max(0.0, end - clock.now())):
                    raise TimeoutError
                chunk = os.read(self._fd, 4096)
                if not chunk:
                    return None
                self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return line.decode()

    def close(self) -> None:
        os.close(self._fd)


class ForkServer:
    """The parent's side: a started server.

    Raises:
        ForkFailed: it could not be started.
    """

    def __init__(self) -> None:
        self.environment = read_at_import()
        self._owner = threading.current_thread()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # NumPy's OpenBLAS starts its threads when it is imported. No trial multiplies matrices through it.
                env={**os.environ, "PYTHONUNBUFFERED": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C in the terminal reaches the parent only
            )
        except OSError as error:
            self._socket.close()
            raise ForkFailed(f"it could not be started: {error.strerror}") from None
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_owned(self) -> bool:
        """Whether the thread that started it still runs; the system ends the server with it."""
        return self._owner.is_alive()

    def prepare(self, module: str) -> None:
        """Asks for the imports of a worker's module without waiting for them.

        Raises:
            ForkFailed: the server is gone.
        """
        self._send({"module": module}, [])

    def settle(self, module: str) -> None:
        """Waits until the imports of a worker's module are done: what is measured beside them would be wrong.

        Raises:
            ForkFailed: the server is gone, or the module cannot be imported or starts threads.
        """
        report_fd, inner = os.pipe()
        report = _Report(report_fd)
        try:
            try:
                self._send({"module": module}, [inner])
            finally:
                os.close(inner)
            line = report.line(START_TIMEOUT_SEC)
            if line is None:
                raise ForkFailed(f"it ended{_how(self._process)}")
            if line != _DONE:
                raise ForkFailed(line)
        except TimeoutError:
            raise ForkFailed(f"it did not answer within {START_TIMEOUT_SEC:.0f} s") from None
        finally:
            report.close()

    def fork(self, module: str, log: int, environment: Mapping[str, str]) -> ForkedProcess:
        """A new process in which `module.main()` runs, in a session of its own.

        Args:
            log: descriptor of its standard error.
            environment: all of its variables.

        Raises:
            ForkFailed: the server is gone, or cannot fork.
        """
        inner_in, stdin = os.pipe()
        stdout, inner_out = os.pipe()
        report_fd, inner_report = os.pipe()
        report = _Report(report_fd)
        try:
            request = {"module": module, "fork": True, "cwd": os.getcwd(), "environment": dict(environment)}
            self._send(request, [inner_in, inner_out, log, inner_report])
        except BaseException:
            os.close(stdin)
            os.close(stdout)
            report.close()
            raise
        finally:
            for fd in (inner_in, inner_out, inner_report):
                os.close(fd)
        pipes = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")
        try:
            line = report.line(START_TIMEOUT_SEC)
            if line is None:
                raise ForkFailed(f"it ended{_how(self._process)}")
            if not line.isdigit():
                raise ForkFailed(line)
        except (TimeoutError, ForkFailed) as error:
            for pipe in pipes:
                pipe.close()
            report.close()
            if isinstance(error, TimeoutError):
                raise ForkFailed(f"it did not answer within {START_TIMEOUT_SEC:.0f} s") from None
            raise
        return ForkedProcess(self, int(line), *pipes, report)

    def close(self) -> None:
        """Ends the server and every trial that it forked."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()

    def _send(self, request: dict[str, Any], fds: list[int]) -> None:
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
        except OSError:
            raise ForkFailed(f"it ended{_how(self._process)}") from None


def read_at_import() -> dict[str, str]:
    """The variables for which a server that has imported its libraries would be too old."""
    return {key: value for key, value in os.environ.items() if key.startswith(_READ_AT_IMPORT)}


def is_possible() -> bool:
    """Whether trials can be forked at all on this system: on Linux, with handles of processes (5.3)."""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open") or not hasattr(socket, "send_fds"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:  # an old kernel or a sandbox
        return False
    return True


def _how(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return ""
    return f" with {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"


# --- the server's side ----------------------------------------------------------------------------


class _Server:
    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.selector = selectors.DefaultSelector()
        self.selector.register(control, selectors.EVENT_READ)
        self.reports: dict[int, tuple[int, int]] = {}  # a trial's handle -> its process id, where to report its end

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is not self.control:
                    self.reap(key.fd)
                    continue
                data, fds, _, _ = socket.recv_fds(self.control, _MESSAGE_BYTES, 4, socket.MSG_CMSG_CLOEXEC)
                if not data:
                    return  # the parent is gone
                try:
                    self.answer(json.loads(data), fds)
                finally:
                    for fd in fds:
                        if fd not in (report for _, report in self.reports.values()):
                            os.close(fd)

    def answer(self, request: dict[str, Any], fds: list[int]) -> None:
        try:
            module = importlib.import_module(request["module"])
            # What a worker imports later is imported here already, if it says what that is.
            getattr(module, "preload", lambda: None)()
            n_threads = len(os.listdir("/proc/self/task"))
            if n_threads != 1:
                raise ForkFailed(f"{request['module']} starts {n_threads - 1} threads when it is imported")
        except Exception as error:
            if fds:
                reason = str(error) if isinstance(error, ForkFailed) else f"{type(error).__name__}: {error}"
                _tell(fds[-1], " ".join(reason.split())[:300])
            return
        if not request.get("fork"):
            if fds:
                _tell(fds[-1], _DONE)
            return
        # The collector of a trial leaves alone what was imported: its pages stay shared, and a collection is quick.
        gc.collect()
        gc.freeze()
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            self.become_trial(server, module, request, fds)
        report = fds[-1]
        handle = os.pidfd_open(pid)
        self.reports[handle] = pid, report
        self.selector.register(handle, selectors.EVENT_READ)
        _tell(report, str(pid))

    def reap(self, handle: int) -> None:
        """A trial has ended: how is told to the parent."""
        self.selector.unregister(handle)
        pid, report = self.reports.pop(handle)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        _tell(report, str(code))
        os.close(report)
        os.close(handle)

    def become_trial(self, server: int, module: Any, request: dict[str, Any], fds: list[int]) -> NoReturn:
        code = 1
        try:
            die_with_parent(server)
            os.setsid()
            for handle, (_, report) in self.reports.items():
                os.close(handle)
                os.close(report)
            self.selector.close()
            self.control.close()
            for target, fd in enumerate(fds[:3]):
                os.dup2(fd, target)
            for fd in fds:
                os.close(fd)
            sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
            os.chdir(request["cwd"])
            os.environ.clear()
            os.environ.update(request["environment"])
            module.main()
            code = 0
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)  # what the server registered to run at its own end is not the trial's


def _tell(report: int, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody asks any more
        os.write(report, line.encode() + b"\n")


def main() -> None:
    die_with_parent(int(sys.argv[2]))
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)  # compilers that an import may start do not hold it open
    _Server(control).run()
    os._exit(0)


if __name__ == "__main__":
    main()
