"""What criteria for single weights share: which layers, calibration block by block, none half done, counted zeros."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.model.layers import Linear
from paretune.ops.weights.base import Weight
from paretune.ops.weights.dense import Dense
from paretune.option import OWN_KERNELS, PRUNED, SPARSE, Option
from paretune.transforms.base import Context, Observation, ensure
from paretune.transforms.calibrate import SecondMoments, blocks_of, check_calibration, moments_of_head, walk
from paretune.transforms.calibrated import Edits
from paretune.transforms.prune.base import Prune, check_keep, percent
from paretune.transforms.quantize import Chosen, matches, matrices, naming

KEEP_TRIED = (0.5, 0.25)  # by a search


@dataclass(frozen=True)
class PruneWeights(Prune):
    """Weights of the blocks' linear layers become zero; `keep` of each layer's stay.

    A zero in a dense matrix is stored and multiplied like any other number: what makes it pay is a sparse format.

    Args:
        keep: share of the weights that stay in the layers that are pruned, above 0 and at most 1.
        ends: also the embedding of tokens and the head (a tied pair stays one matrix).
        include, exclude: patterns of layer names, as formats have them.
    """

    slack: ClassVar[float] = 0.0  # of the share that stays, by rounding in each row
    keep: float = 0.5
    ends: bool = False
    include: str = field(default="", kw_only=True)
    exclude: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        check_keep(self.keep, self.name)

    @classmethod
    def options(cls, config: ModelConfig | None, device: str, n_tokens: int) -> Sequence[Option]:
        if config is None:
            return ()
        return [
            Option(
                f"{cls.name}({keep})",
                tags=frozenset({PRUNED}),
                needs=frozenset({SPARSE, OWN_KERNELS}),
                beside=("quantize",),
                changes_weights=True,
            )
            for keep in KEEP_TRIED
        ]

    @property
    def title(self) -> str:
        return f"{self.name} {percent(self.keep)}" + (" with ends" if self.ends else "")

    @property
    def is_partial(self) -> bool:
        return bool(self.include or self.exclude)

    # -- what a criterion says

    def least_tokens(self, widest: int) -> tuple[int, str]:
        """Calibration tokens that are needed where the widest layer has so many inputs, and what for."""
        return 1, "a mean"

    def pruned(self, values: Tensor, name: str, moments: SecondMoments | None, shared: dict[int, Tensor]) -> Tensor:
        """The weights `[N, C]` of a layer, zeros among them.

        Args:
            moments: of the inputs of the layer `name`; None without calibration.
            shared: what may be kept for other layers that read the same inputs, by `moments.inputs_of`.
        """
        raise NotImplementedError

    def pruned_end(self, values: Tensor, name: str, moments: SecondMoments | None) -> Tensor:
        """The same of an embedding or the head."""
        return self.pruned(values, name, moments, {})

    # -- what they share

    def fits(self, config: ModelConfig) -> str | None:
        if self.is_partial:
            try:
                self.chosen(checkpoint.build(config))
            except UsageError as error:
                return error.cause
        return super().fits(config)

    def chosen(self, model: LanguageModel) -> list[Chosen]:
        """The matrices that it is about, in the order of the tree.

        Raises:
            UsageError: a pattern matches no layer.
        """
        everything = [c for c in matrices(model) if not c.is_positions and (self.ends or not c.is_end)]
        for patterns in (self.include, self.exclude):
            if patterns and not any(matches(c.names, patterns) for c in everything):
                raise UsageError(f"{self.name}: the pattern {patterns!r} matches no layer", "Correct the pattern")
        return [
            c
            for c in everything
            if (not self.include or matches(c.names, self.include)) and not matches(c.names, self.exclude)
        ]

    def apply(self, model: LanguageModel, ctx: Context) -> LanguageModel:
        """Raises `UsageError` where a layer is quantised or packed already, `ParetuneError` where one holds NaN."""
        if self.is_done(model.config):
            return model
        chosen = self.chosen(model)
        self.check_dense(chosen)
        with self._whole() as edits:
            self._prune_(model, ctx, chosen, edits)
            n, n_zeros = _n(chosen), sum(count_zeros(c.weight) for c in chosen)
            ensure(n_zeros >= self._least_zeros(chosen), self, f"{n_zeros:,} of {n:,} weights are zero")
        model.config = self.noted(model.config, f"{n_zeros} of {n} weights are zero")
        return model

    def _least_zeros(self, chosen: Sequence[Chosen]) -> float:
        return max(1.0, _n(chosen) * (1 - self.keep - self.slack) - len(chosen))

    def _prune_(self, model: LanguageModel, ctx: Context, chosen: list[Chosen], edits: Edits) -> None:
        """Puts pruned values into the chosen layers, through `edits`."""
        in_blocks = {id(m.weight) for _, b in blocks_of(model) for m in b.modules() if isinstance(m, Linear)}
        inside = {id(c.weight): c for c in chosen if id(c.weight) in in_blocks}
        ends = [c for c in chosen if id(c.weight) not in in_blocks]
        if self.needs_calibration:
            widest = max((c.weight.in_features for c in chosen), default=0)
            tokens = check_calibration(ctx, self.title, *self.least_tokens(widest))
            shared: dict[int, Tensor] = {}

            def visit(block: str, layers: dict[str, Linear], moments: SecondMoments) -> None:
                shared.clear()
                for name, module in layers.items():
                    if id(module.weight) in inside:
                        with naming(name):
                            self._set_(module.weight, self.pruned(_values(module.weight), name, moments, shared), edits)

            if inside:
                walk(model, tokens, visit, lambda said: ctx.progress(f"{self.title}: {said}"))
            of_head = moments_of_head(model, tokens) if ends else None
        else:
            for layer in inside.values():
                with naming(layer.name):
                    self._set_(layer.weight, self.pruned(_values(layer.weight), layer.name, None, {}), edits)
            of_head = None
        for layer in ends:
            with naming(layer.name):
                is_head = model.head_name in layer.names
                made = self.pruned_end(_values(layer.weight), model.head_name, of_head if is_head else None)
                self._set_(layer.weight, made, edits)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[Edits]:
        """All layers or none: an error leaves the model as it was."""
        edits = Edits()
        try:
            with torch.no_grad():
                yield edits
        except BaseException:
            edits.undo_()
            raise

    def _set_(self, weight: Weight, values: Tensor, edits: Edits) -> None:
        assert isinstance(weight, Dense)
        made = torch.nn.Parameter(values.to(weight.values.dtype), requires_grad=weight.values.requires_grad)
        edits.set_(weight, "values", made)

    def verify(self, model: LanguageModel, probe: Observation) -> list[str]:
        chosen = self.chosen(model)
        ensure(self.is_done(model.config), self, "the model was not pruned like this")
        zeros = {c.name: count_zeros(c.weight) for c in chosen}
        # Formats whose groups have a minimum have no zero of their own.
        exact = [c for c in chosen if c.weight.is_plain or zeros[c.name] >= self._least_zeros([c]) / 2]
        n, n_zeros = _n(exact), sum(zeros[c.name] for c in exact)
        ensure(n_zeros >= (self._least_zeros(exact) if exact else 0), self, f"{n_zeros:,} of {n:,} weights are zero")
        said = [f"{n_zeros:,} of {n:,} weights in {len(exact)} matrices are zero ({n_zeros / n:.1%})"] if exact else []
        if len(exact) < len(chosen):
            others = sorted({c.weight.format for c in chosen if c not in exact})
            said.append(
                f"{len(chosen) - len(exact)} matrices were pruned and then rounded, zeros too ({', '.join(others)})"
            )
        return said


def _n(chosen: Sequence[Chosen]) -> int:
    return sum(c.weight.out_features * c.weight.in_features for c in chosen)


def _values(weight: Weight) -> Tensor:
    return weight.dequantize().detach()


def count_zeros(weight: Weight) -> int:
    """Weights that are zero."""
    values = weight.dequantize()
    return values.numel() - int(values.count_nonzero())


def ensure_not_empty(values: Sequence[tuple[str, Tensor]]) -> None:
    """Raises `UsageError` where all weights of a layer are gone."""
    for name, each in values:
        if not each.count_nonzero():
            raise UsageError(f"{name} would be empty", "Keep more, or prune each layer alike (scope=layer)")
