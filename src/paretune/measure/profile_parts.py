"""The parts of a step that a profile tells apart: study 002's rows, and those that a cache and other families add.

A part is a leaf; groups are sums of leaves. `BOUNDARIES` says where parts begin and end in a family's module tree, so a
new architecture is one more table here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["model", "block", "attention", "mlp"]


@dataclass(frozen=True)
class Part:
    """One row of a breakdown.

    Args:
        key: its name in results.
        title: its name for people.
        group: the table it stands in.
        is_published: study 002 has a row of this name.
    """

    key: str
    title: str
    group: Group
    is_published: bool = True


OUTSIDE = "outside"

# In the order of a forward pass; of a group, the sum stands in the table above it.
PARTS: tuple[Part, ...] = (
    Part(OUTSIDE, "Runner and cache bookkeeping", "model", False),
    Part("token_embedding", "Token embedding", "model"),
    Part("position_embedding", "Positional embedding", "model"),
    Part("embedding_sum", "Sum of the embeddings", "model"),
    Part("rotary_angles", "Rotary angles", "model", False),
    Part("norm_1", "Layer normalisation 1", "block"),
    Part("qkv_projection", "QKV projection", "attention"),
    Part("qkv_reshape", "QKV reshape", "attention"),
    Part("cache_append", "Cache append", "attention", False),
    Part("scores", "Scores", "attention"),
    Part("mask", "Mask", "attention"),
    Part("softmax", "Softmax", "attention"),
    Part("values", "Values", "attention"),
    Part("fused_attention", "Scores to values in one kernel", "attention", False),
    Part("output_reshape", "Output reshape", "attention"),
    Part("output_projection", "Output projection", "attention"),
    Part("residual_1", "Residual 1", "block"),
    Part("norm_2", "Layer normalisation 2", "block"),
    Part("expansion", "Expansion", "mlp"),
    Part("activation", "Activation", "mlp"),
    Part("projection", "Projection", "mlp"),
    Part("residual_2", "Residual 2", "block"),
    Part("last_token", "Choice of the last token", "model", False),
    Part("final_norm", "Final normalisation", "model"),
    Part("head", "Linear output layer", "model"),
    Part("loss", "Loss", "model", False),
    Part("optimizer", "Optimiser step", "model", False),
)
BY_KEY = {part.key: part for part in PARTS}

# group: (key of its sum, title, the table its sum stands in)
SUMS: dict[Group, tuple[str, str, Group]] = {
    "block": ("blocks", "Stack of transformer blocks", "model"),
    "attention": ("attention", "Self-attention", "block"),
    "mlp": ("mlp", "MLP", "block"),
}
SUM_KEYS = frozenset(key for key, _, _ in SUMS.values())
TITLES: dict[Group, str] = {
    "model": "The step",
    "block": "Within the blocks",
    "attention": "Within self-attention",
    "mlp": "Within the MLP",
}

# (end of a module's name, the part that begins when it is called, the part that begins when it returns). What lies
# between two modules (a reshape, a residual) belongs to the part that the first one's end began.
_GPT2 = (
    ("wte", "token_embedding", "embedding_sum"),
    ("wpe", "position_embedding", "embedding_sum"),
    ("ln_1", "norm_1", "qkv_projection"),
    ("attn.c_attn", "qkv_projection", "qkv_reshape"),
    ("attn.c_proj", "output_projection", "residual_1"),
    ("ln_2", "norm_2", "expansion"),
    ("mlp.c_fc", "expansion", "activation"),
    ("mlp.c_proj", "projection", "residual_2"),
    ("ln_f", "final_norm", "head"),
    ("lm_head", "head", OUTSIDE),
)
_LLAMA = (
    ("embed_tokens", "token_embedding", "rotary_angles"),
    ("input_layernorm", "norm_1", "qkv_projection"),
    ("self_attn.q_proj", "qkv_projection", "qkv_reshape"),
    ("self_attn.k_proj", "qkv_projection", "qkv_reshape"),
    ("self_attn.v_proj", "qkv_projection", "qkv_reshape"),
    ("self_attn.o_proj", "output_projection", "residual_1"),
    ("post_attention_layernorm", "norm_2", "expansion"),
    ("mlp.gate_proj", "expansion", "activation"),
    ("mlp.up_proj", "expansion", "activation"),
    ("mlp.down_proj", "projection", "residual_2"),
    ("norm", "final_norm", "head"),
    ("lm_head", "head", OUTSIDE),
)
BOUNDARIES = {"gpt2": _GPT2, "llama": _LLAMA, "mistral": _LLAMA}
STACKS = {"gpt2": "h", "llama": "layers", "mistral": "layers"}  # the list of blocks
SEAM_OWNERS = {"gpt2": "attn", "llama": "self_attn", "mistral": "self_attn"}


def title_of(key: str, family: str = "gpt2") -> str:
    """The name of a row; what a family does differently is said there."""
    for sum_key, title, _ in SUMS.values():
        if key == sum_key:
            return title
    if family != "gpt2" and key == "qkv_reshape":
        return "QKV reshape and rotation"
    if family != "gpt2" and key == "activation":
        return "Activation and gate"
    return BY_KEY[key].title
