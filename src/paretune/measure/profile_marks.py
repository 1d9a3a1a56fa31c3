"""Where the time of a step goes, part by part, without a change of model code.

While `Instrument` is installed, a module's `forward` and the attention seam of each block are wrapped: one reading of
the clock at every boundary. Each nanosecond between the first and the last reading belongs to exactly one part, so the
parts add up to the marked step by construction; what marking costs is the difference to the same step without it,
measured in turns with it. On a GPU a reading is an event on the stream.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paretune import clock
from paretune.measure.profile_parts import BY_KEY, OUTSIDE
from paretune.model.base import LanguageModel
from paretune.ops.attention import reference
from paretune.ops.attention.pattern import Pattern
from paretune.ops.attention.spec import AttentionSpec, LayerCache, Visible, alibi_bias, visible

# (part, layer or -1, whether it is the part's backward pass)
Key = tuple[str, int, bool]


class Marks:
    """Boundary readings of one step. Calling it with a key says: from now on, this part.

    Args:
        device: "cuda" takes events, anything else the clock.
        is_training: gradients are followed too.
    """

    def __init__(self, device: str = "cpu", is_training: bool = False) -> None:
        self.is_cuda = device.startswith("cuda")
        self.is_training = is_training
        self.current: Key = (OUTSIDE, -1, False)
        self._keys: list[Key] = []
        self._times: list[Any] = []
        self.hooked: dict[int, Tensor] = {}  # tensors whose gradient already says whose backward pass begins

    def __call__(self, key: Key) -> None:
        self.current = key
        self._keys.append(key)
        if self.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._times.append(event)
        else:
            self._times.append(clock.now())

    def start(self) -> None:
        self._keys, self._times, self.hooked = [], [], {}
        self((OUTSIDE, -1, False))

    def stop(self) -> dict[Key, float]:
        """Seconds by part since `start`."""
        self((OUTSIDE, -1, False))
        if self.is_cuda:
            torch.cuda.synchronize()
        out: dict[Key, float] = {}
        for i, key in enumerate(self._keys[:-1]):
            a, b = self._times[i], self._times[i + 1]
            out[key] = out.get(key, 0.0) + (a.elapsed_time(b) / 1e3 if self.is_cuda else b - a)
        self.hooked = {}
        return out

    @property
    def n_readings(self) -> int:
        return len(self._keys)

    def counts(self) -> dict[Key, int]:
        """How often each part began in the last step."""
        out: dict[Key, int] = {}
        for key in self._keys[:-1]:
            out[key] = out.get(key, 0) + 1
        return out

    def on_gradient(self, tensor: Any, key: Key) -> None:
        """When the gradient of `tensor` is there, the backward pass of the part that made it begins."""
        if isinstance(tensor, Tensor) and tensor.requires_grad and id(tensor) not in self.hooked:
            self.hooked[id(tensor)] = tensor
            backward = (key[0], key[1], True)
            tensor.register_hook(lambda gradient: self(backward))


class Instrument:
    """Wraps a model's parts; `install` and `remove` may alternate, each takes microseconds.

    Args:
        marks: called at each boundary.

    `missing` names the boundaries that this tree does not have (a transform fused them away): their time stands with
    the part before.
    """

    def __init__(self, model: LanguageModel, marks: Marks) -> None:
        self.marks = marks
        family = model.family
        self.missing: list[str] = []
        self._swaps: list[tuple[nn.Module, str, Any]] = []
        if not family.boundaries:
            self.missing.append(f"{family.name} has no table of parts")
            return
        stack = family.stack
        blocks: list[Any] = list(model.get_submodule(stack))  # type: ignore[call-overload]
        named = dict(model.named_modules())
        for end, begins, ends in family.boundaries:
            assert begins in BY_KEY and ends in BY_KEY, f"{family.name}: {end} begins a part that is not there"
            top = [(end, -1)] if end in named else []
            places = top or [(f"{stack}.{i}.{end}", i) for i in range(len(blocks))]
            for name, layer in places:
                if name not in named:
                    self.missing.append(name)
                    continue
                self._wrap_module(named[name], (begins, layer, False), (ends, layer, False))
        self._wrap_module(blocks[-1], None, ("last_token", -1, False))
        for i, block in enumerate(blocks):
            owner = block.get_submodule(family.attention)
            self._swaps.append((owner, "attention", self._seam(owner.attention, i)))

    def around(self, model: LanguageModel) -> Instrument:
        """A second one, installed on top of this one: marks every boundary of modules once more, and the attention
        seam as one part."""
        self.install()
        try:
            return Instrument(model, Marks("cuda" if self.marks.is_cuda else "cpu", self.marks.is_training))
        finally:
            self.remove()

    def install(self) -> None:
        for owner, name, wrapped in self._swaps:
            owner.__dict__[name] = wrapped

    def remove(self) -> None:
        for owner, name, wrapped in self._swaps:
            if name == "forward":
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = wrapped.__wrapped__

    def _wrap_module(self, module: nn.Module, begins: Key | None, ends: Key) -> None:
        inner, marks = module.forward, self.marks

        @functools.wraps(inner)
        def forward(*args: Any) -> Any:
            if marks.is_training and begins is not None:
                if marks.current[0] != begins[0]:
                    marks.on_gradient(args[0], marks.current)
                marks(begins)
                out = inner(*args)
                marks.on_gradient(out, begins)
            else:
                if begins is not None:
                    marks(begins)
                out = inner(*args)
            marks(ends)
            return out

        self._swaps.append((module, "forward", forward))

    def _seam(self, inner: Callable[..., Tensor], layer: int) -> Callable[..., Tensor]:
        marks = self.marks
        if inner is reference.attention:
            run: Callable[..., Tensor] = functools.partial(staged_reference, marks, layer)
        else:
            run = functools.partial(_fused, inner, marks, layer)

        ends = ("output_reshape", layer, False)

        def attention(q: Tensor, k: Tensor, v: Tensor, layer_cache: LayerCache | None, spec: AttentionSpec) -> Tensor:
            if marks.is_training:
                marks.on_gradient(q, ("qkv_reshape", layer, False))
            out = run(q, k, v, layer_cache, spec)
            marks(ends)
            return out

        attention.__wrapped__ = inner  # type: ignore[attr-defined]
        return attention


class _WatchedCache(LayerCache):
    """A layer's cache that marks its `append`, for attention functions that are one kernel."""

    def __init__(self, inner: LayerCache, marks: Marks, layer: int) -> None:
        self._inner, self._marks, self._layer = inner, marks, layer

    def append(self, k_new: Tensor, v_new: Tensor, pattern: Pattern) -> Visible:
        self._marks(("cache_append", self._layer, False))
        seen = self._inner.append(k_new, v_new, pattern)
        self._marks(("fused_attention", self._layer, False))
        return seen

    @property
    def common_start(self) -> int | None:
        return self._inner.common_start

    @property
    def in_order_from(self) -> int | None:
        return self._inner.in_order_from

    @property
    def prefix_and_ring(self) -> tuple[int, int]:
        return self._inner.prefix_and_ring


def _fused(
    inner: Callable[..., Tensor],
    marks: Marks,
    layer: int,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    layer_cache: LayerCache | None,
    spec: AttentionSpec,
) -> Tensor:
    key = ("fused_attention", layer, False)
    marks(key)
    watched = None if layer_cache is None else _WatchedCache(layer_cache, marks, layer)
    out = inner(q, k_new, v_new, watched, spec)
    if marks.is_training:
        marks.on_gradient(out, key)
    return out


def staged_reference(
    marks: Marks,
    layer: int,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    layer_cache: LayerCache | None,
    spec: AttentionSpec,
) -> Tensor:
    """`reference.attention` with a reading between its steps. The same operations in the same order: a profile checks
    that its logits are bit-equal to those of the unmarked step."""
    grad = marks.is_training
    B, H, K, D = q.size()
    marks(("cache_append", layer, False))
    seen = visible(k_new, v_new, layer_cache, spec)
    k, v, mask, is_causal = seen[:4]
    marks(("scores", layer, False))
    Hkv, n = k.size(1), k.size(2)
    q = q.reshape(B, Hkv, H // Hkv, K, D)
    scores = (q * spec.scale) @ k[:, :, None].transpose(-2, -1)  # (B, Hkv, H/Hkv, K, n)
    if grad:
        marks.on_gradient(scores, ("scores", layer, False))
    if spec.slopes is not None:
        scores = scores.float() + alibi_bias(seen, K, spec.slopes).unflatten(1, (Hkv, -1))
    if is_causal and K > 1:
        marks(("mask", layer, False))
        hidden = torch.ones(K, n, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    elif mask is not None:
        marks(("mask", layer, False))
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    if grad:
        marks.on_gradient(scores, ("mask", layer, False))
    marks(("softmax", layer, False))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    if grad:
        marks.on_gradient(weights, ("softmax", layer, False))
    marks(("values", layer, False))
    out = (weights @ v[:, :, None]).reshape(B, H, K, D)
    if grad:
        marks.on_gradient(out, ("values", layer, False))
    return out


def cost_of_a_reading(n: int = 2000) -> float:
    """Seconds that a boundary adds at least: a wrapped empty module against a bare one, in turns, the median, two
    readings each. In a real step, between operators that fill the caches, it is more.

    Measured on the CPU's clock; an event on a GPU's stream costs the host more and the device next to nothing.
    """
    marks = Marks()
    module = nn.Identity()
    inner = module.forward

    def forward(*args: Any) -> Any:
        marks(begins)
        out = inner(*args)
        marks(ends)
        return out

    begins, ends = ("norm_1", 0, False), ("qkv_projection", 0, False)
    x = torch.empty(1)
    differences = []
    with clock.quiet():
        for _ in range(9):
            spent = []
            for wrapped in (False, True):
                module.__dict__.pop("forward", None)
                if wrapped:
                    module.__dict__["forward"] = forward
                marks.start()
                started = clock.now()
                for _ in range(n // 9):
                    module(x)
                spent.append(clock.now() - started)
            differences.append((spent[1] - spent[0]) / (2 * (n // 9)))
    return max(0.0, statistics.median(differences))
