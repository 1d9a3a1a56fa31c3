"""Which inputs of a layer can be scaled for nothing, because what stands before it takes the opposite scale.

`reader(x) = W x = (W s) (x / s)`, and `x / s` comes out of a norm whose gain (and bias) is divided by `s`, or out of a
linear layer whose rows (and bias) are. Which layers these are, the family says (`Family.folds`). An activation in
between lets nothing through but ReLU, for which `relu(x / s) = relu(x) / s`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paretune.model.base import LanguageModel
from paretune.model.families.fold import Fold
from paretune.model.layers import Linear
from paretune.ops.weights.dense import Dense

Set = Callable[[nn.Module, str, Any], None]


def folds_of(model: LanguageModel, block: str) -> list[Fold]:
    """What can be scaled in a block, as the family says; empty where it says nothing."""
    return model.family.folds(model.config, block)


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
