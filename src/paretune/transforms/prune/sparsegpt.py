"""Weights go so that a layer's output on calibration text changes least, and the others make up for it: SparseGPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from paretune.errors import UsageError
from paretune.ops.weights import rounding
from paretune.ops.weights.pruning import largest_of_rows, sparsegpt
from paretune.transforms.calibrate import SecondMoments
from paretune.transforms.prune.wanda import Wanda
from paretune.transforms.prune.weights import PruneWeights


@dataclass(frozen=True)
class SparseGPT(PruneWeights):
    """Frantar & Alistarh 2023, arXiv:2301.00774. The second moments and their solver are GPTQ's.

    An embedding or head is pruned as by Wanda, without the update: a tied one is looked up too.

    Args:
        damping: added to the diagonal of the second moments, in parts of its mean.
    """

    name: ClassVar[str] = "sparsegpt"
    needs_calibration: ClassVar[bool] = True
    slack: ClassVar[float] = 0.02
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise UsageError(f"sparsegpt: damping is {self.damping}", "It has to be in (0, 1]; 0.01 is usual")

    def least_tokens(self, widest: int) -> tuple[int, str]:
        return widest, f"layers of {widest:,} inputs"  # with fewer their second moments are singular

    def pruned(self, values: Tensor, name: str, moments: SecondMoments | None, shared: dict[int, Tensor]) -> Tensor:
        assert moments is not None, "it calibrates"
        inputs = moments.inputs_of(name)
        if inputs not in shared:
            shared[inputs] = rounding.solver(moments.of(name), act_order=False, damping=self.damping).factor
        return sparsegpt(values, shared[inputs], self.keep, name)

    def pruned_end(self, values: Tensor, name: str, moments: SecondMoments | None) -> Tensor:
        return values * largest_of_rows(Wanda.scores(values, name, moments), self.keep, name)
