"""How much each layer minds each format, and the cheapest mix of formats that meets a target.

A layer's loss is the mean KL divergence from the plain model's next-token distributions when that layer alone is
quantised. Losses of small changes add up nearly, so a mix is predicted by their sum; what is chosen has to be measured
as a whole before it is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from paretune.errors import NoRecipeError, UsageError
from paretune.model.base import LanguageModel
from paretune.model.layers import Embedding, Linear
from paretune.ops.weights.base import Weight
from paretune.transforms.quantize import Quantize, matrices

WINDOWS_AT_ONCE = 8
TOKENS_KEPT = 2048  # whose distributions are compared


@dataclass(frozen=True)
class LayerFormat:
    """One layer in one format.

    Attributes:
        option: index of the format.
        kl: mean over the positions, nats a token.
        n_bytes: of the matrix in that format.
    """

    layer: str
    option: int
    kl: float
    n_bytes: int


@dataclass(frozen=True)
class Mix:
    """A format for every layer.

    Attributes:
        transforms: in recipe order; all but the last name their layers.
        kl: predicted, the sum of the layers' own.
        n_bytes: of the matrices.
    """

    transforms: tuple[Quantize, ...]
    chosen: tuple[LayerFormat, ...]
    kl: float
    n_bytes: int


@torch.inference_mode()
def measure(
    model: LanguageModel,
    windows: Tensor,
    options: Sequence[Quantize],
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerFormat]:
    """Every layer in every format, one at a time; the model is left as it was.

    Args:
        model: plain.
        windows: text that is neither for the evaluation nor for calibration, int64 `[N, T]`.
        options: formats, whose filters are ignored; a layer that none wants stays out of the table.
    """
    # Positions evenly over the text, so that the distributions fit into memory.
    stride = max(1, windows.numel() // TOKENS_KEPT)
    exact = _log_probs(model, windows, stride)
    layers = matrices(model)
    out: list[LayerFormat] = []
    for layer in layers:
        for index, option in enumerate(options):
            if not option.wants(layer.is_end):
                continue
            quantised = option.quantized(layer)
            _put_(model, layer.weight, quantised)
            try:
                ours = _log_probs(model, windows, stride)
            finally:
                _put_(model, quantised, layer.weight)
            kl = float(F.kl_div(ours, exact, reduction="batchmean", log_target=True))
            out.append(LayerFormat(layer.name, index, max(kl, 0.0), quantised.stored_bytes))
            if progress is not None:
                progress(layers.index(layer) + 1, len(layers))
    return out


def choose(
    table: Sequence[LayerFormat],
    options: Sequence[Quantize],
    *,
    max_kl: float | None = None,
    max_bytes: int | None = None,
) -> Mix:
    """The mix that meets one target at the least cost of the other.

    All layers begin in their smallest format; then the step that saves most loss for each byte is taken until the loss
    is small enough, or while the bytes allow one.

    Raises:
        UsageError: not exactly one target.
        NoRecipeError: no mix meets it; the message says what the best one has.
    """
    if (max_kl is None) == (max_bytes is None):
        raise UsageError("a mix needs one target", "Give a largest loss or a largest size, not both")
    by_layer: dict[str, list[LayerFormat]] = {}
    for entry in table:
        by_layer.setdefault(entry.layer, []).append(entry)
    now = {name: min(entries, key=lambda e: (e.n_bytes, e.kl)) for name, entries in by_layer.items()}

    def kl() -> float:
        return sum(e.kl for e in now.values())

    def n_bytes() -> int:
        return sum(e.n_bytes for e in now.values())

    if max_bytes is not None and n_bytes() > max_bytes:
        raise NoRecipeError(f"the smallest mix has {n_bytes():,} bytes, {max_bytes:,} are allowed", "Allow more")
    while max_kl is None or kl() > max_kl:
        steps = [
            (entry, (now[name].kl - entry.kl) / max(entry.n_bytes - now[name].n_bytes, 1))
            for name, entries in by_layer.items()
            for entry in entries
            if entry.kl < now[name].kl
            and (max_bytes is None or n_bytes() - now[name].n_bytes + entry.n_bytes <= max_bytes)
        ]
        if not steps:
            break
        best = max(steps, key=lambda step: step[1])[0]
        now[best.layer] = best
    if max_kl is not None and kl() > max_kl:
        raise NoRecipeError(f"the best mix has a loss of {kl():.3g}, {max_kl:.3g} is allowed", "Allow more")
    return Mix(_transforms(now, options), tuple(now.values()), kl(), n_bytes())


def _transforms(now: dict[str, LayerFormat], options: Sequence[Quantize]) -> tuple[Quantize, ...]:
    names: dict[int, list[str]] = {}
    for name, entry in now.items():
        names.setdefault(entry.option, []).append(name)
    # The commonest goes last, for what is left over, so that the recipe stays short.
    order = sorted(names, key=lambda index: len(names[index]))
    return tuple(replace(options[index], include=",".join(names[index]), exclude="") for index in order)


def _log_probs(model: LanguageModel, windows: Tensor, stride: int) -> Tensor:
    parts = []
    for batch in windows.split(WINDOWS_AT_ONCE):
        logits = model(batch, None, "all").flatten(0, 1)[::stride]
        parts.append(torch.log_softmax(logits.float(), dim=-1))
    return torch.cat(parts)


def _put_(model: LanguageModel, old: Weight, new: Weight) -> None:
    for module in model.modules():
        if isinstance(module, Linear | Embedding) and module.weight is old:
            module.weight = new
