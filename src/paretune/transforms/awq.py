"""Integers in groups, inputs that matter scaled up before they are rounded, and down again for nothing (AWQ)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from paretune.model.base import LanguageModel
from paretune.model.families.fold import Fold
from paretune.model.layers import Linear
from paretune.ops.weights import rounding
from paretune.transforms.calibrate import SecondMoments
from paretune.transforms.calibrated import CalibratedGroups, Edits
from paretune.transforms.folding import fold_, folds_of
from paretune.transforms.formats import GROUPS_ENDS, Format
from paretune.transforms.quantize import naming

ALPHAS = tuple(i / 20 for i in range(20))  # 0: as it was
MOST = 100.0  # that an input is scaled by, so that scales of groups stay in fp16
STEPS = 8  # scales are 2^(i / 8): the last bits of the calibration (another form of attention) do not change them
ROWS = 512  # of a matrix, evenly spread, that the search looks at
LEAST_TOKENS = 512


@dataclass(frozen=True)
class AWQ(CalibratedGroups):
    """Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978.

    An input of large values is multiplied by `s = mean |x| ^ alpha` in the weight, so that rounding disturbs it less,
    and what makes the input is divided by `s` (`folding.py`): nothing is left to do at run time, and the stored form is
    that of `groups`. `alpha` is the one of 20 with the smallest error of the outputs on calibration text. Scales of
    groups are searched under the same measure (the paper clips weights). Where nothing before a layer can take the
    scale (GPT-2's second MLP layer stands behind a GELU, or a filter leaves one of the layers out), that is all.
    Embeddings and head are rounded to nearest.
    """

    name: ClassVar[str] = "awq"
    terms: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    formats: ClassVar[Mapping[str, Format]] = {
        "awq": Format("4 bits in groups of 64, inputs scaled by AWQ", 8, GROUPS_ENDS, {"bits": 4}, "group")
    }

    @property
    def title(self) -> str:
        return f"awq-{super().title}"

    def least_tokens(self, widest: int) -> tuple[int, str]:
        return (LEAST_TOKENS if widest else 0), "the mean size of a layer's inputs"

    def round_(
        self,
        model: LanguageModel,
        block: str,
        layers: dict[str, Linear],
        chosen: Collection[str],
        moments: SecondMoments,
        edits: Edits,
    ) -> None:
        divided: dict[str, Tensor] = {}  # inputs of a layer, by what
        for fold in folds_of(model, block):
            touched = {*fold.readers, *((fold.source,) if fold.rows else ())}
            if touched <= set(chosen):
                with naming(fold.readers[0]):
                    scale = self._search(fold, [layers[name] for name in fold.readers], moments)
                fold_(model, fold, scale, edits.set_)
                divided |= dict.fromkeys(fold.readers, fold.of_readers(scale))
        for name in chosen:
            with naming(name):
                importance = moments.of(name).diagonal() / divided.get(name, torch.ones(())).square()
                edits.set_(layers[name], "weight", self._rounded(layers[name].weight.dequantize(), importance))

    def _rounded(self, values: Tensor, importance: Tensor) -> rounding.IntGroups:
        return rounding.nearest_weighted(values, importance, self.bits, self.group, self.minimum, self.activation_bits)

    def _search(self, fold: Fold, readers: list[Linear], moments: SecondMoments) -> Tensor:
        """The best scale, fp32, one for each row of the source."""
        h = moments.of(fold.readers[0])
        sizes = fold.of_source(moments.mean_sizes(fold.readers[0]))
        is_seen = sizes > 0
        # Around 1 in the geometric mean: sizes of weights stay what they are.
        logs = torch.where(is_seen, sizes, torch.ones_like(sizes)).log2()
        logs = torch.where(is_seen, logs - logs[is_seen].mean() if bool(is_seen.any()) else logs, 0.0)
        parts = [_some_rows(reader.weight.dequantize().float()) for reader in readers]
        best, least = torch.ones_like(sizes), torch.inf
        for alpha in ALPHAS:
            scale = ((alpha * logs * STEPS).round() / STEPS).exp2().clamp(1 / MOST, MOST)
            s = fold.of_readers(scale)
            error = 0.0
            for w in parts:
                off = self._rounded(w * s, h.diagonal() / s.square()).dequantize() / s - w
                error += float(((off @ h) * off).sum())  # of the outputs, squared, over the calibration text
            if error < least:
                best, least = scale, error
        return best


def _some_rows(w: Tensor) -> Tensor:
    return w[:: -(-w.size(0) // ROWS)]
