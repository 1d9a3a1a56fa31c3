"""GPT-2 (Radford et al. 2019): learned positions, layer norms, one fused projection, an MLP without a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from paretune.errors import CheckpointError
from paretune.model import entries
from paretune.model.config import ModelConfig
from paretune.model.families.base import Boundary, Family, Role
from paretune.model.families.fold import Fold
from paretune.model.families.gguf import GgufEntries, GgufForm
from paretune.model.families.gpt2.model import GPT2


class Gguf(GgufForm):
    architecture = "gpt2"
    title = "GPT-2"
    activation = "gelu_tanh"

    def entries(self, config: ModelConfig) -> dict[str, Any]:
        return {"attention.layer_norm_epsilon": config.norm_eps}

    def to_hf(self, file: GgufEntries) -> dict[str, Any]:
        n_head, width = file.count("attention.head_count"), file.count("embedding_length")
        return {
            "model_type": GPT2Family.name,
            "architectures": [GPT2Family.architecture],
            "n_positions": file.get("context_length"),
            "n_layer": file.get("block_count"),
            "n_head": n_head,
            "n_embd": width,
            "n_inner": file.get("feed_forward_length", 4 * width),
            "activation_function": "gelu_new",
            "layer_norm_epsilon": file.get("attention.layer_norm_epsilon"),
        }


def _size(n_layer: int, n_head: int, n_embd: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }


class GPT2Family(Family):
    name = "gpt2"
    architecture = "GPT2LMHeadModel"
    n_positions_key = "n_positions"
    model = GPT2
    positions = "learned"
    norm = "layer"
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
    operators = (14, 7)
    stored_prefix = "transformer."
    # Hugging Face stores these as Conv1D, [in, out].
    stored_transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    # Buffers of old checkpoints that carry no information (the causal mask).
    stored_ignored = (".attn.bias", ".attn.masked_bias")
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
    gguf = Gguf()
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gpt2": _size(12, 12, 768),
        "gpt2-medium": _size(24, 16, 1024),
        "gpt2-large": _size(36, 20, 1280),
        "gpt2-xl": _size(48, 25, 1600),
    }

    def read(self, hf: Mapping[str, Any], where: str) -> ModelConfig:
        if hf.get("add_cross_attention"):
            raise CheckpointError(f"{where}: add_cross_attention is not supported", "Use a decoder-only GPT-2")
        n_embd, n_head = entries.count(hf, "n_embd"), entries.count(hf, "n_head")
        n_positions = "n_ctx" if hf.get("n_positions") is None and "n_ctx" in hf else "n_positions"
        return ModelConfig(
            family=self.name,
            vocab_size=entries.count(hf, "vocab_size"),
            n_positions=entries.count(hf, n_positions),
            n_layer=entries.count(hf, "n_layer"),
            n_head=n_head,
            n_kv_head=n_head,
            n_embd=n_embd,
            head_dim=n_embd // n_head,
            n_inner=entries.count(hf, "n_inner", 4 * n_embd),
            activation=entries.activation(hf.get("activation_function", "gelu_new"), where),
            norm_eps=entries.number(hf, "layer_norm_epsilon", 1e-5),
            tied_head=entries.flag(hf, "tie_word_embeddings", True),
            attn_bias=True,
            mlp_bias=True,
            scale_attn_weights=entries.flag(hf, "scale_attn_weights", True),
            scale_attn_by_inverse_layer_idx=entries.flag(hf, "scale_attn_by_inverse_layer_idx", False),
            bos_token_id=entries.one_id(hf.get("bos_token_id")),
            eos_token_ids=entries.ids(hf.get("eos_token_id")),
            initializer_range=float(hf.get("initializer_range", 0.02)),
            hf=dict(hf),
        )

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "n_positions": config.n_positions,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_inner": None if config.n_inner == 4 * config.n_embd else config.n_inner,
            "activation_function": entries.hf_activation(config.activation),
            "layer_norm_epsilon": config.norm_eps,
            "scale_attn_weights": config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }

    def check(self, config: ModelConfig, where: str) -> None:
        if config.n_embd % config.n_head and not config.pruned:
            raise CheckpointError(
                f"{where}: width {config.n_embd} is not a multiple of {config.n_head} heads", "Correct n_embd or n_head"
            )

    def expresses(self, config: ModelConfig) -> bool:
        return config.n_embd == config.n_head * config.head_dim and config.n_head == config.n_kv_head

    def folds(self, config: ModelConfig, block: str) -> list[Fold]:
        shape = config.layer(int(block.rpartition(".")[2]))
        width = shape.n_head * config.head_dim
        folds = [
            Fold(f"{block}.ln_1", (f"{block}.attn.c_attn",)),
            Fold(f"{block}.attn.c_attn", (f"{block}.attn.c_proj",), (2 * width, 3 * width)),
            Fold(f"{block}.ln_2", (f"{block}.mlp.c_fc",)),
        ]
        if config.activation == "relu":
            folds.append(Fold(f"{block}.mlp.c_fc", (f"{block}.mlp.c_proj",), (0, shape.n_inner)))
        return folds
