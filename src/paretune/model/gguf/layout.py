"""What llama.cpp calls the parts of a model, and the entries that hold its shapes; what is particular to a family, it
says itself (`Family.gguf`).

Matrices are `[out, in]`: what Hugging Face stores `[in, out]` is transposed in checkpoints only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from paretune.errors import CheckpointError, ParetuneError
from paretune.model import families
from paretune.model.config import ModelConfig, RopeScaling
from paretune.model.families.base import Role
from paretune.model.families.gguf import GgufEntries, GgufForm
from paretune.model.gguf.container import F32

# What a module is for: their name of it. `{i}` is the number of the block.
_NAMES: dict[Role, str] = {
    "embedding": "token_embd",
    "positions": "position_embd",
    "norm": "output_norm",
    "head": "output",
    "norm_1": "blk.{i}.attn_norm",
    "qkv": "blk.{i}.attn_qkv",
    "q": "blk.{i}.attn_q",
    "k": "blk.{i}.attn_k",
    "v": "blk.{i}.attn_v",
    "o": "blk.{i}.attn_output",
    "norm_2": "blk.{i}.ffn_norm",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "down": "blk.{i}.ffn_down",
}
ROPE_FACTORS = "rope_freqs.weight"
CURE = "There is no GGUF form of it"
# Llama 3's scaling, of which a file keeps only the resulting factors.
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_n_positions=8192)


def form_of(config: ModelConfig) -> GgufForm:
    """How llama.cpp expresses a model's family.

    Raises:
        ParetuneError: it cannot.
    """
    form = families.of(config).gguf
    if form is None:
        raise ParetuneError(f"llama.cpp has no {config.family} models", CURE)
    return form


def name_of(config: ModelConfig, name: str) -> str:
    """Their name of our `module.weight` or `module.bias`.

    Raises:
        ParetuneError: they have no such tensor.
    """
    module, _, attribute = name.rpartition(".")
    role = families.of(config).role_of(name)
    if role is None:
        raise ParetuneError(f"llama.cpp's {form_of(config).title} has no tensor for {name}", CURE)
    block = re.search(r"\.(\d+)\.", module)
    return f"{_NAMES[role].format(i=block[1] if block else '')}.{attribute}"


def rows_of(config: ModelConfig, name: str) -> Tensor | None:
    """Which of our rows stands at each of theirs, int64 `[rows]`; None where the order is the same."""
    role = families.of(config).role_of(name)
    if role not in form_of(config).interleaved:
        return None
    n_head = config.n_head if role == "q" else config.n_kv_head
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
    c, form = config, form_of(config)
    if c.activation != form.activation:
        raise ParetuneError(f"llama.cpp's {form.title} has no activation {c.activation}", CURE)
    if not c.scale_attn_weights or c.scale_attn_by_inverse_layer_idx:
        raise ParetuneError(f"llama.cpp's {form.title} divides scores by sqrt(head size) in every layer", CURE)
    if not c.is_regular:
        raise ParetuneError(
            f"llama.cpp's {form.title} has no layers of different or pruned widths", "Prune with scope=layer"
        )
    notes = form.notes(c)
    n_positions = c.n_positions
    if c.sliding_window is not None and c.sliding_window < n_positions:
        n_positions = c.sliding_window
        notes.append(
            f"llama.cpp's {form.title} has no sliding window: the file's context is the window, {n_positions} tokens"
        )
    a = form.architecture
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
    own = {f"{a}.{key}": F32(value) if isinstance(value, float) else value for key, value in form.entries(c).items()}
    return out | own, notes


def to_hf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Tensor | None, where: str
) -> dict[str, Any]:
    """A Hugging Face config from the entries of a file.

    Args:
        shapes: of its tensors by name.
        factors: the tensor `ROPE_FACTORS`.

    Raises:
        CheckpointError: an architecture or an option that is not read here, or an entry that is missing.
    """
    a = metadata.get("general.architecture")
    known = {family.gguf.architecture: family for family in families.every() if family.gguf and family.gguf.is_read}
    if a not in known:
        raise CheckpointError(f"{where}: architecture {a!r} is not read from GGUF", f"Known: {', '.join(known)}")
    family, form = known[a], known[a].gguf
    assert form is not None
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
    hf |= form.to_hf(GgufEntries(form.architecture, metadata, shapes, where))
    if factors is not None and family.positions == "rotary":
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
