"""How busy the processor and the accelerator were while something ran, sampled from a thread beside it.

A sample reads two small files (or asks the driver once): at one a second that is far below what a measurement sees.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from paretune import clock, hardware
from paretune.measure import memory

EVERY_SEC = 1.0


@dataclass(frozen=True)
class Point:
    """One sample.

    Attributes:
        sec: since the start.
        phase: what was running then.
        cpu_share: of all cores of the machine, since the sample before, all processes; None: not readable here.
        gpu_share: of the time in which a kernel ran; None without a GPU, or without its driver's library.
        rss_bytes: of this process.
    """

    sec: float
    phase: str
    cpu_share: float | None
    gpu_share: float | None
    rss_bytes: int


@dataclass
class Sampler:
    """`with Sampler() as s: s.phase = "training"; ...`, then `s.points`."""

    device: str = "cpu"
    every_sec: float = EVERY_SEC
    phase: str = ""
    points: list[Point] = field(default_factory=list)

    def __enter__(self) -> Sampler:
        self._stop = threading.Event()
        self._began, self._ticks = clock.now(), cpu_ticks()
        self._thread = threading.Thread(target=self._run, name="utilization", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()  # a short run has one point at least

    def _run(self) -> None:
        while not self._stop.wait(self.every_sec):
            self._sample()

    def _sample(self) -> None:
        now = cpu_ticks()
        share = busy_share(self._ticks, now)
        self._ticks = now
        point = Point(clock.now() - self._began, self.phase, share, gpu_share(self.device), memory.rss_bytes())
        self.points.append(point)

    def to_json(self) -> dict[str, Any]:
        """Means by phase, and the points."""
        phases: dict[str, list[Point]] = {}
        for p in self.points:
            phases.setdefault(p.phase, []).append(p)
        return {
            "every_sec": self.every_sec,
            "n_cores": hardware.n_threads(),
            "phases": [
                {
                    "phase": name,
                    "n_samples": len(points),
                    "cpu_share": _mean([p.cpu_share for p in points]),
                    "gpu_share": _mean([p.gpu_share for p in points]),
                    "rss_peak_bytes": max(p.rss_bytes for p in points),
                }
                for name, points in phases.items()
            ],
            "points": [dict(p.__dict__) for p in self.points],
        }


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def cpu_ticks() -> tuple[int, int] | None:
    """(busy, all) ticks of all cores since the system started (proc(5)); None where the system does not say."""
    try:
        with open("/proc/stat", encoding="utf-8") as f:
            values = [int(v) for v in f.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = values[3] + values[4]  # idle, and waiting for a disk
    return sum(values) - idle, sum(values)


def busy_share(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """The share of the ticks between two readings that were busy."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    return min(1.0, max(0.0, (after[0] - before[0]) / (after[1] - before[1])))


def gpu_share(device: str) -> float | None:
    """What the driver says of the last sampling period, 0 to 1; None without a GPU or its management library."""
    if not device.startswith("cuda"):
        return None
    import torch

    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # the management library raises a family of its own, and may be absent
        return None
