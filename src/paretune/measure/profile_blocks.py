"""Plain, marked and doubly marked steps of a profile in turns, in blocks between bandwidth probes.

A step that is marked twice says what a mark costs where it is used: between operators of a real step, not in a loop of
its own.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from paretune import clock, hardware
from paretune.measure.profile_marks import Instrument, Key
from paretune.measure.profile_steps import Step

N_BLOCKS, SLICE_SEC = 12, 0.15
QUICK_BLOCKS, QUICK_SLICE_SEC = 6, 0.08
WARM_UP_SEC, MAX_WARM_UP_SEC = 0.3, 5.0
MAX_SEC = 60.0  # of the timed blocks; a large model gets fewer of them
MIN_STEPS, MAX_STEPS = 3, 1000  # of a block


@dataclass
class Timed:
    """The blocks of a profile: seconds of plain steps, parts of marked ones, bandwidth before and after, seconds of
    doubly marked steps."""

    plain: list[list[float]] = field(default_factory=list)
    marked: list[list[dict[Key, float]]] = field(default_factory=list)
    bandwidth: list[tuple[float, float] | None] = field(default_factory=list)
    twice: list[list[float]] = field(default_factory=list)

    def states(self) -> list[str]:
        """The bandwidth state of each block: high, low or mixed; "unknown" without a probe."""
        seen = [b for pair in self.bandwidth if pair for b in pair]
        if not seen:
            return ["unknown"] * len(self.plain)
        floor = hardware.STATE_TOLERANCE * max(seen)
        words = ("low", "mixed", "high")
        return [words[sum(b >= floor for b in pair)] if pair else "unknown" for pair in self.bandwidth]

    def kept(self) -> tuple[Timed, str]:
        """The blocks of the commonest state, and its name."""
        states = self.states()
        state = Counter(states).most_common(1)[0][0]
        index = [i for i, s in enumerate(states) if s == state]
        chosen = Timed(*([column[i] for i in index if i < len(column)] for column in self.columns))  # type: ignore[arg-type]
        return chosen, state

    @property
    def columns(self) -> tuple[list[Any], ...]:
        return self.plain, self.marked, self.bandwidth, self.twice


def time_blocks(step: Step, instruments: Sequence[Instrument], quick: bool, seed: int) -> Timed:
    """A plain step, one under the first of `instruments` and one under both, in turns, in random order.

    Args:
        instruments: none times the plain step alone; the second is one around the first.
    """
    kinds = range(1 + len(instruments))
    device = step.runner.device.type
    slice_sec, n_blocks = (QUICK_SLICE_SEC, QUICK_BLOCKS) if quick else (SLICE_SEC, N_BLOCKS)
    one = _warm_up(step, device)
    n_blocks = max(3, min(n_blocks, int(MAX_SEC / (len(kinds) * max(slice_sec, MIN_STEPS * one)))))
    probe = hardware.BandwidthProbe(torch.get_num_threads()) if device == "cpu" else None
    shuffle = random.Random(seed).shuffle
    timed = Timed()
    before = probe() if probe else 0.0
    for _ in range(n_blocks):
        plain: list[float] = []
        marked: list[dict[Key, float]] = []
        twice: list[float] = []
        with clock.quiet():
            while len(plain) < MIN_STEPS or (sum(plain) < slice_sec and len(plain) < MAX_STEPS):
                order = list(kinds)
                shuffle(order)
                for n_marks in order:
                    if n_marks == 0:
                        plain.append(_plain(step, device))
                    elif n_marks == 1:
                        marked.append(_marked(step, instruments[:1], device))
                    else:
                        twice.append(sum(_marked(step, instruments, device).values()))
        timed.plain.append(plain)
        timed.marked.append(marked)
        timed.twice.append(twice)
        after = probe() if probe else 0.0
        timed.bandwidth.append((before, after) if probe else None)
        before = after
    return timed


def _warm_up(step: Step, device: str) -> float:
    """Runs until two steps in a row differ by less than 5 %, within limits; seconds of a step."""
    started, last = clock.now(), float("inf")
    while True:
        now = _plain(step, device)
        elapsed = clock.now() - started
        if (abs(now / last - 1) < 0.05 and elapsed > WARM_UP_SEC) or elapsed > MAX_WARM_UP_SEC:
            return now
        last = now


def _plain(step: Step, device: str) -> float:
    step.prepare()
    clock.synchronize(device)
    started = clock.now()
    step.run()
    clock.synchronize(device)
    return clock.now() - started


def _marked(step: Step, instruments: Sequence[Instrument], device: str) -> dict[Key, float]:
    """Seconds by part, as the first of the instruments saw them."""
    marks = instruments[0].marks
    for instrument in instruments:
        instrument.install()
    try:
        step.prepare()
        clock.synchronize(device)
        for instrument in instruments:
            instrument.marks.start()
        step.run(marks)
        return marks.stop()
    finally:
        for instrument in reversed(instruments):
            instrument.remove()
