"""A session: a model, how it is changed and run, and where, decided in one place before any weight is read."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paretune import hardware
from paretune.engine.dispatch import Dispatcher, Table
from paretune.engine.load import Loaded, load_recipe
from paretune.engine.plan import Plan, is_plan, read_plan
from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.model.tokenizer import Tokenizer
from paretune.recipe import Recipe, preset
from paretune.registry import RUNNERS

DEFAULT_CONFIG = "baseline"
PLAN = "plan"  # the config that a plan itself is


@dataclass(frozen=True)
class Session:
    """What will run, as `open` decided it.

    Args:
        source: as it was given: a folder, a name, a hub id, or a plan.
        config: what the recipe is called here.
        folder: the checkpoint to load.
        recipe: how to change and run it.
        device: that was found to be here.
        plan: the plan that `source` is, whichever recipe was chosen.
        is_of_plan: it is the plan's own recipe that was chosen.
        table: of the plan, where a request may choose among its forms: not beside a runner that was asked for.
    """

    source: str
    config: str
    folder: Path
    recipe: Recipe
    device: str
    plan: Plan | None = None
    is_of_plan: bool = False
    table: Table | None = None

    @functools.cached_property
    def model_config(self) -> ModelConfig:
        """Of the checkpoint, before the recipe."""
        return checkpoint.read_config(self.folder)

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))

    def tokenizer(self) -> Tokenizer:
        """The folder's.

        Raises:
            CheckpointError: it has none.
        """
        return Tokenizer(self.folder)

    def notes(self) -> list[str]:
        """What the user should know before it runs here."""
        own = self.plan.warnings() if self.plan is not None and self.is_of_plan else []
        return [*own, *(note for t in self.recipe.transforms for note in t.notes(self.device))]

    def check(self) -> None:
        """Raises `UsageError` where the recipe cannot run this model here; nothing is loaded."""
        self.recipe.check(self.device, self.model_config)

    def set_threads(self, otherwise: int | None = None) -> dict[str, int]:
        """Threads as the recipe says, else `otherwise`, else the physical cores; as `hardware.set_threads`."""
        return hardware.set_threads(self.recipe.engine.threads or otherwise)

    def load(self) -> Loaded:
        """Loads the model and changes it. PyTorch's thread count is left as it is, unless the recipe sets one.

        Raises:
            UsageError: the recipe cannot run this model here.
            CheckpointError: the folder cannot be loaded as it is.
        """
        return load_recipe(self.folder, self.recipe, self.device)

    def forms(self, loaded: Loaded, spare_bytes: int = 0) -> Dispatcher | None:
        """What chooses among the forms of a plan with a table, for the model that `load` gave; else None.

        Args:
            spare_bytes: for second copies of the weights.
        """
        return None if self.table is None else Dispatcher.of(loaded, self.plan, spare_bytes)


def open(
    source: str | Path,
    config: str | Recipe | None = None,
    device: str = "cpu",
    threads: int | None = None,
    *,
    runner: str | None = None,
    is_alone: bool = False,
) -> Session:
    """Decides what will run; no weight is read.

    Args:
        source: a model folder, name or hub id, or a plan.
        config: a recipe, its file, or an expression; None: the plan's own, else the baseline. Beside a plan any other
            starts from the model as it was before `tune` converted it.
        threads: instead of the recipe's.
        runner: instead of the recipe's.
        is_alone: the source is one thing to be run: a config beside a plan is refused.

    Raises:
        UsageError: an unknown model, config, device or runner; a config beside a plan where it is refused.
    """
    hardware.check_device(device)
    source = str(source)
    if runner is not None:
        RUNNERS.check(runner)
    plan = read_plan(source) if is_plan(source) else None
    if plan is not None and is_alone and config is not None:
        name = config.name if isinstance(config, Recipe) else config
        raise UsageError(
            f"{source} is a plan and has its own recipe: {name} cannot be added",
            "Leave the config out, or pass the model that the plan was made for",
        )
    is_of_plan = plan is not None and config in (None, PLAN)
    if plan is not None and is_of_plan:
        name, recipe, folder = PLAN, plan.recipe, plan.model_folder
    else:
        config = DEFAULT_CONFIG if config is None else config
        name, recipe = (config.name, config) if isinstance(config, Recipe) else (config, preset(config))
        folder = checkpoint.resolve(source) if plan is None else plan.source
    engine = recipe.engine
    if runner is not None and runner != engine.runner:
        name = f"{name}, {runner}"
        engine = replace(engine, runner=runner, compile_mode="default")  # a mode belongs to its runner
    if threads is not None:
        engine = replace(engine, threads=threads)
    table = plan.table if plan is not None and is_of_plan and runner is None else None
    return Session(source, name, folder, replace(recipe, engine=engine), device, plan, is_of_plan, table)


@dataclass(frozen=True)
class Comparison:
    """Configurations of one source side by side.

    Args:
        folder: the model before any of them.
        configs: names and recipes, in order.
        folders: of configs that have a checkpoint of their own.
        tables: of configs that choose by regime.
    """

    folder: Path
    configs: list[tuple[str, Recipe]]
    folders: Mapping[str, Path]
    tables: Mapping[str, Table]


def compare(source: str | Path, configs: Sequence[str | Recipe], device: str = "cpu") -> Comparison:
    """Opens a source under each of `configs`; `plan` among them is the plan's own recipe.

    Raises:
        UsageError: as `open`.
    """
    sides = [open(source, config, device) for config in configs]
    plan = next((side.plan for side in sides if side.plan is not None), None)
    named = [(side.config, side.recipe) for side in sides]
    if plan is None:
        return Comparison(sides[0].folder, named, {}, {})
    tables = {} if plan.table is None else {PLAN: plan.table}
    return Comparison(plan.source, named, {PLAN: plan.model_folder}, tables)
