"""What `plan.json` holds."""

from __future__ import annotations

from dataclasses import dataclass
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
    name: str
    family: str
    n_parameters: int
    n_layer: int
    n_embd: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class PlanFile(Record):
    """A plan as it is written.

    Args:
        hardware: the machine that it holds for.
        recipe: how to change and run the model, as plain data.
        dispatch: forms by regime (`engine.dispatch.Table`), as plain data; None: there is no choice.
    """

    SCHEMA: ClassVar[int] = 1
    CURE: ClassVar[str] = "Run `paretune tune` again"

    created: str
    command: str
    seed: int | None
    versions: dict[str, str]
    hardware: Machine
    schema_version: int
    kind: Literal["plan"] = "plan"
    model: PlanModel
    goal: TuneGoal
    outcome: OutcomeKind
    verdict: list[str]
    recipe: Json
    confirmation: Confirmation | None
    dispatch: Json = None
