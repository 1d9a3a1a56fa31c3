"""Families of models: one file or folder each, which owns all that is particular to it (`base.Family`).

`registry.FAMILIES` names them; nothing outside this folder asks for a family's name.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from paretune.model.families.base import Family
from paretune.registry import FAMILIES

if TYPE_CHECKING:
    from paretune.model.config import ModelConfig


def get(name: str) -> Family:
    """The family of a name, which is the `model_type` of a `config.json`.

    Raises:
        UsageError: no family is registered under it.
    """
    family = _made(FAMILIES.get(name))
    assert family.name == name, f"{type(family).__name__} is registered as {name!r} and calls itself {family.name!r}"
    return family


def of(config: ModelConfig) -> Family:
    """The family of a model."""
    return get(config.family)


def every() -> list[Family]:
    """All that can be had: one of another package that cannot be imported takes none of the others away."""
    return [get(name) for name, _ in FAMILIES.working()]


@functools.cache
def _made(declared: type[Family]) -> Family:
    return declared()
