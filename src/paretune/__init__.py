"""Paretune finds, proves and runs the fastest form of a GPT-style language model on the machine at hand.

The Python API is six names: `load`, `Recipe`, `generate`, `evaluate`, `bench`, `tune`. They are imported when they are
first used, so that `import paretune` costs next to nothing (no torch).
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from paretune import evaluate as _evaluate_package
from paretune import tune as _tune_package

if TYPE_CHECKING:
    from paretune.api import bench, generate, load
    from paretune.recipe import Recipe

__version__: str

_LAZY = {
    "load": "paretune.api",
    "generate": "paretune.api",
    "bench": "paretune.api",
    "Recipe": "paretune.recipe",
}

__all__ = ["Recipe", "__version__", "bench", "evaluate", "generate", "load", "tune"]


class _CallablePackage(ModuleType):
    """`paretune.tune` and `paretune.evaluate` name a package and a function of the API: here they are both.

    A function of that name would be overwritten by the first import of the package, and the other way round.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        from paretune import api

        return getattr(api, self.__name__.rpartition(".")[2])(*args, **options)


for _package in (_evaluate_package, _tune_package):
    _package.__class__ = _CallablePackage


def __getattr__(name: str) -> Any:
    """PEP 562: imports what is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("paretune")
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'paretune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
