"""What this machine is and what it can do at most, found by running and not by reading a datasheet.

Identity (`fingerprint`), resources (`n_threads`, `available_memory_bytes`), ceilings (`BandwidthProbe`,
`ceilings`) and `dtype_support`, which says where a number format works but only in emulation. Units: bytes,
seconds, bytes/s, FLOP/s. PyTorch is imported when something needs it, CUDA touched only where a GPU is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import random
import statistics
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from paretune import clock, native_build
from paretune.errors import UsageError

MIB = 1 << 20
PROBE_SEC = 0.015
DTYPES = ("fp32", "bf16", "fp16")
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
STATE_TOLERANCE = 0.8  # a bandwidth under 80 % of the best seen is another state of the host
EMULATED_GAIN, EMULATED_LOSS = 1.1, 0.8

_SAME = "avx2 fma f16c avx512f avx512_bf16 avx512_vnni avx512_fp16 avx_vnni amx_bf16 amx_int8 amx_fp16 sve sve2"
_ARM = "asimd:neon asimddp:neon_dotprod asimdhp:neon_fp16 bf16:neon_bf16 i8mm:neon_i8mm"
# The system's name of a processor feature -> ours.
_FEATURES = {n: n for n in _SAME.split()} | dict(pair.split(":") for pair in _ARM.split())
_NEEDS = {
    "bf16": ("avx512_bf16", "amx_bf16", "neon_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "neon_fp16"),
}


# ---- identity


def fingerprint() -> dict[str, Any]:
    """Which machine this is, as plain data that is the same in every run (no load, no versions)."""
    model, _ = native_build.cpu_info()
    return {
        "cpu_model": model,
        "n_cores": n_threads(),
        "instruction_sets": instruction_sets(),
        "l2_bytes": cache_bytes(2),
        "l3_bytes": cache_bytes(3),
        "memory_bytes": memory_bytes(),
        "os": f"{platform.system()} {platform.machine()}",
        "gpus": _gpus(),
    }


def fingerprint_id(value: dict[str, Any]) -> str:
    """A hash of 12 hex digits. Memory counts in whole GiB: kernels differ by a few pages."""
    rounded = {**value, "memory_bytes": round(value.get("memory_bytes", 0) / (1 << 30))}
    return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()[:12]


def instruction_sets() -> list[str]:
    """The instruction sets of interest that the processor has, sorted."""
    _, features = native_build.cpu_info()
    return sorted({ours for theirs, ours in _FEATURES.items() if theirs in features})


def has_instruction(dtype: Any) -> bool:
    """Whether the processor multiplies matrices of this `torch.dtype` (bf16, fp16) by itself, without detour."""
    name = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(dtype))
    return name is not None and bool(set(instruction_sets()).intersection(_NEEDS[name]))


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _gpus() -> list[dict[str, Any]]:
    if not has_cuda():
        return []
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory} for p in found]


# ---- resources


def _read(path: str) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(path).read_text(encoding="utf-8").strip()
    return ""


def _read_int(path: str) -> int | None:
    text = _read(path)
    return int(text) if text.isdigit() else None


def cache_bytes(level: int) -> int:
    """Size of the first processor's cache of that level; 0 where the system does not say."""
    for index in range(8):
        folder = f"/sys/devices/system/cpu/cpu0/cache/index{index}"
        if _read(f"{folder}/level") == str(level) and _read(f"{folder}/type") != "Instruction":
            size = _read(f"{folder}/size")
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:], 1)
            return int(size.rstrip("KMG") or 0) * unit
    return 0


def _cgroup_folders(controller: str) -> list[str]:
    """This process's control groups (both versions), its own up to the root: the tightest limit counts."""
    folders = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        root = f"/sys/fs/cgroup/{controller}" if names else "/sys/fs/cgroup"
        parts = [part for part in path.split("/") if part and part != ".."]
        folders += ["/".join([root, *parts[:n]]) for n in range(len(parts), -1, -1)]
    return folders


def n_threads() -> int:
    """The default thread count: physical cores that this process may use (affinity, cgroup quota), 1 or more.

    Two hyperthreads of a core share its units, so the second adds nothing to a matrix product.
    """
    if hasattr(os, "sched_getaffinity"):
        cpus: Iterable[int] = os.sched_getaffinity(0)
    else:
        cpus = range(os.cpu_count() or 1)
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = len({_read(topology.format(cpu)) or str(cpu) for cpu in cpus})
    for folder in _cgroup_folders("cpu"):
        # Version 2 says "200000 100000" in one file ("max ...": no limit), version 1 has two ("-1": no
        # limit).
        quota, _, period = _read(f"{folder}/cpu.max").partition(" ")
        if not quota:
            quota, period = _read(f"{folder}/cpu.cfs_quota_us"), _read(f"{folder}/cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def set_threads(n: int | None = None) -> dict[str, int]:
    """Sets PyTorch's threads inside an operator (default: `n_threads()`) and gives what it reads back.

    Raises:
        UsageError: `n` is below 1.
    """
    import torch

    wanted = n_threads() if n is None else n
    if wanted < 1:
        raise UsageError(f"{wanted} threads", "Give 1 or more")
    torch.set_num_threads(wanted)
    got = torch.get_num_threads()
    assert got == wanted, f"asked PyTorch for {wanted} threads and got {got}"
    return {"threads": got, "inter_op_threads": torch.get_num_interop_threads(), "usable_cores": n_threads()}


def _meminfo() -> tuple[int, int]:
    """Total and available physical memory in bytes."""
    rows = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    if "MemTotal" in rows and "MemAvailable" in rows:
        return int(rows["MemTotal"].split()[0]) << 10, int(rows["MemAvailable"].split()[0]) << 10
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: its own size, total, available, ...
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return int(status[1]), int(status[2])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, total // 2  # macOS does not say what is free in one number; half is a careful guess


def memory_bytes() -> int:
    """Memory that this process may have at most: physical, or the control group's limit."""
    total, _ = _meminfo()
    for folder in _cgroup_folders("memory"):
        limit = _read_int(f"{folder}/memory.max") or _read_int(f"{folder}/memory.limit_in_bytes")
        total = min(total, limit or total)
    return total


def available_memory_bytes() -> int:
    """Memory that can be taken now without swapping, within the control group's limit."""
    _, available = _meminfo()
    for folder in _cgroup_folders("memory"):
        limit = _read_int(f"{folder}/memory.max") or _read_int(f"{folder}/memory.limit_in_bytes")
        used = _read_int(f"{folder}/memory.current") or _read_int(f"{folder}/memory.usage_in_bytes")
        if limit and used is not None:
            rows = dict(line.split() for line in _read(f"{folder}/memory.stat").splitlines() if " " in line)
            # Pages of files that nobody uses are given back under pressure.
            cached = int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))
            available = min(available, max(0, limit - max(0, used - cached)))
    return available


# ---- read bandwidth


def _native_probe() -> ctypes.CDLL:
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
        try:
            self._library = _native_probe()
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
        if self.kind == "native":
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


# ---- matrix rates and number formats


def _dtype_name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    name = next((ours for ours, theirs in TORCH_NAMES.items() if theirs == name), name)
    if name not in TORCH_NAMES:
        raise UsageError(f"unknown dtype {dtype!r}", f"Known: {', '.join(TORCH_NAMES)}")
    return name


def _timed(kernel: Callable[[], Any], device: str) -> float:
    start = clock.now()
    kernel()
    clock.synchronize(device.partition(":")[0])
    return max(clock.now() - start, 1e-9)


def _product(name: str, m: int, n: int, k: int, device: str) -> Callable[[], Any]:
    """`x[m, k] @ weight[n, k].T`, as a linear layer computes it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    if name == "int8":
        ints = [torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator) for shape in ((m, k), (n, k))]
        a, b = (t.to(device) for t in ints)
        return lambda: torch._int_mm(a, b.t())
    dtype = getattr(torch, TORCH_NAMES[name])
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    weight = torch.randn(n, k, generator=generator).to(device, dtype)
    return lambda: torch.nn.functional.linear(x, weight)


def matrix_rate(dtype: Any, n: int = 1024, device: str = "cpu", seconds: float = 0.2) -> float | None:
    """FLOP/s (int8: operations/s) of PyTorch's `n x n x n` product, the best of the repeats within `seconds`.

    `dtype` is "fp32", "bf16", "fp16", "int8" or a torch dtype. A slow format is measured at a smaller size.
    None: PyTorch has no such product here.

    Raises:
        UsageError: an unknown dtype.
    """
    import torch

    name = _dtype_name(dtype)
    small = min(n, 256)
    try:
        with torch.inference_mode():
            best, size = 0.0, small
            while True:
                kernel = _product(name, size, size, size, device)
                shortest, total, count = _timed(kernel, device), 0.0, 0
                while count < 5 or (total < seconds and size == n and count < 50):
                    elapsed = _timed(kernel, device)
                    shortest, total, count = min(shortest, elapsed), total + elapsed, count + 1
                    if count >= 2 and total > 2 * seconds:
                        break
                best = max(best, 2.0 * size**3 / shortest)
                # In steps: on a busy machine the waiting of threads hides the rate of a small product.
                grown = min(n, 2 * size)
                patience = (5 if size == small else 2) * seconds
                if size == n or shortest * (grown / size) ** 3 > patience:
                    return best
                size = grown
    except (RuntimeError, NotImplementedError, TypeError):
        return None


@dataclasses.dataclass(frozen=True)
class DtypeSupport:
    """What a number format is worth on a device.

    Attributes:
        works: it runs and its result is right.
        emulated: it runs without gain: clearly slower than fp32, or no gain and no instruction of its own.
        decode_ratio: speed of a matrix-vector product against fp32 (2.0: twice as fast); 0: does not work.
        prefill_ratio: the same for a matrix product of 128 rows.
        reason: one sentence for the user.
    """

    works: bool
    emulated: bool
    decode_ratio: float
    prefill_ratio: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def judge_dtype(name: str, decode: float, prefill: float, has_instruction: bool, lacks: str = "") -> DtypeSupport:
    """The verdict on a format that works, from its speed ratios to fp32."""
    best = max(decode, prefill)
    emulated = best < EMULATED_LOSS or (best < EMULATED_GAIN and not has_instruction)
    speed = f"large products with one row at {decode:.2f}x and with 128 rows at {prefill:.2f}x the speed of fp32"
    without = "" if has_instruction else f" on a processor without {lacks}"
    how = "is only emulated here" if emulated else "runs"
    return DtypeSupport(True, emulated, decode, prefill, f"{name} {how}{without}: {speed}")


def dtype_support(device: str = "cpu") -> dict[str, DtypeSupport]:
    """fp32, bf16 and fp16 on this device: run, checked against fp32 and timed against it, once per process.

    Two micro-kernels: a product with one row and a weight larger than the L2 cache (decode), and one with 128
    rows (prefill). Formats are interleaved; a ratio is the median over the blocks.
    """
    import torch

    return dict(_dtype_support(device, torch.get_num_threads()))


@functools.cache
def _dtype_support(device: str, _threads: int) -> dict[str, DtypeSupport]:
    import torch

    with torch.inference_mode(), clock.quiet():
        decode = _ratios((1, 4096, 4096), device)
        prefill = _ratios((128, 2048, 1024), device)
    present = set(instruction_sets())
    result = {"fp32": DtypeSupport(True, False, 1.0, 1.0, "fp32 is the reference")}
    for name in DTYPES[1:]:
        ratios = (decode[name], prefill[name])
        wrong = [r for r in ratios if isinstance(r, str)]
        if wrong:
            result[name] = DtypeSupport(False, False, 0.0, 0.0, f"{name} does not work here: {wrong[0]}")
            continue
        if device.startswith("cuda"):
            has, lacks = name == "fp16" or torch.cuda.get_device_capability(device) >= (8, 0), "bf16 units"
        else:
            has, lacks = bool(present.intersection(_NEEDS[name])), " or ".join(_NEEDS[name][:2])
        result[name] = judge_dtype(name, float(ratios[0]), float(ratios[1]), has, lacks)
    return result


def _ratios(shape: tuple[int, int, int], device: str) -> dict[str, float | str]:
    """Speed against fp32 by format, or why the format does not work."""
    kernels: dict[str, Callable[[], Any]] = {}
    result: dict[str, float | str] = {}
    slowest, exact = 0.0, None
    for name in DTYPES:
        try:
            kernel = _product(name, *shape, device)
            value = kernel().float()
            exact = value if exact is None else exact
            error = float((value - exact).norm() / exact.norm())
            if not error < 0.05:  # not a number fails as well
                result[name] = f"its result is {error:.0%} away from fp32"
                continue
            slowest = max(slowest, _timed(kernel, device))
            kernels[name] = kernel
        except (RuntimeError, NotImplementedError, TypeError) as failure:
            result[name] = str(failure).strip().splitlines()[0][:200]
    order = list(kernels)
    shuffle = random.Random(0).shuffle
    logs: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(3 if slowest > 0.1 else 11 if slowest > 0.01 else 41):
        shuffle(order)
        taken = {name: _timed(kernels[name], device) for name in order}
        for name in order:
            logs[name].append(math.log(taken["fp32"] / taken[name]))
    return {**result, **{name: math.exp(statistics.median(values)) for name, values in logs.items()}}


# ---- ceilings


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The most that this machine gave: the denominators of MBU and MFU.

    Attributes:
        read_bandwidth: the rows of `read_bandwidth_sweep` (on a GPU: bytes moved by a copy).
        matrix_rates: FLOP/s by format; a format that does not work is absent.
        fma_rate: fp32 FLOP/s on registers alone; None where it was not measured (no compiler, GPU).
    """

    device: str
    kind: str
    threads: int
    read_bandwidth: tuple[dict[str, Any], ...]
    matrix_rates: dict[str, float]
    fma_rate: float | None = None

    def bandwidth_at(self, n_bytes: float, threads: int | None = None) -> float:
        return bandwidth_at(self.read_bandwidth, n_bytes, threads)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "read_bandwidth": list(self.read_bandwidth)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Ceilings:
        return cls(**{**value, "read_bandwidth": tuple(value["read_bandwidth"])})


def ceilings(device: str = "cpu", quick: bool = False) -> Ceilings:
    """Measures the ceilings: about 8 s on a CPU, 2 s when `quick` (fewer sizes, smaller products)."""
    import torch

    side, seconds = (512, 0.05) if quick else (1024, 0.2)
    measured = {name: matrix_rate(name, side if device == "cpu" else 4096, device, seconds) for name in TORCH_NAMES}
    rates = {name: rate for name, rate in measured.items() if rate}
    if device != "cpu":
        rows = tuple(_copy_sweep(device, quick))
        return Ceilings(device, "copy", torch.get_num_threads(), rows, rates)
    sizes = [n * MIB for n in (4, 16, 64, 256)] if quick else None
    rows = tuple(read_bandwidth_sweep(sizes, 0.02 if quick else 0.03))
    fma = None
    with contextlib.suppress(native_build.NativeUnavailable):
        fma = max(_native_probe().paretune_probe_fma(n_threads(), 0.02) for _ in range(3)) or None
    return Ceilings("cpu", rows[0]["kind"], n_threads(), rows, rates, fma)


def _copy_sweep(device: str, quick: bool) -> list[dict[str, Any]]:
    """Bytes/s of a copy inside the GPU's memory, read and written bytes both counted."""
    import torch

    rows = []
    for n_bytes in [n * MIB for n in ((16, 256) if quick else (4, 16, 64, 256, 1024))]:
        source = torch.ones(n_bytes // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copies = functools.partial(lambda s, t: [t.copy_(s) for _ in range(20)], source, target)
        _timed(copies, device)
        samples = [20 * n_bytes / _timed(copies, device) for _ in range(5)]
        row = {"bytes": n_bytes, "threads": 0, "bytes_per_sec": max(samples), "kind": "copy"}
        rows.append({**row, "samples": samples, "state": "unknown"})
    return rows
