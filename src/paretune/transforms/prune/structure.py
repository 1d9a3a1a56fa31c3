"""What pruning of structures shares: tensors are smaller for good, the config says so, folders load again.

What goes is made up for where text shows how: the layer that read it gets the weights with which its output changes
least (least squares on the second moments of its inputs). Nothing is gathered at run time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paretune.errors import ParetuneError, UsageError
from paretune.model import checkpoint
from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.model.families.base import Role
from paretune.model.layers import Linear
from paretune.ops.weights.dense import Dense
from paretune.option import PRUNED, Option
from paretune.transforms.base import Context, Observation, ensure
from paretune.transforms.calibrate import check_calibration
from paretune.transforms.prune import scores
from paretune.transforms.prune.base import KEEP_TRIED, Prune, check_keep, n_weights, percent
from paretune.transforms.quantize import matrices

WIDEST_STEP = 32  # widths are multiples of it where the dense ones are: whole blocks, whole groups
DAMPING = 0.01  # of the mean second moment


def step_of(width: int) -> int:
    """What widths that come of this one are multiples of: the largest power of two up to 32 that divides it."""
    return min(WIDEST_STEP, width & -width)


def rounded(n: int, keep: float, step: int, what: str) -> int:
    """How many of `n` stay, in steps.

    Raises:
        UsageError: none would.
    """
    if n * keep < step / 2:
        raise UsageError(f"{what}: {percent(keep)} of {n:,} leaves none", f"Keep {percent(step / n)} or more")
    return min(n, step * max(1, round(n * keep / step)))


def best(score: Tensor, n: int) -> Tensor:
    """The places of the `n` largest scores, in their order."""
    return score.topk(n, sorted=False).indices.sort().values


def take_rows_(layer: Linear, index: Tensor) -> None:
    """Leaves these outputs of a linear layer."""
    assert isinstance(layer.weight, Dense)
    layer.weight = Dense(layer.weight.values.detach()[index].contiguous())
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[index].contiguous(), requires_grad=False)


def take_inputs_(layer: Linear, index: Tensor, moments: Tensor | None = None) -> None:
    """Leaves these inputs of a linear layer; with the second moments of all, the rest makes up for what goes."""
    assert isinstance(layer.weight, Dense)
    values = layer.weight.values.detach()
    kept = values[:, index]
    if moments is not None and len(index) < values.size(1):
        inside = moments[index][:, index]
        inside = inside + torch.eye(len(index)) * (DAMPING * float(inside.diagonal().mean().clamp(min=1e-12)))
        # What the outputs have in common with the inputs that stay, of all that goes.
        gone = torch.ones(values.size(1), dtype=torch.bool)
        gone[index] = False
        shared = values[:, gone].float() @ moments[gone][:, index]
        lower, failed = torch.linalg.cholesky_ex(inside)
        if int(failed):
            raise ParetuneError(
                "the second moments of a layer's inputs cannot be inverted", "Give more calibration text"
            )
        kept = kept + torch.cholesky_solve(shared.t(), lower).t().to(kept.dtype)
    layer.weight = Dense(kept.contiguous())


@dataclass(frozen=True)
class PruneStructure(Prune):
    """Args:
    keep: share of the structures that stay, above 0 and at most 1.
    by: how they are ranked.
    """

    criteria: ClassVar[tuple[str, ...]] = (scores.MAGNITUDE, scores.ACTIVATION, scores.TAYLOR)
    what: ClassVar[str]  # in the plural
    trainable: ClassVar[bool] = False
    keep: float = 0.5
    by: str = scores.ACTIVATION

    def __post_init__(self) -> None:
        check_keep(self.keep, self.name)
        if self.by not in self.criteria:
            raise UsageError(f"{self.name}: by is {self.by!r}", f"Known: {', '.join(self.criteria)}")

    @classmethod
    def options(cls, config: ModelConfig | None, device: str, n_tokens: int) -> Sequence[Option]:
        if config is None:
            return ()
        offered = []
        for keep in KEEP_TRIED:
            reason = cls(keep=keep).fits(config)
            offered.append(
                Option(
                    f"{cls.name}({keep})",
                    reason,
                    frozenset({PRUNED}),
                    beside=("quantize",),
                    changes_weights=True,
                    log_gain=1 - keep,
                )
            )
        return offered

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        return self.by != scores.MAGNITUDE

    @property
    def title(self) -> str:
        return f"{self.name} {percent(self.keep)}" + ("" if self.by == scores.ACTIVATION else f" by {self.by}")

    def smaller(self, config: ModelConfig) -> ModelConfig:
        """The config with the shapes that are left, where all layers are pruned alike.

        Raises:
            UsageError: nothing would be left of something.
        """
        raise NotImplementedError

    def prune_(self, model: LanguageModel, tokens: Tensor | None, progress: Callable[[str], None]) -> ModelConfig:
        """Makes the tensors smaller, and gives the config of what is left.

        Args:
            tokens: `[N, T]`; None where no text is asked for.
        """
        raise NotImplementedError

    # -- what they share

    def fits(self, config: ModelConfig) -> str | None:
        if self.is_done(config):
            return None
        try:
            self.smaller(config)
        except UsageError as error:
            return error.cause
        return super().fits(config)

    def changed(self, config: ModelConfig) -> ModelConfig:
        if self.is_done(config):
            return config
        return self.noted(self.smaller(config), "planned")

    def apply(self, model: LanguageModel, ctx: Context) -> LanguageModel:
        """Raises `UsageError` where nothing would be left, or a layer is quantised or packed already."""
        if self.is_done(model.config):
            return model
        self.smaller(model.config)
        self.check_dense(matrices(model))
        tokens = (
            check_calibration(ctx, self.title, *self.least_tokens(model.config)) if self.needs_calibration else None
        )
        before = n_weights(model)
        said = lambda line: ctx.progress(f"{self.title}: {line}")  # noqa: E731
        with self._whole(model), torch.no_grad():
            left = self.prune_(model, tokens, said)
        after = n_weights(model)
        ensure(after < before, self, f"all {before:,} weights are still there")
        model.config = self.noted(left, f"{before} -> {after} weights")
        return model

    def least_tokens(self, config: ModelConfig) -> tuple[int, str]:
        return 1, "a mean"

    @contextlib.contextmanager
    def _whole(self, model: LanguageModel) -> Iterator[None]:
        """An error leaves the model as it was: modules keep their tensors, so what they held is put back."""
        held: list[tuple[nn.Module, dict[str, Any]]] = []
        for module in model.modules():
            tables = {k: dict(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()}
            held.append((module, tables))
        try:
            yield
        except BaseException:
            for module, tables in held:
                module.__dict__.clear()
                module.__dict__.update(tables)
            raise

    def verify(self, model: LanguageModel, probe: Observation) -> list[str]:
        entry = next((e for e in model.config.pruned if e.partition(";")[0] == self.spelled), None)
        ensure(entry is not None, self, "the model was not pruned like this")
        numbers = str(entry).partition(";")[2].split()
        before, now = int(numbers[0]), n_weights(model)
        ensure(now < before, self, f"all {before:,} weights are still there")
        planned = n_weights(checkpoint.build(model.config))
        ensure(now == planned, self, f"{now:,} weights are there, {planned:,} by the config")
        return [f"{now:,} of {before:,} weights are left ({now / before:.1%}): {self.shapes(model.config)}"]

    def shapes(self, config: ModelConfig) -> str:
        """What is left, in words."""
        raise NotImplementedError


def linear(model: LanguageModel, role: Role, i: int) -> Linear | None:
    """The linear layer of block `i` that is for `role`; None where the family has none."""
    path = model.family.modules.get(role)
    if path is None:
        return None
    found = model.get_submodule(path.format(i=i))
    assert isinstance(found, Linear)
    return found


def name_of(model: LanguageModel, role: Role, i: int) -> str:
    return model.family.modules[role].format(i=i)


def in_words(numbers: Sequence[int]) -> str:
    """`96` or `64 to 128`."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
