"""Attention heads go, with the key/value head that they share: rows of the projections, inputs of `o`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paretune.model.base import LanguageModel
from paretune.model.config import LayerShape, ModelConfig
from paretune.model.families.base import Role
from paretune.transforms.prune import scores
from paretune.transforms.prune.inner import PruneInner
from paretune.transforms.prune.structure import in_words, linear, take_rows_


@dataclass(frozen=True)
class Heads(PruneInner):
    """Each layer keeps a share of its heads; query heads that share keys and values go together."""

    name: ClassVar[str] = "heads"
    what: ClassVar[str] = "heads"
    reader: ClassVar[Role] = "o"

    def count(self, shape: LayerShape) -> int:
        return shape.n_kv_head

    def with_count(self, shape: LayerShape, n: int) -> LayerShape:
        return shape._replace(n_head=shape.n_head // shape.n_kv_head * n, n_kv_head=n)

    def fits(self, config: ModelConfig) -> str | None:
        if config.alibi and not self.is_done(config):
            return "slopes of ALiBi belong to the number of heads"
        return super().fits(config)

    def _parts(self, model: LanguageModel, i: int) -> list[tuple[Role, Tensor]]:
        """The rows of the projections as they are by key/value head, int64 `[n_kv_head, rows of a head]`."""
        n_head, n_kv_head, _ = model.config.layer(i)
        D, sharers = model.config.head_dim, n_head // n_kv_head
        keys = torch.arange(n_kv_head * D).view(n_kv_head, D)
        queries = torch.arange(n_head * D).view(n_kv_head, sharers * D)
        if "qkv" in model.family.modules:
            width = n_head * D
            return [("qkv", torch.cat([queries, width + keys, width + n_kv_head * D + keys], dim=1))]
        return [("q", queries), ("k", keys), ("v", keys)]

    def magnitudes(self, model: LanguageModel, i: int) -> Tensor:
        reader = linear(model, self.reader, i)
        assert reader is not None
        n = self.count(model.config.layer(i))
        rows = []
        for role, index in self._parts(model, i):
            layer = linear(model, role, i)
            assert layer is not None
            rows.append((layer, lambda x, index=index: x[index].sum(1)))
        return scores.sizes(rows, [(reader, lambda x: x.view(n, -1).sum(1))])

    def cut_(self, model: LanguageModel, i: int, kept: Tensor) -> Tensor:
        n_head, n_kv_head, _ = model.config.layer(i)
        D = model.config.head_dim
        sharers = n_head // n_kv_head
        for role, index in self._parts(model, i):
            layer = linear(model, role, i)
            assert layer is not None
            # In the order of the layer itself: queries, keys, values.
            take_rows_(layer, index[kept].flatten().sort().values)
        attention = model.get_submodule(f"{model.family.stack}.{i}.{model.family.attention}")
        attention.n_head = sharers * len(kept)  # type: ignore[assignment]
        if hasattr(attention, "n_kv_head"):
            attention.n_kv_head = len(kept)  # type: ignore[assignment]
        return torch.arange(n_head * D).view(n_kv_head, -1)[kept].flatten()

    def shapes(self, config: ModelConfig) -> str:
        layers = [config.layer(i) for i in range(config.n_layer)]
        words = f"{in_words([s.n_head for s in layers])} heads"
        if any(s.n_head != s.n_kv_head for s in layers):
            words += f" on {in_words([s.n_kv_head for s in layers])} of keys and values"
        return f"layers of {words}"
