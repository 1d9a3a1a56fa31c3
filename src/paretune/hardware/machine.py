"""What this machine is (`fingerprint`) and what of it this process may use: threads and memory. Units: bytes."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paretune import native_build
from paretune.errors import UsageError

MIB = 1 << 20

_SAME = "avx2 fma f16c avx512f avx512_bf16 avx512_vnni avx512_fp16 avx_vnni amx_bf16 amx_int8 amx_fp16 sve sve2"
_ARM = "asimd:neon asimddp:neon_dotprod asimdhp:neon_fp16 bf16:neon_bf16 i8mm:neon_i8mm"
# The system's name of a processor feature -> ours.
_FEATURES = {n: n for n in _SAME.split()} | dict(pair.split(":") for pair in _ARM.split())
NEEDS = {
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
    return name is not None and bool(set(instruction_sets()).intersection(NEEDS[name]))


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def check_device(device: str, cure: str = "Use the device cpu") -> None:
    """Raises `UsageError` where there is no such device here."""
    if not (device == "cpu" or (device.partition(":")[0] == "cuda" and has_cuda())):
        raise UsageError(f"there is no device {device!r} here", cure)


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


def memory_left(device: str = "cpu") -> int:
    """Memory that can be taken now where `device` keeps its tensors; what PyTorch holds there unused counts as free."""
    if not device.startswith("cuda"):
        return available_memory_bytes()
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
