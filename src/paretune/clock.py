"""The only clock. Everything that is timed goes through here, so that a test can put a fake one in its place."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds, and a way to wait."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """`time.perf_counter`: monotonic, about 50 ns of resolution and cost."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class FakeClock:
    """A clock that moves only when told to. For tests of the measuring code."""

    def __init__(self, start_sec: float = 0.0) -> None:
        self.now_sec = start_sec

    def now(self) -> float:
        return self.now_sec

    def sleep(self, seconds: float) -> None:
        self.now_sec += seconds


_clock: Clock = SystemClock()


def now() -> float:
    """Seconds on the current clock; only differences mean anything."""
    return _clock.now()


def sleep(seconds: float) -> None:
    _clock.sleep(seconds)


def wall_time() -> float:
    """Seconds since 1970, for time stamps in files (never for a duration)."""
    return time.time()


@contextlib.contextmanager
def use(clock: Clock) -> Iterator[Clock]:
    """Runs the body on another clock."""
    global _clock
    previous, _clock = _clock, clock
    try:
        yield clock
    finally:
        _clock = previous


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The timed region: garbage is collected before it and the collector is off inside it."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def synchronize(device_type: str) -> None:
    """Waits for the device's queue, so that `now()` after it counts the work and not its launch."""
    if device_type == "cuda":
        import torch

        torch.cuda.synchronize()
