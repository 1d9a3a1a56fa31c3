"""This process: the memory it holds, and how one that serves another answers it.

Standard library only: the workers of peers load this file by path, in environments of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def _status_bytes(key: str) -> int | None:
    """A row of /proc/self/status, such as VmRSS or VmHWM."""
    try:
        with open("/proc/self/status", encoding="utf-8") as f:
            for line in f:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


def _largest_rss_bytes() -> int:
    """The process's largest resident size by getrusage: the only figure where there is no /proc."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def rss_bytes() -> int:
    """Physical memory of this process now. Without /proc: its largest so far; 0 on Windows."""
    now = _status_bytes("VmRSS")
    return _largest_rss_bytes() if now is None else now


def shared_bytes() -> int | None:
    """Of `rss_bytes`: pages that other processes hold too, such as libraries and what a process that forks has
    imported. However many of its kind run, these are there once. None where the system does not say."""
    total = None
    with contextlib.suppress(OSError), open("/proc/self/smaps_rollup", encoding="utf-8") as f:
        for line in f:
            if line.startswith(("Shared_Clean:", "Shared_Dirty:")):
                total = (total or 0) + (int(line.split()[1]) << 10)
    return total


def peak_rss_bytes() -> int:
    """The largest physical memory of this process since its start, or since `reset_peak_rss` gave True."""
    peak = _status_bytes("VmHWM")
    return _largest_rss_bytes() if peak is None else peak


def reset_peak_rss() -> bool:
    """Starts the peak again from the present size. False where the system does not allow it: then the peak
    still counts everything since the start, loading among it.
    """
    before = _status_bytes("VmHWM")
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
            f.write("5")  # 5: the peak alone (proc(5)); the page marks stay
    except OSError:
        return False
    after = _status_bytes("VmHWM")
    # Some sandboxes take the write and do nothing: a peak above the present size by over 1 MiB was not reset.
    return before is not None and after is not None and after <= max(rss_bytes() + (1 << 20), 0)


def give_back_free_memory() -> None:
    """Freed blocks of some megabytes stay with the C library, which counts as memory of the process."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def die_with_parent(parent: int | None = None) -> None:
    """From here on the system ends this process when its parent ends, also while it is stopped. Linux only.

    Args:
        parent: the parent's process id, where it is known: one that has ended already ends this process now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG; SIGKILL reaches a stopped process too
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def serve(handlers: dict[str, Handler], refusals: tuple[type[Exception], ...]) -> None:
    """Answers JSON lines `{"do": NAME, ...}` until standard input closes. Dies with its parent, stopped or not.

    Args:
        handlers: by name; what one gives is the answer, with `ok`.
        refusals: errors whose message is the reason as it is. Every other is an answer too: one trial's bug is a row
            with its cause, never the end of the run.
    """
    die_with_parent()
    if sys.platform == "linux":
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints does not garble the protocol
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": True, **handlers[request.pop("do")](request)}
        except refusals as error:
            answer = {"ok": False, "kind": type(error).__name__, "reason": str(error)}
        except MemoryError:
            answer = {"ok": False, "kind": "OutOfMemory", "reason": "out of memory"}
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            out_of_memory = "out of memory" in reason.lower() or "can't allocate memory" in reason.lower()
            kind = "OutOfMemory" if out_of_memory else type(error).__name__
            answer = {"ok": False, "kind": kind, "reason": f"{type(error).__name__}: {reason}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
