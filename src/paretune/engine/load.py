"""From a folder and a recipe to something that runs, and the proof that it is what it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from paretune import clock, hardware
from paretune.engine import calibration
from paretune.engine.generate import naive_generate
from paretune.engine.probe import Observation, observe
from paretune.engine.runners.base import CACHE_DTYPES, Runner
from paretune.errors import NoEffectError, NotExactError
from paretune.model import checkpoint
from paretune.model.base import LanguageModel
from paretune.model.layers import Embedding, Linear
from paretune.ops.native import packed
from paretune.ops.quantized_linear import op
from paretune.ops.weights.base import Weight
from paretune.recipe import Recipe
from paretune.transforms.base import Context

TIE_MARGIN = 1e-4  # logits closer than this are a tie: either token is right (fp32)


@dataclass
class Loaded:
    """A model under a recipe."""

    folder: Path
    recipe: Recipe
    runner: Runner
    load_sec: float


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

    def convert(model: LanguageModel, name: str, weight: Weight) -> Weight:
        for transform in recipe.transforms:
            weight = transform.convert(model, name, weight)
        if recipe.engine.runner == "native" and weight.native() is not None:
            weight = next(packed.pack([weight]))
        return weight

    dtype = torch.float32 if device == "cpu" else None
    model = checkpoint.load(folder, dtype, convert if streams else None).to(device)
    if ctx is None:
        is_plain = all(m.weight.format == "dense" for m in model.modules() if isinstance(m, Linear | Embedding))
        needs = is_plain and any(t.needs_calibration for t in recipe.transforms)
        ctx = Context(device=device, calibration=calibration.from_model(model) if needs else None)
    model = recipe.apply(model, ctx)
    loaded = Loaded(folder, recipe, recipe.runner(model), clock.now() - started)
    if device.startswith("cuda") and any(isinstance(m, Weight) and m.format != "dense" for m in model.modules()):
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
    if loaded.runner.name == "native":
        if not loaded.runner.kernels:
            raise NoEffectError(f"no step of {batch_size} sequences ran in native code", "Use the eager runner")
        said.append(f"whole steps run in native code ({probe.runner['isa']})")
    if wanted := loaded.recipe.engine.cache_dtype:
        if probe.cache_dtype != str(CACHE_DTYPES[wanted]):
            raise NoEffectError(f"the cache holds {probe.cache_dtype}, not {wanted}", "Leave cache_dtype out")
        said.append(f"keys and values are kept in {wanted}")
    if probe.compiled:
        if probe.graph_breaks:
            raise NoEffectError(f"the compiled graph has {probe.graph_breaks} breaks", "Use the eager runner")
        said.append("prefill and decode each run as one compiled graph, 0 graph breaks")
    return said, probe


@torch.inference_mode()
def check_exact(loaded: Loaded, prompt: list[int], n_tokens: int = 12, *, shape: tuple[int, int] = (1, 0)) -> list[str]:
    """Holds what claims to be exact against its reference: reference attention, no cache, eager.

    In fp32 the greedy tokens are equal, or differ first at a tie. With rounded numbers (16 bits, int8) the logits may
    be off from the fp32 model by at most twice what the reference form of the same recipe is off.

    Args:
        shape: batch size and least capacity of the cache; a compiled runner has a graph for each. All rows are alike.

    Raises:
        NotExactError: they are not equal.
    """
    batch_size, capacity = shape
    recipe, device = loaded.recipe, str(loaded.runner.device)
    twin = load_recipe(loaded.folder, recipe.without_exact(), device, check=False).runner.model
    runner = loaded.runner
    if not recipe.changes_numbers:
        expected, margins = naive_generate(twin, prompt, n_tokens)
        cache = runner.new_cache(batch_size, max(capacity, len(prompt) + n_tokens))
        step = torch.tensor([prompt] * batch_size, device=runner.device)
        for i in range(n_tokens):
            token = int(runner.forward(step, cache, "last")[0, 0].argmax())
            if token != expected[i]:
                if margins[i] < TIE_MARGIN:
                    return [f"greedy tokens equal the reference up to a tie at token {i + 1} (margin {margins[i]:.1e})"]
                raise NotExactError(
                    f"{recipe.name} is not exact: token {i + 1} differs, with a margin of {margins[i]:.2g}",
                    "Report it as a bug; the recipe is not timed",
                )
            step = torch.tensor([[token]] * batch_size, device=runner.device)
        return [f"{n_tokens} greedy tokens equal the reference's"]
    exact_model = checkpoint.load(loaded.folder, torch.float32).to(device)
    tokens = torch.tensor([prompt] * batch_size, device=device)
    # Prefill most of the prompt and step through the rest, so that both phases are held to it.
    half = max(1, len(prompt) - n_tokens)

    def last_logits(runner: Runner) -> torch.Tensor:
        cache = runner.new_cache(batch_size, max(capacity, len(prompt) + 1))
        parts = [runner.forward(tokens[:, :half], cache, "last")]
        parts += [runner.forward(tokens[:, i : i + 1], cache, "last") for i in range(half, len(prompt))]
        return torch.cat(parts, dim=1).double()

    truth = exact_model(tokens, None, "all")[:, half - 1 :].double()
    # The twin goes the same way (int8 kernels round activations by the number of rows).
    ours, reference = last_logits(runner), last_logits(recipe.without_exact().runner(twin))
    norm = truth.norm()
    error, allowed = float((ours - truth).norm() / norm), float((reference - truth).norm() / norm)
    if not error <= 2 * allowed + 1e-6:
        raise NotExactError(
            f"{recipe.name} is off by {error:.2g} from fp32, its reference form by {allowed:.2g}",
            "Report it as a bug; the recipe is not timed",
        )
    return [f"logit error against fp32 {error:.2g}, reference form of the same recipe {allowed:.2g}"]
