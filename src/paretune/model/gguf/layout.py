"""What llama.cpp calls the parts of GPT-2 and Llama, and the entries that hold their shapes.

llama.cpp's Llama rotates dimension 2i with 2i + 1, Hugging Face's i with i + D/2: rows of queries and keys are
permuted. Its matrices are `[out, in]`: GPT-2's Conv1D is transposed in checkpoints only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from paretune.errors import CheckpointError, ParetuneError
from paretune.model.config import ModelConfig, RopeScaling
from paretune.model.gguf.container import F32

# Our module: theirs. `{i}` is the number of the block.
_NAMES = {
    "gpt2": {
        "wte": "token_embd",
        "wpe": "position_embd",
        "ln_f": "output_norm",
        "lm_head": "output",
        "h.{i}.ln_1": "blk.{i}.attn_norm",
        "h.{i}.attn.c_attn": "blk.{i}.attn_qkv",
        "h.{i}.attn.c_proj": "blk.{i}.attn_output",
        "h.{i}.ln_2": "blk.{i}.ffn_norm",
        "h.{i}.mlp.c_fc": "blk.{i}.ffn_up",
        "h.{i}.mlp.c_proj": "blk.{i}.ffn_down",
    },
    "llama": {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "lm_head": "output",
        "layers.{i}.input_layernorm": "blk.{i}.attn_norm",
        "layers.{i}.self_attn.q_proj": "blk.{i}.attn_q",
        "layers.{i}.self_attn.k_proj": "blk.{i}.attn_k",
        "layers.{i}.self_attn.v_proj": "blk.{i}.attn_v",
        "layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
        "layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
        "layers.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
        "layers.{i}.mlp.up_proj": "blk.{i}.ffn_up",
        "layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
    },
}
ROPE_FACTORS = "rope_freqs.weight"
# Llama 3's scaling, of which a file keeps only the resulting factors.
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_n_positions=8192)


def architecture(config: ModelConfig) -> str:
    return "gpt2" if config.family == "gpt2" else "llama"


def name_of(config: ModelConfig, name: str) -> str:
    """Their name of our `module.weight` or `module.bias`."""
    module, _, attribute = name.rpartition(".")
    block = re.search(r"\.(\d+)\.", module)
    i = block[1] if block else ""
    table = _NAMES[architecture(config)]
    return f"{table[re.sub(r'[.][0-9]+[.]', '.{i}.', module)].format(i=i)}.{attribute}"


def rows_of(config: ModelConfig, name: str) -> Tensor | None:
    """Which of our rows stands at each of theirs, int64 `[rows]`; None where the order is the same."""
    if config.family == "gpt2":
        return None
    n_head = {"q_proj": config.n_head, "k_proj": config.n_kv_head}.get(name.split(".")[-2])
    if n_head is None:
        return None
    order = torch.arange(n_head * config.head_dim)
    return order.view(n_head, 2, config.head_dim // 2).transpose(1, 2).reshape(-1)


def rope_factors(config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """What `llama3` scaling divides each frequency by, fp32 `[D / 2]`."""
    D = config.head_dim
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
    turns = scaling.original_n_positions * frequency / (2 * torch.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 / ((1 - kept) / scaling.factor + kept)).float()


def to_metadata(config: ModelConfig, name: str) -> tuple[dict[str, Any], list[str]]:
    """The entries of a model's shapes, and what the user should know.

    Raises:
        ParetuneError: llama.cpp cannot express the model.
    """
    c, notes = config, []
    cure = "There is no GGUF form of it"
    if c.family == "gpt2":
        if c.activation != "gelu_tanh":
            raise ParetuneError(f"llama.cpp's GPT-2 has no activation {c.activation}", cure)
        if not c.scale_attn_weights or c.scale_attn_by_inverse_layer_idx:
            raise ParetuneError("llama.cpp's GPT-2 divides scores by sqrt(head size) in every layer", cure)
    elif c.activation != "silu":
        raise ParetuneError(f"llama.cpp's Llama has no activation {c.activation}", cure)
    elif c.attn_bias or c.mlp_bias:
        notes.append("the biases of its layers are written; llama.cpp reads them where its version knows them")
    n_positions = c.n_positions
    if c.sliding_window is not None and c.sliding_window < n_positions:
        n_positions = c.sliding_window
        notes.append(f"llama.cpp's Llama has no sliding window: the file's context is the window, {n_positions} tokens")
    a = architecture(c)
    out: dict[str, Any] = {
        "general.architecture": a,
        "general.name": name,
        "general.quantization_version": 2,
        f"{a}.vocab_size": c.vocab_size,
        f"{a}.context_length": n_positions,
        f"{a}.embedding_length": c.n_embd,
        f"{a}.block_count": c.n_layer,
        f"{a}.feed_forward_length": c.n_inner,
        f"{a}.attention.head_count": c.n_head,
        f"{a}.attention.head_count_kv": c.n_kv_head,
    }
    if c.family == "gpt2":
        return out | {f"{a}.attention.layer_norm_epsilon": F32(c.norm_eps)}, notes
    out |= {
        f"{a}.attention.layer_norm_rms_epsilon": F32(c.norm_eps),
        f"{a}.attention.key_length": c.head_dim,
        f"{a}.attention.value_length": c.head_dim,
        f"{a}.rope.dimension_count": c.head_dim,
        f"{a}.rope.freq_base": F32(c.rope_theta),
    }
    if c.rope_scaling is not None and c.rope_scaling.kind == "linear":
        out |= {f"{a}.rope.scaling.type": "linear", f"{a}.rope.scaling.factor": F32(c.rope_scaling.factor)}
    return out, notes


def to_hf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Tensor | None, where: str):
    """A Hugging Face config from the entries of a file.

    Args:
        shapes: of its tensors by name.
        factors: the tensor `ROPE_FACTORS`.

    Raises:
        CheckpointError: an architecture or an option that is not read here, or an entry that is missing.
    """
    a = metadata.get("general.architecture")
    if a not in _NAMES:
        raise CheckpointError(f"{where}: architecture {a!r} is not read from GGUF", f"Known: {', '.join(_NAMES)}")

    def get(key: str, *default: Any) -> Any:
        value = metadata.get(f"{a}.{key}", *default)
        if value is None:
            raise CheckpointError(f"{where} has no entry {a}.{key}", "Take another file")
        return value

    def count(key: str) -> int:
        value = get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{where}: the entry {a}.{key} is {value!r}, not a whole number", "Take another file")
        return value

    if metadata.get(f"{a}.expert_count"):
        raise CheckpointError(f"{where} is a mixture of experts", "Take a dense model")
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{where} has no tensor token_embd.weight", "Take another file")
    ids = {k: metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos", "eot")}
    # A chat ends a turn with a token of its own, where the file names one.
    ends = list(dict.fromkeys(i for i in (ids["eos"], ids["eot"]) if i is not None))
    hf: dict[str, Any] = {
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
    }
    n_head, width = count("attention.head_count"), count("embedding_length")
    if a == "gpt2":
        return hf | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": get("context_length"),
            "n_layer": get("block_count"),
            "n_head": n_head,
            "n_embd": width,
            "n_inner": get("feed_forward_length", 4 * width),
            "activation_function": "gelu_new",
            "layer_norm_epsilon": get("attention.layer_norm_epsilon"),
        }
    head_dim = get("attention.key_length", width // n_head)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(f"{where} rotates a part of each head only", "Take another model")
    hf |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": get("context_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": n_head,
        "num_key_value_heads": get("attention.head_count_kv", n_head),
        "hidden_size": width,
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length"),
        "hidden_act": "silu",
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }
    kind = metadata.get(f"{a}.rope.scaling.type", "none")
    if kind == "linear":
        hf["rope_scaling"] = {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    elif kind != "none":
        raise CheckpointError(f"{where}: rope scaling {kind!r} is not read here", "Known: none, linear, Llama 3's")
    if factors is not None:
        hf["rope_scaling"] = _llama3(hf, factors, where)
    return hf


def _llama3(hf: Mapping[str, Any], factors: Tensor, where: str) -> dict[str, Any]:
    """The settings whose factors are those of the file."""
    scaling = RopeScaling(**(vars(LLAMA3) | {"factor": round(float(factors.max()), 4)}))
    shape = ModelConfig.from_hf(hf, where)
    if not torch.allclose(rope_factors(shape, scaling), factors.float().flatten(), rtol=1e-3):
        raise CheckpointError(f"{where}: the rope factors are not Llama 3's", "Take the model in its original form")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_n_positions,
    }
