"""Integers in groups, rounded so that a layer's output on calibration text changes least (GPTQ)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from paretune.errors import UsageError
from paretune.model.base import LanguageModel
from paretune.model.layers import Linear
from paretune.ops.weights import rounding
from paretune.transforms.calibrate import SecondMoments
from paretune.transforms.calibrated import CalibratedGroups, Edits
from paretune.transforms.formats import GROUPS_ENDS, Format
from paretune.transforms.quantize import naming


@dataclass(frozen=True)
class GPTQ(CalibratedGroups):
    """Frantar et al. 2022, arXiv:2210.17323. Embeddings and head are rounded to nearest, as `groups` does.

    Args:
        act_order: round the inputs of the largest second moments first, while all others can still make up for them.
        damping: added to the diagonal of the second moments, in parts of its mean.
    """

    name: ClassVar[str] = "gptq"
    terms: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    formats: ClassVar[Mapping[str, Format]] = {
        "gptq": Format("4 bits in groups of 64, rounded by GPTQ", 8, GROUPS_ENDS, {"bits": 4}, "group")
    }
    act_order: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise UsageError(f"gptq: damping is {self.damping}", "It has to be in (0, 1]; 0.01 is usual")

    @property
    def title(self) -> str:
        return f"gptq-{super().title}"

    def least_tokens(self, widest: int) -> tuple[int, str]:
        return widest, f"layers of {widest:,} inputs"  # with fewer their second moments are singular

    def round_(
        self,
        model: LanguageModel,
        block: str,
        layers: dict[str, Linear],
        chosen: Collection[str],
        moments: SecondMoments,
        edits: Edits,
    ) -> None:
        solvers: dict[int, rounding.Solver] = {}  # queries, keys and values read one tensor
        for name in chosen:
            with naming(name):
                inputs = moments.inputs_of(name)
                if inputs not in solvers:
                    H = moments.of(name)
                    solvers[inputs] = rounding.solver(H, act_order=self.act_order, damping=self.damping)
                solved = rounding.gptq(
                    layers[name].weight.dequantize(),
                    solvers[inputs],
                    self.bits,
                    self.group,
                    minimum=self.minimum,
                    activation_bits=self.activation_bits,
                )
            edits.set_(layers[name], "weight", solved)
