"""The parts of a step: the rows of the published kernel study, and those that a cache and other families add.

A part is a leaf; groups are sums of leaves. Where parts begin and end in a module tree, the family says
(`Family.boundaries`).
"""

from __future__ import annotations

from collections.abc import Mapping
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
        is_published: the published kernel study has a row of this name.
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


def title_of(key: str, titles: Mapping[str, str]) -> str:
    """The name of a row.

    Args:
        titles: of parts that do more in a family than their name says (`Family.titles`).
    """
    for sum_key, title, _ in SUMS.values():
        if key == sum_key:
            return title
    return titles.get(key, BY_KEY[key].title)
