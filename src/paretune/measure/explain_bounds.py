"""Rules of the explanations: what bounds a step, by the share of it that each cause takes."""

from __future__ import annotations

from collections.abc import Iterator

from paretune.measure.explain_base import (
    ABOVE_CEILING,
    LARGE,
    NOTABLE,
    Result,
    Rule,
    can_be_native,
    ceilings_of,
    duration,
    gain_without,
    is_on_cpu,
    is_training,
    leaves_of,
    runner_of,
    runners_to_try,
)
from paretune.measure.roofline import NEAR_CEILING, percent, quantity
from paretune.recipe import Recipe
from paretune.records.explanation import Explanation

OVERHEAD = ("dispatch", "allocation")
# Bytes a weight where a result does not say how its weights are stored.
WIDTH = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0}
INT4_BYTES = 0.5625  # with the scales of its groups of 32
REAL_SHARE = 0.8  # of a ceiling: what a good kernel reaches as a rule


def _weights(result: Result) -> Iterator[Explanation]:
    whole = result.get("whole") or {}
    leaves = [r for r in leaves_of(result) if r["product_weight_bytes"] and r["limit"] == "memory"]
    if leaves:
        share, sec = sum(r["share"] for r in leaves), sum(r["sec"] for r in leaves)
        n_bytes = sum(r["bytes"] for r in leaves)
        reached = sum(r["least_sec"] for r in leaves) / sec if sec else 0.0
        what = f"reading weights takes {percent(share)} of the step"
    elif not result.get("parts") and whole.get("mbu") and result.get("phase") == "decode":
        share, sec, n_bytes, reached = 1.0, whole["sec"], whole["needed_bytes"], whole["mbu"]
        what = "the step reads its weights and cache"
    else:
        return
    if share < LARGE or reached < NEAR_CEILING:
        return
    if reached > ABOVE_CEILING:
        yield _surpassed(share, f"weights were read at {quantity(n_bytes / sec, 'B/s')}", reached, "bandwidth")
        return
    kept, advice = _narrower(result)
    yield Explanation(
        "weight bandwidth",
        share,
        f"{what}: {quantity(n_bytes, 'B')} at {quantity(n_bytes / sec, 'B/s')}, {percent(reached)} of what this "
        "machine reads",
        advice,
        1 / (1 - share * (1 - kept)) if kept < 1 else None,
    )


def _surpassed(share: float, did: str, reached: float, what: str) -> Explanation:
    return Explanation(
        "unsteady machine",
        share,
        f"{did}, {percent(reached)} of what was measured as the largest {what}: the largest was measured "
        "in a worse moment, or the data stays in a cache, so every share of it is too large",
        "measuring again when nothing else runs",
    )


def _narrower(result: Result) -> tuple[float, str]:
    """Bytes of the next narrower format against those of the present one, and how to get it."""
    whole = result.get("whole") or {}
    width = whole.get("bytes_per_weight") or WIDTH.get(str(whole.get("dtype")), 4.0)
    if is_training(result):
        return 1.0, "a larger --batch-size: its tokens share the reading"
    if width > 1.5:
        names = "native_int8, or native_bf16" if can_be_native(result) else "int8, or bf16"
        return 1.0 / width, f"fewer bytes a weight: --config {names}"
    if width > 0.9 and can_be_native(result):
        return INT4_BYTES / width, "fewer bytes a weight: --config native_int4 (its loss of quality is to be measured)"
    return 1.0, "a smaller model: these are the fewest bytes a weight that this version stores"


def _slow_products(result: Result) -> Iterator[Explanation]:
    """Products that take most of the step and reach neither ceiling: the kernels themselves are what could be better.

    Their own time, as the profiler saw it: what finding them takes is another cause.
    """
    classes = [row for row in result.get("kernel_classes") or () if row["kind"] in ("GEMM", "GEMV")]
    whole = result.get("whole") or {}
    sec, step_sec = sum(row["sec"] for row in classes), whole.get("sec")
    if not sec or not step_sec or runner_of(result).own_kernels:
        return
    leaves = [r for r in leaves_of(result) if r["product_weight_bytes"]]
    if leaves:
        n_bytes, flops = sum(r["bytes"] for r in leaves), sum(r["flops"] for r in leaves)
        reading = sum(r["least_sec"] for r in leaves if r["limit"] == "memory")
        computing = sum(r["least_sec"] for r in leaves if r["limit"] == "compute")
    else:  # inside a graph: what the whole step needs
        n_bytes, flops = whole.get("needed_bytes") or 0, whole.get("needed_flops") or 0
        reading, computing = (step_sec * (whole.get(key) or 0.0) for key in ("mbu", "mfu"))
        reading, computing = (reading, 0.0) if reading > computing else (0.0, computing)
    share, reached = min(1.0, sec / step_sec), (reading + computing) / sec
    if share < LARGE or not 0 < reached < NEAR_CEILING:
        return
    if reading > computing:
        did = f"read {quantity(n_bytes, 'B')} at {quantity(n_bytes / sec, 'B/s')}, {percent(reached)} of what this "
        did += "machine reads"
    else:
        did = f"do {quantity(flops, 'FLOP')} at {quantity(flops / sec, 'FLOP/s')}, {percent(reached)} of the rate "
        did += "of large products here"
    yield Explanation(
        "slow products",
        share,
        f"the library's matrix products take {percent(share)} of the step and {did}: their kernels, not the machine, "
        "are the limit",
        "--config native, whose products stream packed weights" if can_be_native(result) else "a larger --batch-size",
        gain_without(share * max(0.0, 1 - reached / REAL_SHARE)),
    )


def _cache(result: Result) -> Iterator[Explanation]:
    leaves = [r for r in leaves_of(result) if r["cache_bytes"]]
    share = sum(r["share"] for r in leaves)
    n_bytes, total = sum(r["cache_bytes"] for r in leaves), sum(r["bytes"] for r in leaves_of(result))
    if share < NOTABLE or n_bytes < 0.3 * total:
        return
    sec = sum(r["sec"] for r in leaves)
    yield Explanation(
        "cache bandwidth",
        share,
        f"the key/value cache moves {quantity(n_bytes, 'B')} a step at {quantity(n_bytes / sec, 'B/s')}, "
        f"{percent(n_bytes / total)} of all bytes and {percent(share)} of the time",
        ("an int8 cache (--config native_int8_kv8)" if can_be_native(result) else "an int8 cache (--config kv8)")
        + ", a shorter context, or attention in one kernel (--config baseline)",
        1 / (1 - share / 2),
    )


def _arithmetic(result: Result) -> Iterator[Explanation]:
    whole, ceilings = result.get("whole") or {}, ceilings_of(result)
    leaves = [r for r in leaves_of(result) if r["limit"] == "compute"]
    if leaves:
        share, sec = sum(r["share"] for r in leaves), sum(r["sec"] for r in leaves)
        flops = sum(r["flops"] for r in leaves)
        reached = sum(r["least_sec"] for r in leaves) / sec if sec else 0.0
    elif not result.get("parts") and whole.get("mfu"):
        share, sec, flops, reached = 1.0, whole["sec"], whole["needed_flops"], whole["mfu"]
    else:
        return
    if share < LARGE or reached < NEAR_CEILING:
        return
    dtype = str(whole.get("dtype"))
    if reached > ABOVE_CEILING:  # no bound, whatever it is called
        did = f"matrix products ran at {quantity(flops / sec, 'FLOP/s')}"
        yield _surpassed(share, did, reached, f"rate of this machine in {dtype}")
        return
    rates = ceilings.matrix_rates if ceilings else {}
    best = max((n for n in ("fp32", "bf16", "fp16") if n in rates), key=lambda n: rates[n], default=dtype)
    faster = rates[best] / rates[dtype] if dtype in rates and best in rates else 1.0
    yield Explanation(
        "arithmetic",
        share,
        f"matrix products take {percent(share)} of the step and do {quantity(flops, 'FLOP')} at "
        f"{quantity(flops / sec, 'FLOP/s')}, {percent(reached)} of what this machine computes in {dtype}",
        f"--config {best}, whose products run at {quantity(rates[best], 'FLOP/s')} here"
        if faster > 1.1
        else "a shorter prompt or a smaller model: no number format computes faster here",
        1 / (1 - share * (1 - 1 / faster)) if faster > 1.1 else None,
    )


def _between(result: Result) -> tuple[float, float]:
    """Seconds of a step that pass in finding operators (with views and small allocations), and between operators.

    A profiled step is longer than a plain one, and nearly all of that lies around the kernels, not in them: it is taken
    off both, in proportion.
    """
    tiny = [k for k in result.get("kernels") or () if k["kind"] == "copy/reshape" and k["sec"] < 3e-6 * k["count"]]
    classes = result.get("kernel_classes") or ()
    finding = sum(k["sec"] for k in tiny) + sum(row["sec"] for row in classes if row["kind"] in OVERHEAD)
    gap = max(0.0, sum(row["sec"] for row in classes if row["kind"] == "launch gap"))
    profiled = result.get("profiled_sec") or 0.0
    excess = max(0.0, profiled - ((result.get("whole") or {}).get("sec") or profiled))
    kept = max(0.0, 1 - excess / (finding + gap)) if finding + gap else 0.0
    return kept * finding, kept * gap


_LESS_DISPATCH = ("--config native (one call a step)", "--config compile (fewer operators, less Python)")


def _dispatch(result: Result) -> Iterator[Explanation]:
    spent, sec = _between(result)[0], (result.get("whole") or {}).get("sec")
    if not sec or spent / sec < NOTABLE:
        return
    share = min(1.0, spent / sec)
    n = sum(row["count"] for row in result["kernel_classes"] if row["kind"] != "launch gap")
    yield Explanation(
        "dispatch overhead",
        share,
        f"a step calls {n:,.0f} operators, and finding them, views and small allocations take {percent(share)} of it "
        f"({duration(spent / max(n, 1))} an operator, the profiler's own time taken off)",
        runners_to_try(result, *_LESS_DISPATCH),
        gain_without(share),
    )


def _python(result: Result) -> Iterator[Explanation]:
    gap, sec = _between(result)[1], (result.get("whole") or {}).get("sec")
    if not gap or not sec or gap / sec < NOTABLE:
        return
    share = min(1.0, gap / sec)
    cause, where = ("Python", "Python") if is_on_cpu(result) else ("launch overhead", "the GPU is idle")
    yield Explanation(
        cause,
        share,
        f"{duration(gap)} of a step ({percent(share)}) pass between kernels, the profiler taken off: {where}",
        runners_to_try(result, *_LESS_DISPATCH),
        gain_without(share),
    )


def _allocation(result: Result) -> Iterator[Explanation]:
    facts, whole = result.get("facts") or {}, result.get("whole") or {}
    n, cost, sec = facts.get("page_faults"), facts.get("page_fault_sec"), whole.get("sec")
    if not n or not cost or not sec or n * cost / sec < 0.05:
        return
    share = min(1.0, n * cost / sec)
    yield Explanation(
        "memory allocation",
        share,
        f"a step touches {n:,.0f} fresh pages, at {duration(cost)} each {percent(share)} of its time: "
        "large results are allocated anew and given back",
        _kept_buffers(result),
        gain_without(share),
    )


def _kept_buffers(result: Result) -> str:
    """What allocates less than the present recipe."""
    recipe = result.get("recipe")
    said = []
    if recipe and Recipe.from_dict({"transforms": recipe.get("transforms") or ()}).has_score_matrix:
        said.append("attention without a score matrix (--config baseline)")
    if is_training(result):
        said.append("fewer sequences at once (--batch-size, with --grad-accumulation in `paretune train`)")
    elif runner_of(result).is_reference:
        which = "--config native or compile" if can_be_native(result) else "--config compile"
        said.append(f"buffers that are kept ({which})")
    return " or ".join(said) or "a shorter prompt or a smaller --batch-size"


BOUNDS: tuple[Rule, ...] = (_weights, _slow_products, _cache, _arithmetic, _dispatch, _python, _allocation)
