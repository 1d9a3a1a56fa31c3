"""Read bandwidth of this machine's memory and caches, measured by our own streaming sums. Units: bytes/s."""

from __future__ import annotations

import ctypes
import itertools
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from paretune import clock, native_build
from paretune.hardware.machine import MIB, available_memory_bytes, cache_bytes, n_threads

PROBE_SEC = 0.015
STATE_TOLERANCE = 0.8  # a bandwidth under 80 % of the best seen is another state of the host


def native_probe() -> ctypes.CDLL:
    library = native_build.load("probe")
    library.paretune_probe_new.restype = ctypes.c_void_p
    library.paretune_probe_new.argtypes = [ctypes.c_size_t, ctypes.c_int]
    library.paretune_probe_free.restype = None
    library.paretune_probe_free.argtypes = [ctypes.c_void_p]
    library.paretune_probe_read.restype = ctypes.c_double
    library.paretune_probe_read.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_double]
    library.paretune_probe_fma.restype = ctypes.c_double
    library.paretune_probe_fma.argtypes = [ctypes.c_int, ctypes.c_double]
    return library


def probe_bytes() -> int:
    """A buffer that no cache holds: four times the last level, 64 to 512 MiB, an eighth of free memory."""
    return min(max(64 * MIB, 4 * cache_bytes(3)), 512 * MIB, max(16 * MIB, available_memory_bytes() // 8))


class BandwidthProbe:
    """Read bandwidth now, in bytes/s. Calling it takes about 15 ms; the buffer is kept between calls.

    Args:
        threads: how many threads read together; default `n_threads()`.
        n_bytes: the buffer; default `probe_bytes()`, well above the last-level cache.

    `kind` says how: "native" (our own streaming sums), or "torch" (`torch.sum`, where there is no compiler;
    `note` says why). Figures of the two kinds must not be compared.
    """

    def __init__(self, threads: int | None = None, n_bytes: int | None = None) -> None:
        self.threads = threads or n_threads()
        self.n_bytes = n_bytes or probe_bytes()
        self.kind = "torch"
        self.note = ""
        self._handle: int | None = None
        try:
            self._library = native_probe()
            self._handle = self._library.paretune_probe_new(self.n_bytes, self.threads)
            if self._handle:
                self.kind = "native"
                self._finalizer = weakref.finalize(self, self._library.paretune_probe_free, self._handle)
            else:
                self.note = "the native probe got no memory or no threads"
        except native_build.NativeUnavailable as error:
            self.note = str(error)
        if self.kind == "torch":
            import torch

            self._buffer = torch.ones(max(1, self.n_bytes // 4), dtype=torch.float32)

    def __call__(self, seconds: float = PROBE_SEC, threads: int | None = None) -> float:
        if self._handle:
            return float(self._library.paretune_probe_read(self._handle, threads or self.threads, seconds))
        return self._torch_read(seconds, threads or self.threads)

    def _torch_read(self, seconds: float, threads: int) -> float:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            start, elapsed, n_passes = clock.now(), 0.0, 0
            while elapsed < seconds and n_passes < 10_000:  # an end even on a clock that stands still
                self._buffer.sum()
                n_passes += 1
                elapsed = clock.now() - start
        finally:
            torch.set_num_threads(before)
        return n_passes * self._buffer.numel() * 4 / max(elapsed, 1e-9)


def read_bandwidth_sweep(
    sizes: Sequence[int] | None = None,
    seconds: float = 0.05,
    repeats: int = 3,
    threads: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Read bandwidth by working-set size, best of `repeats`, on one thread and on all.

    Each row: `bytes` (of all threads together), `threads`, `bytes_per_sec`, `samples`, `kind`, and `state`
    by a 15 ms probe before and after the row: both at 80 % or more of the sweep's best ("high"), both below
    ("low"), or neither ("mixed"). Shared hosts switch between states for seconds to minutes.
    """
    room = available_memory_bytes() // 4
    wanted = [n for n in (sizes or [MIB << i for i in range(10)]) if n <= room] or [MIB]
    counts = sorted(set(threads or (1, n_threads())))
    monitor = BandwidthProbe()
    rows: list[dict[str, Any]] = []
    before = monitor()
    for n_bytes in wanted:
        probe = BandwidthProbe(counts[-1], n_bytes)
        for count in counts:
            probe(seconds / 4, count)
            samples = [probe(seconds, count) for _ in range(repeats)]
            after = monitor()
            row = {"bytes": n_bytes, "threads": count, "bytes_per_sec": max(samples), "kind": probe.kind}
            rows.append({**row, "samples": samples, "probe_before": before, "probe_after": after})
            before = after
    best = max(max(row["probe_before"], row["probe_after"]) for row in rows)
    for row in rows:
        fast = sum(row[key] >= STATE_TOLERANCE * best for key in ("probe_before", "probe_after"))
        row["state"] = ("low", "mixed", "high")[fast]
    return rows


def bandwidth_at(sweep: Iterable[dict[str, Any]], n_bytes: float, threads: int | None = None) -> float:
    """Bytes/s at a working set: between the sweep's sizes on a logarithmic scale, beyond its ends the end's.

    `threads` picks the rows; default: the most threads that the sweep has.
    """
    rows = list(sweep)
    assert rows, "the bandwidth sweep is empty"
    count = max(row["threads"] for row in rows) if threads is None else threads
    points = sorted((row["bytes"], row["bytes_per_sec"]) for row in rows if row["threads"] == count)
    assert points, f"the bandwidth sweep has no row of {count} threads"
    if n_bytes <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if n_bytes <= x1:
            share = math.log(n_bytes / x0) / math.log(x1 / x0)
            return math.exp(math.log(y0) + share * math.log(y1 / y0))
    return points[-1][1]
