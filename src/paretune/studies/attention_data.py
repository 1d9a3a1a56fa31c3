"""The attention studies as published, and the mechanisms that stand beside them.

Published: "Reducing Inference Time in GPT Models" (GPT-2 small, an A100, 1000 training and 200 validation articles of
at most 512 tokens, batch 1). Another machine, other data: ratios and orders are compared, never seconds or scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from paretune.errors import ParetuneError
from paretune.model.config import ModelConfig
from paretune.model.layers import DEFAULT_ATTENTION
from paretune.ops.attention.spec import AttentionSpec
from paretune.recipe import Recipe
from paretune.registry import ATTENTION
from paretune.transforms.attention import Attention

STANDARD, FLASH = "Standard GPT-2", "Flash GPT-2"
ALIBI, SPARSE, HYBRID = "Flash + ALiBi", "Flash + Sparse", "Flash + ALiBi + Sparse"

# Table I: scores 0 to 1 there; BLEU here as sacrebleu writes it, times 100.
PUBLISHED_QUALITY = {
    STANDARD: {"rouge1": 0.1806, "rouge2": 0.0804, "rougeL": 0.1215, "bleu": 2.63},
    FLASH: {"rouge1": 0.1608, "rouge2": 0.0691, "rougeL": 0.1076, "bleu": 2.21},
    ALIBI: {"rouge1": 0.1975, "rouge2": 0.0868, "rougeL": 0.1320, "bleu": 2.95},
    SPARSE: {"rouge1": 0.1943, "rouge2": 0.0856, "rougeL": 0.1303, "bleu": 2.82},
}
# Table II: seconds, bytes.
PUBLISHED_SPEED = {
    STANDARD: {"sec": 0.09622, "bytes": 9465.81e6},
    FLASH: {"sec": 0.07342, "bytes": 8867.81e6},
    ALIBI: {"sec": 0.08708, "bytes": 8865.81e6},
    SPARSE: {"sec": 0.08686, "bytes": 8877.81e6},
}
# Training time by batch size: seconds (printed there in milliseconds), and the printed speedup of Flash in percent.
PUBLISHED_SAVING = {16: 0.0262, 32: 0.0139, 64: 0.0322, 128: 0.0507}
PUBLISHED_TRAINING = {
    (STANDARD, 16): 1.50843,
    (STANDARD, 32): 1.35353,
    (STANDARD, 64): 1.32598,
    (STANDARD, 128): 1.34139,
    (FLASH, 16): 1.46735,
    (FLASH, 32): 1.33477,
    (FLASH, 64): 1.28322,
    (FLASH, 128): 1.27407,
}
WHERE_IT_WENT_WRONG = (
    "Flash attention is exact: with the same weights it writes the same summaries, so its ROUGE is the standard one's, "
    "not 0.161 against 0.181. That published gap is what two fine-tuning runs differ by on 200 articles, and it is "
    "larger than every other gap of the table.",
    "ALiBi's slopes are fixed, a geometric series by head; nothing is learned, and the bias is two operations a score.",
    "A 0/1 mask that multiplies the scores leaves a masked score at 0, which still weighs exp(0). Here what is masked "
    "is minus infinity or, in the sparse forms, not computed at all.",
    "Memory was 8.9 GB in the table and 20.9 GB in the conclusion: here it is the resident peak of a process of its "
    "own, with its parts.",
)


@dataclass(frozen=True)
class Mechanism:
    """One row of the tables.

    Attributes:
        weights: which fine-tuned weights it runs on; rows that share them are exact variants of each other.
        form: the attention function that runs it (`registry.ATTENTION`).
        convert: options of the `mechanism` transform that comes before fine-tuning; none for dense attention.
    """

    name: str
    weights: str
    form: str = "sdpa"
    convert: dict[str, Any] = field(default_factory=dict)

    def recipe(self, *, is_converted: bool = False, form: str | None = None, runner: str = "eager") -> Recipe:
        """How it runs.

        Args:
            is_converted: the folder that it runs on has the mechanism already.
            form: another attention function than its own.
        """
        first = [{"name": "mechanism", **self.convert}] if self.convert and not is_converted else []
        attention = {"name": "attention", "form": form or self.form}
        return Recipe.from_dict({"transforms": [*first, attention], "engine": {"runner": runner}})

    @property
    def training(self) -> Recipe:
        """What is applied before fine-tuning, which runs on PyTorch's operators (they have gradients)."""
        return self.recipe(form=self.form if self.form == DEFAULT_ATTENTION else "sdpa")


def pattern_of(config: ModelConfig) -> str:
    """Longformer's form at a scale that skips most of the context: an eighth of it, and a few global tokens."""
    window = max(4, config.n_positions // 8)
    return f"prefix:{max(1, window // 8)}+window:{window}"


def fast_form(device: str) -> tuple[str, str]:
    """The attention function for biases and patterns, one that skips what is masked where one runs here, and otherwise
    why none does."""
    name = "native" if device == "cpu" else "flex"  # FlexAttention on a CPU compiles for tens of seconds
    cause = Attention(form=name).requires(device)
    if cause is None:
        q = torch.zeros(1, 1, 128, 64, device=device)  # on a GPU, heads of fewer than 16 numbers do not compile
        try:
            ATTENTION.get(name)(q, q, q, None, AttentionSpec(scale=1.0))  # what can be compiled is known after it
        except (ParetuneError, RuntimeError) as error:
            cause = " ".join(str(error).split())[:160]
    return (name, "") if cause is None else ("sdpa", f"{name}: {cause}")


def mechanisms(config: ModelConfig, fast: str) -> list[Mechanism]:
    """The published rows, then what they left open: ALiBi and sparsity together.

    Args:
        fast: the attention function of the rows with biases and patterns (`fast_form`).
    """
    pattern = pattern_of(config)
    return [
        Mechanism(STANDARD, "dense", "eager"),
        Mechanism(FLASH, "dense"),
        Mechanism(ALIBI, "ALiBi", fast, {"alibi": True}),
        Mechanism(SPARSE, "sparse", fast, {"pattern": pattern}),
        Mechanism(HYBRID, "ALiBi + sparse", fast, {"alibi": True, "pattern": pattern}),
    ]
