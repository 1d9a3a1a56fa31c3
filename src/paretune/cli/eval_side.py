"""What the tasks of `paretune eval` share: a side that is loaded and proven, and lines of progress."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paretune.engine.load import Loaded
    from paretune.recipe import Recipe

EVERY_SEC = 10.0  # a line of progress


def load_side(
    folder: Path, recipe: Recipe, device: str, threads: int | None, quiet: bool
) -> tuple[Loaded, list[str], list[str]]:
    """The loaded model, the proof of what was done to it, and what the user should know."""
    from paretune import hardware
    from paretune.engine.load import load_recipe, prove

    if not quiet:
        print(f"loading {recipe.name}", file=sys.stderr, flush=True)
    hardware.set_threads(recipe.engine.threads or threads)
    loaded = load_recipe(folder, recipe, device)
    proof, _ = prove(loaded)
    return loaded, proof, [note for t in recipe.transforms for note in t.notes(device)]


def progress_of(phase: str, unit: str, quiet: bool) -> Callable[[int, int], None]:
    """Lines on stderr, one every ten seconds, with an estimate of what is left.

    Args:
        unit: what is counted, such as "window".
    """
    from paretune import clock
    from paretune.report.units import format_sec

    started = last = clock.now()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = clock.now()
        if quiet or now - last < EVERY_SEC or done == total:
            return
        last = now
        left = format_sec(round((now - started) / done * (total - done)))
        print(f"{phase}: {unit} {done} of {total}, about {left} left", file=sys.stderr, flush=True)

    return progress
