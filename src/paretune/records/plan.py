"""What `plan.json` holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from paretune.records.header import Machine
from paretune.records.record import Json, Record
from paretune.records.tune import Confirmation, OutcomeKind, TuneGoal


@dataclass(frozen=True)
class PlanModel(Record):
    """The model of a plan.

    Args:
        source: the checkpoint as it was before `tune`: a name or a folder.
        folder: the converted one inside the plan; None: it is converted anew.
    """

    source: str
    folder: str | None
    name: str | None = None
    family: str | None = None
    n_parameters: int | None = None
    n_layer: int | None = None
    n_embd: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlanFile(Record):
    """A plan as it is written. Schema version, model and recipe run it; a plan whose evidence is gone still runs.

    Args:
        hardware: the machine that it holds for.
        recipe: how to change and run the model, as plain data.
        dispatch: forms by regime (`engine.dispatch.Table`), as plain data; None: there is no choice.
    """

    SCHEMA: ClassVar[int] = 1
    CURE: ClassVar[str] = "Run `paretune tune` again"

    created: str | None = None
    command: str | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: Machine | None = None
    schema_version: int
    kind: Literal["plan"] = "plan"
    model: PlanModel
    goal: TuneGoal | None = None
    outcome: OutcomeKind | None = None
    verdict: list[str] = field(default_factory=list)
    recipe: Json
    confirmation: Confirmation | None = None
    dispatch: Json = None
