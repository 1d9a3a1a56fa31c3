"""A kin of GPT-2: RMS norms, residuals scaled by an option that only it has. Its sibling scales nothing, and so native
code has a form of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from paretune.errors import CheckpointError
from paretune.model import entries
from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.model.families.base import Boundary, Family, Role
from paretune.model.families.fold import Fold
from paretune.model.families.gpt2.model import GPT2, Block
from paretune.model.layers import RMSNorm


class ToyBlock(Block):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.ln_1, self.ln_2 = (RMSNorm(config.n_embd, config.norm_eps) for _ in range(2))
        self.scale: float = config.option("residual_scale")

    def forward(self, x: Tensor, layer_cache: Any) -> Tensor:
        x = x + self.scale * self.attn(self.ln_1(x), layer_cache)
        return x + self.scale * self.mlp(self.ln_2(x))


class ToyModel(GPT2):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.h = torch.nn.ModuleList([ToyBlock(config, i) for i in range(config.n_layer)])
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)

    lower = LanguageModel.lower  # the scale has no native form


class PlainModel(ToyModel):
    lower = GPT2.lower


class Toy(Family):
    name = "toy"
    architecture = "ToyForCausalLM"
    n_positions_key = "context"
    model: ClassVar[type[LanguageModel]] = ToyModel
    positions = "learned"
    norm = "rms"
    modules: ClassVar[Mapping[Role, str]] = {
        "embedding": "wte",
        "positions": "wpe",
        "norm_1": "h.{i}.ln_1",
        "qkv": "h.{i}.attn.c_attn",
        "o": "h.{i}.attn.c_proj",
        "norm_2": "h.{i}.ln_2",
        "up": "h.{i}.mlp.c_fc",
        "down": "h.{i}.mlp.c_proj",
        "norm": "ln_f",
        "head": "lm_head",
    }
    stack = "h"
    attention = "attn"
    operators = (17, 5)
    stored_prefix = "toy."
    stored_transposed = ("mlp.c_fc.weight",)
    boundaries = (
        Boundary("wte", "token_embedding", "embedding_sum"),
        Boundary("wpe", "position_embedding", "embedding_sum"),
        Boundary("ln_1", "norm_1", "qkv_projection"),
        Boundary("attn.c_attn", "qkv_projection", "qkv_reshape"),
        Boundary("attn.c_proj", "output_projection", "residual_1"),
        Boundary("ln_2", "norm_2", "expansion"),
        Boundary("mlp.c_fc", "expansion", "activation"),
        Boundary("mlp.c_proj", "projection", "residual_2"),
        Boundary("ln_f", "final_norm", "head"),
        Boundary("lm_head", "head", "outside"),
    )
    titles: ClassVar[Mapping[str, str]] = {"residual_1": "Scaled residual 1"}

    def read(self, hf: Mapping[str, Any], where: str) -> ModelConfig:
        width, n_head = entries.count(hf, "width"), entries.count(hf, "heads")
        return ModelConfig(
            family=self.name,
            vocab_size=entries.count(hf, "vocab_size"),
            n_positions=entries.count(hf, "context"),
            n_layer=entries.count(hf, "depth"),
            n_head=n_head,
            n_kv_head=n_head,
            n_embd=width,
            head_dim=width // n_head,
            n_inner=4 * width,
            activation=entries.activation(hf.get("activation", "relu"), where),
            norm_eps=entries.number(hf, "eps", 1e-5),
            tied_head=entries.flag(hf, "tie_word_embeddings", True),
            attn_bias=True,
            mlp_bias=True,
            own=(("residual_scale", entries.number(hf, "residual_scale", 1.0)),),
            hf=dict(hf),
        )

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "context": config.n_positions,
            "depth": config.n_layer,
            "heads": config.n_head,
            "width": config.n_embd,
            "activation": config.activation,
            "eps": config.norm_eps,
            "residual_scale": config.option("residual_scale"),
        }

    def check(self, config: ModelConfig, where: str) -> None:
        if config.n_embd % config.n_head:
            raise CheckpointError(f"{where}: {config.n_head} heads do not divide the width", "Correct heads")

    def folds(self, config: ModelConfig, block: str) -> list[Fold]:
        return [
            Fold(f"{block}.ln_1", (f"{block}.attn.c_attn",)),
            Fold(f"{block}.ln_2", (f"{block}.mlp.c_fc",)),
            Fold(f"{block}.mlp.c_fc", (f"{block}.mlp.c_proj",), (0, config.n_inner)),
        ]


class PlainToy(Toy):
    name = "plain-toy"
    model = PlainModel
