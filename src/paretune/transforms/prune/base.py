"""What all pruning shares: its place in a recipe, the label, and that what is done is not done again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import ClassVar

from paretune.errors import ParetuneError, UsageError
from paretune.model import checkpoint
from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.ops.weights.base import is_finite
from paretune.ops.weights.dense import Dense
from paretune.transforms.base import Stage, Transform
from paretune.transforms.quantize import Chosen, matrices, naming

KEEP_TRIED = (0.9, 0.75, 0.5)  # by a search


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def check_keep(keep: float, who: str) -> None:
    """Raises `UsageError` where `keep` is not in (0, 1]."""
    if not 0 < keep <= 1:
        raise UsageError(f"{who}: keep is {keep}", "It has to be above 0 and at most 1, such as 0.5")


def n_weights(model: LanguageModel) -> int:
    """Numbers in all matrices, each shared one once, in whatever format."""
    return sum(c.weight.out_features * c.weight.in_features for c in matrices(model))


@dataclass(frozen=True)
class Prune(Transform):
    """Base of all pruning. `config.json` remembers what was done, so that a recipe leaves a pruned folder alone."""

    stage: ClassVar[Stage] = Stage.PRUNE
    axis: ClassVar[str] = "prune"
    main: ClassVar[str | None] = "keep"
    changes_weights: ClassVar[bool] = True

    @property
    def spelled(self) -> str:
        """All its settings, as `config.json` remembers them."""
        fields = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in fields if v != '')})"

    def is_done(self, config: ModelConfig) -> bool:
        """Whether a model of this config was pruned like this already."""
        return any(entry.partition(";")[0] == self.spelled for entry in config.pruned)

    def noted(self, config: ModelConfig, what: str) -> ModelConfig:
        """The config of a model that was pruned like this; `what` came of it."""
        return replace(config, pruned=(*config.pruned, f"{self.spelled}; {what}"))

    def changed(self, config: ModelConfig) -> ModelConfig:
        return config if self.is_done(config) else self.noted(config, "planned")

    def fits(self, config: ModelConfig) -> str | None:
        stored = checkpoint.stored_formats(config)
        if stored and not self.is_done(config):
            return f"its layers are stored as {', '.join(sorted(set(stored.values())))}: prune the dense model first"
        return None

    def check_dense(self, layers: list[Chosen]) -> None:
        """Before the first minute of work.

        Raises:
            UsageError: a layer is quantised or packed already.
            ParetuneError: one holds NaN.
        """
        for layer in layers:
            with naming(layer.name):
                if not isinstance(layer.weight, Dense):
                    how = f"stored as {layer.weight.format}"
                    raise UsageError(f"its weights are {how} already and cannot be pruned", "Prune the dense model")
                if not is_finite(layer.weight.dequantize()):
                    raise ParetuneError("a weight holds NaN or infinity", "Repair the checkpoint first")
