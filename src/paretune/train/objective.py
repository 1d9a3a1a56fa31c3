"""What a training step makes small: cross-entropy of the tokens that count and, where asked, the way to a teacher.

Reference: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paretune.errors import UsageError
from paretune.model.base import LanguageModel

IGNORED = -100  # a target that does not count
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

Forward = Callable[[Tensor], Tensor]


def counted(targets: Tensor) -> int:
    """How many targets count."""
    return int((targets != IGNORED).sum())


def logits_of(forward: Forward, inputs: Tensor, dtype: str) -> Tensor:
    """Logits `[B, T, V]` of inputs `[B, T]` under the autocast of `dtype`."""
    with torch.autocast(inputs.device.type, dtype=AUTOCAST.get(dtype, torch.bfloat16), enabled=dtype in AUTOCAST):
        return forward(inputs)


def kept_logits(forward: Forward, inputs: Tensor, kept: Tensor, dtype: str) -> Tensor:
    """Logits `[n, V]` of the positions that count, `kept[B, T]`.

    The head, a third of a small model's work and the largest tensor of a step, runs on those alone. (A compiled model
    computes all: a hook would break its graph.)
    """
    if bool(kept.all()):
        return logits_of(forward, inputs, dtype).flatten(0, 1)  # picking all would copy them, and their gradients
    if not isinstance(forward, LanguageModel):
        return logits_of(forward, inputs, dtype)[kept]
    handle = forward.head.register_forward_pre_hook(lambda module, given: (given[0][kept],))
    try:
        return logits_of(forward, inputs, dtype)
    finally:
        handle.remove()


def mean_loss(forward: Forward, inputs: Tensor, targets: Tensor, dtype: str) -> Tensor:
    """Mean cross-entropy of the targets that count, nats per token, a scalar in fp32."""
    kept = targets != IGNORED
    return F.cross_entropy(kept_logits(forward, inputs, kept, dtype).float(), targets[kept])


@dataclass(frozen=True, eq=False)
class Teacher:
    """The original, which a converted model is pulled towards.

    Args:
        model: in evaluation mode; nothing of it changes.
        key: names its weights.
        weight: 0 to 1, of the distance to the teacher; the rest is the cross-entropy.
        temperature: both distributions are softened by it.

    A run resumes only with the same three.
    """

    model: LanguageModel
    key: str
    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise UsageError(f"--distill-weight is {self.weight:g}", "Give more than 0 and at most 1")
        if self.temperature <= 0:
            raise UsageError(f"--distill-temperature is {self.temperature:g}", "Give more than 0")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its part of the loss, for `train.json` and the checkpoint."""
        return {"key": self.key, "weight": self.weight, "temperature": self.temperature}

    def check(self, model: LanguageModel) -> None:
        """
        Raises:
            UsageError: the two have different vocabularies.
        """
        ours, theirs = model.config.vocab_size, self.model.config.vocab_size  # type: ignore[union-attr]
        if ours != theirs:
            raise UsageError(f"the teacher knows {theirs} tokens, the model {ours}", "Use a teacher of the same family")


def summed_loss(forward: Forward, inputs: Tensor, targets: Tensor, dtype: str, teacher: Teacher | None) -> Tensor:
    """The loss of one forward pass, summed over the targets that count (so that uneven batches add up right).

    With a teacher: `(1 - w) * cross-entropy + w * T^2 * KL(teacher || model)` at temperature T.
    """
    kept = targets != IGNORED
    logits = kept_logits(forward, inputs, kept, dtype).float()
    loss = F.cross_entropy(logits, targets[kept], reduction="sum")
    if teacher is None:
        return loss
    with torch.no_grad():
        wanted = kept_logits(teacher.model, inputs, kept, dtype).float()
    t = teacher.temperature
    distance = F.kl_div(F.log_softmax(logits / t, -1), F.log_softmax(wanted / t, -1), log_target=True, reduction="sum")
    return (1 - teacher.weight) * loss + teacher.weight * t * t * distance
