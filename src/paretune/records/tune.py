"""The result of `tune`: every candidate, what was chosen, and what is known of the choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from paretune.records.evaluation import Fidelity
from paretune.records.explanation import Explanation
from paretune.records.header import Header
from paretune.records.peers import PeerRow, PeersMeasured
from paretune.records.record import Json, Record, flat
from paretune.records.regimes import Regimes
from paretune.records.trial import MemoryParts
from paretune.stats import Verdict

Objective = Literal["tpot", "ttft", "throughput", "memory", "size"]
OutcomeKind = Literal["winner", "baseline", "none", "interrupted"]
TrialStatus = Literal["measured", "failed", "invalid", "excluded", "not_reached"]
Word = Literal[
    "baseline",
    "chosen",
    "best so far",
    "faster, within the limit",  # measured, and its quality is known to hold
    "faster, quality not judged",
    "no clear difference",
    "slower",
    "over the quality limit",
    "did not hold",  # won, and failed the confirmation
    "excluded",  # cannot win, by figures
    "failed",
    "invalid",
    "not reached",
]


@dataclass(frozen=True)
class TuneGoal(Record):
    """What was asked of one `tune` run.

    Args:
        objective: what is made small: seconds per output token, to the first token, per token of a batch; bytes of
            weights, cache and activations; bytes of weights.
        max_ppl_increase: largest relative increase of perplexity over the baseline; its upper bound is held to it.
        min_speedup: what the winner has to reach at least; None asks for nothing.
        budget_sec: for the search and the confirmation, once the machine is measured and the baseline runs.
        input_len, output_len, batch_size: the request that is made fast.
        engines: peers that the winner is compared with, `llama.cpp:Q8_0`; a text is split at its commas.
        regimes: grid of batch sizes and lengths (`auto`, `1,8x128,1024`) over which forms are measured for the plan's
            table of choice; None: no such table.
        allow: what else may be tried, `changed-weights`.
    """

    objective: Objective = "tpot"
    max_ppl_increase: float = 0.01
    min_speedup: float | None = None
    budget_sec: float = 300.0
    input_len: int = 128
    output_len: int = 32
    batch_size: int = 1
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    engines: tuple[str, ...] = ()
    regimes: str | None = None
    allow: tuple[str, ...] = ()

    @property
    def in_bytes(self) -> bool:
        return self.objective in ("memory", "size")

    @property
    def sample_kind(self) -> str:
        """What is timed (`workload.KINDS`); objectives in bytes time the decode step beside."""
        return "tpot" if self.in_bytes else self.objective

    def bytes_of(self, memory: MemoryParts) -> float:
        """Stored weights ("size"), or weights, cache and activations ("memory")."""
        if self.objective == "size":
            return memory.weights_bytes
        return memory.weights_bytes + (memory.kv_cache_bytes or 0) + (memory.activation_peak_bytes or 0)


@dataclass(frozen=True)
class TuneModel(Record):
    """The model that was searched."""

    name: str
    family: str
    n_parameters: int
    n_layer: int
    n_embd: int
    vocab_size: int


@dataclass(frozen=True)
class Standing(Record):
    """Where a candidate stands.

    Args:
        why: the figures or the cause; empty where the word says it all.
    """

    word: Word
    why: str = ""


@dataclass(frozen=True)
class Ratio(Record):
    """How many times as fast as the baseline, from blocks; None: too few of them for a bound."""

    value: float | None
    low: float | None
    high: float | None
    n_blocks: int


@dataclass(frozen=True)
class Speedup(Ratio):
    """A ratio that was judged."""

    verdict: Verdict


@dataclass(frozen=True)
class States(Record):
    """A figure in the two bandwidth states of the host: ratios, or bytes/s."""

    low: float | None
    high: float | None


@dataclass(frozen=True)
class TrialSpeedup(Speedup):
    """Of a candidate. `by_state`: None where the host has one state."""

    by_state: States | None = None


@dataclass(frozen=True, kw_only=True)
class TrialMeasured(Record):
    """What was measured of a candidate.

    Args:
        speedup: None for the baseline.
        break_even_tokens: output tokens until extra load and compile time is paid back; None where it never is.
        warm_settled: its timings showed no trend any more.
        bound_by: the sentence of the roofline; `tpot_roofline_sec` is the least that a step's bytes take here.
    """

    speedup: TrialSpeedup | None
    tpot_sec: float
    ttft_sec: float
    throughput_tokens_per_sec: float | None
    memory: MemoryParts
    quality: Fidelity | None
    load_sec: float
    compile_sec: float
    break_even_tokens: float | None
    proof: list[str]
    warm_settled: bool | None = None
    mbu: float | None
    mfu: float | None
    bound_by: str | None
    tpot_roofline_sec: float | None
    explanations: list[Explanation]


@dataclass(frozen=True, kw_only=True)
class TuneTrial(Record):
    """One candidate.

    Args:
        recipe: as plain data.
        reason: why there is no measurement.
        label: lossless (equality proven), bounded (quality measured within the bound), or None: nothing to promise.
        measured: its keys stand among these; None: it was not measured.
    """

    id: str
    name: str
    recipe: Json
    status: TrialStatus
    reason: str | None = None
    label: Literal["lossless", "bounded", "changed weights"] | None = None
    standing: Standing
    measured: TrialMeasured | None = field(default=None, metadata=flat(""))


@dataclass(frozen=True)
class Resolution(Ratio):
    """The baseline against itself. `half_width`: what this machine resolves."""

    half_width: float


@dataclass(frozen=True)
class SweepPoint(Record):
    """Read bandwidth at one size of the data."""

    bytes: int
    bytes_per_sec: float
    n_threads: int


@dataclass(frozen=True)
class TuneBandwidth(Record):
    """What the memory of this machine gives; `states`: its two states meanwhile, bytes/s."""

    sweep: list[SweepPoint]
    states: States | None


@dataclass(frozen=True)
class Illegal(Record):
    """What cannot work here, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class TuneSpace(Record):
    """How much of what could be tried was tried. The baseline is one of `n_legal`."""

    n_legal: int
    n_illegal: int
    n_measured: int
    n_failed: int
    n_excluded: int
    n_not_reached: int
    illegal: list[Illegal]


@dataclass(frozen=True)
class MedianTimes(Record):
    """Median seconds of what was timed."""

    ours: float
    base: float


@dataclass(frozen=True, kw_only=True)
class Confirmation(Record):
    """The choice measured again, in fresh processes on fresh prompts.

    Args:
        quality: None: it was held to the reference's own tokens there too, so there is no loss to measure.
        n_processes: pairs of them.
        median_sec: of the kind that is timed.
    """

    speedup: Speedup
    quality: Fidelity | None
    n_processes: int
    median_sec: MedianTimes
    note: str
    ttft_sec: float
    baseline_ttft_sec: float
    tpot_sec: float
    baseline_tpot_sec: float


@dataclass(frozen=True, kw_only=True)
class TuneResult(Header):
    """What `tune` gives.

    Args:
        winner_id: the choice, or the best so far; None: the baseline is kept.
        aa: None: too few blocks.
        again: the command that makes it again.
        verdict: what came out, a sentence each.
    """

    CURE: ClassVar[str] = "Run `paretune tune` again"

    kind: Literal["tune"] = "tune"
    model: TuneModel
    goal: TuneGoal
    outcome: OutcomeKind
    too_noisy: bool
    winner_id: str | None
    baseline_id: str
    aa: Resolution | None
    bandwidth: TuneBandwidth
    matrix_rates: dict[str, float]
    elapsed_sec: float
    space: TuneSpace
    trials: list[TuneTrial]
    confirmation: Confirmation | None
    n_repeated_slices: int
    samples_file: str
    peers: list[PeerRow]
    peers_measured: PeersMeasured | None
    regimes: Regimes | None
    again: str
    verdict: list[str]

    def trial(self, id: str | None) -> TuneTrial | None:
        return next((t for t in self.trials if t.id == id), None)

    @property
    def baseline(self) -> TuneTrial | None:
        return self.trial(self.baseline_id)

    @property
    def winner(self) -> TuneTrial | None:
        return self.trial(self.winner_id)
