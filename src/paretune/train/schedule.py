"""What is decided before a run: its options, and the learning rate of every update.

The rate is a linear warm-up, then half a cosine down to a floor: pure functions of the update's index, so
that a resumed run needs no state for them.
Reference: Loshchilov & Hutter 2017, "SGDR", arXiv:1608.03983, without restarts; warm-up and floor as GPT-3
(Brown et al. 2020, arXiv:2005.14165, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from paretune.errors import ParetuneError, UsageError
from paretune.model.base import LanguageModel
from paretune.ops.weights.base import Weight

FREE_ON_RESUME = ("eval_every", "eval_windows", "checkpoint_every")  # they do not touch the weights
FREE_WITH_PATIENCE = ("checkpoint_every",)  # evaluations decide there which weights are kept


@dataclass(frozen=True)
class TrainOptions:
    """How to train. A run resumes only under its own options, `FREE_ON_RESUME` (`FREE_WITH_PATIENCE`) apart."""

    learning_rate: float = 3e-4  # the peak
    min_learning_rate: float = 0.05  # the last update's rate, as a fraction of the peak
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # on matrices alone
    clip: float = 1.0  # longest gradient, L2 norm over all parameters
    steps: int = 1000  # updates
    warmup_steps: int = 0
    batch_size: int = 8  # windows in one forward pass
    block_size: int = 512  # tokens in a window
    grad_accumulation: int = 1  # forward passes in one update
    # fp32; bf16 and fp16 (autocast, weights stay fp32; fp16 scales the loss); auto: bf16 where it is faster
    dtype: str = "auto"
    seed: int = 0
    eval_every: int = 0  # updates; 0: before the first and after the last only
    eval_windows: int = 0  # held-out windows or pairs to score, evenly spread; 0: all
    patience: int = 0  # evaluations without a better held-out loss that end the run; the best weights are kept; 0: none
    checkpoint_every: int = 0  # updates; 0: on Ctrl-C only
    compile: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        def require(holds: bool, name: str, cure: str) -> None:
            if not holds:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}", cure)

        for name in ("steps", "batch_size", "block_size", "grad_accumulation"):
            require(getattr(self, name) >= 1, name, "Give 1 or more")
        for name in ("eval_every", "eval_windows", "checkpoint_every", "warmup_steps", "weight_decay", "patience"):
            require(getattr(self, name) >= 0, name, "Give 0 or more")
        for name in ("learning_rate", "clip"):
            require(0 < getattr(self, name) < math.inf, name, "Give a positive number")
        require(0 <= self.min_learning_rate <= 1, "min_learning_rate", "It is a fraction of the peak: 0 to 1")
        require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "Give two in [0, 1)")
        require(self.warmup_steps < self.steps, "warmup_steps", f"Give less than --steps {self.steps}")
        require(self.dtype in ("auto", "fp32", "bf16", "fp16"), "dtype", "Known: auto, fp32, bf16, fp16")
        require(not self.patience or self.eval_every > 0, "patience", "Pass --eval-every too: it counts evaluations")
        require(0 <= self.seed < 2**64, "seed", "Give 0 to 2**64 - 1")


@dataclass(frozen=True)
class TrainResult:
    """What a finished run was.

    Attributes:
        folder: the model folder; `train.json` lies in it.
        loss: of the last update's batch, nats per token.
        heldout_bits_per_byte: of the weights that were kept, and before the first update; None without held-out text.
        heldout_loss: nats per token that counts, of the weights that were kept; None without held-out data.
        first_heldout_loss: before the first update.
        stopped_early: the held-out loss got no better for `patience` evaluations.
        kept_step: the update whose weights were written: with `patience` the best evaluation's, else the last.
        tokens_per_sec: over all updates, evaluation and saving left out.
        elapsed_sec: of all sessions of the run, evaluation and saving included.
        points: one dict per update (and one for step 0), as in `train.json`.
    """

    folder: Path
    steps: int
    loss: float
    heldout_bits_per_byte: float | None
    first_heldout_bits_per_byte: float | None
    dtype: str
    tokens_per_sec: float
    elapsed_sec: float
    points: tuple[dict[str, Any], ...]
    heldout_loss: float | None = None
    first_heldout_loss: float | None = None
    stopped_early: bool = False
    kept_step: int | None = None


def warm_up(step: int, warmup_steps: int) -> float:
    """The factor in (0, 1] of update `step` (0 is the first): 1/n, 2/n, .. 1 (0 would waste an update)."""
    return 1.0 if step >= warmup_steps else (step + 1) / warmup_steps


def cosine(progress: float, floor: float) -> float:
    """From 1 at `progress` 0 down to `floor` at 1; constant outside."""
    progress = min(max(progress, 0.0), 1.0)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def learning_rate(step: int, *, peak: float, steps: int, warmup_steps: int = 0, min_ratio: float = 0.05) -> float:
    """The learning rate of update `step`.

    Args:
        step: 0 for the first update, `steps - 1` for the last.
        peak: the highest rate; update `warmup_steps - 1` is the first to have it.
        steps: updates in the whole run.
        warmup_steps: updates of the linear rise, 0 for none.
        min_ratio: the last update's rate as a fraction of `peak`.
    """
    if step < warmup_steps:
        return peak * warm_up(step, warmup_steps)
    first = max(warmup_steps - 1, 0)  # the cosine starts where the warm-up has reached the peak
    span = steps - 1 - first
    return peak * cosine((step - first) / span if span > 0 else 0.0, min_ratio)


def plain_options(options: TrainOptions) -> dict[str, Any]:
    """The options as JSON gives them back (a tuple is a list there)."""
    return asdict(options) | {"betas": list(options.betas)}


def check_same(
    options: TrainOptions, text_key: str, teacher: Mapping[str, Any] | None, state: Mapping[str, Any], folder: Path
) -> None:
    """Proves that a checkpoint's run is the one that goes on: the same updates on the same text.

    Args:
        teacher: key, weight and temperature; None where nothing is distilled.

    Raises:
        UsageError: names what differs.
    """
    then, now = dict(state["options"]), plain_options(options)
    free = FREE_WITH_PATIENCE if options.patience else FREE_ON_RESUME
    changed = [k for k in now if k not in free and then.get(k) != now[k]]
    if changed:
        differ = ", ".join(f"{k} was {then.get(k)} and is {now[k]}" for k in changed)
        raise UsageError(
            f"cannot resume {folder}: {differ}", "Pass the options of the first run, or start in a new folder"
        )
    if state.get("teacher") != teacher:
        raise UsageError(
            f"cannot resume {folder}: the teacher was {_named(state.get('teacher'))}, and is {_named(teacher)}",
            "Pass --distill, --distill-weight and --distill-temperature of the first run, or start in a new folder",
        )
    if state["text"] != text_key:
        raise UsageError(
            f"cannot resume {folder}: the training text or the tokenizer is not the same",
            "Pass the text of the first run, or start in a new folder",
        )


def _named(teacher: Mapping[str, Any] | None) -> str:
    if teacher is None:
        return "none"
    return f"{teacher['key']} at weight {teacher['weight']:g}, temperature {teacher['temperature']:g}"


def check_same_model(model: LanguageModel, stored: LanguageModel, folder: Path) -> None:
    """Proves that a checkpoint's model is the one that is to go on: its shapes, and what it computes with them.

    A sparse pattern, or ALiBi beside positions, leaves every name and shape as it was: only the config tells.

    Raises:
        UsageError: names what differs.
    """
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (model, stored)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"{folder} holds a model of another shape", "Resume with the MODEL and the --config that the run began with"
        )
    changed = [
        f"{f.name} was {getattr(stored.config, f.name)!r} and is {getattr(model.config, f.name)!r}"
        for f in fields(model.config)
        if f.compare and getattr(stored.config, f.name) != getattr(model.config, f.name)
    ]
    if changed:
        raise UsageError(
            f"cannot resume {folder}: {', '.join(changed)}", "Resume with the MODEL and the --config of the first run"
        )


def auto_dtype(device: str, state: Mapping[str, Any] | None, real: Callable[[], bool] | bool | None) -> str:
    """What `dtype="auto"` means: the checkpoint's on a resume, else bf16 where it is faster than fp32."""
    if state is not None:  # a second measurement could come out the other way, and the run would not be the same
        return str(state.get("options", {}).get("dtype", "fp32"))
    if real is None:
        from paretune import hardware

        if device == "cpu":  # a property of the processor: a measured speed would come out differently each time
            import torch

            real = hardware.has_instruction(torch.bfloat16)
        else:
            support = hardware.dtype_support(device)["bf16"]
            real = support.works and not support.emulated
    return "bf16" if (real() if callable(real) else real) else "fp32"


def check_trainable(model: LanguageModel) -> None:
    """
    Raises:
        UsageError: quantised weights.
    """
    other = [m.format for m in model.modules() if isinstance(m, Weight) and not m.is_plain]
    if other:
        raise UsageError(f"the model holds {other[0]} weights, which carry no gradient", "Train the dense model")


def check_fits(model: LanguageModel, options: TrainOptions, tokens: np.ndarray, heldout: np.ndarray | None) -> None:
    """Proves, before any work, that model, texts and options go together.

    Raises:
        UsageError: quantised weights, a block longer than the positions, ids outside the vocabulary.
        ParetuneError: held-out text with nothing to score.
    """
    config: Any = model.config
    check_trainable(model)
    if options.block_size > config.n_positions:
        raise UsageError(
            f"--block-size {options.block_size} exceeds the model's {config.n_positions} positions",
            f"Use --block-size {config.n_positions} or less",
        )
    for ids in (tokens, heldout):
        if ids is not None and len(ids) and int(ids.max()) >= config.vocab_size:
            raise UsageError(
                f"the text has token {int(ids.max())}, the model knows {config.vocab_size}",
                "Use the tokenizer that belongs to the model",
            )
    if heldout is not None and len(heldout) < 2:
        raise ParetuneError("the held-out text has fewer than 2 tokens", "Hold out a longer text")


def parameter_groups(model: LanguageModel, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices (`*.weight.values`) decay, biases and norms do not; tied ones count once."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (matrices if p.dim() == 2 and name.endswith("weight.values") else others).append(p)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
