"""Weights go whose product with the size of their input is small: Wanda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from paretune.ops.weights.pruning import largest_of_rows
from paretune.transforms.calibrate import SecondMoments
from paretune.transforms.prune.weights import PruneWeights


@dataclass(frozen=True)
class Wanda(PruneWeights):
    """Sun et al. 2024, arXiv:2306.11695: `|w| * |x|_2`, compared within each output.

    Block after block on calibration text: what went before is seen by what comes after.
    """

    name: ClassVar[str] = "wanda"
    needs_calibration: ClassVar[bool] = True
    slack: ClassVar[float] = 0.02  # a row of 25 inputs keeps 12 or 13

    def pruned(self, values: Tensor, name: str, moments: SecondMoments | None, shared: dict[int, Tensor]) -> Tensor:
        return values * largest_of_rows(self.scores(values, name, moments), self.keep, name)

    @staticmethod
    def scores(values: Tensor, name: str, moments: SecondMoments | None) -> Tensor:
        """A table that is only looked up has no inputs: there magnitude decides."""
        sizes = values.float().abs()
        return sizes if moments is None else sizes * moments.of(name).diagonal().sqrt()
