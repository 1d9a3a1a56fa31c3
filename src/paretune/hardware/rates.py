"""The most that this machine computes: matrix rates, what a number format is worth, all ceilings together.

Units: bytes/s, FLOP/s. PyTorch is imported when something needs it, CUDA touched only where a GPU is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import random
import statistics
from collections.abc import Callable
from typing import Any

from paretune import clock, native_build
from paretune.errors import UsageError
from paretune.hardware.bandwidth import bandwidth_at, native_probe, read_bandwidth_sweep
from paretune.hardware.machine import MIB, NEEDS, instruction_sets, n_threads

DTYPES = ("fp32", "bf16", "fp16")
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
EMULATED_GAIN, EMULATED_LOSS = 1.1, 0.8


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


@functools.cache
def dtype_failure(name: str, device: str = "cpu") -> str | None:
    """Why a format does not work on this device, or None: a small product, checked against fp32 and not timed."""
    import torch

    with torch.inference_mode():
        exact, value = (_tried_product(kind, (128, 256, 512), device) for kind in (DTYPES[0], name))
    if isinstance(exact, str):
        return f"fp32 does not work here: {exact}"
    if isinstance(value, str):
        return f"{name} does not work here: {value}"
    reason = _wrong(value, exact)
    return None if reason is None else f"{name} does not work here: {reason}"


def _tried_product(name: str, shape: tuple[int, int, int], device: str) -> Any:
    """The product in fp32, or why there is none."""
    try:
        return _product(name, *shape, device)().float()
    except (RuntimeError, NotImplementedError, TypeError) as failure:
        return str(failure).strip().splitlines()[0][:200]


def _wrong(value: Any, exact: Any) -> str | None:
    error = float((value - exact).norm() / exact.norm())
    return None if error < 0.05 else f"its result is {error:.0%} away from fp32"  # not a number fails as well


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
            has, lacks = bool(present.intersection(NEEDS[name])), " or ".join(NEEDS[name][:2])
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
            if wrong := _wrong(value, exact):
                result[name] = wrong
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

    def or_better(self, other: Ceilings) -> Ceilings:
        """The larger of two measurements of one machine, figure by figure: what it gave once, it can give."""
        places = {(row["bytes"], row["threads"]): row for row in other.read_bandwidth}
        rows = []
        for row in self.read_bandwidth:
            twin = places.get((row["bytes"], row["threads"]), row)
            rows.append(max(row, twin, key=lambda r: r["bytes_per_sec"]))
        names = (*self.matrix_rates, *(n for n in other.matrix_rates if n not in self.matrix_rates))
        rates = {n: max(self.matrix_rates.get(n, 0.0), other.matrix_rates.get(n, 0.0)) for n in names}
        fma = max(self.fma_rate or 0.0, other.fma_rate or 0.0) or None
        return dataclasses.replace(self, read_bandwidth=tuple(rows), matrix_rates=rates, fma_rate=fma)

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
        torch.cuda.empty_cache()  # what was allocated for it would be missing to the processes that are measured
        return Ceilings(device, "copy", torch.get_num_threads(), rows, rates)
    sizes = [n * MIB for n in (4, 16, 64, 256)] if quick else None
    rows = tuple(read_bandwidth_sweep(sizes, 0.02 if quick else 0.03))
    fma = None
    with contextlib.suppress(native_build.NativeUnavailable):
        fma = max(native_probe().paretune_probe_fma(n_threads(), 0.02) for _ in range(3)) or None
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
