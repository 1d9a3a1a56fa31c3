"""Runs calibration text through a model block by block and sums up what each linear layer sees."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paretune.errors import ParetuneError, UsageError
from paretune.model.base import LanguageModel
from paretune.model.layers import Linear
from paretune.transforms.base import Context

TOKENS_AT_ONCE = 4096
STRIP = 256  # rows of the second moments that are summed together


class _Captured(Exception):
    """What was wanted was reached: nothing behind it need run."""


def check_calibration(ctx: Context, who: str, at_least: int, why: str) -> Tensor:
    """The calibration windows, int64 `[N, T]`.

    Args:
        at_least: tokens; fewer are an error.
        why: what they are for, in the error.

    Raises:
        UsageError: there are none, or too few.
    """
    if ctx.calibration is None:
        raise UsageError(f"{who} needs calibration text", "Give some that is not the evaluation text")
    n_tokens = ctx.calibration.numel()
    if n_tokens < at_least:
        raise UsageError(
            f"calibration text too short: {n_tokens:,} tokens for {why}", f"Give {4 * at_least:,} tokens or more"
        )
    return ctx.calibration


def blocks_of(model: LanguageModel) -> list[tuple[str, nn.Module]]:
    """The repeated blocks with their names."""
    lists = [(n, m) for n, m in model.named_children() if isinstance(m, nn.ModuleList)]
    assert len(lists) == 1, "a model has one list of blocks"
    name, blocks = lists[0]
    return [(f"{name}.{i}", block) for i, block in enumerate(blocks)]


class SecondMoments:
    """`H = 2 / n * sum x x^T` of the inputs of some layers, fp32 `[in, in]`, and the mean of `|x|`, `[in]`.

    Layers that read one tensor share them.

    Args:
        layers: by name; each runs once in a pass.
        stops: ends a pass with `_Captured` when all inputs are known: the product of the last layer is for nothing.
    """

    def __init__(self, layers: dict[str, Linear], stops: bool = False) -> None:
        self._left: set[str] = set()  # layers that this pass has not reached
        self._names, self._stops = frozenset(layers), stops
        self._sums: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._n: list[int] = []
        self._of: dict[str, int] = {}
        self._last: tuple[int, Tensor] | None = None
        self._hooks = [m.register_forward_pre_hook(self._hook(name)) for name, m in layers.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            add(args[0])
            self._left.discard(name)
            if self._stops and not self._left:
                raise _Captured

        def add(x: Tensor) -> None:
            if self._last is not None and self._last[1] is x and self._of.setdefault(name, self._last[0]) != -1:
                return  # summed for the layer before
            if name not in self._of:
                self._of[name] = len(self._sums)
                self._sums.append(torch.zeros(x.size(-1), x.size(-1), device=x.device))
                self._sizes.append(torch.zeros(x.size(-1), device=x.device))
                self._n.append(0)
            at = self._of[name]
            flat = x.reshape(-1, x.size(-1)).float()
            for i in range(0, flat.size(1), STRIP):  # they are symmetric: from the diagonal on
                self._sums[at][i : i + STRIP, i:].addmm_(flat[:, i : i + STRIP].t(), flat[:, i:])
            self._sizes[at] += flat.abs().sum(0)
            self._n[at] += flat.size(0)
            self._last = (at, x)

        return see

    def forget_input(self) -> None:
        """A new pass begins: tensors of the last one may be gone and their identity with them."""
        self._last, self._left = None, set(self._names)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def inputs_of(self, name: str) -> int:
        """A number that layers share which read one tensor."""
        return self._of[name]

    def of(self, name: str) -> Tensor:
        """Raises `ParetuneError` where the calibration text gave NaN or infinity."""
        at = self._of[name]
        upper = self._sums[at].triu()
        moments = (upper + upper.triu(1).t()) * (2 / self._n[at])
        if not bool(torch.isfinite(moments).all()):
            raise ParetuneError("its inputs are not finite on the calibration text", "Use fp32")
        return moments

    def mean_sizes(self, name: str) -> Tensor:
        """The mean of `|x|` of each input, fp32 `[in]`."""
        at = self._of[name]
        return self._sizes[at] / self._n[at]


@torch.no_grad()  # no inference tensors: what `visit` makes stays in the model
def walk(
    model: LanguageModel,
    tokens: Tensor,
    visit: Callable[[str, dict[str, Linear], SecondMoments], None],
    progress: Callable[[str], None],
) -> None:
    """Calls `visit(block name, its linear layers, their moments)` for one block after another.

    What `visit` changes in a block is what the next one's inputs come from, so that errors are made up for.

    Args:
        tokens: `[N, T]`.
    """
    blocks = blocks_of(model)
    batches = _inputs_of_first_block(model, blocks[0][1], tokens)
    for i, (name, block) in enumerate(blocks):
        progress(f"block {i + 1} of {len(blocks)}")
        layers = {n: m for n, m in model.named_modules() if n.startswith(f"{name}.") and isinstance(m, Linear)}
        moments = SecondMoments(layers, stops=True)
        try:
            for args, kwargs in batches:
                moments.forget_input()
                with contextlib.suppress(_Captured):
                    block(*args, **kwargs)
        finally:
            moments.close()
        visit(name, layers, moments)
        if i + 1 < len(blocks):
            batches = [((block(*args, **kwargs), *args[1:]), kwargs) for args, kwargs in batches]


@torch.no_grad()
def moments_of_head(model: LanguageModel, tokens: Tensor) -> SecondMoments:
    """What the head sees of `tokens[N, T]`, under its name; the product of the head itself is never made."""
    moments = SecondMoments({model.head_name: model.head}, stops=True)
    try:
        for batch in tokens.to(model.embedding.weight.device).split(max(1, TOKENS_AT_ONCE // tokens.size(1))):
            moments.forget_input()
            with contextlib.suppress(_Captured):
                model(batch, None, "all")
    finally:
        moments.close()
    return moments


def _inputs_of_first_block(
    model: LanguageModel, first: nn.Module, tokens: Tensor
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Captured

    hook = first.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        for batch in tokens.to(model.embedding.weight.device).split(max(1, TOKENS_AT_ONCE // tokens.size(1))):
            try:
                model(batch, None, "last")
            except _Captured:
                continue
    finally:
        hook.remove()
    return seen
