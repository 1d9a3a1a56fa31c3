"""Attention through PyTorch's fused operator (flash on CPU and GPU where its shapes allow).

Dense causal attention has no score or mask in memory. A pattern is a dense mask here and ALiBi a dense bias: exact, and
no faster for what is masked (the forms that skip are `native` and `flex`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paretune.ops.attention.spec import AttentionSpec, LayerCache, alibi_bias, visible

RECOMPUTES = True  # the backward pass computes the scores again instead of keeping them
FUSED_KERNELS = ("scaled_dot_product", "_flash_attention", "_efficient_attention")  # of which one has to run


def attention(q: Tensor, k_new: Tensor, v_new: Tensor, layer_cache: LayerCache | None, spec: AttentionSpec) -> Tensor:
    """`scaled_dot_product_attention`; arguments and result as in `reference.attention`.

    Exact: equals the reference up to the order of additions.
    """
    seen = visible(k_new, v_new, layer_cache, spec)
    k, v, mask, is_causal = seen[:4]
    if spec.slopes is not None:
        bias = alibi_bias(seen, q.size(2), spec.slopes)
        if is_causal and q.size(2) > 1:
            mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=q.device).tril()
        mask = (bias if mask is None else bias.masked_fill(~mask, float("-inf"))).to(q.dtype)
        is_causal = False
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=is_causal and q.size(2) > 1,
        scale=spec.scale,
        enable_gqa=q.size(1) != k.size(1),
    )
