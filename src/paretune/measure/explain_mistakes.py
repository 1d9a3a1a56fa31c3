"""Rules of the explanations: what is wrong whatever the times are."""

from __future__ import annotations

from collections.abc import Iterator

from paretune.measure import busy
from paretune.measure.explain_base import (
    Result,
    Rule,
    can_be_native,
    ceilings_of,
    class_share,
    gain_without,
    leaves_of,
)
from paretune.measure.roofline import percent, quantity
from paretune.records.explanation import Explanation

MANY_ZEROS = 0.3  # of the weights
MUCH_CONVERTED = 0.25  # of the bytes of the weights that products read


def _threads(result: Result) -> Iterator[Explanation]:
    facts = result.get("facts") or {}
    used, usable = facts.get("threads"), facts.get("usable_cores")
    if not used or not usable or used >= usable:
        return
    gain = usable / used
    ceilings, n_bytes = ceilings_of(result), (result.get("whole") or {}).get("needed_bytes")
    detail = ""
    if result.get("phase") == "decode" and ceilings and n_bytes:
        counts = {row["threads"] for row in ceilings.read_bandwidth}
        if {used, usable} <= counts:
            few, all_ = ceilings.bandwidth_at(n_bytes, used), ceilings.bandwidth_at(n_bytes, usable)
            gain = all_ / few
            detail = f": they read {quantity(few, 'B/s')} here, all of them {quantity(all_, 'B/s')}"
    yield Explanation(
        "threads",
        1 - 1 / max(gain, 1.0),
        f"it runs on {used} of {usable} usable cores{detail}",
        f"--threads {usable}, or no threads in the recipe",
        max(gain, 1.0),
    )


def _busy(result: Result) -> Iterator[Explanation]:
    facts, said = result.get("facts") or {}, busy.words_of_facts(result)
    if not said:
        return
    # Who left cores to the others already is not told to leave more.
    fewer = (facts.get("threads") or 1) >= (facts.get("usable_cores") or 1) > 1
    # A thread that waits for another one's share of a product waits a whole slice of the scheduler, milliseconds.
    yield Explanation(
        "busy machine",
        0.0,
        f"other programs run beside this one: {' and '.join(said)}; threads then wait for each other, so every "
        "time here is longer than on an idle machine",
        "close other programs and measure again" + (", or use fewer --threads" if fewer else ""),
    )


def _graph_break(result: Result) -> Iterator[Explanation]:
    n = (result.get("facts") or {}).get("graph_breaks") or 0
    if n:
        gap = class_share(result, "launch gap")
        spent = f", and {percent(gap)} of the step passes between kernels" if gap else ""
        yield Explanation(
            "graph break",
            gap,
            f"the compiled step falls apart at {n} graph break{'s' if n > 1 else ''}: Python runs between the pieces"
            + spent,
            "--config compile, which refuses graph breaks" + (", or --config native" if can_be_native(result) else ""),
            gain_without(gap) if gap else None,
        )


def _emulated(result: Result) -> Iterator[Explanation]:
    facts, whole = result.get("facts") or {}, result.get("whole") or {}
    if facts.get("emulated"):
        yield Explanation(
            "emulated dtype",
            0.0,
            f"{whole.get('dtype')} is emulated on this machine ({facts['emulated_reason']})",
            "--config baseline"
            if not can_be_native(result)
            else "--config native_bf16, which reads 16-bit weights and computes in fp32, or --config baseline",
        )


def _dequantised(result: Result) -> Iterator[Explanation]:
    facts = result.get("facts") or {}
    made, stored = facts.get("converted_bytes") or 0, _stored(result)
    if not made or made < MUCH_CONVERTED * max(stored, 1):
        return
    affected = [row for row in leaves_of(result) if row["converted_bytes"]]
    share = sum(row["share"] for row in affected)
    ceilings = ceilings_of(result)
    cost = ""
    gain = None
    sec = (result.get("whole") or {}).get("sec")
    if ceilings and sec:
        # Written once and read once by the product.
        wasted = 2 * made / ceilings.bandwidth_at(made) / sec
        gain = gain_without(min(wasted, share))
        cost = f"; writing and reading it takes at least {percent(min(wasted, 1.0))} of the step"
    yield Explanation(
        "dequantisation on every call",
        share,
        f"each step makes {quantity(made, 'B')} of another form of its weights anew (dequantised, cast or masked) "
        f"beside {quantity(stored, 'B')} that are stored, in parts that take {percent(share)} of it{cost}",
        "a format that is read as it is stored: --config native_int8, or native_bf16"
        if can_be_native(result)
        else "weights in the numbers that are computed with: no format",
        gain,
    )


def _stored(result: Result) -> float:
    whole = result.get("whole") or {}
    return whole.get("needed_bytes") or (result.get("facts") or {}).get("product_weight_bytes") or 0


def _zeros(result: Result) -> Iterator[Explanation]:
    zeros = (result.get("facts") or {}).get("zero_share") or 0.0
    if zeros < MANY_ZEROS:
        return
    share = sum(row["share"] for row in leaves_of(result) if row["product_weight_bytes"])
    yield Explanation(
        "masked dense weights",
        share * zeros,
        f"{percent(zeros)} of the weights are zero, yet stored and multiplied as a dense matrix"
        + (f", in parts that take {percent(share)} of the step" if share else ""),
        "pruning of whole columns, which makes the matrices smaller: zeros in a dense matrix save nothing",
        gain_without(share * zeros) if share else None,
    )


MISTAKES: tuple[Rule, ...] = (_busy, _threads, _graph_break, _emulated, _dequantised, _zeros)
