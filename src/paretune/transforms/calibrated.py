"""What transforms share that round integers in groups by what calibration text shows: GPTQ, AWQ."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from paretune.errors import ParetuneError
from paretune.model.base import LanguageModel
from paretune.model.layers import Linear
from paretune.ops.weights.base import Weight, is_finite
from paretune.ops.weights.dense import Dense
from paretune.transforms.base import Context
from paretune.transforms.calibrate import SecondMoments, blocks_of, check_calibration, walk
from paretune.transforms.groups import Groups
from paretune.transforms.quantize import naming


class Edits:
    """Changes of a model that can be taken back."""

    def __init__(self) -> None:
        self._done: list[tuple[nn.Module, str, Any]] = []

    def set_(self, owner: nn.Module, attribute: str, value: Any) -> None:
        self._done.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    def undo_(self, attribute: str | None = None) -> None:
        """Takes back all, or the changes of one attribute that are weights in a format."""
        for owner, name, old in reversed(self._done):
            if attribute is None or (name == attribute and isinstance(old, Weight)):
                setattr(owner, name, old)


@dataclass(frozen=True)
class CalibratedGroups(Groups):
    """Block after block: `round_` changes its layers and sees what the ones before became.

    Embeddings and head are rounded to nearest, as `groups` does. An error leaves the model as it was.
    """

    per_weight: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = True
    group: int = 64

    def least_tokens(self, widest: int) -> tuple[int, str]:
        """Calibration tokens that are needed where the widest layer has so many inputs, and what for."""
        raise NotImplementedError

    def round_(
        self,
        model: LanguageModel,
        block: str,
        layers: dict[str, Linear],
        chosen: Collection[str],
        moments: SecondMoments,
        edits: Edits,
    ) -> None:
        """Puts new weights into the chosen layers of a block, through `edits`.

        Args:
            layers: all linear layers of the block by their names, `chosen` those that are to be rounded.
        """
        raise NotImplementedError

    def apply(self, model: LanguageModel, ctx: Context) -> LanguageModel:
        chosen = [c for c in self.chosen(model) if isinstance(c.weight, Dense)]
        if not chosen:
            return model  # a converted checkpoint
        todo = {id(c.weight): c for c in chosen}
        in_blocks = {id(m.weight) for _, b in blocks_of(model) for m in b.modules() if isinstance(m, Linear)}
        solved = [c for c in chosen if id(c.weight) in in_blocks]
        for layer in chosen:  # before the first minute of work
            with naming(layer.name):
                if not is_finite(layer.weight.dequantize()):
                    raise ParetuneError("a weight holds NaN or infinity", "Repair the checkpoint first")
        needed = self.least_tokens(max((c.weight.in_features for c in solved), default=0))
        tokens = check_calibration(ctx, self.title, *needed)
        made: dict[int, Weight] = {key: self.quantized(c) for key, c in todo.items() if key not in in_blocks}
        edits = Edits()

        def visit(block: str, layers: dict[str, Linear], moments: SecondMoments) -> None:
            before = {name: m.weight for name, m in layers.items() if id(m.weight) in todo}
            self.round_(model, block, layers, before.keys(), moments, edits)
            made.update({id(old): layers[name].weight for name, old in before.items()})

        try:
            if solved:
                walk(model, tokens, visit, lambda said: ctx.progress(f"{self.title}: {said}"))
        except BaseException:
            edits.undo_()
            raise
        edits.undo_("weight")  # so that tied layers are swapped together
        self._swap_(model, todo, lambda layer: made[id(layer.weight)])
        return model

    def convert(self, model: LanguageModel, name: str, weight: Weight) -> Weight:
        return weight  # a whole model has to be there
