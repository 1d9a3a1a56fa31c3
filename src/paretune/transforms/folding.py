"""Which inputs of a layer can be scaled for nothing, because what stands before it takes the opposite scale.

`reader(x) = W x = (W s) (x / s)`, and `x / s` comes out of a norm whose gain (and bias) is divided by `s`, or out of a
linear layer whose rows (and bias) are. A family is one function here. An activation in between lets nothing through
but ReLU, for which `relu(x / s) = relu(x) / s`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paretune.model.base import LanguageModel
from paretune.model.families.gpt2.model import GPT2
from paretune.model.families.llama.model import Llama
from paretune.model.layers import Linear
from paretune.ops.weights.dense import Dense

Set = Callable[[nn.Module, str, Any], None]


@dataclass(frozen=True)
class Fold:
    """A tensor that one module makes and some linear layers read.

    Args:
        source: of a norm, or of a linear layer, by name.
        readers: names of all that read it.
        rows: of a linear source that make it, first and one past the last.
        shared: `(n_kv_head, sharers, head_dim)` where heads of the inputs are copies of one of the source.
    """

    source: str
    readers: tuple[str, ...]
    rows: tuple[int, int] | None = None
    shared: tuple[int, int, int] | None = None

    def of_source(self, x: Tensor) -> Tensor:
        """Mean over the inputs that are the same row of the source: `[in] -> [rows]`."""
        if self.shared is None:
            return x
        n_kv_head, sharers, head_dim = self.shared
        return x.view(n_kv_head, sharers, head_dim).mean(1).flatten()

    def of_readers(self, x: Tensor) -> Tensor:
        """A number for each row of the source -> for each input of the readers."""
        if self.shared is None:
            return x
        n_kv_head, sharers, head_dim = self.shared
        return x.view(n_kv_head, 1, head_dim).expand(-1, sharers, -1).flatten()


def folds_of(model: LanguageModel, block: str) -> list[Fold]:
    """What can be scaled in a block; empty where the family is not known."""
    if isinstance(model, GPT2):
        return _of_gpt2(model, block)
    return _of_llama(model, block) if isinstance(model, Llama) else []


def _of_gpt2(model: GPT2, block: str) -> list[Fold]:
    width = model.config.n_embd
    folds = [
        Fold(f"{block}.ln_1", (f"{block}.attn.c_attn",)),
        Fold(f"{block}.attn.c_attn", (f"{block}.attn.c_proj",), (2 * width, 3 * width)),
        Fold(f"{block}.ln_2", (f"{block}.mlp.c_fc",)),
    ]
    if model.config.activation == "relu":
        folds.append(Fold(f"{block}.mlp.c_fc", (f"{block}.mlp.c_proj",), (0, model.config.n_inner)))
    return folds


def _of_llama(model: Llama, block: str) -> list[Fold]:
    c, attn, mlp = model.config, f"{block}.self_attn", f"{block}.mlp"
    shared = (c.n_kv_head, c.n_head // c.n_kv_head, c.head_dim)
    return [
        Fold(f"{block}.input_layernorm", (f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj")),
        Fold(f"{attn}.v_proj", (f"{attn}.o_proj",), (0, c.n_kv_head * c.head_dim), shared),
        Fold(f"{block}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
        Fold(f"{mlp}.up_proj", (f"{mlp}.down_proj",), (0, c.n_inner)),
    ]


def fold_(model: LanguageModel, fold: Fold, scale: Tensor, put: Set = setattr) -> None:
    """Multiplies the readers' columns by `scale`, fp32, one for each row of the source, and divides the source by it.

    Linear layers in question are dense.

    Args:
        put: what sets an attribute.
    """
    for name in fold.readers:
        reader = model.get_submodule(name)
        put(reader, "weight", Dense(_times(_values(reader), fold.of_readers(scale)[None])))
    source = model.get_submodule(fold.source)
    if fold.rows is None:
        for part in ("weight", "bias"):
            if isinstance(before := getattr(source, part, None), Tensor):
                put(source, part, _parameter(_times(before, 1 / scale)))
        return
    inverse = torch.ones(_values(source).size(0), device=scale.device)
    inverse[slice(*fold.rows)] = 1 / scale
    put(source, "weight", Dense(_times(_values(source), inverse[:, None])))
    if isinstance(source.bias, Tensor):
        put(source, "bias", _parameter(_times(source.bias, inverse)))


def _values(layer: nn.Module) -> Tensor:
    assert isinstance(layer, Linear) and isinstance(layer.weight, Dense)
    return layer.weight.values.detach()


def _times(x: Tensor, scale: Tensor) -> Tensor:
    return (x.detach().float() * scale).to(x.dtype)


def _parameter(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)
