"""The step that is profiled: one prefill, one decode step or one training step, always at the same position."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from paretune import hardware
from paretune.engine.load import Loaded
from paretune.errors import ParetuneError, UsageError
from paretune.measure.profile_marks import Marks
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.model.layers import Embedding, Linear
from paretune.ops.weights.dense import Dense
from paretune.recipe import Recipe

Phase = Literal["prefill", "decode", "train"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "train")
_INTERPRETER_BYTES = 450 << 20  # a process with PyTorch
_MEMORY_SHARE = 0.9


def check_phase(phase: str, recipe: Recipe, name: str) -> None:
    """
    Raises:
        UsageError: there is no such phase, or the recipe has none of it.
    """
    if phase not in PHASES:
        raise UsageError(f"unknown phase {phase!r}", f"Known: {', '.join(PHASES)}")
    if phase != "train":
        return
    quantised = [t.title for t in recipe.transforms if not t.trainable]
    why = "" if recipe.runner_class.trainable else f"its runner is {recipe.engine.runner}"
    why = why or (f"{quantised[0]} weights carry no gradient" if quantised else "")
    if why:
        raise UsageError(
            f"{name} has no training phase: {why}",
            "Use --phase prefill or decode, or train with --config baseline",
        )


def stored_width(recipe: Recipe) -> float:
    """Bytes that a weight takes in memory under a recipe, from above.

    Weights take their last form as they are read, if every transform works on them one by one; else all are there in
    fp32 first.
    """
    if not all(t.per_weight for t in recipe.transforms):
        return 4.0
    width = 4.0
    for transform in recipe.transforms:
        width = transform.weight_width or width
    return width


def needed_bytes(config: ModelConfig, phase: str, input_len: int, batch_size: int, recipe: Recipe | None = None) -> int:
    """Memory that the profile takes, from above, known before anything is loaded.

    Loading holds one plain tensor beside the model. Training adds gradients, two moments and the activations of all
    layers.

    Args:
        recipe: how the weights are stored; None: fp32.
    """
    parameters = [p.numel() for p in checkpoint.build(config).parameters()]
    n_params, largest = sum(parameters), max(parameters)
    width = stored_width(recipe) if recipe else 4.0
    rows = batch_size * input_len
    wide = 3 * config.n_inner + 8 * config.n_embd + 2 * config.n_head * input_len  # activations a layer keeps, a token
    logits = rows * config.vocab_size if phase == "train" else batch_size * config.vocab_size
    cache = 2 * config.n_layer * config.n_kv_head * config.head_dim * (rows + batch_size)
    if phase == "train":
        return _INTERPRETER_BYTES + 4 * (4 * n_params + config.n_layer * rows * wide + 3 * logits)
    return _INTERPRETER_BYTES + round(width * n_params) + 4 * (2 * largest + cache + rows * wide + 2 * logits)


def check_memory(
    config: ModelConfig, phase: str, input_len: int, batch_size: int, recipe: Recipe | None = None
) -> None:
    """
    Raises:
        ParetuneError: the model will not fit; nothing was loaded.
    """
    needed, free = needed_bytes(config, phase, input_len, batch_size, recipe), hardware.available_memory_bytes()
    if needed > _MEMORY_SHARE * free:
        raise ParetuneError(
            f"this profile needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free",
            "Use fewer bytes a weight (--config native_int4), a smaller model, --batch-size or --input-len, or plan "
            "with --predict or --device-profile",
        )


class Step:
    """One phase of one runner, repeatable.

    Args:
        input_len: prompt tokens; of a decode step, what the cache holds before it; of training, the window.
        capacity: of the cache at least; a compiled runner has a graph for each.
    """

    def __init__(
        self, loaded: Loaded, phase: Phase, input_len: int, batch_size: int, seed: int = 0, capacity: int = 0
    ) -> None:
        runner, config = loaded.runner, loaded.runner.config
        self.loaded, self.runner, self.model, self.phase = loaded, runner, runner.model, phase
        self.input_len, self.batch_size = input_len, batch_size
        n_tokens = input_len + (phase != "prefill")
        if n_tokens > config.n_positions:
            raise UsageError(
                f"{input_len} input tokens and one more exceed the context of {config.n_positions}",
                "Choose a smaller --input-len",
            )
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, n_tokens)
        self.tokens = torch.randint(0, config.vocab_size, shape, generator=generator).to(runner.device)
        self.cache: Any = None
        if phase == "train":
            self._start_training()
            return
        self.cache = runner.new_cache(batch_size, max(capacity, n_tokens))
        self._last = self.tokens[:, input_len:].contiguous()
        self._prompt = self.tokens[:, :input_len].contiguous()
        if phase == "decode":
            runner.forward(self._prompt, self.cache, "last")

    def _start_training(self) -> None:
        holders = [m for m in self.model.modules() if isinstance(m, Linear | Embedding)]
        if any(not isinstance(m.weight, Dense) for m in holders):
            raise UsageError("this model's weights carry no gradient", "Profile its prefill or decode phase")
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)

    def prepare(self) -> None:
        """Outside the timed region: the cache goes back to where the step begins."""
        if self.cache is not None:
            self.cache.truncate_(self.input_len if self.phase == "decode" else 0)

    def run(self, marks: Marks | None = None) -> torch.Tensor:
        """The step; its logits `[B, 1, V]`, or the loss of training."""
        if self.phase == "prefill":
            return self.runner.forward(self._prompt, self.cache, "last")
        if self.phase == "decode":
            return self.runner.forward(self._last, self.cache, "last")
        logits = self.model(self.tokens[:, :-1], None, "all")
        if marks is not None:
            marks.on_gradient(logits, ("head", -1, False))
            marks(("loss", -1, False))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), self.tokens[:, 1:].reshape(-1))
        if marks is not None:
            marks(("loss", -1, True))
        loss.backward()
        if marks is not None:
            marks(("optimizer", -1, False))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @property
    def cache_tensors(self) -> list[torch.Tensor]:
        return [] if self.cache is None else [t for layer in self.cache.layers for t in (layer.k, layer.v)]

    @property
    def n_tokens(self) -> int:
        """Tokens that one step works on."""
        return self.batch_size * (1 if self.phase == "decode" else self.input_len)
