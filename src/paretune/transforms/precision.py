"""Weights, activations and cache in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from paretune import hardware
from paretune.errors import UsageError
from paretune.model.base import LanguageModel
from paretune.model.checkpoint import DTYPE_ALIASES, dtype_of
from paretune.model.config import ModelConfig
from paretune.ops.weights.base import Weight
from paretune.option import ALL_QUANTISED, OWN_KERNELS, Option
from paretune.transforms.base import Context, Observation, Stage, Transform, ensure

CACHE_ALONE = "every weight is quantised: the number format would change the cache alone, which is a choice of its own"


@dataclass(frozen=True)
class Precision(Transform):
    """Args:
    dtype: `bf16` or `fp16` (`fp32` is what a model on a CPU has without this).
    """

    name: ClassVar[str] = "precision"
    stage: ClassVar[Stage] = Stage.PRECISION
    axis: ClassVar[str] = "precision"
    bare: ClassVar[bool] = False
    main: ClassVar[str | None] = "dtype"
    terms: ClassVar[Mapping[str, Mapping[str, Any]]] = {"bf16": {"dtype": "bf16"}, "fp16": {"dtype": "fp16"}}
    per_weight: ClassVar[bool] = True
    trainable: ClassVar[bool] = True
    dtype: str = "bf16"

    @classmethod
    def options(cls, config: ModelConfig | None, device: str, n_tokens: int) -> Sequence[Option]:
        moot = ((frozenset({OWN_KERNELS, ALL_QUANTISED}), CACHE_ALONE),)
        return [Option(name, conflicts=moot, log_gain=0.4) for name in cls.terms]

    def __post_init__(self) -> None:
        dtype_of(self.dtype)
        object.__setattr__(self, "dtype", DTYPE_ALIASES.get(self.dtype, self.dtype))
        if self.dtype == "fp32":
            raise UsageError("precision fp32 changes nothing", "Leave it out: models are loaded in fp32 on a CPU")

    @property
    def title(self) -> str:
        return self.dtype

    @property
    def dtype_of_model(self) -> str:
        return self.dtype

    @property
    def weight_width(self) -> float:
        return 2.0

    def requires(self, device: str) -> str | None:
        return hardware.dtype_failure(self.dtype, device)  # what it is worth is timed only for `notes`

    def notes(self, device: str) -> list[str]:
        support = hardware.dtype_support(device)[self.dtype]
        return [support.reason] if support.emulated else []

    def convert(self, model: LanguageModel, name: str, weight: Weight) -> Weight:
        return weight.to(dtype_of(self.dtype))

    def apply(self, model: LanguageModel, ctx: Context) -> LanguageModel:
        return model.to(dtype_of(self.dtype))

    def verify(self, model: LanguageModel, probe: Observation) -> list[str]:
        wanted = dtype_of(self.dtype)
        floating = [(n, p) for n, p in model.named_parameters() if p.is_floating_point()]
        wrong = [n for n, p in floating if p.dtype != wanted]
        ensure(not wrong, self, f"{len(wrong)} tensors kept another dtype, {wrong[0] if wrong else ''} first")
        n_bytes = sum(p.nbytes for _, p in floating)
        size = torch.empty(0, dtype=wanted).element_size()
        said = f"{len(floating)} tensors in {self.dtype}: {n_bytes:,} bytes, {size} each"
        if "cache_dtype" in probe.runner:  # the recipe asks for another one
            return [said]
        ensure(probe.cache_dtype == str(wanted), self, f"the cache holds {probe.cache_dtype}")
        return [f"{said}; so is the cache"]
