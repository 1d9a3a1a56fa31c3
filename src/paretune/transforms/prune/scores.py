"""How much structures of a model matter: by the size of their weights, by what they do on text, to first order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.errors import ParetuneError
from paretune.model.base import LanguageModel
from paretune.model.layers import Linear
from paretune.ops.weights.dense import Dense
from paretune.transforms.calibrate import blocks_of

MAGNITUDE, ACTIVATION, TAYLOR, RESIDUAL = "magnitude", "activation", "taylor", "residual"

Sum = Callable[[Tensor], Tensor]  # `[n]` numbers of single inputs or outputs -> of structures


def sizes(rows: Iterable[tuple[Linear, Sum]], inputs: Iterable[tuple[Linear, Sum]]) -> Tensor:
    """L2 norm of all weights of each structure: rows of layers that write it, columns of those that read."""
    parts = [of(_matrix(layer).square().sum(1)) for layer, of in rows]
    parts += [of(_matrix(layer).square().sum(0)) for layer, of in inputs]
    return torch.stack(parts).sum(0).sqrt()


def output_changes(layer: Linear, moments: Tensor, n: int) -> Tensor:
    """The mean square by which a layer's output changes where one of `n` structures of its inputs goes, `[n]`.

    Args:
        moments: of its inputs, `[C, C]`; structures are neighbouring inputs, C / n each.
    """
    w = _matrix(layer)
    wide = w.size(1) // n
    grouped = w.view(w.size(0), n, wide).transpose(0, 1)  # (n, N, wide)
    blocks = torch.stack([moments[i * wide : (i + 1) * wide, i * wide : (i + 1) * wide] for i in range(n)])
    return ((grouped @ blocks) * grouped).sum((1, 2))


def effects(model: LanguageModel, tokens: Tensor, names: Iterable[str], sums: Mapping[str, Sum]) -> dict[str, Tensor]:
    """First-order change of the loss where parts of a layer go: `|sum w * dL/dw|`, averaged over windows
    (Molchanov et al. 2019, arXiv:1906.10771).

    Args:
        tokens: `[N, T]`, a window at a time.
        names: of linear layers.
        sums: `w * dL/dw` `[out, in]` of a layer -> its parts `[n]`.

    Raises:
        ParetuneError: the loss on the text is not finite.
    """
    values = {name: _parameter(model.get_submodule(name)) for name in names}
    found = dict.fromkeys(values, torch.zeros(()))
    had = {name: v.requires_grad for name, v in values.items()}
    with torch.enable_grad():
        for v in values.values():
            v.requires_grad_(True)
        try:
            for window in tokens.split(1):
                logits = model(window[:, :-1], None, "all").float()
                loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
                if not bool(torch.isfinite(loss)):
                    raise ParetuneError(f"the loss on the calibration text is {loss.item()}", "Use fp32 and other text")
                grads = torch.autograd.grad(loss, list(values.values()))
                for (name, v), g in zip(values.items(), grads, strict=True):
                    found[name] = found[name] + sums[name]((v.detach() * g).float()).abs()
        finally:
            for name, v in values.items():
                v.requires_grad_(had[name])
    return {name: score / len(tokens) for name, score in found.items()}


@torch.no_grad()
def changes_of_stream(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What each block does to the residual stream, `[n_layer]` each: `1 - cos(in, out)` (ShortGPT, Men et al. 2024,
    arXiv:2403.03853), and the square of what it adds, in parts of what is there."""
    blocks = blocks_of(model)
    angles, added = torch.zeros(len(blocks)), torch.zeros(len(blocks))
    hooks = []
    for i, (_, block) in enumerate(blocks):

        def see(module: object, args: tuple[Tensor, ...], out: Tensor, i: int = i) -> None:
            x, y = args[0].float(), out.float()
            angles[i] += (1 - F.cosine_similarity(x, y, dim=-1)).sum().cpu()
            added[i] += ((y - x).square().sum(-1) / x.square().sum(-1).clamp(min=1e-12)).sum().cpu()

        hooks.append(block.register_forward_hook(see))
    try:
        for batch in tokens.split(max(1, 4096 // tokens.size(1))):
            model(batch, None, "last")
    finally:
        for hook in hooks:
            hook.remove()
    if not bool(torch.isfinite(angles).all()):
        raise ParetuneError("the model is not finite on the calibration text", "Use fp32")
    return angles / tokens.numel(), added / tokens.numel()


def _parameter(layer: nn.Module) -> nn.Parameter:
    assert isinstance(layer, Linear) and isinstance(layer.weight, Dense)
    values = layer.weight.values
    assert isinstance(values, nn.Parameter)
    return values


def _matrix(layer: Linear) -> Tensor:
    return _parameter(layer).detach().float()
