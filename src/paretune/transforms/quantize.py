"""What all quantising transforms share: which layers, none half done, and the proof from stored bytes.

A recipe may hold several of them, each with its layers; a layer that an earlier one (or the checkpoint) has quantised
stays as it is.
"""

from __future__ import annotations

import contextlib
import fnmatch
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from paretune.errors import NoEffectError, ParetuneError, UsageError
from paretune.model import checkpoint
from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.model.layers import Embedding
from paretune.ops.quantized_linear import op
from paretune.ops.weights.base import Weight
from paretune.ops.weights.dense import Dense
from paretune.transforms.base import (
    Context,
    Observation,
    Stage,
    Transform,
    ensure,
    kernels_like,
    swap_weights_,
    weight_holders,
)


@dataclass(frozen=True)
class Chosen:
    """One matrix that a transform is about.

    Args:
        names: of the layers that hold it.
        is_end: an embedding or the head.
        is_positions: the embedding of positions, a small table that no product goes through.
        is_product: some layer multiplies with it; an embedding that is not the head too is a look-up.
    """

    names: tuple[str, ...]
    weight: Weight
    is_end: bool
    is_positions: bool = False
    is_product: bool = True

    @property
    def name(self) -> str:
        return self.names[0]


def matrices(model: LanguageModel) -> list[Chosen]:
    """All matrices of a model in the order of the tree, each shared one once."""
    out: dict[int, Chosen] = {}
    for name, module in weight_holders(model, lambda m, n: True):
        before = out.get(id(module.weight))
        is_end = isinstance(module, Embedding) or module is model.head
        names = (*before.names, name) if before else (name,)
        is_positions = isinstance(module, Embedding) and module is not model.embedding
        is_end = is_end or (before is not None and before.is_end)
        is_product = not isinstance(module, Embedding) or (before is not None and before.is_product)
        out[id(module.weight)] = Chosen(names, module.weight, is_end, is_positions, is_product)
    return list(out.values())


@contextlib.contextmanager
def naming(layer: str) -> Iterator[None]:
    """Puts the layer's name in front of what goes wrong inside."""
    try:
        yield
    except ParetuneError as error:
        raise type(error)(f"{layer}: {error.cause}", error.cure) from None


@dataclass(frozen=True)
class Quantize(Transform):
    """Args:
    include: patterns of layer names, separated by commas (`h.0.*, *.c_proj`); empty: all.
    exclude: patterns of layers that stay as they are. A tied pair is chosen by either of its names.
    """

    must_declare: ClassVar[tuple[str, ...]] = ("format", "format_title", "quantize", "expected_bytes")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    axis: ClassVar[str] = "quantize"
    per_weight: ClassVar[bool] = True
    format: ClassVar[str]  # of the weights that this makes
    format_title: ClassVar[str]
    include: str = field(default="", kw_only=True)
    exclude: str = field(default="", kw_only=True)

    @classmethod
    def cannot_pay(cls, device: str) -> str | None:
        """Why no quantised layer is fast on `device`, or None."""
        reason = op.unavailable_reason(device) if device.startswith("cuda") else None
        return f"dequantised at every call: {reason}" if reason else None

    # -- what a format says

    def wants(self, is_end: bool) -> bool:
        """Whether it is about the embeddings and the head (`is_end`), or the other layers."""
        return True

    def takes(self, layer: Chosen) -> bool:
        """Whether it is about this matrix, filters aside."""
        return self.wants(layer.is_end)

    def quantize(self, layer: Chosen) -> Weight:
        """The layer's weight in the new format."""
        raise NotImplementedError

    def expected_bytes(self, layer: Chosen) -> float:
        """What such a matrix may take, everything counted; more is a copy that should not be there."""
        raise NotImplementedError

    def is_mine(self, layer: Chosen) -> bool:
        """Whether the weight is what this transform makes."""
        return layer.weight.format == self.format

    def notes(self, device: str) -> list[str]:
        reason = op.unavailable_reason(device) if device.startswith("cuda") else None
        return [f"a layer is dequantised at every call: {reason}"] if reason else []

    def proof_of_kernel(self, model: LanguageModel, probe: Observation) -> list[str]:
        """The kernel that the watched step has to show."""
        return []

    # -- what they share

    def fits(self, config: ModelConfig) -> str | None:
        stored = checkpoint.stored_formats(config)
        if not (self.include or self.exclude or stored):
            return None
        try:
            chosen = self.chosen(checkpoint.build(config))  # names and shapes, no memory
        except UsageError as error:
            return error.cause
        by_layer = [next((stored[f"{n}.weight"] for n in c.names if f"{n}.weight" in stored), None) for c in chosen]
        if chosen and all(found not in (None, self.format) for found in by_layer):
            return f"its layers are stored as {', '.join(sorted({str(found) for found in by_layer}))} already"
        return None

    @property
    def is_partial(self) -> bool:
        return bool(self.include or self.exclude) or not self.wants(is_end=True)

    @property
    def of_layers(self) -> str:
        """The filters, for titles."""
        return (f" of {self.include}" if self.include else "") + (f" but {self.exclude}" if self.exclude else "")

    def chosen(self, model: LanguageModel) -> list[Chosen]:
        """The matrices that it is about, in the order of the tree, each shared one once.

        Raises:
            UsageError: a pattern matches no layer.
        """
        everything = matrices(model)
        for option in ("include", "exclude"):
            for pattern in _patterns(getattr(self, option)):
                if not any(fnmatch.fnmatchcase(n, pattern) for c in everything for n in c.names):
                    raise UsageError(
                        f"{self.name}: {option} pattern {pattern!r} matches no layer "
                        f"(names look like {everything[-1].name})",
                        f"Correct the pattern in `{option}`",
                    )
        return [c for c in everything if self.takes(c) and self._passes(c.names)]

    def passed(self, model: LanguageModel) -> list[str]:
        """Names of the layers that the filters let through, whatever the format takes of them."""
        return [name for c in matrices(model) if self._passes(c.names) for name in c.names]

    def _passes(self, names: tuple[str, ...]) -> bool:
        return (not self.include or matches(names, self.include)) and not matches(names, self.exclude)

    def quantized(self, layer: Chosen) -> Weight:
        """`quantize`, with the layer's name in what goes wrong."""
        with naming(layer.name):
            return self.quantize(layer)

    def convert(self, model: LanguageModel, name: str, weight: Weight) -> Weight:
        if not isinstance(weight, Dense):
            return weight
        layer = self._chosen_by_name(model).get(name)
        return weight if layer is None else self.quantized(replace(layer, weight=weight))

    def _chosen_by_name(self, model: LanguageModel) -> dict[str, Chosen]:
        """`chosen`, found once a model: while it is read, weights are replaced and the tree stays as it is."""
        known = _by_name.setdefault(model, {})
        if self not in known:
            chosen = [replace(c, weight=_NOTHING) for c in self.chosen(model)]  # no weight is held for it
            known[self] = {name: c for c in chosen for name in c.names}
        return known[self]

    def apply(self, model: LanguageModel, ctx: Context) -> LanguageModel:
        todo = {id(c.weight): c for c in self.chosen(model) if isinstance(c.weight, Dense)}
        self._swap_(model, todo, self.quantized)
        return model

    def _swap_(self, model: LanguageModel, todo: dict[int, Chosen], make: Callable[[Chosen], Weight]) -> None:
        """All new weights are made before the first is put in: an error leaves the model as it was."""
        swap_weights_(model, lambda m, n: id(m.weight) in todo, lambda w: make(todo[id(w)]))  # type: ignore[union-attr]

    def verify(self, model: LanguageModel, probe: Observation) -> list[str]:
        chosen = self.chosen(model)
        left = [c.name for c in chosen if c.weight.format == Dense.format]
        ensure(not left, self, f"{len(left)} layers are not {self.format_title}, {left[0] if left else ''} first")
        mine = [c for c in chosen if self.is_mine(c)]
        others = sorted({c.weight.format for c in chosen if not self.is_mine(c)})
        ensure(bool(mine), self, f"its layers were already quantised ({', '.join(others)})")
        n_bytes = sum(c.weight.stored_bytes for c in mine)
        n_values = sum(c.weight.out_features * c.weight.in_features for c in mine)
        allowed = sum(self.expected_bytes(c) for c in mine)
        if n_bytes > allowed:
            raise NoEffectError(
                f"{self.title} stores too much: {n_bytes} bytes are stored, {allowed:.0f} expected",
                f"A copy was kept, or `expected_bytes` of {self.name} is wrong. Leave it out of the recipe",
            )
        said = f"{len(mine)} matrices hold {self.format_title}: {n_bytes:,} bytes for {n_values:,} weights"
        said += f" ({8 * n_bytes / n_values:.2f} bits each)"
        if others:
            said += f"; {len(chosen) - len(mine)} were quantised before ({', '.join(others)})"
        return [said, *self.proof_of_kernel(model, probe)]


# What `convert` knows of the models that are being read. `apply` asks anew: trees may have changed until then.
_by_name: weakref.WeakKeyDictionary[LanguageModel, dict[Quantize, dict[str, Chosen]]] = weakref.WeakKeyDictionary()
_NOTHING = Dense(torch.empty(0, 0))


def matches(names: Sequence[str], patterns: str) -> bool:
    """Whether one of the names fits one of the patterns, which commas separate."""
    return any(fnmatch.fnmatchcase(n, p) for n in names for p in _patterns(patterns))


def _patterns(text: str) -> list[str]:
    return [p.strip() for p in text.split(",") if p.strip()]


def fast_kernel(transform: Transform, model: LanguageModel, probe: Observation, kernel: str) -> list[str]:
    """Proof that a native step ran `kernel`, or a step on a GPU its fused kernels; nothing on plain PyTorch."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        if reason := op.unavailable_reason(str(device)):
            return [f"its layers are dequantised at every call: {reason}"]
        ran = kernels_like(probe, op.KERNELS)
        ensure(bool(ran), transform, f"the step runs none of {', '.join(op.KERNELS)}")
        return [f"{name} ran {n} times in one prefill and one decode step" for name, n in ran.items()]
    if not probe.own_kernels:
        return []
    ensure(bool(probe.kernels.get(kernel)), transform, f"the step runs no {kernel}")
    return [f"{kernel} ran {probe.kernels[kernel]} times in one step"]
