"""Bytes and arithmetic of a step as it really runs, part by part, counted at the operators (no time is taken).

Bytes: what each operator reads and writes (views move nothing; a look-up counts the rows it takes). FLOP: two a
multiply-add in products and attention, one an element elsewhere. Counted as run, not as needed: a weight that is
converted on every call counts its conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from paretune.measure.profile_marks import Key
from paretune.ops.weights.base import Weight

# Operators that read single rows of their first tensor, and those whose name the registry of formulas lacks.
_GATHERS = ("embedding", "index", "gather", "index_select")
_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_weight_int8pack_mm",
    "_int_mm",
    "int8_few_rows",
    "quantized_linear",
    "linear",
)
_ALLOCATIONS = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")


@dataclass
class Counted:
    """Sums over the operators of one part.

    Attributes:
        n_ops: operators that do something (views not counted).
        n_bytes: read and written.
        flops: as run.
        product_flops: the part of it in matrix products.
        product_weight_bytes: stored bytes of weights that products read.
        converted_bytes: written by operators that make another form of a stored weight (dequantisation, a cast, a
            mask) in this step.
        allocated_bytes: new tensors.
        cache_bytes: read from or written to the key/value cache.
    """

    n_ops: int = 0
    n_bytes: int = 0
    flops: int = 0
    product_flops: int = 0
    product_weight_bytes: int = 0
    converted_bytes: int = 0
    allocated_bytes: int = 0
    cache_bytes: int = 0

    def __iadd__(self, other: Counted) -> Counted:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


@dataclass
class Counts:
    """What one step does, by part."""

    parts: dict[Key, Counted] = field(default_factory=dict)

    def total(self) -> Counted:
        out = Counted()
        for counted in self.parts.values():
            out += counted
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _moved(tensor: Tensor) -> int:
    """Bytes behind a tensor; an expanded one has no more than its storage."""
    n_bytes = tensor.numel() * tensor.element_size()
    return min(n_bytes, tensor.untyped_storage().nbytes()) if tensor.layout == torch.strided else n_bytes


def flops_of(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """FLOP of one operator as it was called."""
    if name.startswith("_scaled_dot_product") and "backward" not in name:
        q, k = args[0], args[1]
        pairs = q.size(-2) * k.size(-2)
        is_causal = kwargs.get("is_causal", next((a for a in args[3:] if isinstance(a, bool)), False))
        if is_causal:
            pairs = q.size(-2) * (q.size(-2) + 1) // 2
        return 4 * q.size(0) * q.size(1) * q.size(-1) * pairs
    if name in ("_weight_int8pack_mm", "int8_few_rows", "quantized_linear"):
        return 2 * args[0].numel() * args[1].size(0)
    if name == "_int_mm":
        return 2 * args[0].numel() * args[1].size(1)
    packet = getattr(func, "_overloadpacket", None)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if name in ("copy_", "clone", "_to_copy", "fill_", "zero_", "cat", "detach", *_GATHERS, *_ALLOCATIONS):
        return 0
    return max((t.numel() for t in [*_tensors(out), *_tensors(args)]), default=0)


class CountingMode(TorchDispatchMode):
    """Counts every operator under the part that `current` names.

    Args:
        current: gives the part that runs now.
        model: its `Weight`s are told apart from activations.
        cache_tensors: keys and values.
    """

    def __init__(self, current: Callable[[], Key], model: nn.Module, cache_tensors: list[Tensor]) -> None:
        super().__init__()
        self.counts = Counts()
        self._current = current
        weights = [t for m in model.modules() if isinstance(m, Weight) for t in m.to_tensors().values()]
        self._weights = {_place(t): t.numel() for t in weights if t.numel()}
        self._cache = {_place(t) for t in cache_tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Inference mode hands composite operators on whole.
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        if not func.is_view:
            name = func._schema.name.partition("::")[2]
            if not func._schema.name.startswith("prim") and name not in ("lift_fresh", "_unsafe_view", "detach"):
                self._count(name, func, args, kwargs, out)
        return out

    def _count(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        counted = self.counts.parts.setdefault(self._current(), Counted())
        inputs, outputs = list(_tensors([list(args), kwargs])), list(_tensors(out))
        if name in _ALLOCATIONS:
            counted.allocated_bytes += sum(_moved(t) for t in outputs)
            return
        counted.n_ops += 1
        written = sum(_moved(t) for t in outputs)
        if name in _GATHERS:
            read = written  # the rows that were taken
        else:
            # In-place operators name their target as an input: what they read is not it, unless they add to it.
            replaces = name in ("copy_", "fill_", "zero_")
            read = sum(_moved(t) for t in (inputs[1:] if replaces else inputs))
        counted.n_bytes += read + written
        flops = flops_of(name, func, args, kwargs, out)
        counted.flops += flops
        places = {_place(t) for t in inputs if t.numel()}
        fresh = [t for t in outputs if t.numel() and _place(t) not in places]
        counted.allocated_bytes += sum(_moved(t) for t in fresh)
        counted.cache_bytes += sum(_moved(t) for t in [*inputs, *outputs[:1]] if _place(t) in self._cache)
        weights = [t for t in inputs if _place(t) in self._weights]
        if name in _PRODUCTS:
            counted.product_flops += flops
            counted.product_weight_bytes += sum(_moved(t) for t in weights)
        elif name.startswith("_scaled_dot_product"):
            counted.product_flops += flops
        elif name not in _GATHERS:
            counted.converted_bytes += sum(
                _moved(t) for t in fresh for w in weights if w.dim() == 2 and t.numel() >= self._weights[_place(w)] // 2
            )


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
