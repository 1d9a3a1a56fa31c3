"""Llama (Touvron et al. 2023): rotary positions, RMS norms, shared key/value heads, a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from paretune.errors import CheckpointError
from paretune.model import entries
from paretune.model.config import ModelConfig, RopeScaling
from paretune.model.families.base import Boundary, Family, Role
from paretune.model.families.fold import Fold
from paretune.model.families.gguf import GgufEntries, GgufForm
from paretune.model.families.llama.model import Llama


class Gguf(GgufForm):
    architecture = "llama"
    title = "Llama"
    activation = "silu"
    interleaved = ("q", "k")

    def notes(self, config: ModelConfig) -> list[str]:
        said = "the biases of its layers are written; llama.cpp reads them where its version knows them"
        return [said] if config.attn_bias or config.mlp_bias else []

    def entries(self, config: ModelConfig) -> dict[str, Any]:
        out: dict[str, Any] = {
            "attention.layer_norm_rms_epsilon": config.norm_eps,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": config.rope_theta,
        }
        if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
            out |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling.factor}
        return out

    def to_hf(self, file: GgufEntries) -> dict[str, Any]:
        n_head, width = file.count("attention.head_count"), file.count("embedding_length")
        head_dim = file.get("attention.key_length", width // n_head)
        if file.get("rope.dimension_count", head_dim) != head_dim:
            raise CheckpointError(f"{file.where} rotates a part of each head only", "Take another model")
        hf = {
            "model_type": LlamaFamily.name,
            "architectures": [LlamaFamily.architecture],
            "max_position_embeddings": file.get("context_length"),
            "num_hidden_layers": file.get("block_count"),
            "num_attention_heads": n_head,
            "num_key_value_heads": file.get("attention.head_count_kv", n_head),
            "hidden_size": width,
            "head_dim": head_dim,
            "intermediate_size": file.get("feed_forward_length"),
            "hidden_act": "silu",
            "rms_norm_eps": file.get("attention.layer_norm_rms_epsilon"),
            "rope_theta": file.get("rope.freq_base", 10000.0),
            "attention_bias": "blk.0.attn_q.bias" in file.shapes,
            "mlp_bias": "blk.0.ffn_up.bias" in file.shapes,
        }
        kind = file.get("rope.scaling.type", "none")
        if kind == "linear":
            hf["rope_scaling"] = {"rope_type": "linear", "factor": file.get("rope.scaling.factor")}
        elif kind != "none":
            raise CheckpointError(
                f"{file.where}: rope scaling {kind!r} is not read here", "Known: none, linear, Llama 3's"
            )
        return hf


class LlamaFamily(Family):
    """Siblings of Llama are subclasses that declare what they do otherwise.

    Class variables:
        has_window: a query sees a number of tokens that `config.json` may limit.
        writes_biases: whether linear layers have biases is an entry of its `config.json`.
    """

    name = "llama"
    architecture = "LlamaForCausalLM"
    has_window: ClassVar[bool] = False
    writes_biases: ClassVar[bool] = True
    n_positions_key = "max_position_embeddings"
    model = Llama
    positions = "rotary"
    norm = "rms"
    is_gated = True
    modules: ClassVar[Mapping[Role, str]] = {
        "embedding": "embed_tokens",
        "norm_1": "layers.{i}.input_layernorm",
        "q": "layers.{i}.self_attn.q_proj",
        "k": "layers.{i}.self_attn.k_proj",
        "v": "layers.{i}.self_attn.v_proj",
        "o": "layers.{i}.self_attn.o_proj",
        "norm_2": "layers.{i}.post_attention_layernorm",
        "gate": "layers.{i}.mlp.gate_proj",
        "up": "layers.{i}.mlp.up_proj",
        "down": "layers.{i}.mlp.down_proj",
        "norm": "norm",
        "head": "lm_head",
    }
    stack = "layers"
    attention = "self_attn"
    operators = (36, 14)
    stored_prefix = "model."
    stored_ignored = (".rotary_emb.inv_freq",)
    boundaries = (
        Boundary("embed_tokens", "token_embedding", "rotary_angles"),
        Boundary("input_layernorm", "norm_1", "qkv_projection"),
        Boundary("self_attn.q_proj", "qkv_projection", "qkv_reshape"),
        Boundary("self_attn.k_proj", "qkv_projection", "qkv_reshape"),
        Boundary("self_attn.v_proj", "qkv_projection", "qkv_reshape"),
        Boundary("self_attn.o_proj", "output_projection", "residual_1"),
        Boundary("post_attention_layernorm", "norm_2", "expansion"),
        Boundary("mlp.gate_proj", "expansion", "activation"),
        Boundary("mlp.up_proj", "expansion", "activation"),
        Boundary("mlp.down_proj", "projection", "residual_2"),
        Boundary("norm", "final_norm", "head"),
        Boundary("lm_head", "head", "outside"),
    )
    titles: ClassVar[Mapping[str, str]] = {
        "qkv_reshape": "QKV reshape and rotation",
        "activation": "Activation and gate",
    }
    gguf = Gguf()

    def read(self, hf: Mapping[str, Any], where: str) -> ModelConfig:
        n_embd, n_head = entries.count(hf, "hidden_size"), entries.count(hf, "num_attention_heads")
        rope = entries.table(hf, "rope_parameters")  # transformers 5; before it rope_theta and rope_scaling
        scaling = rope or entries.table(hf, "rope_scaling")
        return ModelConfig(
            family=self.name,
            vocab_size=entries.count(hf, "vocab_size"),
            n_positions=entries.count(hf, "max_position_embeddings"),
            n_layer=entries.count(hf, "num_hidden_layers"),
            n_head=n_head,
            n_kv_head=entries.count(hf, "num_key_value_heads", n_head),
            n_embd=n_embd,
            head_dim=entries.count(hf, "head_dim", n_embd // n_head),
            n_inner=entries.count(hf, "intermediate_size"),
            activation=entries.activation(hf.get("hidden_act", "silu"), where),
            norm_eps=entries.number(hf, "rms_norm_eps", 1e-6),
            tied_head=entries.flag(hf, "tie_word_embeddings", False),
            attn_bias=entries.flag(hf, "attention_bias", False),
            mlp_bias=entries.flag(hf, "mlp_bias", False),
            rope_theta=entries.number(rope, "rope_theta", entries.number(hf, "rope_theta", 10000.0)),
            rope_scaling=_rope_scaling(scaling, where),
            sliding_window=_window(hf) if self.has_window else None,
            bos_token_id=entries.one_id(hf.get("bos_token_id")),
            eos_token_ids=entries.ids(hf.get("eos_token_id")),
            initializer_range=float(hf.get("initializer_range", 0.02)),
            hf=dict(hf),
        )

    def write(self, config: ModelConfig) -> dict[str, Any]:
        out: dict[str, Any] = {
            "max_position_embeddings": config.n_positions,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_kv_head,
            "hidden_size": config.n_embd,
            "head_dim": config.head_dim,
            "intermediate_size": config.n_inner,
            "hidden_act": entries.hf_activation(config.activation),
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
        }
        if config.rope_scaling is not None:
            out["rope_scaling"] = _rope_scaling_to_hf(config.rope_scaling)
        if self.writes_biases:
            out |= {"attention_bias": config.attn_bias, "mlp_bias": config.mlp_bias}
        if self.has_window:
            out["sliding_window"] = config.sliding_window
        return out

    def check(self, config: ModelConfig, where: str) -> None:
        if config.head_dim % 2:
            raise CheckpointError(
                f"{where}: rotary embeddings need an even head size, not {config.head_dim}", "Correct head_dim"
            )

    def folds(self, config: ModelConfig, block: str) -> list[Fold]:
        attn, mlp = f"{block}.self_attn", f"{block}.mlp"
        n_head, n_kv_head, n_inner = config.layer(int(block.rpartition(".")[2]))
        shared = (n_kv_head, n_head // n_kv_head, config.head_dim)
        return [
            Fold(f"{block}.input_layernorm", (f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj")),
            Fold(f"{attn}.v_proj", (f"{attn}.o_proj",), (0, n_kv_head * config.head_dim), shared),
            Fold(f"{block}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
            Fold(f"{mlp}.up_proj", (f"{mlp}.down_proj",), (0, n_inner)),
        ]


def _window(hf: Mapping[str, Any]) -> int | None:
    return None if hf.get("sliding_window") is None else entries.count(hf, "sliding_window")


def _rope_scaling(scaling: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise CheckpointError(f"{where}: rope scaling {kind!r} is not supported", "Supported: default, linear, llama3")
    out = RopeScaling(
        kind=kind,
        factor=entries.number(scaling, "factor"),
        low_freq_factor=entries.number(scaling, "low_freq_factor", 1.0),
        high_freq_factor=entries.number(scaling, "high_freq_factor", 4.0),
        original_n_positions=entries.count(scaling, "original_max_position_embeddings", 8192),
    )
    if out.high_freq_factor <= out.low_freq_factor:
        raise ValueError("rope scaling's high_freq_factor has to be larger than its low_freq_factor")
    return out


def _rope_scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        out |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_n_positions,
        }
    return out
