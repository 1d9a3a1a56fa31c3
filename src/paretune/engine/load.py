"""From a folder and a recipe to something that runs, and the proof that it is what it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from paretune import clock, hardware
from paretune.engine import calibration
from paretune.engine.probe import Observation, observe
from paretune.engine.runners.base import CACHE_DTYPES, Runner
from paretune.errors import NoEffectError
from paretune.model import checkpoint
from paretune.model.base import LanguageModel
from paretune.model.layers import Embedding, Linear
from paretune.ops.native import packed
from paretune.ops.quantized_linear import op
from paretune.ops.weights.base import Weight
from paretune.process import give_back_free_memory
from paretune.recipe import Recipe
from paretune.registry import RUNNERS
from paretune.transforms.base import Context


@dataclass
class Loaded:
    """A model under a recipe.

    Attributes:
        load_sec: from the folder to the runner, the next two included.
        convert_sec: what the transforms took.
        calibrate_sec: the model's writing of the text that some of them need.
        notes: what the user has to know of how it was loaded.
    """

    folder: Path
    recipe: Recipe
    runner: Runner
    load_sec: float
    convert_sec: float = 0.0
    calibrate_sec: float = 0.0
    notes: tuple[str, ...] = ()


def load_recipe(
    folder: Path, recipe: Recipe, device: str = "cpu", ctx: Context | None = None, *, check: bool = True
) -> Loaded:
    """Loads the checkpoint, applies the transforms, makes the runner.

    Models are loaded in fp32 on a CPU and as stored on a GPU.

    Args:
        ctx: None where a transform needs calibration: the model writes the text itself.
        check: ask the recipe first whether it can run here; False where the caller has asked already (the answer costs
            seconds of micro-kernels, and more on a busy machine).

    Raises:
        UsageError: the recipe cannot run this model here; the reason is in the message.
    """
    if check:
        recipe.check(device, checkpoint.read_config(folder))
    started = clock.now()
    if recipe.engine.threads:
        hardware.set_threads(recipe.engine.threads)
    # Each weight takes its last form as soon as it is read: the peak is the converted model and one plain weight.
    streams = device == "cpu" and all(t.per_weight for t in recipe.transforms)

    convert_sec = calibrate_sec = 0.0
    kind = RUNNERS.get(recipe.engine.runner)

    def convert(model: LanguageModel, name: str, weight: Weight) -> Weight:
        nonlocal convert_sec
        before = clock.now()
        for transform in recipe.transforms:
            weight = transform.convert(model, name, weight)
        convert_sec += clock.now() - before
        if kind.packs_weights and weight.native() is not None:
            weight = next(packed.pack([weight]))
        return weight

    dtype = torch.float32 if device == "cpu" else None
    model = checkpoint.load(folder, dtype, convert if streams else None).to(device)
    notes: list[str] = []
    if ctx is None:
        is_plain = all(m.weight.is_plain for m in model.modules() if isinstance(m, Linear | Embedding))
        needs = is_plain and any(t.needs_calibration for t in recipe.transforms)
        before = clock.now()
        windows = calibration.from_model(model, say=notes.append) if needs else None
        ctx = Context(device=device, calibration=windows)
        calibrate_sec = clock.now() - before
    before = clock.now()
    model = recipe.apply(model, ctx)
    convert_sec += clock.now() - before
    runner = recipe.runner(model)
    give_back_free_memory()  # of the plain weights that were converted
    loaded = Loaded(folder, recipe, runner, clock.now() - started, convert_sec, calibrate_sec, tuple(notes))
    if device.startswith("cuda") and any(isinstance(m, Weight) and not m.is_plain for m in model.modules()):
        op.unavailable_reason(device)  # tries the kernels now, once a process: in a captured graph would be too late
    return loaded


def prove(loaded: Loaded, batch_size: int = 1, capacity: int = 0) -> tuple[list[str], Observation]:
    """Proof of effect of every transform and of the runner.

    Args:
        batch_size, capacity: of the cache that is probed with; a compiled runner has a graph for each.

    Raises:
        NoEffectError: a transform or the runner did nothing.
    """
    probe = observe(loaded.runner, batch_size, capacity)
    said = [s for t in loaded.recipe.transforms for s in t.verify(loaded.runner.model, probe)]
    said += loaded.runner.prove(probe.graph_breaks)
    if wanted := loaded.recipe.engine.cache_dtype:
        if probe.cache_dtype != str(CACHE_DTYPES[wanted]):
            raise NoEffectError(f"the cache holds {probe.cache_dtype}, not {wanted}", "Leave cache_dtype out")
        said.append(f"keys and values are kept in {wanted}")
    return said, probe
