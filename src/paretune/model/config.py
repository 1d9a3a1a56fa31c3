"""What shapes a model, narrowed from a Hugging Face `config.json` so that nothing else ever reads that file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from paretune.errors import CheckpointError
from paretune.registry import FAMILIES

# The several names of one function, as published GPT-2 and Llama configs spell them.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# GPT-2 by size: layers, heads, width.
GPT2_SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. `kind` is `linear` or `llama3`."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_n_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shapes in the field's names; every family reads what it needs."""

    family: str  # gpt2, llama, mistral
    vocab_size: int  # rows of the embedding
    n_positions: int  # longest sequence, tokens
    n_layer: int
    n_head: int  # query heads
    n_kv_head: int  # key/value heads; n_head is a multiple of it
    n_embd: int  # width of the residual stream
    head_dim: int
    n_inner: int  # width of the MLP
    activation: str  # one of ACTIVATIONS' values
    norm_eps: float
    tied_head: bool  # head and embedding share one Weight
    attn_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # tokens a query sees, itself included
    scale_attn_weights: bool = True  # GPT-2: divide scores by sqrt(head_dim)
    scale_attn_by_inverse_layer_idx: bool = False  # GPT-2: and by layer index + 1
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    initializer_range: float = 0.02
    hf: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # the file as it was read

    @property
    def gated_mlp(self) -> bool:
        return self.family != "gpt2"

    @staticmethod
    def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Narrows a Hugging Face config.

        Raises:
            CheckpointError: the architecture or one of its options is not known here.
        """
        family = hf.get("model_type")
        if family not in FAMILIES.names():
            raise CheckpointError(
                f"{where}: model_type {family!r} is not supported", f"Supported: {', '.join(FAMILIES.names())}"
            )
        try:
            config = _gpt2(hf, where) if family == "gpt2" else _llama(hf, where)
        except KeyError as missing:
            raise CheckpointError(
                f"{where} has no entry {missing}", "Take the config.json that belongs to this model"
            ) from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{where} has a value of the wrong type: {error}", "Take the config.json that belongs to this model"
            ) from None
        _check(config, where)
        return config

    def to_hf(self) -> dict[str, Any]:
        """The config as it was read, or a fresh one that `transformers` reads."""
        if self.hf:
            return dict(self.hf)
        common: dict[str, Any] = {
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "initializer_range": self.initializer_range,
            "tie_word_embeddings": self.tied_head,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": _one_or_list(self.eos_token_ids),
        }
        if self.family == "gpt2":
            return common | {
                "architectures": ["GPT2LMHeadModel"],
                "n_positions": self.n_positions,
                "n_layer": self.n_layer,
                "n_head": self.n_head,
                "n_embd": self.n_embd,
                "n_inner": None if self.n_inner == 4 * self.n_embd else self.n_inner,
                "activation_function": "gelu_new" if self.activation == "gelu_tanh" else self.activation,
                "layer_norm_epsilon": self.norm_eps,
                "scale_attn_weights": self.scale_attn_weights,
                "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
                "attn_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "resid_pdrop": 0.0,
            }
        named = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
        out = common | {
            "architectures": [named[self.family]],
            "max_position_embeddings": self.n_positions,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "num_key_value_heads": self.n_kv_head,
            "hidden_size": self.n_embd,
            "head_dim": self.head_dim,
            "intermediate_size": self.n_inner,
            "hidden_act": self.activation,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
        }
        if self.family == "llama":
            out |= {"attention_bias": self.attn_bias, "mlp_bias": self.mlp_bias}
        else:
            out["sliding_window"] = self.sliding_window
        return out

    def with_positions(self, n_positions: int) -> ModelConfig:
        """The same model for another longest sequence (random weights and length studies)."""
        key = "n_positions" if self.family == "gpt2" else "max_position_embeddings"
        return replace(self, n_positions=n_positions, hf={**self.hf, key: n_positions} if self.hf else {})


def _gpt2(hf: Mapping[str, Any], where: str) -> ModelConfig:
    if hf.get("add_cross_attention"):
        raise CheckpointError(f"{where}: add_cross_attention is not supported", "Use a decoder-only GPT-2")
    n_embd, n_head = int(hf["n_embd"]), int(hf["n_head"])
    return ModelConfig(
        family="gpt2",
        vocab_size=int(hf["vocab_size"]),
        n_positions=int(hf.get("n_positions") or hf["n_ctx"]),
        n_layer=int(hf["n_layer"]),
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_embd,
        head_dim=n_embd // n_head,
        n_inner=int(hf.get("n_inner") or 4 * n_embd),
        activation=_activation(hf.get("activation_function", "gelu_new"), where),
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        tied_head=bool(hf.get("tie_word_embeddings", True)),
        attn_bias=True,
        mlp_bias=True,
        scale_attn_weights=bool(hf.get("scale_attn_weights", True)),
        scale_attn_by_inverse_layer_idx=bool(hf.get("scale_attn_by_inverse_layer_idx", False)),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=_ids(hf.get("eos_token_id")),
        initializer_range=float(hf.get("initializer_range", 0.02)),
        hf=dict(hf),
    )


def _llama(hf: Mapping[str, Any], where: str) -> ModelConfig:
    n_embd, n_head = int(hf["hidden_size"]), int(hf["num_attention_heads"])
    rope = hf.get("rope_parameters") or {}  # transformers 5; before it rope_theta and rope_scaling
    scaling = rope or hf.get("rope_scaling") or {}
    return ModelConfig(
        family=hf["model_type"],
        vocab_size=int(hf["vocab_size"]),
        n_positions=int(hf["max_position_embeddings"]),
        n_layer=int(hf["num_hidden_layers"]),
        n_head=n_head,
        n_kv_head=int(hf.get("num_key_value_heads") or n_head),
        n_embd=n_embd,
        head_dim=int(hf.get("head_dim") or n_embd // n_head),
        n_inner=int(hf["intermediate_size"]),
        activation=_activation(hf.get("hidden_act", "silu"), where),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tied_head=bool(hf.get("tie_word_embeddings", False)),
        attn_bias=bool(hf.get("attention_bias", False)),
        mlp_bias=bool(hf.get("mlp_bias", False)),
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(scaling, where),
        sliding_window=hf.get("sliding_window") if hf["model_type"] == "mistral" else None,
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=_ids(hf.get("eos_token_id")),
        initializer_range=float(hf.get("initializer_range", 0.02)),
        hf=dict(hf),
    )


def _rope_scaling(scaling: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise CheckpointError(
            f"{where}: rope scaling {kind!r} is not supported", "Supported: default, linear, llama3"
        )
    return RopeScaling(
        kind=kind,
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_n_positions=int(scaling.get("original_max_position_embeddings", 8192)),
    )


def _activation(name: str, where: str) -> str:
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{where}: activation {name!r} is not supported", f"Supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (int(value),)


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


def _check(c: ModelConfig, where: str) -> None:
    sizes = ("vocab_size", "n_positions", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_inner")
    bad = [name for name in sizes if getattr(c, name) < 1]
    if bad:
        raise CheckpointError(f"{where}: {bad[0]} is {getattr(c, bad[0])}", "It has to be 1 or more")
    if c.n_head % c.n_kv_head:
        raise CheckpointError(
            f"{where}: {c.n_head} query heads cannot share {c.n_kv_head} key/value heads",
            "The first has to be a multiple of the second",
        )
    if c.family == "gpt2" and c.n_embd % c.n_head:
        raise CheckpointError(
            f"{where}: width {c.n_embd} is not a multiple of {c.n_head} heads", "Correct n_embd or n_head"
        )
    if c.family != "gpt2" and c.head_dim % 2:
        raise CheckpointError(
            f"{where}: rotary embeddings need an even head size, not {c.head_dim}", "Correct head_dim"
        )
