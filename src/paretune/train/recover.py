"""Recovery block by block: what was pruned learns to give the dense model's residual stream again.

Attention and MLP of a block are trained one after the other, each against the dense stream at its end, with inputs as
the pruned model has them: errors of earlier blocks are made up for. A weight that is zero stays zero.

Where whole layers went, a block learns what it and the ones behind it did up to the next that stayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paretune.errors import ParetuneError, UsageError
from paretune.model.base import LanguageModel
from paretune.transforms.calibrate import blocks_of

HELD_OUT = 8  # of so many windows one tells whether training helped


@dataclass(frozen=True)
class RecoverOptions:
    """Args:
    epochs: over the calibration windows, for each half of a block.
    learning_rate: of Adam, at its beginning; it falls to nothing along a line.
    batch_size: windows of an update.
    """

    epochs: int = 4
    learning_rate: float = 1e-3
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name, cure in (("epochs", "1 or more"), ("batch_size", "1 or more"), ("learning_rate", "more than 0")):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)}", f"Give {cure}")


@dataclass(frozen=True)
class Half:
    """One half of a block after its recovery: the error on held-out windows, in parts of what is there, before and
    after. It is never larger than before: what does not help is taken back."""

    name: str
    before: float
    after: float


class _Reached(Exception):
    pass


def recover_blocks_(
    model: LanguageModel,
    dense: LanguageModel,
    kept: Sequence[int],
    tokens: Tensor,
    options: RecoverOptions,
    *,
    first: int = 0,
    done: Callable[[int, list[Half]], None] = lambda i, halves: None,
) -> list[Half]:
    """Trains the blocks of `model`, in place, against those of `dense`.

    Args:
        kept: which block of the dense model each block was.
        tokens: `[N, T]`, 8 windows or more.
        first: the first block that is trained; those before it are as an earlier run left them.
        done: called with the number of each block and its halves when it is finished.

    Raises:
        UsageError: too few windows, or another width of the residual stream.
        ParetuneError: the error became NaN or infinite.
    """
    if len(tokens) < HELD_OUT:
        raise UsageError(f"{len(tokens)} windows are too short a text to recover with", f"Give {HELD_OUT} or more")
    if model.config.n_embd != dense.config.n_embd:
        raise UsageError(
            "the residual stream has another width: blocks cannot be held against the dense ones",
            "Train the result with `paretune train`",
        )
    ours, theirs = blocks_of(model), blocks_of(dense)
    assert len(kept) == len(ours)
    batches = list(tokens.split(options.batch_size))
    held_out = max(1, len(batches) // HELD_OUT)
    x, wanted = _inputs(model, ours[0][1], batches), _inputs(dense, theirs[0][1], batches)
    at = 0  # the dense block whose inputs `wanted` are
    made: list[Half] = []
    for i, (name, block) in enumerate(ours):
        while at < kept[i]:
            wanted = _through(theirs[at][1], wanted)
            at += 1
        middle_name = model.family.modules["norm_2"].format(i=kept[i])
        middle = [_middle(dense, middle_name, theirs[at][1], args).detach() for args in wanted]
        end_of = kept[i + 1] if i + 1 < len(ours) else len(theirs)
        while at < end_of:
            wanted = _through(theirs[at][1], wanted)
            at += 1
        ends = [args[0] for args in wanted]
        if i >= first:
            norm_2 = model.family.modules["norm_2"].format(i=i)
            mlp = model.family.modules["down"].format(i=i).rpartition(".")[0]
            late = {id(p) for path in (norm_2, mlp) for p in model.get_submodule(path).parameters()}
            early = [p for p in block.parameters() if id(p) not in late]
            rest = [p for p in block.parameters() if id(p) in late]
            to_middle, to_end = partial(_middle, model, norm_2, block), partial(_end, block)
            halves = [
                _train(f"{name}: attention", early, x, middle, held_out, options, to_middle),
                _train(f"{name}: MLP", rest, x, ends, held_out, options, to_end),
            ]
            made += halves
            done(i, halves)
        x = _through(block, x)
    return made


Args = tuple[Any, ...]


@torch.no_grad()
def _inputs(model: LanguageModel, first: nn.Module, batches: Sequence[Tensor]) -> list[Args]:
    seen: list[Args] = []

    def capture(module: nn.Module, args: Args) -> None:
        seen.append(args)
        raise _Reached

    hook = first.register_forward_pre_hook(capture)
    try:
        for batch in batches:
            try:
                model(batch, None, "last")
            except _Reached:
                continue
    finally:
        hook.remove()
    return seen


@torch.no_grad()
def _through(block: nn.Module, batches: list[Args]) -> list[Args]:
    return [(block(*args), *args[1:]) for args in batches]


def _end(block: nn.Module, args: Args) -> Tensor:
    """The residual stream behind the block."""
    out: Tensor = block(*args)
    return out


def _middle(model: LanguageModel, norm_2: str, block: nn.Module, args: Args) -> Tensor:
    """The residual stream between attention and MLP."""
    found: list[Tensor] = []

    def capture(module: nn.Module, given: Args) -> None:
        found.append(given[0])
        raise _Reached

    hook = model.get_submodule(norm_2).register_forward_pre_hook(capture)
    try:
        block(*args)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]


def _train(
    name: str,
    parameters: list[nn.Parameter],
    x: list[Args],
    wanted: list[Tensor],
    held_out: int,
    options: RecoverOptions,
    forward: Callable[[Args], Tensor],
) -> Half:
    scale = float(torch.stack([w.square().mean() for w in wanted]).mean().clamp(min=1e-12))

    def error(batches: range) -> float:
        with torch.no_grad():
            errors = [float((forward(x[b]) - wanted[b]).square().mean()) for b in batches]
        return sum(errors) / len(errors) / scale

    n = len(x) - held_out if len(x) > held_out else len(x)
    tests = range(n, len(x)) if n < len(x) else range(n)
    before, kept = error(tests), [p.detach().clone() for p in parameters]
    masks = [(p.detach() != 0).to(p.dtype) if p.dim() == 2 else None for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
    steps = options.epochs * n
    with torch.enable_grad():
        for p in parameters:
            p.requires_grad_(True)
        try:
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = options.learning_rate * (1 - step / steps)
                loss = (forward(x[step % n]) - wanted[step % n]).square().mean() / scale
                if not bool(torch.isfinite(loss)):
                    raise ParetuneError(f"{name}: the error became {loss.item():g}", "Lower the learning rate")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for p, mask in zip(parameters, masks, strict=True):
                        if mask is not None:
                            p.mul_(mask)
        finally:
            for p in parameters:
                p.requires_grad_(False)
                p.grad = None
    after = error(tests)
    if not after < before:
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
        after = before
    return Half(name, before, after)
