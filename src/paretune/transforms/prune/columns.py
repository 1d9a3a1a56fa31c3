"""Dimensions of the residual stream go (study 004's columns, with one index for the whole model): `n_embd` is smaller.

With an index of its own each layer would have to gather its inputs in every step, which is what made the published
form slower than no pruning. One index for all is folded into every tensor that writes or reads the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.model.layers import Embedding, Linear
from paretune.ops.weights.dense import Dense
from paretune.transforms.calibrate import SecondMoments, moments_of_head, walk
from paretune.transforms.prune import scores
from paretune.transforms.prune.structure import PruneStructure, best, rounded, step_of, take_inputs_, take_rows_
from paretune.transforms.quantize import matrices


@dataclass(frozen=True)
class Columns(PruneStructure):
    """By magnitude: the L2 norm of a dimension's columns in all layers that read the stream, each layer weighed alike.

    With text, the layers that read take on what the columns that go gave (least squares), and the norms, which divide
    by the size of what is left, take the ratio of the sizes into `gamma`.
    """

    name: ClassVar[str] = "columns"
    what: ClassVar[str] = "dimensions of the residual stream"

    def smaller(self, config: ModelConfig) -> ModelConfig:
        n = rounded(config.n_embd, self.keep, step_of(config.n_embd), "the residual stream")
        return config.reshaped([config.layer(i) for i in range(config.n_layer)], n)

    def prune_(self, model: LanguageModel, tokens: Tensor | None, progress: Callable[[str], None]) -> ModelConfig:
        config = model.config
        readers, writers = self._readers(model), self._writers(model)
        n_left = rounded(config.n_embd, self.keep, step_of(config.n_embd), "the residual stream")
        moments = {} if tokens is None else self._moments(model, tokens, readers)
        kept = best(self._scores(model, tokens, readers, moments), n_left)
        ratios = {} if tokens is None else _ratios(model, tokens, kept)
        head = model.head
        for matrix in matrices(model):
            if matrix.is_end:  # embeddings, and the head where it is another matrix
                assert isinstance(matrix.weight, Dense)
                values = matrix.weight.values.detach()[:, kept].contiguous()
                matrix.weight.values = nn.Parameter(values, requires_grad=False)
                matrix.weight.in_features = len(kept)
        for name, layer in readers.items():
            if layer is not head:  # a tied one is an embedding too
                take_inputs_(layer, kept, moments.get(name))
        for layer in writers:
            take_rows_(layer, kept)
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if not isinstance(module, Linear | Embedding | Dense) and p.shape == (config.n_embd,):
                    values = p.detach()[kept] * (ratios.get(module, 1.0) if name == "weight" else 1.0)
                    setattr(module, name, nn.Parameter(values.contiguous(), requires_grad=False))
                    if isinstance(module, nn.LayerNorm):
                        module.normalized_shape = (len(kept),)
        return self.smaller(config)

    def _readers(self, model: LanguageModel) -> dict[str, Linear]:
        modules = model.family.modules
        roles = [r for r in ("qkv", "q", "k", "v", "gate", "up") if r in modules]
        found: dict[str, Linear] = {}
        for i in range(model.config.n_layer):
            for role in roles:
                name = modules[role].format(i=i)  # type: ignore[index]
                found[name] = model.get_submodule(name)  # type: ignore[assignment]
        found[model.head_name] = model.head
        return found

    def _writers(self, model: LanguageModel) -> list[Linear]:
        names = [model.family.modules[role].format(i=i) for i in range(model.config.n_layer) for role in ("o", "down")]
        return [model.get_submodule(name) for name in names]  # type: ignore[misc]

    def _moments(self, model: LanguageModel, tokens: Tensor, readers: dict[str, Linear]) -> dict[str, Tensor]:
        """Second moments of the readers' inputs; layers that read one tensor share theirs."""
        found: dict[str, Tensor] = {}

        def visit(block: str, layers: dict[str, Linear], moments: SecondMoments) -> None:
            made: dict[int, Tensor] = {}
            for name in layers:
                if name in readers:
                    inputs = moments.inputs_of(name)
                    found[name] = made.setdefault(inputs, made[inputs] if inputs in made else moments.of(name))

        walk(model, tokens, visit, lambda line: None)
        found[model.head_name] = moments_of_head(model, tokens).of(model.head_name)
        return found

    def _scores(
        self, model: LanguageModel, tokens: Tensor | None, readers: dict[str, Linear], moments: dict[str, Tensor]
    ) -> Tensor:
        if tokens is not None and self.by == scores.TAYLOR:
            found = scores.effects(model, tokens, readers, dict.fromkeys(readers, lambda change: change.sum(0)))
            return torch.stack(list(found.values())).sum(0)
        total = torch.zeros(model.config.n_embd)
        for name, layer in readers.items():
            if name in moments:
                score = scores.output_changes(layer, moments[name], model.config.n_embd)
            else:
                score = scores.sizes([], [(layer, lambda x: x)]).square()
            total += score / score.sum().clamp(min=1e-30)
        return total

    def shapes(self, config: ModelConfig) -> str:
        return f"a residual stream of {config.n_embd:,}"


def _ratios(model: LanguageModel, tokens: Tensor, kept: Tensor) -> dict[nn.Module, float]:
    """By norm: the root mean square (deviation, of a layer norm) of the dimensions that stay, in parts of all."""
    norms = [m for m in model.modules() if not isinstance(m, Dense) and hasattr(m, "eps")]
    squares: dict[nn.Module, list[float]] = {m: [0.0, 0.0] for m in norms}

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        for i, x in enumerate((args[0].float()[..., kept], args[0].float())):
            if isinstance(module, nn.LayerNorm):
                x = x - x.mean(-1, keepdim=True)
            squares[module][i] += float(x.square().mean())

    hooks = [m.register_forward_pre_hook(see) for m in norms]
    try:
        for batch in tokens.split(8):
            model(batch, None, "all")
    finally:
        for hook in hooks:
            hook.remove()
    return {m: (a / b) ** 0.5 if b else 1.0 for m, (a, b) in squares.items()}
