"""What a transform is. `int8.py` beside this file is the exemplar to copy.

A transform sees the model, never another transform; the recipe knows the order.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from paretune.errors import NoEffectError
from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.model.layers import Embedding, Linear
from paretune.ops.weights.base import Weight
from paretune.option import Option
from paretune.transforms.formats import Format


class Stage(enum.IntEnum):
    """The legal order of transforms in a recipe."""

    PRUNE = 1
    MECHANISM = 2  # what attention computes
    ATTENTION = 3  # by which code
    PRECISION = 4
    QUANTIZE = 5
    FUSE = 6


@dataclass(frozen=True)
class Context:
    """What a transform may use.

    Args:
        calibration: token windows `[N, T]`; a transform that needs them and gets None raises `UsageError`.
    """

    device: str = "cpu"
    calibration: Tensor | None = None
    cache_folder: Path | None = None
    progress: Callable[[str], None] = field(default=lambda _: None)


class Observation(Protocol):
    """What one prefill and one decode step through the chosen runner showed (`engine.probe`)."""

    @property
    def kernels(self) -> dict[str, int]: ...

    @property
    def compiled(self) -> bool: ...

    @property
    def own_kernels(self) -> bool: ...

    @property
    def cache_dtype(self) -> str: ...

    @property
    def runner(self) -> dict[str, object]: ...


@dataclass(frozen=True)
class Transform:
    """One optimisation. Subclasses are frozen dataclasses whose fields are plain data."""

    must_declare: ClassVar[tuple[str, ...]] = ("name", "stage", "axis", "title", "apply", "verify")
    name: ClassVar[str]  # in `registry.TRANSFORMS`
    stage: ClassVar[Stage]
    axis: ClassVar[str]  # of the search; a recipe has one transform of an axis (a mix of formats aside)
    # Names that expressions have for some of its settings; None: the axis as the model has it, without a transform.
    terms: ClassVar[Mapping[str, Mapping[str, Any] | None]] = {}
    main: ClassVar[str | None] = None  # the field that a value alone sets in an expression
    bare: ClassVar[bool] = True  # its own name alone is a setting; False: some field has to be said
    formats: ClassVar[Mapping[str, Format]] = {}  # of `paretune quantize`
    exact: ClassVar[bool] = False  # claims the reference's results: checked before it is timed

    format: ClassVar[str | None] = None  # in `registry.FORMATS`, where it makes weights of one
    # `convert` does all that `apply` does to weights: a model can be converted while it is read.
    per_weight: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False  # `apply` asks for `Context.calibration`
    replaces_attention: ClassVar[bool] = False  # attention is something else than softmax over what is seen
    has_alibi: ClassVar[bool] = False  # with `replaces_attention`: its attention adds the bias of `spec.slopes`
    trainable: ClassVar[bool] = False  # the model can be trained under it
    changes_weights: ClassVar[bool] = False  # prunes or trains: "changed weights" is what its results are labelled

    @classmethod
    def options(cls, config: ModelConfig | None, device: str, n_tokens: int) -> Sequence[Option]:
        """The settings that are worth trying on a model.

        Args:
            config: of the model; None: of any.
            n_tokens: the longest sequence that it will see; 0: not known.
        """
        return ()

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Its fields as they are where nothing is said."""
        return {f.name: f.default for f in dataclasses.fields(cls)}

    @property
    def title(self) -> str:
        """A short name for tables."""
        raise NotImplementedError

    @property
    def changes_mechanism(self) -> bool:
        """Whether it changes what attention computes, so that quality depends on the length."""
        return self.stage == Stage.MECHANISM

    @property
    def dtype_of_model(self) -> str | None:
        """What it makes dense weights and the cache, such as `bf16`; None: it leaves them."""
        return None

    @property
    def weight_width(self) -> float | None:
        """Bytes that a weight takes in memory under it, from above; None: as many as without it."""
        return None

    @property
    def keeps_scores(self) -> bool | None:
        """Whether attention holds `[T, T]` numbers for the backward pass; None where this does not say."""
        return None

    @property
    def has_score_matrix(self) -> bool | None:
        """Whether attention writes its scores to memory; None where this does not say."""
        return None

    @property
    def is_partial(self) -> bool:
        """Whether it is about named layers only, so that another of the same stage may follow."""
        return False

    def requires(self, device: str) -> str | None:
        """Why this cannot run on `device`, or None."""
        return None

    def trains(self, device: str) -> str | None:
        """Why the model has no gradients on `device` under this, or None."""
        return None

    def fits(self, config: ModelConfig) -> str | None:
        """Why this cannot be applied to a model of this config, or None: known before any weight is read."""
        return None

    def changed(self, config: ModelConfig) -> ModelConfig:
        """The config of the model that `apply` leaves, for what comes after it."""
        return config

    def notes(self, device: str) -> list[str]:
        """What the user should know before it runs (an emulated dtype, say)."""
        return []

    def apply(self, model: LanguageModel, ctx: Context) -> LanguageModel:
        """Changes the model, in place where it can, and returns it. What `convert` did already it leaves alone."""
        raise NotImplementedError

    def convert(self, model: LanguageModel, name: str, weight: Weight) -> Weight:
        """The weight of the layer `name` as `apply` would leave it; the rest of the model may not be there yet."""
        return weight

    def undo_(self, model: LanguageModel) -> bool:
        """Takes back what `apply` did, in place; False where that cannot be. For what is exact: the reference form."""
        return False

    def verify(self, model: LanguageModel, probe: Observation) -> list[str]:
        """Proof of effect on the transformed model: sentences with figures for the report.

        Raises:
            NoEffectError: what should have changed did not.
        """
        raise NotImplementedError


Filter = Callable[[nn.Module, str], bool]


def weight_holders(model: LanguageModel, keep: Filter) -> list[tuple[str, Linear | Embedding]]:
    """Linear and embedding layers that pass the filter, with their fully qualified names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Linear | Embedding) and keep(module, name)
    ]


def swap_weights_(model: LanguageModel, keep: Filter, make: Callable[[Weight], Weight]) -> list[str]:
    """Replaces the weights of the layers that pass the filter; tied layers stay tied.

    Returns:
        names of the layers that hold a new weight.
    """
    made: dict[int, Weight] = {}
    chosen = weight_holders(model, keep)
    for _, module in chosen:
        if id(module.weight) not in made:
            made[id(module.weight)] = make(module.weight)
    changed = []
    for name, module in weight_holders(model, lambda m, n: True):
        if id(module.weight) in made:
            module.weight = made[id(module.weight)]
            changed.append(name)
    return changed


def ensure(condition: bool, transform: Transform, what: str) -> None:
    """Raises `NoEffectError` unless the claim holds."""
    if not condition:
        raise NoEffectError(f"{transform.title} had no effect: {what}", "Leave it out of the recipe")


def kernels_like(probe: Observation, parts: Sequence[str]) -> dict[str, int]:
    """Kernels of the probe whose name holds one of `parts`."""
    return {k: n for k, n in probe.kernels.items() if any(p in k for p in parts)}


def config_of(transform: Transform) -> dict[str, Any]:
    """The transform as plain data, its name first."""
    return {"name": transform.name, **transform.__dict__}
