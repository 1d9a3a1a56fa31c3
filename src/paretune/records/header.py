"""What every result file begins with, and what several of them hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from paretune.records.record import LEFT_OUT, Record


@dataclass(frozen=True)
class Gpu(Record):
    """A GPU. `capability`: major.minor."""

    name: str
    capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Machine(Record):
    """The fingerprint of the machine; `id` is its hash."""

    id: str
    cpu_model: str
    n_cores: int
    instruction_sets: list[str]
    l2_bytes: int | None
    l3_bytes: int | None
    memory_bytes: int
    os: str
    gpus: list[Gpu] = field(default_factory=list)


@dataclass(frozen=True)
class Threads(Record):
    """PyTorch's threads inside an operator and between operators, read back."""

    intra_op: int
    inter_op: int


@dataclass(frozen=True)
class Environment(Record):
    """The state of the machine. `load_average`: processes, over 1, 5 and 15 minutes; None: not readable."""

    threads: Threads
    git_commit: str | None
    variables: dict[str, str]
    load_average: list[float] | None
    governor: str | None


@dataclass(frozen=True, kw_only=True)
class Header(Record):
    """The first keys of a result file.

    Args:
        created: ISO 8601, UTC.
        command: as a user types it.
        seed: None where nothing is random.
        versions: of Python, Paretune and the installed packages that a result may depend on.
    """

    SCHEMA: ClassVar[int] = 1

    schema_version: int
    created: str
    command: str
    seed: int | None
    versions: dict[str, str]
    hardware: Machine
    environment: Environment


@dataclass(frozen=True)
class Estimate(Record):
    """An estimate from `n` values and its interval; None: there is no bound."""

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Bandwidth(Record):
    """One size of a sweep of read bandwidth. `threads`: 0 on a GPU. `state`: of the host's memory meanwhile."""

    bytes: int
    threads: int
    bytes_per_sec: float
    kind: str | None = field(default=None, metadata=LEFT_OUT)
    samples: list[float] | None = field(default=None, metadata=LEFT_OUT)
    probe_before: float | None = field(default=None, metadata=LEFT_OUT)
    probe_after: float | None = field(default=None, metadata=LEFT_OUT)
    state: str | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class Ceilings(Record):
    """The limits of the machine, measured. Matrix rates are FLOP/s by number format; `fma_rate` is in registers."""

    device: str
    kind: str
    threads: int
    read_bandwidth: list[Bandwidth]
    matrix_rates: dict[str, float]
    fma_rate: float | None = None
