"""The tables of a profile: times, bytes and arithmetic of the parts, put together and held against the ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from paretune.hardware import Ceilings
from paretune.measure.profile_count import Counted, Counts
from paretune.measure.profile_marks import Key
from paretune.measure.profile_parts import BY_KEY, PARTS, SUMS, Group, title_of

Row = dict[str, Any]


def middle_half(totals: Sequence[float]) -> list[int]:
    """Indices of the values between the quartiles: what an interruption made long, or luck short, is left out."""
    order = sorted(range(len(totals)), key=lambda i: totals[i])
    quarter = len(order) // 4
    return order[quarter : len(order) - quarter]


def alike_half(plain: Sequence[float], marked: Sequence[float]) -> list[int]:
    """Indices of about half of the turns: without the slowest quarter, in which both steps were interrupted, those
    whose two steps stand to each other as most do; where one was interrupted, the ratio is off to either side."""
    order = sorted(range(len(plain)), key=lambda i: plain[i] + marked[i])
    order = order[: len(order) - len(order) // 4]
    middle = statistics.median(marked[i] / plain[i] for i in order)
    order.sort(key=lambda i: abs(marked[i] / plain[i] - middle))
    return sorted(order[: (2 * len(order) + 2) // 3])


def seconds_of(kept: Sequence[Mapping[Key, float]]) -> dict[Key, float]:
    """Seconds by part: the mean over the same steps for every part, so that parts add up to the step; medians of parts
    would not."""
    keys = dict.fromkeys(key for step in kept for key in step)
    return {key: statistics.fmean(step.get(key, 0.0) for step in kept) for key in keys}


def limits_of(counted: Counted, sec: float, n_calls: int, ceilings: Ceilings, dtype: str, step_bytes: int) -> Row:
    """Achieved rates of a part and its share of what this machine allows.

    The least time is the larger of bytes / bandwidth and FLOP / rate. Bandwidth is that of the working set: of all
    weights where a part streams weights (they come round once a step), of one call's data elsewhere (a cache may hold
    it, so a share above 1 is possible). Elementwise arithmetic is not held against the rate of matrix products.
    """
    reads_weights = counted.product_weight_bytes > 0
    n_bytes = counted.n_bytes
    working_set = step_bytes if reads_weights else max(1, n_bytes // max(1, n_calls))
    bandwidth = ceilings.bandwidth_at(working_set)
    rate = ceilings.matrix_rates.get(dtype) or ceilings.matrix_rates.get("fp32")
    memory_sec = n_bytes / bandwidth
    compute_sec = counted.product_flops / rate if rate else 0.0
    least = max(memory_sec, compute_sec)
    return {
        "bytes": n_bytes,
        "flops": counted.flops,
        "bytes_per_sec": n_bytes / sec if sec > 0 else None,
        "flops_per_sec": counted.flops / sec if sec > 0 else None,
        "ceiling_bandwidth": bandwidth,
        "least_sec": least,
        "limit": ("compute" if compute_sec > memory_sec else "memory") if least > 0 else None,
        "ceiling_share": least / sec if sec > 0 and least > 0 else None,
    }


def rows_of(
    seconds: Mapping[Key, float],
    counts: Counts,
    calls: Mapping[Key, int],
    plain_sec: float,
    ceilings: Ceilings,
    dtype: str,
    titles: Mapping[str, str],
) -> list[Row]:
    """One row a part and a group, parts in the order of a forward pass, each group before its members.

    `share` is of the independently timed step, `group_share` of the sum that the row stands in.
    """
    step_bytes = counts.total().n_bytes
    rows: dict[str, Row] = {}
    for part in PARTS:
        keys = [key for key in {**seconds, **counts.parts} if key[0] == part.key]
        if not keys:
            continue
        counted = Counted()
        for key in keys:
            counted += counts.parts.get(key, Counted())
        sec = sum(seconds.get(key, 0.0) for key in keys)
        backward = sum(seconds.get(key, 0.0) for key in keys if key[2])
        n_calls = sum(calls.get(key, 0) for key in keys)
        rows[part.key] = {
            "part": part.key,
            "group": part.group,
            "calls": n_calls,
            "sec": sec,
            "backward_sec": backward if any(key[2] for key in seconds) else None,
            "n_ops": counted.n_ops,
            "counted": counted,
            **limits_of(counted, sec, n_calls, ceilings, dtype, step_bytes),
        }
    for group in _INNER_FIRST:
        name, _, parent = SUMS[group]
        members = [r for r in rows.values() if r["group"] == group]
        if members:
            rows[name] = _sum_of(name, parent, members)
    totals = {group: sum(r["sec"] for r in rows.values() if r["group"] == group) for group in TABLES}
    out = []
    for group in TABLES:
        for name in ORDER:
            row = rows.get(name)
            if row is None or row["group"] != group:
                continue
            counted = row.pop("counted")
            details = {k: v for k, v in vars(counted).items() if k not in ("n_ops", "n_bytes", "flops")}
            is_published = name not in BY_KEY or BY_KEY[name].is_published
            out.append(
                {
                    **row,
                    **details,
                    "title": title_of(name, titles),
                    "is_published": is_published,
                    "share": row["sec"] / plain_sec,
                    "group_share": row["sec"] / totals[group] if totals[group] else None,
                    "intensity": row["flops"] / row["bytes"] if row["bytes"] else None,
                }
            )
    return out


def _sum_of(key: str, parent: Group, members: Sequence[Row]) -> Row:
    counted = Counted()
    for member in members:
        counted += member["counted"]
    sec, least = sum(m["sec"] for m in members), sum(m["least_sec"] for m in members)
    backward = [m["backward_sec"] for m in members if m["backward_sec"] is not None]
    by_limit = {kind: sum(m["least_sec"] for m in members if m["limit"] == kind) for kind in ("memory", "compute")}
    return {
        "part": key,
        "group": parent,
        "calls": sum(m["calls"] for m in members),
        "sec": sec,
        "backward_sec": sum(backward) if backward else None,
        "n_ops": counted.n_ops,
        "counted": counted,
        "bytes": counted.n_bytes,
        "flops": counted.flops,
        "bytes_per_sec": counted.n_bytes / sec if sec > 0 else None,
        "flops_per_sec": counted.flops / sec if sec > 0 else None,
        "ceiling_bandwidth": None,
        "least_sec": least,
        "limit": max(by_limit, key=lambda kind: by_limit[kind]),
        "ceiling_share": least / sec if sec > 0 else None,
    }


TABLES: tuple[Group, ...] = ("model", "block", "attention", "mlp")
_INNER_FIRST: tuple[Group, ...] = ("attention", "mlp", "block")


def _order() -> list[str]:
    """Parts in the order of a forward pass; a group stands where its first member does."""
    out: list[str] = []
    for part in PARTS:
        group: Any = part.group
        while group in SUMS:
            key, _, parent = SUMS[group]
            if key not in out:
                out.append(key)
            group = parent
        out.append(part.key)
    return out


ORDER = _order()


def layers_of(seconds: Mapping[Key, float]) -> list[Row]:
    """Seconds of each block of the stack."""
    found: dict[int, float] = {}
    for (_, layer, _), sec in seconds.items():
        if layer >= 0:
            found[layer] = found.get(layer, 0.0) + sec
    return [{"layer": layer, "sec": found[layer]} for layer in sorted(found)]
