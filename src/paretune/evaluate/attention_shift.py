"""How a mechanism moves attention: entropy of each head, and its divergence from the dense model's. For small inputs.

Attention is linear in the values, so its weights can be read through the seam of any form, fast or sparse: with rows of
the identity as values, the output is the weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paretune.errors import UsageError
from paretune.model.base import LanguageModel

MAX_TOKENS = 512  # weights of all layers are held at once: n_layer * n_head * T^2 numbers


@dataclass(frozen=True)
class HeadShift:
    """One head, means over queries.

    Attributes:
        entropy, dense_entropy: nats; low is a head that looks at few tokens.
        kl: nats, of the mechanism's weights from the dense ones (finite: what the mechanism sees the dense one sees).
        distance, dense_distance: tokens from the query to where it looks, on average.
    """

    layer: int
    head: int
    entropy: float
    dense_entropy: float
    kl: float
    distance: float
    dense_distance: float


def attention_weights(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Attention weights `[n_layer, B, H, T, T]` (fp32) of `tokens[B, T]`; rows sum to 1.

    Raises:
        UsageError: more than `MAX_TOKENS` tokens.
    """
    if tokens.size(1) > MAX_TOKENS:
        raise UsageError(f"{tokens.size(1)} tokens of attention weights", f"Use {MAX_TOKENS} or fewer")
    found: list[Tensor] = []
    with torch.no_grad(), _recorded(model, found):
        model(tokens, None, "all")
    return torch.stack(found)


def shift(model: LanguageModel, dense: LanguageModel, tokens: Tensor) -> list[HeadShift]:
    """Every head of `model` against the same head of `dense` on the same `tokens[B, T]`."""
    ours, theirs = attention_weights(model, tokens), attention_weights(dense, tokens)
    assert ours.shape == theirs.shape, "two models of one shape"
    T = tokens.size(1)
    away = (torch.arange(T)[:, None] - torch.arange(T)[None]).clamp(min=0).to(ours)
    means = {
        "entropy": _entropy(ours),
        "dense_entropy": _entropy(theirs),
        "kl": _divergence(ours, theirs),
        "distance": (ours * away).sum(-1),
        "dense_distance": (theirs * away).sum(-1),
    }
    by_head = {key: value.mean(dim=(1, 3)) for key, value in means.items()}  # (n_layer, H)
    n_layer, n_head = by_head["kl"].shape
    return [
        HeadShift(layer, head, **{key: float(value[layer, head]) for key, value in by_head.items()})
        for layer in range(n_layer)
        for head in range(n_head)
    ]


def _entropy(weights: Tensor) -> Tensor:
    return -torch.xlogy(weights, weights).sum(-1)


def _divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(ours || theirs), clipped at 0: rounding may leave -1e-8."""
    floor = torch.finfo(torch.float32).tiny
    return (torch.xlogy(ours, ours) - ours * theirs.clamp(min=floor).log()).sum(-1).clamp(min=0)


@contextmanager
def _recorded(model: LanguageModel, found: list[Tensor]) -> Iterator[None]:
    """For the body, each layer also writes its weights to `found`."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "attention") and hasattr(m, "spec")]
    before = [layer.attention for layer in layers]

    def watching(inner: Any) -> Any:
        def attention(q: Tensor, k: Tensor, v: Tensor, layer_cache: Any, spec: Any) -> Tensor:
            found.append(_weights(inner, q, k, v, spec))
            return inner(q, k, v, layer_cache, spec)

        return attention

    try:
        for layer in layers:
            layer.attention = watching(layer.attention)
        yield
    finally:
        for layer, function in zip(layers, before, strict=True):
            layer.attention = function


def _weights(inner: Any, q: Tensor, k: Tensor, v: Tensor, spec: Any) -> Tensor:
    """`[B, H, T, T]`: columns of the identity as values, as many at once as a head is wide (what kernels expect)."""
    T, D = k.size(2), v.size(3)
    columns = []
    for start in range(0, T, D):
        values = torch.zeros_like(v)
        n = min(D, T - start)
        values[:, :, start : start + n, :n] = torch.eye(n, dtype=v.dtype, device=v.device)
        columns.append(inner(q, k, values, None, spec)[..., :n].float())
    return torch.cat(columns, dim=-1)
