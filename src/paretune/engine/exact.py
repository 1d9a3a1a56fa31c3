"""Exact before fast: what claims to be exact is held against its reference before it is timed.

A reference is computed once a run and kept in a file that all of its trials read. The first trial that needs it
computes it from its own weights where it can: with the exact transforms undone and packed weights unpacked (bit for
bit) these are the weights of the reference form, and nothing has to be loaded a second time.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.engine.generate import naive_generate
from paretune.engine.load import Loaded, load_recipe
from paretune.engine.runners.base import Runner
from paretune.errors import NotExactError, ParetuneError
from paretune.files import write_bytes
from paretune.model import checkpoint
from paretune.model.base import LanguageModel
from paretune.model.layers import Embedding, Linear
from paretune.ops.native.packed import PackedWeight
from paretune.ops.weights.base import Weight
from paretune.recipe import Recipe

TIE_MARGIN = 1e-4  # logits closer than this are a tie: either token is right (fp32)
N_TOKENS = 12  # of the check, the last ones of the prompt or the first after it
FEW_ROWS = 16  # that the reference takes at once where a trial decodes: many rows go through other kernels than one

Arrays = dict[str, np.ndarray]


@torch.inference_mode()
def check_exact(
    loaded: Loaded,
    prompt: list[int],
    n_tokens: int = N_TOKENS,
    *,
    shape: tuple[int, int] = (1, 0),
    store: Path | None = None,
) -> list[str]:
    """Holds what claims to be exact against its reference: reference attention, no cache, eager.

    In fp32 the greedy tokens are equal, or differ first at a tie. With rounded numbers (16 bits, int8) the logits may
    be off from the fp32 model by at most twice what the reference form of the same recipe is off.

    Args:
        shape: batch size and least capacity of the cache; a compiled runner has a graph for each. All rows are alike.
        store: an existing folder in which references are kept for other trials of the same run; None keeps none.

    Returns:
        sentences for the report.

    Raises:
        NotExactError: they are not equal.
    """
    batch_size, capacity = shape
    reference = _Reference(loaded, prompt, n_tokens, batch_size, store)
    recipe, runner = loaded.recipe, loaded.runner
    if recipe.changes_numbers:
        tokens = torch.tensor([prompt] * batch_size, device=runner.device)
        ours = _last_logits(runner, tokens, reference.half, capacity, rows=1)
        error, allowed = reference.error_of(ours), reference.allowed()
        if not error <= 2 * allowed + 1e-6:
            raise NotExactError(
                f"{recipe.name} is off by {error:.2g} from fp32, its reference form by {allowed:.2g}",
                "Report it as a bug; the recipe is not timed",
            )
        return [f"logit error against fp32 {error:.2g}, reference form of the same recipe {allowed:.2g}"]
    cache = runner.new_cache(batch_size, max(capacity, len(prompt) + n_tokens))
    step, chosen = torch.tensor([prompt] * batch_size, device=runner.device), []
    for _ in range(n_tokens):
        chosen.append(int(runner.forward(step, cache, "last")[0, 0].argmax()))
        step = torch.tensor([chosen[-1:]] * batch_size, device=runner.device)
    expected, margins = reference.greedy(chosen)
    for i, (token, wanted, margin) in enumerate(zip(chosen, expected, margins, strict=True), 1):
        if token == wanted:
            continue
        if margin < TIE_MARGIN:
            return [f"greedy tokens equal the reference up to a tie at token {i} (margin {margin:.1e})"]
        raise NotExactError(
            f"{recipe.name} is not exact: token {i} differs, with a margin of {margin:.2g}",
            "Report it as a bug; the recipe is not timed",
        )
    return [f"{n_tokens} greedy tokens equal the reference's"]


def _last_logits(runner: Runner, tokens: Tensor, half: int, capacity: int, rows: int) -> Tensor:
    """Teacher-forced logits `[B, T - half + 1, V]` in fp64 of the positions from `half - 1` on: a prefill of `half`
    tokens, then steps of at most `rows` rows (one token at least), so that both phases are held to the reference."""
    batch_size, length = tokens.shape
    cache = runner.new_cache(batch_size, max(capacity, length + 1))
    parts = [runner.forward(tokens[:, :half], cache, "last")]
    size = max(1, rows // batch_size)
    parts += [runner.forward(tokens[:, i : i + size], cache, "all") for i in range(half, length, size)]
    return torch.cat(parts, dim=1).double()


def _rows_matter(runner: Runner) -> bool:
    """Whether a step of few rows rounds otherwise than one of many: then the reference has to take both kinds.

    Sums in 16 bits and kernels of a GPU are assumed to.
    """
    if runner.device.type != "cpu" or runner.dtype != torch.float32:
        return True
    return any(m.rows_matter for m in runner.model.modules() if isinstance(m, Weight))


class _Reference:
    """What a trial is compared with: computed, or read from the store."""

    def __init__(self, loaded: Loaded, prompt: list[int], n_tokens: int, batch_size: int, store: Path | None) -> None:
        self.loaded, self.prompt, self.n_tokens = loaded, prompt, n_tokens
        self.batch_size, self.store = batch_size, store
        self.device = str(loaded.runner.device)
        # Most of the prompt is prefilled, the rest stepped through.
        self.half = max(1, len(prompt) - n_tokens)
        self.n_vocab = loaded.runner.config.vocab_size
        # The order of additions depends on the threads; what is compared here does not.
        self.recipe = loaded.recipe.without_exact().with_threads(None)
        self._twin: LanguageModel | None = None
        self._truth: Tensor | None = None

    def greedy(self, guess: list[int]) -> tuple[list[int], list[float]]:
        """The reference's greedy tokens, and the margin of each over the second."""

        def compute() -> Arrays:
            twin = self.twin()
            tokens, margins = naive_generate(twin, self.prompt, self.n_tokens, guess)
            if self.store is not None and all(p.dtype == torch.float32 for p in twin.parameters()):
                self.truth(twin)  # the trials that change numbers need it, and would have to load this model for it
            return {"tokens": np.array(tokens, np.int64), "margins": np.array(margins, np.float64)}

        found = self.kept("greedy", {"tokens": (self.n_tokens,), "margins": (self.n_tokens,)}, compute)
        return found["tokens"].tolist(), found["margins"].tolist()

    def truth(self, model: LanguageModel | None = None) -> Tensor:
        """Logits `[1, n, V]` in fp64 of the checkpoint in fp32, reference attention, no cache.

        Args:
            model: that very model, where it is at hand.
        """

        def compute() -> Arrays:
            exact = model or checkpoint.load(self.loaded.folder, torch.float32).to(self.device)
            tokens = torch.tensor([self.prompt], device=self.device)
            return {"logits": exact(tokens, None, "all")[0, self.half - 1 :].float().cpu().numpy()}

        shape = (len(self.prompt) - self.half + 1, self.n_vocab)
        if self._truth is None:
            logits = self.kept("truth", {"logits": shape}, compute, Recipe())["logits"]  # of no recipe: all share it
            self._truth = torch.from_numpy(logits)[None].to(self.device).double()
        return self._truth

    def error_of(self, logits: Tensor) -> float:
        """Distance of logits `[B, n, V]` from the truth, relative to it."""
        truth = self.truth().expand_as(logits)
        return float((logits - truth).norm() / truth.norm())

    def allowed(self) -> float:
        """What the reference form of the recipe is off from the truth."""

        def compute() -> Arrays:
            tokens = torch.tensor([self.prompt] * self.batch_size, device=self.device)
            runner = self.recipe.runner(self.twin())
            if _rows_matter(runner):
                logits = _last_logits(runner, tokens, self.half, 0, FEW_ROWS)
            else:  # the same numbers up to the order of additions, and each layer is dequantised once
                cache = runner.new_cache(self.batch_size, tokens.size(1) + 1)
                logits = runner.forward(tokens, cache, "all")[:, self.half - 1 :].double()
            return {"error": np.array(self.error_of(logits), np.float64)}

        return float(self.kept(f"error-{self.batch_size}", {"error": ()}, compute)["error"])

    def twin(self) -> LanguageModel:
        """The model of the recipe without what claims to be exact."""
        if self._twin is None:
            self._twin = _undone(self.loaded)
            if self._twin is None:
                self._twin = load_recipe(self.loaded.folder, self.recipe, self.device, check=False).runner.model
        return self._twin

    def kept(
        self,
        kind: str,
        shapes: Mapping[str, tuple[int, ...]],
        compute: Callable[[], Arrays],
        recipe: Recipe | None = None,
    ) -> Arrays:
        """Arrays of `shapes` from the store, or computed and put there."""
        if self.store is None:
            return compute()
        path = self.store / f"{kind}-{self._key(recipe or self.recipe)}.npz"
        found = _read(path, shapes)
        if found is None:
            found = compute()
            buffer = io.BytesIO()
            np.savez(buffer, **found)  # type: ignore[arg-type]
            with contextlib.suppress(ParetuneError):  # a full disk: the next trial computes it again
                write_bytes(path, buffer.getvalue())
        return found

    def _key(self, recipe: Recipe) -> str:
        folder = self.loaded.folder.resolve()
        files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.weight_files(folder)]
        about = [str(folder), files, self.prompt, self.n_tokens, self.device, recipe.to_dict()]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Arrays | None:
    """None: it is not there, or not what it should be."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in shapes}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if any(arrays[name].shape != shape or arrays[name].dtype.kind not in "fi" for name, shape in shapes.items()):
        return None
    return arrays


def _undone(loaded: Loaded) -> LanguageModel | None:
    """A second module tree over the weights of a loaded model, its exact transforms undone; None where one of them
    cannot be."""
    model = loaded.runner.model
    tensors: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, tensors)  # what is in the second argument is not copied
    if not all(t.undo_(twin) for t in loaded.recipe.transforms if t.exact):
        return None
    originals: dict[int, Any] = {}
    for module in twin.modules():
        if isinstance(module, Linear | Embedding) and isinstance(module.weight, PackedWeight):
            packed = module.weight
            if id(packed) not in originals:  # tied layers stay tied
                originals[id(packed)] = (packed, packed.original())
            module.weight = originals[id(packed)][1]
    return twin
