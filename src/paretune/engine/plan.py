"""What `tune` returns: a folder with the chosen recipe, the evidence, and the machine it holds for.

plan.json      recipe, model, goal, outcome, confirmation, fingerprint of the machine
model/         the converted checkpoint, where conversion is not instant
trials.jsonl   one line a trial, failed and slower ones too
samples.jsonl  every raw sample, in the order they were taken
report.html    the same for people
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paretune import hardware
from paretune.engine.dispatch import Table
from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.recipe import Recipe
from paretune.records import record
from paretune.records.plan import PlanFile

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Plan:
    """A plan as it was read.

    Args:
        folder: where it lies.
        model_folder: the checkpoint to load: the converted one inside the plan, or the original.
        recipe: how to change and run it.
        file: the whole `plan.json`.
        table: forms by regime, where `tune --regimes` measured them.
    """

    folder: Path
    model_folder: Path
    recipe: Recipe
    file: PlanFile
    table: Table | None = None

    @property
    def source(self) -> Path:
        """The checkpoint as it was before `tune`."""
        return checkpoint.resolve(self.file.model.source)

    def warnings(self) -> list[str]:
        """What to say before the plan runs here: that it was measured on another machine, say."""
        made_on = self.file.hardware
        if made_on is not None and made_on.id != hardware.fingerprint_id(hardware.fingerprint()):
            return ["this plan was measured on another machine: its speed is a guess here, run `paretune tune` again"]
        return []


def is_plan(path: str | Path) -> bool:
    """Whether `path` is a plan folder or its `plan.json`."""
    path = Path(path).expanduser()
    return (path / PLAN_FILE).is_file() or (path.name == PLAN_FILE and path.is_file())


def read_plan(path: str | Path) -> Plan:
    """Reads a plan folder (or its `plan.json`).

    Raises:
        UsageError: it is not a plan, it is damaged, or the model it refers to is gone.
    """
    path = Path(path).expanduser()
    file = path if path.is_file() else path / PLAN_FILE
    if not file.exists():
        raise UsageError(f"{path} holds no {PLAN_FILE}", "Pass a folder that `paretune tune` wrote")
    data = record.read(PlanFile, file)
    try:
        recipe = Recipe.from_dict(data.recipe)
        table = None if data.dispatch is None else Table.from_dict(data.dispatch)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file} is damaged ({error})", PlanFile.CURE) from None
    folder, inside = file.parent, data.model.folder
    if inside:
        if not (folder / inside).is_dir():
            raise UsageError(f"the stored model {folder / inside} is gone", PlanFile.CURE)
        return Plan(folder, folder / inside, recipe, data, table)
    return Plan(folder, checkpoint.resolve(data.model.source), recipe, data, table)
