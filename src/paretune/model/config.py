"""What shapes a model, narrowed from a Hugging Face `config.json` so that nothing else ever reads that file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from paretune.errors import CheckpointError, UsageError
from paretune.ops.attention.pattern import CAUSAL, Pattern, Window, parse
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

CONVERTED = "paretune"  # the entry of config.json that says how a model was converted
UNBOUNDED = 2**30  # tokens: as good as no limit, and still a number

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
    alibi: bool = False  # scores fall with the distance (`ops/attention/alibi.py`)
    has_positions: bool = True  # learned or rotary ones; False: converted to do without
    pattern: str | None = None  # of attention, in place of the architecture's own (`ops/attention/pattern.py`)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    initializer_range: float = 0.02
    hf: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # the file as it was read

    @property
    def gated_mlp(self) -> bool:
        return self.family != "gpt2"

    @property
    def attention_pattern(self) -> Pattern:
        """Which keys a query sees, in every layer."""
        if self.pattern is not None:
            return parse(self.pattern)
        return CAUSAL if self.sliding_window is None else Window(self.sliding_window)

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have: `n_positions`, or practically any number where nothing ends there.

        Nothing does without learned positions, where ALiBi says how far a key is or a window forgets it.
        """
        is_learned = self.family == "gpt2" and self.has_positions
        is_open = not is_learned and (self.alibi or self.attention_pattern.kept.window is not None)
        return UNBOUNDED if is_open else self.n_positions

    @staticmethod
    def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Narrows a Hugging Face config.

        Raises:
            CheckpointError: the architecture or one of its options is not known here.
        """
        converted = hf.get(CONVERTED)
        family = hf.get("model_type")
        if converted is not None and isinstance(family, str):
            family = family.removeprefix(f"{CONVERTED}_")
        if family not in FAMILIES.names():
            raise CheckpointError(
                f"{where}: model_type {family!r} is not supported",
                f"Supported: {', '.join(FAMILIES.names())}",
            )
        try:
            config = _gpt2(hf, where) if family == "gpt2" else _llama(hf, family, where)
            if converted is not None:
                config = _converted(config, hf)
        except KeyError as missing:
            raise CheckpointError(
                f"{where} has no entry {missing}", "Take the config.json that belongs to this model"
            ) from None
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{where} has a wrong value: {error}", "Take the config.json that belongs to this model"
            ) from None
        _check(config, where)
        return config

    def to_hf(self) -> dict[str, Any]:
        """The config as it was read, or a fresh one that `transformers` reads."""
        if self.hf:
            out = {k: v for k, v in self.hf.items() if k != CONVERTED} | {"model_type": self.family}
        else:
            out = self._fresh_hf()
        if self.alibi or not self.has_positions or self.pattern is not None:
            # Another name of the architecture: tools that do not know the entry must not read it as the plain one.
            out["model_type"] = f"{CONVERTED}_{self.family}"
            out[CONVERTED] = {"alibi": self.alibi, "positions": self.has_positions, "pattern": self.pattern}
        return out

    def _fresh_hf(self) -> dict[str, Any]:
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
                "activation_function": _hf_activation(self.activation),
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
            "hidden_act": _hf_activation(self.activation),
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
        }
        if self.rope_scaling is not None:
            out["rope_scaling"] = _rope_scaling_to_hf(self.rope_scaling)
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
    n_embd, n_head = _count(hf, "n_embd"), _count(hf, "n_head")
    return ModelConfig(
        family="gpt2",
        vocab_size=_count(hf, "vocab_size"),
        n_positions=_count(hf, "n_ctx" if hf.get("n_positions") is None and "n_ctx" in hf else "n_positions"),
        n_layer=_count(hf, "n_layer"),
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_embd,
        head_dim=n_embd // n_head,
        n_inner=_count(hf, "n_inner", 4 * n_embd),
        activation=_activation(hf.get("activation_function", "gelu_new"), where),
        norm_eps=_number(hf, "layer_norm_epsilon", 1e-5),
        tied_head=_flag(hf, "tie_word_embeddings", True),
        attn_bias=True,
        mlp_bias=True,
        scale_attn_weights=_flag(hf, "scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=_flag(hf, "scale_attn_by_inverse_layer_idx", False),
        bos_token_id=_one_id(hf.get("bos_token_id")),
        eos_token_ids=_ids(hf.get("eos_token_id")),
        initializer_range=float(hf.get("initializer_range", 0.02)),
        hf=dict(hf),
    )


def _llama(hf: Mapping[str, Any], family: str, where: str) -> ModelConfig:
    n_embd, n_head = _count(hf, "hidden_size"), _count(hf, "num_attention_heads")
    rope = _table(hf, "rope_parameters")  # transformers 5; before it rope_theta and rope_scaling
    scaling = rope or _table(hf, "rope_scaling")
    return ModelConfig(
        family=family,
        vocab_size=_count(hf, "vocab_size"),
        n_positions=_count(hf, "max_position_embeddings"),
        n_layer=_count(hf, "num_hidden_layers"),
        n_head=n_head,
        n_kv_head=_count(hf, "num_key_value_heads", n_head),
        n_embd=n_embd,
        head_dim=_count(hf, "head_dim", n_embd // n_head),
        n_inner=_count(hf, "intermediate_size"),
        activation=_activation(hf.get("hidden_act", "silu"), where),
        norm_eps=_number(hf, "rms_norm_eps", 1e-6),
        tied_head=_flag(hf, "tie_word_embeddings", False),
        attn_bias=_flag(hf, "attention_bias", False),
        mlp_bias=_flag(hf, "mlp_bias", False),
        rope_theta=_number(rope, "rope_theta", _number(hf, "rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(scaling, where),
        sliding_window=_window(hf) if family == "mistral" else None,
        bos_token_id=_one_id(hf.get("bos_token_id")),
        eos_token_ids=_ids(hf.get("eos_token_id")),
        initializer_range=float(hf.get("initializer_range", 0.02)),
        hf=dict(hf),
    )


def _converted(config: ModelConfig, hf: Mapping[str, Any]) -> ModelConfig:
    """What `transforms.mechanism` changed and `to_hf` wrote down."""
    entry = _table(hf, CONVERTED)
    unknown = set(entry) - {"alibi", "positions", "pattern"}
    if unknown:
        raise ValueError(f"{CONVERTED} has an entry {min(unknown)!r}, which this version does not know")
    pattern = entry.get("pattern")
    if pattern is not None and not isinstance(pattern, str):
        raise TypeError(f"pattern is {pattern!r}, not a text")
    try:
        pattern = None if pattern is None else str(parse(pattern))
    except UsageError as error:
        raise ValueError(error.cause) from None
    return replace(
        config,
        alibi=_flag(entry, "alibi", False),
        has_positions=_flag(entry, "positions", True),
        pattern=pattern,
    )


def _rope_scaling(scaling: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise CheckpointError(f"{where}: rope scaling {kind!r} is not supported", "Supported: default, linear, llama3")
    out = RopeScaling(
        kind=kind,
        factor=_number(scaling, "factor"),
        low_freq_factor=_number(scaling, "low_freq_factor", 1.0),
        high_freq_factor=_number(scaling, "high_freq_factor", 4.0),
        original_n_positions=_count(scaling, "original_max_position_embeddings", 8192),
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


def _count(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of 1 or more; null is the default, where there is one."""
    value = hf[key] if default is None else hf.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} is {value!r}, not a whole number")
    if value < 1:
        raise ValueError(f"{key} is {value}, not 1 or more")
    return value


def _number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number above 0."""
    value = hf[key] if default is None else hf.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{key} is {value!r}, not a number")
    if not 0 < value < float("inf"):
        raise ValueError(f"{key} is {value}, not a finite number above 0")
    return float(value)


def _flag(hf: Mapping[str, Any], key: str, default: bool) -> bool:
    value = hf.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise TypeError(f"{key} is {value!r}, not true or false")
    return value


def _table(hf: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = hf.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError(f"{key} is {value!r}, not an object")
    return value


def _window(hf: Mapping[str, Any]) -> int | None:
    return None if hf.get("sliding_window") is None else _count(hf, "sliding_window")


def _hf_activation(activation: str) -> str:
    return "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation


def _activation(name: str, where: str) -> str:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"{where}: activation {name!r} is not supported", f"Supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"token id {i!r} is not a whole number")
    return ids


def _one_id(value: int | None) -> int | None:
    return next(iter(_ids(value)), None)


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
