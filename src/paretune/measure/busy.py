"""Whether other programs ran beside ours: preemptions of this process, and tasks that waited for a processor.

Counted by the system, so that a busy machine is told from a slow one. Threads of ours leave none waiting, as many run
as there are cores; processes that we start, a compiler's, do, so the watch ends before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretune import clock
from paretune.measure.roofline import percent

PREEMPTIONS_PER_SEC = 100  # a quiet machine has a few
PRESSURE = 0.3  # of the time in which some task waits


@dataclass(frozen=True)
class Busy:
    """What was counted over `sec` seconds; None where the system does not count it.

    Attributes:
        preemptions: times that a thread of this process lost its processor to another program.
        page_faults: minor ones of this process.
        pressure: share of the time in which some task of the machine was ready and had no processor.
    """

    sec: float
    preemptions: int | None
    page_faults: int | None
    pressure: float | None


class BusyWatch:
    """Counts from when it is made until it is called."""

    def __init__(self) -> None:
        self._started, self._usage, self._waited = clock.now(), usage(), _waited_sec()

    def __call__(self) -> Busy:
        sec, after, waited = clock.now() - self._started, usage(), _waited_sec()
        before = self._usage
        return Busy(
            sec,
            None if before is None else after.ru_nivcsw - before.ru_nivcsw,
            None if before is None else after.ru_minflt - before.ru_minflt,
            None if self._waited is None or waited is None or sec <= 0 else (waited - self._waited) / sec,
        )


def words(preemptions_per_sec: float | None, pressure: float | None) -> list[str]:
    """What shows that other programs ran; empty on a quiet machine."""
    said = []
    if (preemptions_per_sec or 0.0) >= PREEMPTIONS_PER_SEC:
        said.append(f"this process lost its processor {preemptions_per_sec:,.0f} times a second")
    if (pressure or 0.0) >= PRESSURE:
        said.append(f"some program waited for a processor in {percent(min(pressure or 0.0, 1.0))} of the time")
    return said


def words_of(busy: Busy) -> list[str]:
    """`words` of what was counted."""
    return words(busy.preemptions / busy.sec if busy.preemptions is not None and busy.sec > 0 else None, busy.pressure)


def words_of_facts(result: Mapping[str, Any]) -> list[str]:
    """`words` of a profile: its facts count preemptions by step."""
    facts, sec = result.get("facts") or {}, (result.get("whole") or {}).get("sec")
    n = facts.get("preemptions")
    return words(n / sec if n and sec else None, facts.get("cpu_pressure"))


def usage() -> Any:
    """What the system counts for this process; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF)


def _waited_sec() -> float | None:
    try:
        text = Path("/proc/pressure/cpu").read_text("utf-8")
        return int(text.split("total=")[1].split()[0]) / 1e6
    except (OSError, ValueError, IndexError):
        return None
