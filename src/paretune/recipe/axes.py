"""The axes of a search: what transforms, runners and caches offer for a model on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paretune.engine import cache_formats
from paretune.option import Option
from paretune.registry import DRAFTS, RUNNERS, TRANSFORMS

if TYPE_CHECKING:
    from paretune.model.config import ModelConfig

Axes = dict[str, list[Option]]


def axes(device: str, config: ModelConfig | None = None, n_tokens: int = 0) -> Axes:
    """The options of every axis, in the legal order of their transforms, then `runner`, `cache`, `speculate` and
    `threads`.

    An axis without a default may also be left out.

    Args:
        config: of the model; None: of any.
        n_tokens: the longest sequence of the requests; 0: not known.
    """
    kinds = sorted((kind for _, kind in TRANSFORMS.working()), key=lambda kind: kind.stage)
    found: Axes = {}
    for kind in kinds:
        found.setdefault(kind.axis, []).extend(kind.options(config, device, n_tokens))
    found["runner"] = [option for _, kind in RUNNERS.working() for option in kind.options(device)]
    found["cache"] = list(cache_formats.OPTIONS)
    drafts = [kind for _, kind in DRAFTS.working()]
    found["speculate"] = [option for kind in drafts for option in kind.options(config, device)]
    found["threads"] = []  # `threads(N)` is understood; a search takes the threads that it is given
    for axis, options in found.items():
        assert sum(o.is_default for o in options) <= 1, f"the axis {axis} has two defaults"
    return found


def default_of(options: Sequence[Option]) -> Option | None:
    """What a recipe has of an axis where it does not say; None: nothing."""
    return next((o for o in options if o.is_default), None)
