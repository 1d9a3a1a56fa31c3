"""What the user wants: an objective, a quality bound, a budget."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import get_args

from paretune.errors import UsageError
from paretune.measure.peers.catalogue import OURS, engines_of
from paretune.records.tune import Objective, TuneGoal

ALLOWED = ("changed-weights",)  # of `allow`: `space.CHANGED_WEIGHTS`
OBJECTIVES = get_args(Objective)
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_percent(text: str) -> float:
    """`1%` or `0.01` -> 0.01.

    Raises:
        UsageError: no number, or negative.
    """
    number, percent = (text[:-1], True) if text.endswith("%") else (text, False)
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        raise UsageError(f"{text!r} is not a percentage", "Write it as 1% or 0.01") from None
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"{text!r} is not a bound", "It has to be 0 or more")
    return value


def parse_duration(text: str) -> float:
    """`90s`, `5m`, `1h30m` or plain seconds -> seconds.

    Raises:
        UsageError: not a duration above zero.
    """
    if re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    else:
        parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
        if not parts or "".join(a + b for a, b in parts) != text:
            raise UsageError(f"{text!r} is not a duration", "Write it as 90s, 5m or 1h30m")
        seconds = sum(float(a) * _UNITS[b] for a, b in parts)
    if not 0 < seconds < math.inf:
        raise UsageError(f"{text!r} is not a duration", "It has to be above zero")
    return seconds


def parse_grid(text: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """`1,8x128,1024` -> batch sizes and lengths, ascending; None for `auto`.

    Raises:
        UsageError: neither.
    """
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d+(?:,\d+)*)x(\d+(?:,\d+)*)", text.replace(" ", ""))
    sides = [tuple(sorted({int(n) for n in side.split(",")})) for side in match.groups()] if match else []
    if not sides or min(map(min, sides)) < 1:
        raise UsageError(
            f"--regimes is {text!r}", "Write auto, or batch sizes x lengths of 1 or more such as 1,8x128,1024"
        )
    return sides[0], sides[1]


@dataclass(frozen=True)
class Goal(TuneGoal):
    """The request of one `tune` run, checked."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UsageError(f"unknown objective {self.objective!r}", f"Known: {', '.join(OBJECTIVES)}")
        # Not a number fails each of these: it would run for the whole budget and then not fit into strict JSON.
        if self.min_speedup is not None and not 0 < self.min_speedup < math.inf:
            raise UsageError(f"--min-speedup is {self.min_speedup}", "It has to be above 0")
        if not 0 < self.budget_sec < math.inf:
            raise UsageError(f"the budget is {self.budget_sec} s", "It has to be above 0")
        if not 0 <= self.max_ppl_increase < math.inf:
            raise UsageError(f"--max-ppl-increase is {self.max_ppl_increase}", "It has to be 0 or more")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads is {self.threads}", "It has to be 1 or more")
        object.__setattr__(self, "allow", tuple(self.allow))
        for name in self.allow:
            if name not in ALLOWED:
                raise UsageError(f"--allow {name!r} is not known", f"Known: {', '.join(ALLOWED)}")
        object.__setattr__(self, "engines", self._read_engines())
        if self.regimes is not None:
            parse_grid(self.regimes)
            if self.in_bytes:
                raise UsageError(
                    f"--regimes ranks forms by time, and the objective is {self.objective}",
                    "Leave --regimes out, or choose tpot, ttft or throughput",
                )

    def _read_engines(self) -> tuple[str, ...]:
        """By their full names, each once; `paretune` itself adds nothing."""
        given: str | tuple[str, ...] = self.engines
        if not given and not isinstance(given, str):  # an empty text was typed: a mistake
            return ()
        text = given if isinstance(given, str) else ",".join(given)
        for part in text.split(","):
            if part.strip().startswith(f"{OURS}:"):
                raise UsageError(f"{part.strip()!r}: the formats of {OURS} are what is searched", f"Write {OURS}")
        names = tuple(engine.name for engine in engines_of(text)[1])
        if names and self.device != "cpu":
            cure = "Leave --engine out, or --device cpu"
            raise UsageError(f"peers are measured on the CPU, not on {self.device!r}", cure)
        return names
