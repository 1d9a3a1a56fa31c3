"""Attention through PyTorch's fused operator (flash on CPU and GPU where its shapes allow)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from paretune.ops.attention.spec import AttentionSpec, LayerCache, visible


def attention(q: Tensor, k_new: Tensor, v_new: Tensor, layer_cache: LayerCache | None, spec: AttentionSpec) -> Tensor:
    """`scaled_dot_product_attention`; arguments and result as in `reference.attention`.

    Exact: equals the reference up to the order of additions. No score matrix in memory.
    """
    k, v, mask, is_causal = visible(k_new, v_new, layer_cache, spec)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=is_causal and q.size(2) > 1,
        scale=spec.scale,
        enable_gqa=q.size(1) != k.size(1),
    )
