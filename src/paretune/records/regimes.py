"""Which form of a plan is best in which regime: the map that `tune --regimes` measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from paretune.records.record import Json, Record
from paretune.stats import Verdict


@dataclass(frozen=True)
class RegimeForm(Record):
    """One way to run a plan. `recipe`: its title; the rest as of `engine.dispatch.Form`."""

    name: str
    recipe: str
    label: Literal["lossless", "bounded"]
    ppl_increase_upper: float | None
    longest: int | None
    weights_bytes: int


@dataclass(frozen=True)
class Figure(Record):
    """One form in one regime: its median seconds, its speed over the plan's own, and what it takes.

    Args:
        ratio: None: not measured there, or not to be used there; `cause` says why.
        n_bytes: of cache and activations.
    """

    form: str
    status: str
    cause: str | None
    seconds: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: Verdict | Literal["baseline"] | None
    n_bytes: int


@dataclass(frozen=True)
class Ranked(Record):
    """A form in the order of a regime; `n_bytes` of cache and activations were taken there."""

    form: str
    n_bytes: int


@dataclass(frozen=True)
class RegimeCell(Record):
    """One regime.

    Args:
        length: tokens of prompt and answer.
        best: the form that is ranked first; `runs`: what a request gets that grants nothing more.
        is_tie: another form cannot be told from the best.
    """

    batch_size: int
    length: int
    status: Literal["measured", "not_reached"]
    best: str
    runs: str
    is_tie: bool
    figures: list[Figure]
    ranked: list[Ranked]

    def figure(self, form: str) -> Figure:
        return next(f for f in self.figures if f.form == form)


@dataclass(frozen=True, kw_only=True)
class Regimes(Record):
    """The map.

    Args:
        left_out: (name, reason) of forms that are not among them.
        table: of `engine.dispatch`, as plain data; None: there is nothing to choose, and `cause` says why.
    """

    batch_sizes: list[int]
    lengths: list[int]
    output_len: int
    kind: str
    forms: list[RegimeForm] = field(default_factory=list)
    cells: list[RegimeCell] = field(default_factory=list)
    left_out: list[list[str]] = field(default_factory=list)
    table: Json = None
    cause: str | None = None
    interrupted: bool = False
    aa_half_width: float | None = None
    elapsed_sec: float = 0.0
    samples_file: str
