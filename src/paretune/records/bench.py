"""The result of `bench`: a row a configuration and cell, and everything that it was made from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from paretune.records.header import Ceilings, Estimate, Header
from paretune.records.record import LEFT_OUT, Json, Record, flat
from paretune.stats import Verdict

Role = Literal["", "baseline", "twin", "peer"]
Status = Literal["measured", "not_reached", "failed", "invalid"]
PhaseName = Literal["prefill", "decode", "throughput"]
PHASES: dict[str, PhaseName] = {"ttft": "prefill", "tpot": "decode", "throughput": "throughput"}


@dataclass(frozen=True)
class States(Record):
    """A ratio in each bandwidth state of the host."""

    low: Estimate
    high: Estimate


@dataclass(frozen=True)
class Phase(Record):
    """What was measured of one phase: slices, their spread, and the ratio to the baseline.

    Args:
        n: slices.
        n_repeated: slices thrown away, because the bandwidth changed meanwhile.
        speedup: more than 1 is faster; None: not measured beside the baseline. `low` and `high` are its interval.
        verdict: None: not compared (yet).
    """

    n: int
    p50_sec: float | None
    p90_sec: float | None
    n_repeated: int
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    verdict: Verdict | Literal["baseline"] | None
    by_state: States | None = None

    @classmethod
    def unmeasured(cls) -> Phase:
        return cls(0, None, None, 0, None, None, None, None)


@dataclass(frozen=True)
class Agreement(Record):
    """How far another engine computes the same model as our fp32 eager.

    Args:
        top1_share: positions at which the most likely token is the same.
        top1_share_beyond_ties: the same, a swap of two tokens that are near ties for us counted as agreeing.
        logits_rel_rms: RMS of the difference of the logits / RMS of ours.
        greedy_same: greedy tokens that are equal before the first that differs, of `greedy_n`.
        n_positions: compared positions.
    """

    top1_share: float
    top1_share_beyond_ties: float
    logits_rel_rms: float
    greedy_same: int
    greedy_n: int
    n_positions: int


@dataclass(frozen=True, kw_only=True)
class BenchRow(Record):
    """One configuration in one cell. None: not measured.

    Args:
        config: its name; `recipe`: the recipe's, empty for a peer.
        cause: why it gave nothing (more); empty where it did.
        throughput_tokens_per_sec: output tokens of the batch / whole request.
        break_even_tokens: output tokens until the extra seconds of loading and compiling are won back.
        decode_bytes: what a decode step must read; `tpot_roofline_sec` is the least that they take here.
        bound_by, prefill_bound_by: a clause each.
        group: of the configurations that were measured side by side.
    """

    config: str
    recipe: str
    role: Role
    cell: str
    input_len: int
    output_len: int
    batch_size: int
    status: Status
    cause: str
    ttft_sec: float | None = None
    tpot_sec: float | None = None
    prefill_tokens_per_sec: float | None = None
    decode_tokens_per_sec: float | None = None
    throughput_tokens_per_sec: float | None = None
    prefill: Phase | None = field(default=None, metadata=flat("prefill_"))
    decode: Phase | None = field(default=None, metadata=flat("decode_"))
    throughput: Phase | None = field(default=None, metadata=flat("throughput_"))
    weights_bytes: int | None = None
    kv_cache_bytes: int | None = None
    activation_peak_bytes: int | None = None
    rss_bytes: int | None = None
    rss_peak_bytes: int | None = None
    device_allocated_bytes: int | None = field(default=None, metadata=LEFT_OUT)
    device_reserved_bytes: int | None = field(default=None, metadata=LEFT_OUT)
    device_used_bytes: int | None = field(default=None, metadata=LEFT_OUT)
    load_sec: float | None = None
    compile_sec: float | None = None
    break_even_tokens: float | None = None
    decode_bytes: int | None = None
    tpot_roofline_sec: float | None = None
    mbu: float | None = None
    decode_mfu: float | None = None
    prefill_mfu: float | None = None
    bound_by: str | None = None
    prefill_bound_by: str | None = None
    threads: int | None = None
    disk_bytes: int | None = None
    engine: str = "paretune"
    format: str | None = None
    engine_version: str | None = None
    agreement: Agreement | None = field(default=None, metadata=flat("agreement_", nulls=True))
    proof: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    group: int = 0

    def phase(self, name: PhaseName) -> Phase | None:
        """The phase of that name; None where it was not asked for."""
        return {"prefill": self.prefill, "decode": self.decode, "throughput": self.throughput}[name]

    @property
    def phases(self) -> list[tuple[PhaseName, Phase]]:
        """Those that were asked for, with their names."""
        return [(name, phase) for name in PHASES.values() if (phase := self.phase(name)) is not None]

    def without_verdicts(self) -> BenchRow:
        """The row while it is measured: nothing is decided yet."""
        undecided: dict[str, Phase] = {name: replace(phase, verdict=None) for name, phase in self.phases}
        return replace(self, **undecided)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Resolution(Record):
    """What the baseline differs from itself by, for one kind of slice. `half_width`: None: too few blocks."""

    cell: str
    group: int
    kind: str
    half_width: float | None
    ratio: Estimate
    verdict: Verdict


@dataclass(frozen=True)
class BenchSample(Record):
    """One timed slice (`interleave.Sample`) and where it belongs."""

    cell: str
    group: int
    kind: str
    subject: str
    block: int
    position: int
    value_sec: float
    bandwidth_before: float | None
    bandwidth_after: float | None
    n_repeated: int


@dataclass(frozen=True)
class WarmUp(Record):
    """The timings of a warm-up: seconds per unit of work."""

    cell: str
    kind: str
    group: int
    config: str
    timings_sec: list[float]


@dataclass(frozen=True)
class BenchModel(Record):
    """The model that was measured."""

    name: str
    family: str
    n_parameters: int


@dataclass(frozen=True)
class BenchThreads(Record):
    """Threads of the measuring process, read back."""

    threads: int
    inter_op_threads: int | None = field(default=None, metadata=LEFT_OUT)
    usable_cores: int | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class Cell(Record):
    """One workload of the grid."""

    input_len: int
    output_len: int
    batch_size: int

    @property
    def title(self) -> str:
        return f"{self.input_len}+{self.output_len} x{self.batch_size}"


@dataclass(frozen=True)
class BenchSettings(Record):
    """How it was measured. `level`: of each interval, so that all looks together are at 95 %."""

    kinds: list[str]
    looks_after_blocks: list[int]
    level: float
    delta: float
    min_time_sec: float
    budget_sec: float | None


@dataclass(frozen=True)
class Probe(Record):
    """The probe of the bandwidth around each slice. `note`: why it is not the native one."""

    kind: str
    note: str


@dataclass(frozen=True, kw_only=True)
class BenchResult(Header):
    """What `bench` gives.

    Args:
        configs: name -> recipe as plain data.
        is_noisy: the baseline differs from itself by more than a verdict can bear.
        too_noisy: and no row is judged all the same.
    """

    CURE: ClassVar[str] = "Run `paretune bench` again"

    model: BenchModel
    device: str
    threads: BenchThreads
    baseline: str
    configs: dict[str, Json]
    engines: list[str]
    cells: list[Cell]
    settings: BenchSettings
    ceilings: Ceilings | None = None
    probe: Probe | None
    rows: list[BenchRow]
    aa: list[Resolution]
    samples: list[BenchSample]
    warm_up: list[WarmUp]
    definitions: dict[str, str]
    is_noisy: bool | None = None  # None: written before it was recorded
    too_noisy: bool = False
    interrupted: bool = False

    @property
    def known_ceilings(self) -> Ceilings:
        """The limits of the machine, of a run that was not interrupted."""
        assert self.ceilings is not None
        return self.ceilings

    @property
    def widest(self) -> float | None:
        """The largest A/A half width; None where none is known."""
        return max((entry.half_width for entry in self.aa if entry.half_width is not None), default=None)
