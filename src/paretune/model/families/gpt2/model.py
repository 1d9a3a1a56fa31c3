"""GPT-2, whole: plain PyTorch, no optimisation flags; what makes it faster is swapped in from outside.

References: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; OpenAI's gpt-2 `src/model.py`;
Hugging Face `modeling_gpt2.py`, whose module names are kept so that checkpoints map one to one.

Legend: B batch, T time (tokens), C width (n_embd), H heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.model.layers import (
    ACTIVATION_FUNCTIONS,
    DEFAULT_ATTENTION,
    LayerNorm,
    empty_embedding,
    empty_linear,
)
from paretune.ops.attention import alibi
from paretune.ops.attention.spec import AttentionFunction, AttentionSpec, LayerCache
from paretune.ops.native.program import LOGITS, Program
from paretune.registry import ATTENTION


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.head_dim = config.layer(layer).n_head, config.head_dim
        width = self.n_head * self.head_dim  # n_embd, but where heads were pruned
        self.c_attn = empty_linear(config.n_embd, 3 * width, bias=True)
        self.c_proj = empty_linear(width, config.n_embd, bias=True)
        scale = 1 / math.sqrt(config.head_dim) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        slopes = alibi.slopes(self.n_head) if config.alibi else None
        self.spec = AttentionSpec(scale, config.attention_pattern, slopes)
        self.attention: AttentionFunction = ATTENTION.get(DEFAULT_ATTENTION)  # the seam

    def forward(self, x: Tensor, layer_cache: LayerCache | None) -> Tensor:
        B, T, _ = x.size()
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, self.head_dim).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        y = self.attention(q, k, v, layer_cache, self.spec)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        n_inner = config.layer(layer).n_inner
        self.c_fc = empty_linear(config.n_embd, n_inner, bias=True)
        self.c_proj = empty_linear(n_inner, config.n_embd, bias=True)
        self.activation = ACTIVATION_FUNCTIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config, layer)

    def forward(self, x: Tensor, layer_cache: LayerCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), layer_cache)
        return x + self.mlp(self.ln_2(x))


class GPT2(LanguageModel):
    """The language model.

    Args:
        config: shapes; parameters are left unset (`checkpoint.load` or `initialize_` fills them).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = empty_embedding(config.vocab_size, config.n_embd)
        # A model that was converted to ALiBi may have none.
        self.wpe = empty_embedding(config.n_positions, config.n_embd) if config.has_positions else None
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, config.norm_eps)
        self.lm_head = empty_linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor, cache: Any = None, logits: Literal["last", "all"] = "all") -> Tensor:
        """Logits of the next token; see the base."""
        T = tokens.size(1)
        positions = torch.arange(T, device=tokens.device) if cache is None else cache.positions
        x = self.wte(tokens)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache.layers[i])
        if logits == "last":
            x = x[:, -1:] if cache is None else cache.take_last(x)
        return self.lm_head(self.ln_f(x))

    def drop_positions_(self) -> None:
        self.wpe = None

    def lower(self, program: Program) -> None:
        c = self.config
        program.embed("x", self.wte.weight, None if self.wpe is None else self.wpe.weight)
        blocks: list[Any] = list(self.h)
        for i, block in enumerate(blocks):
            attn, mlp, n_head = block.attn, block.mlp, c.layer(i).n_head
            # Buffers are named by their widths: layers may differ.
            qkv, mixed, inner = f"qkv{n_head}", f"mixed{n_head}", f"inner{c.layer(i).n_inner}"
            program.linear(attn.c_attn, "x", qkv, norm=block.ln_1, part="norm_1+qkv_projection", block=i)
            program.attention(qkv, mixed, i, attn.attention, attn.spec, n_head, n_head, c.head_dim)
            program.linear(attn.c_proj, mixed, "x", add=True, part="output_projection+residual_1", block=i)
            part = "norm_2+expansion+activation"
            program.linear(mlp.c_fc, "x", inner, norm=block.ln_2, activation=c.activation, part=part, block=i)
            program.linear(mlp.c_proj, inner, "x", add=True, part="projection+residual_2", block=i)
        program.linear(self.lm_head, "x", LOGITS, norm=self.ln_f, last_only=True, part="final_norm+head")

    def initialize_(self, generator: torch.Generator) -> None:
        """GPT-2's own initialisation: normal, residual projections scaled by 1/sqrt(2 n_layer)."""
        std = self.config.initializer_range
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.data.zero_()
            elif "ln_" in name:
                p.data.fill_(1.0)
            else:
                shrink = math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 1.0
                p.data.normal_(0.0, std / shrink, generator=generator)
