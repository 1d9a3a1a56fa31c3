"""What a step of several tokens costs on this machine: measured once, in turns, and kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from paretune import clock, files, hardware, native_build
from paretune.engine.cache import KVCache
from paretune.engine.decode.control import StepCosts
from paretune.engine.runners.base import Runner
from paretune.engine.sampling import argmax
from paretune.errors import ParetuneError

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # tokens a row
N_ROUNDS = 3
CONTEXT = 64  # tokens before the step; longer ones make all widths slower by much the same
FOLDER = "step-costs"


def step_costs(runner: Runner, n_rows: int, key: str = "", most: int = WIDTHS[-1]) -> tuple[StepCosts, float]:
    """Seconds of a step by its width: from the cache of files, else measured and put there.

    Args:
        key: what the model and its recipe are; "": nothing is kept.
        most: tokens a row of the widest step.

    Returns:
        the costs, and the seconds that measuring took; 0 where they were kept.
    """
    widths = _widths(runner, most)
    path = None
    if key:
        about = [key, _about(runner), n_rows, torch.get_num_threads(), widths, hardware.fingerprint()]
        name = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
        path = native_build.cache_folder() / FOLDER / f"{name}.json"
        if (kept := _read(path, widths)) is not None:
            return StepCosts(kept), 0.0
    started = clock.now()
    seconds = measure(runner, n_rows, widths)
    if path is not None:
        with contextlib.suppress(ParetuneError):  # a full or read-only disk: it is measured again next time
            files.write_bytes(path, json.dumps({str(w): s for w, s in seconds.items()}).encode())
    return StepCosts(seconds), clock.now() - started


def _about(runner: Runner) -> dict[str, object]:
    """What steps of a runner depend on beside the weights."""
    return {**runner.describe(), "cache_dtype": str(runner.cache_dtype), "config": asdict(runner.config)}


def _widths(runner: Runner, most: int) -> list[int]:
    room = runner.config.longest - 1
    return [w for w in WIDTHS if w == 1 or w <= min(most, room)]


def measure(runner: Runner, n_rows: int, widths: list[int]) -> dict[int, float]:
    """Seconds of a step of each width, the median of `N_ROUNDS` taken in turns, at the same positions."""
    context = max(1, min(CONTEXT, runner.config.longest - max(widths)))
    cache = runner.new_cache(n_rows, context + max(widths))
    tokens = (torch.arange(context) % runner.config.vocab_size).repeat(n_rows, 1).to(runner.device)
    runner.forward(tokens, cache, "last")
    taken: dict[int, list[float]] = {width: [] for width in widths}

    def once(width: int) -> float:
        cache.truncate_(context)
        clock.synchronize(runner.device.type)
        before = clock.now()
        step(runner, tokens[:, :1].expand(n_rows, width).contiguous(), cache)
        clock.synchronize(runner.device.type)
        return clock.now() - before

    with clock.quiet():
        for width in widths:  # first use: memory, and graphs where they are compiled
            once(width)
        for turn in range(N_ROUNDS):
            for width in widths if turn % 2 else reversed(widths):
                taken[width].append(once(width))
    return {width: max(statistics.median(times), 1e-9) for width, times in taken.items()}


def step(runner: Runner, tokens: Tensor, cache: KVCache) -> None:
    """One step as decoding takes it: of one token the likeliest alone, of more the logits of all."""
    if tokens.size(1) == 1:
        runner.greedy(tokens, cache)
    else:
        argmax(runner.forward(tokens, cache, "all").flatten(0, 1))


def _read(path: Path, widths: list[int]) -> dict[int, float] | None:
    """None: it is not there, or not what it should be."""
    try:
        found = {int(w): float(s) for w, s in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return None
    return found if sorted(found) == widths and all(s > 0 for s in found.values()) else None
