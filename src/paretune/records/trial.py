"""What the process of a trial says of itself once it is loaded, proven and warm."""

from __future__ import annotations

from dataclasses import dataclass, field

from paretune.records.record import LEFT_OUT, SIGNED, Json, Record


@dataclass(frozen=True)
class MemoryParts(Record):
    """The memory of one trial in bytes. None: not measured, or there is no such thing here.

    Attributes:
        weights_bytes: parameters and buffers by storage (`measure.memory.storage_bytes`).
        kv_cache_bytes: the cache as allocated, not as filled.
        activation_peak_bytes: the most that the rest of a forward pass held at once.
        rss_bytes, rss_peak_bytes: the process, with the interpreter and the libraries: what the recipe takes alone.
        device_allocated_bytes: GPU: in tensors, at the peak.
        device_reserved_bytes: GPU: held by PyTorch's allocator, at the peak.
        device_used_bytes: GPU: device-wide, other processes and the driver included.
        shared_bytes: of these, pages that other processes hold too: for all trials together they count once.
    """

    weights_bytes: int
    kv_cache_bytes: int | None
    activation_peak_bytes: int | None
    rss_bytes: int
    rss_peak_bytes: int
    device_allocated_bytes: int | None = None
    device_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    shared_bytes: int | None = None


@dataclass(frozen=True)
class SideTimes(Record):
    """Short figures that are shown and never compared."""

    ttft: float
    tpot: float

    def of(self, kind: str) -> float:
        return self.ttft if kind == "ttft" else self.tpot


@dataclass(frozen=True, kw_only=True)
class TrialFacts(Record):
    """A trial as its process describes it.

    Args:
        proof: what was checked on the changed model, a sentence each; `notes`: what the user should know.
        runner: as it describes itself.
        step_weights_bytes: of the weights that a decode step reads.
        kv_bytes_per_token: of the batch.
        bytes_per_weight: None: its process did not say.
        threads: what its process runs with, read back.
        start_parts_sec: of the start; `convert`, `calibrate` and `compile` are done once for a plan.
        warm_settled: its timings showed no trend after `n_warm` slices.
    """

    load_sec: float
    compile_sec: float
    proof: list[str]
    notes: list[str]
    runner: dict[str, Json]
    bytes_by_dtype: dict[str, int]
    weights_bytes: int
    step_weights_bytes: int
    bytes_per_weight: float | None = field(default=None, metadata=LEFT_OUT)
    compute_dtype: str
    threads: dict[str, int] | None = field(default=None, metadata=LEFT_OUT)
    kv_cache_bytes: int
    kv_bytes_per_token: float
    attention_pattern: str = "causal"
    memory: MemoryParts
    side_sec: SideTimes
    start_parts_sec: dict[str, float] = field(default_factory=dict, metadata=SIGNED)
    warm_settled: bool | None = None
    n_warm: int | None = None
