"""What a profile finds out beside times: threads, emulated formats, graph breaks, zeros, conversions, page faults.

These are counted, not timed (but for the cost of a page fault), so the explanations that rest on them do not need a
quiet machine.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from paretune import clock, hardware
from paretune.engine.load import Loaded
from paretune.measure import busy
from paretune.measure.explain_base import leaves_of
from paretune.measure.profile_steps import Step
from paretune.model.layers import Linear
from paretune.ops.weights.dense import Dense

_FAULT_BYTES = 32 << 20
_FEW_STEPS, _MANY_STEPS, _WATCH_SEC = 3, 1000, 0.2


class BreakCounter:
    """Graph breaks of `torch.compile` since it was made."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> int:
        from torch._dynamo.utils import counters

        return sum(counters["graph_break"].values())

    def count(self) -> int:
        return self._now() - self._before


def zero_share(model: torch.nn.Module) -> float:
    """Share of the weights of dense linear layers that are exactly zero: they are multiplied all the same."""
    n_zeros = n_values = 0
    for weight in {id(m.weight): m.weight for m in model.modules() if isinstance(m, Linear)}.values():
        if isinstance(weight, Dense):
            n_zeros += int((weight.values == 0).sum())
            n_values += weight.values.numel()
    return n_zeros / n_values if n_values else 0.0


def bytes_per_weight(model: torch.nn.Module) -> float | None:
    """Stored bytes of the matrices of linear layers, scales and all, for each of their values."""
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, Linear)}.values()
    n = sum(w.out_features * w.in_features for w in weights)
    return sum(w.stored_bytes for w in weights) / n if n else None


def page_faults() -> int | None:
    """Minor page faults of this process so far; None where the system does not count them."""
    counted = busy.usage()
    return None if counted is None else counted.ru_minflt


@functools.cache
def page_fault_sec() -> float:
    """Seconds that the first touch of a page costs here: filling fresh memory against filling it again, by page."""
    found = []
    for _ in range(5):  # the least of five: another program may take the processor in between
        before = page_faults()
        fresh = torch.empty(_FAULT_BYTES, dtype=torch.uint8)
        spent = []
        for _ in range(2):
            started = clock.now()
            fresh.fill_(1)
            spent.append(clock.now() - started)
        n = (page_faults() or 0) - (before or 0)
        found.append(max(0.0, spent[0] - spent[1]) / n if n > 0 else 0.0)
        del fresh
    return min(found)


def facts(loaded: Loaded, step: Step, result: dict[str, Any], breaks: BreakCounter) -> dict[str, Any]:
    """What `explain` looks at, beside times; `result` is what `profile.take_apart` gave, with the threads."""
    runner = loaded.runner
    device = runner.device.type
    dtype = result["whole"]["dtype"]
    support = hardware.dtype_support(device).get(dtype) if dtype != "fp32" else None
    watch, n_steps, started = busy.BusyWatch(), 0, clock.now()
    while n_steps < _FEW_STEPS or (clock.now() - started < _WATCH_SEC and n_steps < _MANY_STEPS):
        step.prepare()
        step.run()
        n_steps += 1
    seen = watch()
    parts = leaves_of(result)
    return {
        "threads": result["threads"]["threads"],
        "usable_cores": result["threads"]["usable_cores"],
        "emulated": bool(support and support.emulated) and not runner.own_kernels,
        "emulated_reason": support.reason if support else "",
        "graph_breaks": breaks.count(),
        "zero_share": zero_share(step.model),
        "converted_bytes": sum(row["converted_bytes"] for row in parts),
        "product_weight_bytes": sum(row["product_weight_bytes"] for row in parts),
        "allocated_bytes": sum(row["allocated_bytes"] for row in parts),
        "cache_bytes": sum(row["cache_bytes"] for row in parts),
        "n_ops": sum(row["n_ops"] for row in parts),
        "page_faults": None if seen.page_faults is None else seen.page_faults / n_steps,
        "preemptions": None if seen.preemptions is None else seen.preemptions / n_steps,
        "cpu_pressure": seen.pressure,
        "page_fault_sec": page_fault_sec() if device == "cpu" else None,
    }
