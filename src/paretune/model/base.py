"""What a model file gives to the rest of the house, besides `forward`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from paretune.model import families
from paretune.model.config import ModelConfig
from paretune.model.families.base import Family
from paretune.model.layers import Embedding, Linear
from paretune.ops.native.program import CannotLower, Program


class LanguageModel(nn.Module):
    """Base of every architecture; a subclass holds `config`. What else is particular to a family: `families.base`."""

    config: ModelConfig

    @property
    def family(self) -> Family:
        return families.of(self.config)

    @property
    def embedding_name(self) -> str:
        return self.family.modules["embedding"]

    @property
    def head_name(self) -> str:
        return self.family.modules["head"]

    @property
    def embedding(self) -> Embedding:
        return self.get_submodule(self.embedding_name)  # type: ignore[return-value]

    @property
    def head(self) -> Linear:
        return self.get_submodule(self.head_name)  # type: ignore[return-value]

    def forward(self, tokens: Tensor, cache: Any = None, logits: Literal["last", "all"] = "all") -> Tensor:
        """Logits of the next token.

        Args:
            tokens: int64 `[B, T]`.
            cache: a `KVCache` begun for T tokens, or None: then `tokens` is all there is.
            logits: of every position, `[B, T, V]`, or of each row's last valid one, `[B, 1, V]`.
        """
        raise NotImplementedError

    def drop_positions_(self) -> None:
        """Takes the positions out of the forward step (ALiBi stands in for them)."""
        raise NotImplementedError

    def lower(self, program: Program) -> None:
        """Writes the forward step as a list of native operations.

        Raises:
            CannotLower: native code has no form of something in it.
        """
        raise CannotLower(f"{type(self).__name__} has no native form", "Use the eager runner")

    def initialize_(self, generator: torch.Generator) -> None:
        """Fills the parameters at random, as the architecture's paper does."""
        raise NotImplementedError
