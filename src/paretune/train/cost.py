"""What a training step costs: time and peak memory by batch size and mechanism, interleaved, one process each.

A batch that does not fit goes through in parts (gradient accumulation, the same update); one of which no single window
fits is an out-of-memory row. Both are decided from a prediction, before anything is tried.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paretune import clock, hardware, stats
from paretune.measure.interleave import SubjectError, block_order
from paretune.measure.session import TrialProcess
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.recipe import Recipe

BATCH_SIZES = (16, 32, 64, 128)
WORKER = "paretune.train.worker"
_INTERPRETER_BYTES = 450 << 20  # a process with PyTorch
_MEMORY_SHARE = 0.85
_LOAD_SEC, _STEP_SEC = 600.0, 3600.0  # time-outs


def step_bytes(config: ModelConfig, n_params: int, rows: int, length: int, keeps_scores: bool) -> int:
    """Memory of a training process, from above: weights, gradients, two moments, what each layer keeps, the logits.

    Args:
        rows: windows in one forward pass.
        keeps_scores: the attention form keeps its scores for the backward pass (the formula itself, or a mask).
    """
    tokens = rows * length
    wide = 12 * config.n_embd + 4 * config.n_inner + (3 * config.n_head * length if keeps_scores else 0)
    return _INTERPRETER_BYTES + 4 * (4 * n_params + config.n_layer * tokens * wide + 4 * tokens * config.vocab_size)


def micro_batch(
    config: ModelConfig, n_params: int, batch_size: int, length: int, available: int, keeps_scores: bool
) -> int:
    """The most windows of one forward pass that fit, a divisor of the batch; 0 where not even one does."""
    rows = batch_size
    while rows and step_bytes(config, n_params, rows, length, keeps_scores) > _MEMORY_SHARE * available:
        rows = 0 if rows == 1 else next(r for r in range(rows // 2, 0, -1) if batch_size % r == 0)
    return rows


@dataclass
class _Subject:
    name: str
    process: TrialProcess | None
    keeps_scores: bool
    cause: str = ""


def training_costs(
    folder: Path,
    mechanisms: Mapping[str, Recipe],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    length: int = 512,
    n_blocks: int = 3,
    budget_sec: float | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
    log_folder: Path,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """A row for each batch size and mechanism; the first mechanism is what the others are compared with.

    Args:
        length: tokens in a window.
        n_blocks: timed updates of each. One more before them warms up, at every size (a larger one touches new memory);
            with a single one, of which nothing is claimed, at the smallest size alone.
        budget_sec: for all, shared out by batch size; what is not reached then says so.
    """
    config = checkpoint.read_config(folder)
    n_params = sum(p.numel() for p in checkpoint.build(config).parameters())
    end = math.inf if budget_sec is None else clock.now() + budget_sec
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        subjects = [
            _start(stack, name, recipe, folder, log_folder / f"train-{i}.log", device, dtype, threads)
            for i, (name, recipe) in enumerate(mechanisms.items())
        ]
        ascending = sorted(batch_sizes)  # so that the peak of a process is that of the size at hand
        for i, batch_size in enumerate(ascending):
            say(f"training step of {batch_size} x {length} tokens")
            warms_up = n_blocks > 1 or i == 0
            until = clock.now() + (end - clock.now()) * batch_size / sum(ascending[i:])
            rows += _cell(subjects, config, n_params, batch_size, length, n_blocks, until, device, seed, warms_up)
    return rows


def _start(
    stack: contextlib.ExitStack,
    name: str,
    recipe: Recipe,
    folder: Path,
    log: Path,
    device: str,
    dtype: str,
    threads: int | None,
) -> _Subject:
    subject = _Subject(name, None, recipe.keeps_scores)
    request = {"folder": str(Path(folder).absolute()), "recipe": recipe.to_dict(), "device": device, "dtype": dtype}
    process = TrialProcess(name, "train", log=log, module=WORKER)
    stack.callback(process.close)
    try:
        process.ask("load", _LOAD_SEC, **request, threads=threads)
        process.pause()
        subject.process = process
    except SubjectError as error:
        subject.cause = str(error)
        process.close()
    return subject


def _cell(
    subjects: Sequence[_Subject],
    config: ModelConfig,
    n_params: int,
    batch_size: int,
    length: int,
    n_blocks: int,
    until: float,
    device: str,
    seed: int,
    warms_up: bool,
) -> list[dict[str, Any]]:
    """One batch size: blocks in random order, where asked after one that warms up."""
    free = hardware.memory_left(device)
    micro = {s.name: micro_batch(config, n_params, batch_size, length, free, s.keeps_scores) for s in subjects}
    taken: dict[str, list[float]] = {s.name: [] for s in subjects}
    peak: dict[str, int | None] = {s.name: None for s in subjects}
    cause = {s.name: s.cause for s in subjects}
    for s in subjects:
        if not cause[s.name] and not micro[s.name]:
            needed = step_bytes(config, n_params, 1, length, s.keeps_scores)
            cause[s.name] = f"out of memory: one window needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    by_name = {s.name: s for s in subjects}
    for block in range(-1 if warms_up else 0, n_blocks):
        for name in block_order(list(by_name), seed, block):
            s = by_name[name]
            if cause[name] or s.process is None:
                continue
            if clock.now() >= until:
                cause[name] = cause[name] or ("" if taken[name] else "the time budget ended before its turn")
                continue
            try:
                s.process.resume()
                request = {"batch_size": batch_size, "micro": micro[name], "length": length, "seed": seed + block + 1}
                answer = s.process.ask("step", _STEP_SEC, **request)
                s.process.pause()
                peak[name] = answer["peak_bytes"]
                if block >= 0:
                    taken[name].append(answer["sec"])
            except SubjectError as error:
                cause[name] = s.cause = f"out of memory: {error}" if "memory" in str(error) else str(error)
                s.process.close()
                s.process = None
    first = subjects[0].name
    rows = []
    for s in subjects:
        n = min(len(taken[first]), len(taken[s.name]))
        ratio = stats.speed_ratio(taken[first][:n], taken[s.name][:n]).to_json() if n else {}
        mean = float(np.median(taken[s.name])) if taken[s.name] else None
        rows.append(
            {
                "mechanism": s.name,
                "batch_size": batch_size,
                "length": length,
                "micro_batch_size": micro[s.name] or None,
                "step_sec": mean,
                "tokens_per_sec": batch_size * length / mean if mean else None,
                "peak_bytes": peak[s.name],
                "speedup": ratio.get("value"),
                "speedup_low": ratio.get("low") or None,
                "speedup_high": ratio.get("high"),
                "n": len(taken[s.name]),
                "samples_sec": taken[s.name],
                "cause": cause[s.name],
            }
        )
    return rows
