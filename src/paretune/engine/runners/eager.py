"""PyTorch, operator by operator."""

from __future__ import annotations

import torch
from torch import Tensor

from paretune.engine.cache import KVCache
from paretune.engine.runners.base import Logits, Runner


class EagerRunner(Runner):
    name = "eager"
    is_reference = True
    trainable = True

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: KVCache, logits: Logits = "last") -> Tensor:
        if tokens.size(1) > cache.max_step and cache.ring:
            return self.in_pieces(tokens, cache, logits)
        cache.begin_(tokens.size(1))
        out = self.model(cache.of_step(tokens), cache, logits)
        cache.commit_()
        return cache.of_cache(out)
