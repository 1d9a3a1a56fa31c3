"""A runner that takes every prompt in two halves, through PyTorch's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from paretune.engine.cache import KVCache
from paretune.engine.runners.base import Logits
from paretune.engine.runners.eager import EagerRunner


class HalvesRunner(EagerRunner):
    name = "halves"
    is_reference = False

    def forward(self, tokens: Tensor, cache: KVCache, logits: Logits = "last") -> Tensor:
        if tokens.size(1) < 2 or logits == "all" or cache.ring:
            return super().forward(tokens, cache, logits)
        (length, *others) = cache.take_staged_(tokens.size(1))
        if any(n != tokens.size(1) for n in (length, *others)):  # rows of their own lengths go through whole
            cache.stage_([length, *others])
            return super().forward(tokens, cache, logits)
        middle = tokens.size(1) // 2
        super().forward(tokens[:, :middle], cache, "last")
        return super().forward(torch.clone(tokens[:, middle:]), cache, "last")
