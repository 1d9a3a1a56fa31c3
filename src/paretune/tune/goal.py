"""What the user wants: an objective, a quality bound, a budget."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from paretune.errors import UsageError
from paretune.measure.peers.catalogue import OURS, engines_of

ALLOWED = ("changed-weights",)  # of `allow`: `space.CHANGED_WEIGHTS`
OBJECTIVES = ("tpot", "ttft", "throughput", "memory", "size")
Objective = Literal["tpot", "ttft", "throughput", "memory", "size"]
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
        raise UsageError(f"{text!r} is no percentage", "Write it as 1% or 0.01") from None
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
            raise UsageError(f"{text!r} is no duration", "Write it as 90s, 5m or 1h30m")
        seconds = sum(float(a) * _UNITS[b] for a, b in parts)
    if not 0 < seconds < math.inf:
        raise UsageError(f"{text!r} is no duration", "It has to be above zero")
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
class Goal:
    """The request of one `tune` run.

    Args:
        objective: what is made small: seconds per output token, to the first token, per token of a batch; bytes of
            weights, cache and activations; bytes of weights.
        max_ppl_increase: largest relative increase of perplexity over the baseline; its upper bound is held to it.
        min_speedup: what the winner has to reach at least; None asks for nothing.
        budget_sec: for the search and the confirmation, once the machine is measured and the baseline runs.
        input_len, output_len, batch_size: the request that is made fast.
        regimes: grid of batch sizes and lengths (`auto`, `1,8x128,1024`) over which forms are measured for the plan's
            table of choice; None: no such table.
        allow: what else may be tried, `changed-weights`.
        engines: peers that the winner is compared with, `llama.cpp:Q8_0`; a text is split at its commas.
    """

    objective: Objective = "tpot"
    max_ppl_increase: float = 0.01
    min_speedup: float | None = None
    budget_sec: float = 300.0
    input_len: int = 128
    output_len: int = 32
    batch_size: int = 1
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    engines: tuple[str, ...] = ()
    regimes: str | None = None
    allow: tuple[str, ...] = ()

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

    @property
    def sample_kind(self) -> str:
        """What is timed (`workload.KINDS`); objectives in bytes time the decode step beside."""
        return self.objective if self.objective in ("tpot", "ttft", "throughput") else "tpot"

    @property
    def in_bytes(self) -> bool:
        return self.objective in ("memory", "size")

    def to_json(self) -> dict[str, Any]:
        out = {**asdict(self), "engines": list(self.engines), "allow": list(self.allow)}
        return out if self.allow else {k: v for k, v in out.items() if k != "allow"}
