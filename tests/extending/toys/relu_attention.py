"""Attention without softmax: scores through a ReLU, by the number of keys (Wortsman et al. 2023, arXiv:2309.08586)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.ops.attention.spec import AttentionSpec, LayerCache, alibi_bias, visible
from paretune.option import Option
from paretune.transforms.attention import attention_layers
from paretune.transforms.base import Context, Observation, Stage, Transform, ensure


def attention(q: Tensor, k_new: Tensor, v_new: Tensor, layer_cache: LayerCache | None, spec: AttentionSpec) -> Tensor:
    """The attention seam: `q[B, H, K, D]` on the keys that each query sees."""
    seen = visible(k_new, v_new, layer_cache, spec)
    k, v, mask, is_causal = seen[:4]
    K, n = q.size(2), k.size(2)
    if is_causal:
        mask = torch.ones(K, n, dtype=torch.bool, device=q.device).tril(n - K)
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = (q * spec.scale) @ k.transpose(-2, -1)
    if spec.slopes is not None:
        scores = scores + alibi_bias(seen, K, spec.slopes).to(scores.dtype)
    scores = torch.relu(scores)
    if mask is None:
        return scores @ v / n
    return scores.masked_fill(~mask, 0.0) @ v / mask.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class ReluAttention(Transform):
    name: ClassVar[str] = "relu_attention"
    stage: ClassVar[Stage] = Stage.ATTENTION
    axis: ClassVar[str] = "attention"
    replaces_attention: ClassVar[bool] = True
    has_alibi: ClassVar[bool] = True
    per_weight: ClassVar[bool] = True  # it changes none
    trainable: ClassVar[bool] = True

    @classmethod
    def options(cls, config: ModelConfig | None, device: str, n_tokens: int) -> Sequence[Option]:
        return [Option("relu_attention")]

    @property
    def title(self) -> str:
        return "relu"

    def apply(self, model: LanguageModel, ctx: Context) -> LanguageModel:
        for module in attention_layers(model):
            module.attention = attention
        return model

    def verify(self, model: LanguageModel, probe: Observation) -> list[str]:
        layers = attention_layers(model)
        ensure(bool(layers) and all(m.attention is attention for m in layers), self, "some layers kept softmax")
        return [f"all {len(layers)} layers run attention without softmax"]
