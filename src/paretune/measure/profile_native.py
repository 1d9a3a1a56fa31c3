"""Operations of the native runner, from its own counters, where it has them.

What a runner gives: an attribute `counters`, None while off (the default, and then free) or a list of
(operation, layer or -1, calls, seconds, bytes, FLOP), sums since they were switched on; and `count_(on: bool)`, which
switches them on from zero or off. An operation is named by the parts that it runs, joined by "+" in their order:
`norm_1+qkv_projection`, `fused_attention`, `output_projection+residual_1`, `norm_2+expansion+activation`,
`projection+residual_2`, `final_norm+head` (keys of `profile_parts.PARTS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from paretune import clock
from paretune.hardware import Ceilings
from paretune.measure.profile_steps import Step

N_STEPS = 20
OUTSIDE = "outside the operations"


class Counter(NamedTuple):
    """One operation of one layer, summed over the steps that were counted."""

    operation: str
    layer: int
    calls: int
    sec: float
    n_bytes: int
    flops: int


def rows(runner: Any, step: Step, whole: Mapping[str, Any], ceilings: Ceilings) -> dict[str, Any] | None:
    """Operations of a step, the mean over `N_STEPS`; None for other runners, a reason where nothing was counted.

    The steps that were counted are timed too (`step_sec`): shares are of them, and the last row is what of them passed
    outside the operations, in Python and in waking the threads. Rows add up to that step.

    Args:
        whole: of the profile: of its bytes is the working set of the weights.
    """
    if not runner.own_kernels:
        return None
    counted, spent = _counted(runner, step, N_STEPS)
    if not counted:
        reason = "this step does not run in native code"
        return {"available": False, "reason": reason, "rows": [], "sum_sec": 0.0, "step_sec": 0.0}
    sums: dict[str, list[float]] = {}
    for entry in counted:
        total = sums.setdefault(entry.operation, [0.0] * 4)
        for i, value in enumerate((entry.calls, entry.sec, entry.n_bytes, entry.flops)):
            total[i] += value / N_STEPS
    out: list[dict[str, Any]] = []
    step_sec = spent / N_STEPS
    bandwidth = ceilings.bandwidth_at(whole["needed_bytes"] or 1)
    rate = ceilings.matrix_rates.get(whole["dtype"]) or ceilings.matrix_rates.get("fp32")
    for operation, (calls, sec, n_bytes, flops) in sums.items():
        rates = {"bytes_per_sec": n_bytes / sec, "flops_per_sec": flops / sec} if sec else {}
        memory_sec, compute_sec = n_bytes / bandwidth, flops / rate if rate else 0.0
        least = max(memory_sec, compute_sec)
        row = {"operation": operation, "calls": calls, "sec": sec, "bytes": n_bytes, "flops": flops}
        row |= {"share": sec / step_sec, "ceiling_share": least / sec if sec and least else None}
        row["limit"] = ("compute" if compute_sec > memory_sec else "memory") if least else None
        out.append({**row, "bytes_per_sec": None, "flops_per_sec": None, **rates})
    out.sort(key=lambda row: -row["sec"])
    sum_sec = sum(row["sec"] for row in out)
    rest = dict.fromkeys(out[0], None) | {"operation": OUTSIDE, "calls": 1.0, "sec": step_sec - sum_sec}
    rest |= {"share": 1 - sum_sec / step_sec, "bytes": 0, "flops": 0}
    return {"available": True, "reason": "", "rows": [*out, rest], "sum_sec": sum_sec, "step_sec": step_sec}


def spans(runner: Any, step: Step) -> list[tuple[str, float]]:
    """(operation with its layer, seconds) of one step in the order in which they ran; empty for other runners."""
    if not runner.own_kernels:
        return []
    counted, _ = _counted(runner, step, 1)
    return [(f"layer {c.layer}: {c.operation}" if c.layer >= 0 else c.operation, c.sec) for c in counted if c.calls]


def _counted(runner: Any, step: Step, n_steps: int) -> tuple[list[Counter], float]:
    """Counters of the native runner over so many steps, and the seconds of these."""
    runner.count_(True)
    spent = 0.0
    try:
        for _ in range(n_steps):
            step.prepare()
            started = clock.now()
            step.run()
            spent += clock.now() - started
        return [Counter(*entry) for entry in runner.counters or ()], spent
    finally:
        runner.count_(False)
