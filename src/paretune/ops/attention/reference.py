"""Attention as the formula says it: softmax(q k^T * scale + bias + mask) v (Vaswani et al. 2017, arXiv:1706.03762).

The bias is ALiBi's. A mask is added as minus infinity; a masked score must not keep the weight exp(0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from paretune.ops.attention.spec import AttentionSpec, LayerCache, alibi_bias, visible

SCORE_MATRIX = True  # every score is in memory


def attention(q: Tensor, k_new: Tensor, v_new: Tensor, layer_cache: LayerCache | None, spec: AttentionSpec) -> Tensor:
    """Attention of any pattern, every score in memory.

    Args:
        q: `[B, H, K, D]`.
        k_new, v_new: `[B, Hkv, K, D]`; H is a multiple of Hkv.

    Returns:
        `[B, H, K, D]`. The softmax runs in fp32 whatever the dtype.
    """
    B, H, K, D = q.size()
    seen = visible(k_new, v_new, layer_cache, spec)
    k, v, mask, is_causal = seen[:4]
    Hkv, n = k.size(1), k.size(2)
    q = q.reshape(B, Hkv, H // Hkv, K, D)  # query heads of one group share their keys
    scores = (q * spec.scale) @ k[:, :, None].transpose(-2, -1)  # (B, Hkv, H/Hkv, K, n)
    if spec.slopes is not None:
        scores = scores.float() + alibi_bias(seen, K, spec.slopes).unflatten(1, (Hkv, -1))
    if is_causal and K > 1:
        hidden = torch.ones(K, n, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    elif mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v[:, :, None]).reshape(B, H, K, D)
