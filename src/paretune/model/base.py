"""What a model file gives to the rest of the house, besides `forward`."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from paretune.model.config import ModelConfig
from paretune.model.layers import Embedding, Linear
from paretune.ops.native.program import CannotLower, Program


class LanguageModel(nn.Module):
    """Base of every architecture: how its tensors are called in a Hugging Face folder, and its two ends.

    A subclass holds `config` and sets the class variables:
        hf_prefix: what stored names begin with, the head's aside.
        hf_transposed: ends of names that are stored `[in, out]`.
        hf_ignored: ends of names that carry no information.
        embedding_name, head_name: attributes of the token embedding and the output layer.
    """

    hf_prefix: ClassVar[str]
    hf_transposed: ClassVar[tuple[str, ...]] = ()
    hf_ignored: ClassVar[tuple[str, ...]] = ()
    embedding_name: ClassVar[str]
    head_name: ClassVar[str]
    config: ModelConfig

    @property
    def embedding(self) -> Embedding:
        return getattr(self, self.embedding_name)

    @property
    def head(self) -> Linear:
        return getattr(self, self.head_name)

    def forward(self, tokens: Tensor, cache=None, logits: Literal["last", "all"] = "all") -> Tensor:
        """Logits of the next token; see `GPT2.forward`."""
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
