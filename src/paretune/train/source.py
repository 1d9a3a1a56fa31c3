"""What a run learns from: batches, held-out scores, and what a resume is held to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from paretune.model.base import LanguageModel
from paretune.train import data
from paretune.train.data import BatchSampler, TokenStream
from paretune.train.objective import mean_loss
from paretune.train.schedule import TrainOptions, check_fits

BITS = "heldout_bits_per_byte"


class Sampler(Protocol):
    """Batches in an order that a resumed run finds again."""

    def next(self) -> tuple[Tensor, Tensor]: ...

    def state(self) -> dict[str, int]: ...

    def restore(self, state: Mapping[str, int]) -> None: ...


class Source(Protocol):
    """What a run learns from and is scored on: a text (`TextSource`) or pairs (`pairs.PairSource`)."""

    @property
    def key(self) -> str:
        """A hash of all that decides the batches: a resume is held to it."""
        ...

    @property
    def heldout_names(self) -> Sequence[str]: ...

    @property
    def files(self) -> Mapping[str, Any]:
        """JSON files that belong beside the finished model."""
        ...

    def sampler(self, options: TrainOptions) -> Sampler: ...

    def check(self, model: LanguageModel, options: TrainOptions) -> None:
        """Raises UsageError where model, data and options do not go together."""
        ...

    def evaluate(self, model: LanguageModel, options: TrainOptions) -> dict[str, float | None]:
        """Held-out scores, `heldout_loss` among them; empty without held-out data."""
        ...


@dataclass(frozen=True, eq=False)
class TextSource:
    """Windows of a token stream."""

    stream: TokenStream
    heldout: TokenStream | None
    files: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return self.stream.key

    @property
    def heldout_names(self) -> Sequence[str]:
        return self.heldout.documents if self.heldout else ()

    def sampler(self, options: TrainOptions) -> Sampler:
        return BatchSampler(self.stream.tokens, options.batch_size, options.block_size, options.seed)

    def check(self, model: LanguageModel, options: TrainOptions) -> None:
        check_fits(model, options, self.stream.tokens, self.heldout.tokens if self.heldout else None)

    def evaluate(self, model: LanguageModel, options: TrainOptions) -> dict[str, float | None]:
        if self.heldout is None:
            return {}
        o, held = options, self.heldout
        loss = heldout_loss(model, held.tokens, o.block_size, o.batch_size, o.eval_windows, o.dtype)
        bits = loss / math.log(2) * len(held.tokens) / held.n_bytes
        # A model that is broken from the start gives NaN here, which strict JSON has no word for.
        return {
            "heldout_loss": loss if math.isfinite(loss) else None,
            BITS: bits if math.isfinite(bits) else None,
        }


@torch.no_grad()
def heldout_loss(
    model: LanguageModel,
    tokens: np.ndarray,
    block_size: int,
    batch_size: int,
    n_windows: int = 0,
    dtype: str = "fp32",
) -> float:
    """Mean nats per token over non-overlapping windows (each token but the first is a target once).

    Args:
        n_windows: score this many, evenly spread; 0: all.
    """
    device = next(model.parameters()).device
    total, n = 0.0, 0
    for batch in data.heldout_batches(tokens, block_size, batch_size, n_windows):
        shown = batch.to(device)
        loss = mean_loss(model, shown[:, :-1], shown[:, 1:], dtype)
        total, n = total + loss.item() * shown[:, 1:].numel(), n + shown[:, 1:].numel()
    return total / n
