"""Swaps the attention function of every layer. Exact: all forms here compute the same sums."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.model.layers import DEFAULT_ATTENTION
from paretune.option import OWN_KERNELS, Option
from paretune.registry import ATTENTION
from paretune.transforms.base import Context, Observation, Stage, Transform, ensure, kernels_like

SAME_ATTENTION = "native code runs the same attention whatever the form: a duplicate"


@dataclass(frozen=True)
class Attention(Transform):
    """Args:
    form: a name in `registry.ATTENTION`.
    """

    name: ClassVar[str] = "attention"
    stage: ClassVar[Stage] = Stage.ATTENTION
    axis: ClassVar[str] = "attention"
    bare: ClassVar[bool] = False
    main: ClassVar[str | None] = "form"
    terms: ClassVar[Mapping[str, Mapping[str, Any] | None]] = {"sdpa": {"form": "sdpa"}, "as_loaded": None}
    exact: ClassVar[bool] = True
    per_weight: ClassVar[bool] = True  # it changes none
    trainable: ClassVar[bool] = True
    form: str = "sdpa"

    @classmethod
    def options(cls, config: ModelConfig | None, device: str, n_tokens: int) -> Sequence[Option]:
        return (
            Option("sdpa", is_default=True, changes_numbers=False),
            Option("attention(eager)", conflicts=((frozenset({OWN_KERNELS}), SAME_ATTENTION),), changes_numbers=False),
        )

    def __post_init__(self) -> None:
        ATTENTION.check(self.form)

    @property
    def title(self) -> str:
        return self.form

    @property
    def keeps_scores(self) -> bool:
        return not self._declared("RECOMPUTES", False)

    @property
    def has_score_matrix(self) -> bool:
        return self._declared("SCORE_MATRIX", False)

    @property
    def compiles_for_each_length(self) -> str | None:
        """Why a request would wait for a compiler under this form, or None."""
        return self._declared("COMPILES_FOR_EACH_LENGTH", None)

    def _declared(self, name: str, default: Any) -> Any:
        """What the form's module says of itself: a constant or a function beside the attention function."""
        return getattr(importlib.import_module(ATTENTION.get(self.form).__module__), name, default)

    def _asked(self, name: str, about: Any) -> str | None:
        ask = self._declared(name, None)
        return ask(about) if ask else None

    def requires(self, device: str) -> str | None:
        return self._asked("requires", device)

    def trains(self, device: str) -> str | None:
        return self._asked("trains", device)

    def fits(self, config: ModelConfig) -> str | None:
        if config.alibi and self.form in ATTENTION.others and not self._declared("HAS_ALIBI", False):
            return f"{self.form} has no ALiBi: its module does not declare `HAS_ALIBI`"
        return self._asked("fits", config.attention_pattern)

    def apply(self, model: LanguageModel, ctx: Context) -> LanguageModel:
        function = ATTENTION.get(self.form)
        for module in attention_layers(model):
            module.attention = function
        return model

    def undo_(self, model: LanguageModel) -> bool:
        function = ATTENTION.get(DEFAULT_ATTENTION)
        for module in attention_layers(model):
            module.attention = function
        return True

    def verify(self, model: LanguageModel, probe: Observation) -> list[str]:
        function = ATTENTION.get(self.form)
        layers = attention_layers(model)
        ensure(bool(layers), self, "the model has no attention layer")
        ensure(all(m.attention is function for m in layers), self, "some layers kept another function")
        said = f"all {len(layers)} layers run {self.form} attention"
        fused_kernels = self._declared("FUSED_KERNELS", ())
        if fused_kernels and not probe.compiled:
            seen = kernels_like(probe, [*fused_kernels, "native::attention"])
            ensure(bool(seen), self, "the profile of one step shows no fused attention kernel")
            fused = [k for k in seen if "flash" in k or "efficient" in k or "cudnn" in k]
            native = ["native::attention"] if "native::attention" in seen else []
            said += f" ({[*fused, *native, 'the unfused math form'][0]} in the profile)"
        kernel = self._declared("KERNEL", None)
        if kernel is not None and not probe.compiled:
            ran = kernels_like(probe, [kernel, "native::attention"])
            ensure(bool(ran), self, f"the profile of one step shows no {kernel}")
            said += f" ({next(iter(ran))} in the profile)"
        return [said]


def attention_layers(model: LanguageModel) -> list[nn.Module]:
    """Modules that carry the attention seam."""
    return [m for m in model.modules() if hasattr(m, "attention") and hasattr(m, "spec")]
