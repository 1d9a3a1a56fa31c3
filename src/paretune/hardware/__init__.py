"""What this machine is and what it can do at most, found by running and not by reading a datasheet.

One name for the rest of the house: `machine` (identity, threads, memory), `bandwidth`, `rates` (matrix products,
number formats, ceilings).
"""

from __future__ import annotations

from paretune.hardware.bandwidth import (
    PROBE_SEC,
    STATE_TOLERANCE,
    BandwidthProbe,
    bandwidth_at,
    probe_bytes,
    read_bandwidth_sweep,
)
from paretune.hardware.machine import (
    MIB,
    available_memory_bytes,
    cache_bytes,
    fingerprint,
    fingerprint_id,
    has_cuda,
    has_instruction,
    instruction_sets,
    memory_bytes,
    memory_left,
    n_threads,
    set_threads,
)
from paretune.hardware.rates import (
    DTYPES,
    EMULATED_GAIN,
    EMULATED_LOSS,
    TORCH_NAMES,
    Ceilings,
    DtypeSupport,
    ceilings,
    dtype_failure,
    dtype_support,
    judge_dtype,
    matrix_rate,
)

__all__ = [
    "DTYPES",
    "EMULATED_GAIN",
    "EMULATED_LOSS",
    "MIB",
    "PROBE_SEC",
    "STATE_TOLERANCE",
    "TORCH_NAMES",
    "BandwidthProbe",
    "Ceilings",
    "DtypeSupport",
    "available_memory_bytes",
    "bandwidth_at",
    "cache_bytes",
    "ceilings",
    "dtype_failure",
    "dtype_support",
    "fingerprint",
    "fingerprint_id",
    "has_cuda",
    "has_instruction",
    "instruction_sets",
    "judge_dtype",
    "matrix_rate",
    "memory_bytes",
    "memory_left",
    "n_threads",
    "probe_bytes",
    "read_bandwidth_sweep",
    "set_threads",
]
