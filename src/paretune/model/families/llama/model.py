"""Llama and Mistral, whole: plain PyTorch, the same two seams as every family.

References: Touvron et al. 2023, arXiv:2302.13971; Jiang et al. 2023 (Mistral 7B), arXiv:2310.06825; Hugging Face
`modeling_llama.py`, whose module names and rotary convention (halves, not pairs) are kept.

Legend: B batch, T time (tokens), C width (n_embd), H query heads, Hkv key/value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.model.layers import (
    ACTIVATION_FUNCTIONS,
    DEFAULT_ATTENTION,
    RMSNorm,
    empty_embedding,
    empty_linear,
)
from paretune.ops.attention import alibi
from paretune.ops.attention.spec import AttentionFunction, AttentionSpec, LayerCache
from paretune.ops.native.program import LOGITS, Program
from paretune.registry import ATTENTION


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angular frequency of each pair of dimensions, `[D / 2]`, fp32 (Su et al. 2021, arXiv:2104.09864).

    `llama3` scaling: long wavelengths are divided by the factor, short ones kept, between them a linear blend.
    """
    D = config.head_dim
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original_n_positions * frequency / (2 * math.pi)  # over the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates dimension i with i + D/2: `x[B, H, T, D]`, `cos, sin [B or 1, 1, T, D]`."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        H, Hkv, _ = config.layer(layer)
        D, C = config.head_dim, config.n_embd
        self.n_head, self.n_kv_head, self.head_dim = H, Hkv, D
        self.q_proj = empty_linear(C, H * D, config.attn_bias)
        self.k_proj = empty_linear(C, Hkv * D, config.attn_bias)
        self.v_proj = empty_linear(C, Hkv * D, config.attn_bias)
        self.o_proj = empty_linear(H * D, C, config.attn_bias)
        slopes = alibi.slopes(H) if config.alibi else None
        self.spec = AttentionSpec(1 / math.sqrt(D), config.attention_pattern, slopes)
        self.attention: AttentionFunction = ATTENTION.get(DEFAULT_ATTENTION)  # the seam

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, layer_cache: LayerCache | None) -> Tensor:
        B, T, _ = x.size()
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, Hkv, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = self.attention(q, k, v, layer_cache, self.spec)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        n_inner = config.layer(layer).n_inner
        self.gate_proj = empty_linear(config.n_embd, n_inner, config.mlp_bias)
        self.up_proj = empty_linear(config.n_embd, n_inner, config.mlp_bias)
        self.down_proj = empty_linear(n_inner, config.n_embd, config.mlp_bias)
        self.activation = ACTIVATION_FUNCTIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config, layer)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, layer_cache: LayerCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(LanguageModel):
    """The language model.

    Args:
        config: shapes; parameters are left unset (`checkpoint.load` or `initialize_` fills them).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = empty_embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = empty_linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.embed_tokens.weight
        # [D / 2], fp32. A model that was converted to ALiBi may have none.
        self._rope = rope_frequencies(config) if config.has_positions else None

    def forward(self, tokens: Tensor, cache: Any = None, logits: Literal["last", "all"] = "all") -> Tensor:
        """Logits of the next token; see the base."""
        T = tokens.size(1)
        positions = torch.arange(T, device=tokens.device)[None] if cache is None else cache.positions
        x = self.embed_tokens(tokens)  # (B, T, C)
        # Angles in fp32 whatever the model's dtype: bf16 cannot tell position 257 from 258.
        cos = sin = None
        if self._rope is not None:
            angles = positions[:, None, :, None].float() * self._rope  # (B, 1, T, D/2)
            angles = torch.cat((angles, angles), dim=-1)
            cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, None if cache is None else cache.layers[i])
        if logits == "last":
            x = x[:, -1:] if cache is None else cache.take_last(x)
        return self.lm_head(self.norm(x))

    def drop_positions_(self) -> None:
        self._rope = None

    def lower(self, program: Program) -> None:
        c = self.config
        program.embed("x", self.embed_tokens.weight, rope=self._rope, head_dim=c.head_dim)
        blocks: list[Any] = list(self.layers)
        for i, block in enumerate(blocks):
            attn, mlp = block.self_attn, block.mlp
            n_head, n_kv_head, n_inner = c.layer(i)
            heads = (n_head, n_kv_head, c.head_dim)
            q_width, kv_width = n_head * c.head_dim, n_kv_head * c.head_dim
            width = q_width + 2 * kv_width
            # Buffers are named by their widths: layers may differ.
            qkv, mixed, wide, inner = f"qkv{width}", f"mixed{q_width}", f"gate{n_inner}", f"inner{n_inner}"
            q: dict[str, Any] = {"part": "norm_1+qkv_projection", "block": i}
            kv: dict[str, Any] = {"part": "qkv_projection", "block": i, "same_input": True}
            norm = block.input_layernorm
            program.linear(attn.q_proj, "x", qkv, norm=norm, columns=(0, width), barrier=False, **q)
            program.linear(attn.k_proj, "x", qkv, columns=(q_width, width), barrier=False, **kv)
            program.linear(attn.v_proj, "x", qkv, columns=(q_width + kv_width, width), **kv)
            program.attention(qkv, mixed, i, attn.attention, attn.spec, *heads, rope=self._rope)
            program.linear(attn.o_proj, mixed, "x", add=True, part="output_projection+residual_1", block=i)
            gate: dict[str, Any] = {"part": "norm_2+expansion+activation", "block": i, "barrier": False}
            norm = block.post_attention_layernorm
            program.linear(mlp.gate_proj, "x", wide, norm=norm, activation=c.activation, **gate)
            program.linear(mlp.up_proj, "x", inner, same_input=True, gate=wide, part="expansion", block=i)
            program.linear(mlp.down_proj, inner, "x", add=True, part="projection+residual_2", block=i)
        program.linear(self.lm_head, "x", LOGITS, norm=self.norm, last_only=True, part="final_norm+head")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Not a buffer, because `model.to(bfloat16)` must not round it; it still follows the model's device.
        super()._apply(fn, recurse)
        if self._rope is not None:
            self._rope = self._rope.to(self.norm.weight.device)
        return self

    def initialize_(self, generator: torch.Generator) -> None:
        """Normal with the config's standard deviation; norms one, biases zero."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.data.zero_()
            elif "norm" in name:
                p.data.fill_(1.0)
            else:
                p.data.normal_(0.0, self.config.initializer_range, generator=generator)
