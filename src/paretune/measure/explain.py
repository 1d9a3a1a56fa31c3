"""Why a step takes the time it takes, in sentences that carry the figures they rest on, and what to try next.

Rules over the numbers of a profile (or of a trial: a rule whose figures are absent stays silent). Each names a cause,
the share of the step that it explains, and the gain that its cure can bring at most. A gain is a prediction: the share
of the step that the cure takes away, by the byte counts and the rates measured on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from paretune.hardware import Ceilings
from paretune.measure.roofline import NEAR_CEILING, quantity

MANY_ZEROS = 0.3  # of the weights
MUCH_CONVERTED = 0.25  # of the bytes of the weights that products read
LARGE = 0.4  # of the step: a cause that is called its bound
NOTABLE = 0.15
BUSY_PER_SEC = 100  # preemptions: a quiet machine has a few a second
BUSY_PRESSURE = 0.3  # of the time some task waits for a processor; our own threads leave none waiting
OVERHEAD = ("dispatch", "allocation")
# Bytes a weight by number format, for the gain of a smaller one.
_WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Explanation:
    """One cause.

    Args:
        cause: its name (`CAUSES`).
        share: of the step's time that it accounts for, or 0 where that is not known.
        sentence: what was found, with the figures.
        try_next: what to do in this tool.
        gain: predicted speed-up of the step at most, 1.5 for 1.5 times as fast; None: not predictable from here.
    """

    cause: str
    share: float
    sentence: str
    try_next: str
    gain: float | None = None

    @property
    def text(self) -> str:
        """Everything in one line."""
        gain = "" if self.gain is None else f" Predicted gain: at most {self.gain:.2f}x."
        return f"{self.sentence}. To try: {self.try_next}.{gain}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "text": self.text}


Result = Mapping[str, Any]
Rule = Callable[[Result], Iterator[Explanation]]


def explain(result: Result) -> list[Explanation]:
    """All causes that the figures show, what is simply wrong first, then by share of the step."""
    found = [e for rule in _MISTAKES for e in rule(result)]
    found += sorted((e for rule in _BOUNDS for e in rule(result)), key=lambda e: -e.share)
    return found or list(_nothing(result))


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 else "under 1 %"


def _time(sec: float) -> str:
    return quantity(sec * 1e6, "us") if sec < 1e-3 else f"{1e3 * sec:.3g} ms"


def _gain(share: float) -> float:
    """Speed-up when `share` of the step is gone."""
    return 1 / max(0.01, 1 - min(share, 0.99))


def _leaves(result: Result) -> list[Mapping[str, Any]]:
    return [row for row in result.get("parts") or () if row["part"] not in ("blocks", "attention", "mlp")]


def _ceilings(result: Result) -> Ceilings | None:
    return Ceilings.from_json(result["ceilings"]) if result.get("ceilings") else None


# ---- what is wrong whatever the times are


def _threads(result: Result) -> Iterator[Explanation]:
    facts = result.get("facts") or {}
    used, usable = facts.get("threads"), facts.get("usable_cores")
    if not used or not usable or used >= usable:
        return
    gain = usable / used
    ceilings, n_bytes = _ceilings(result), (result.get("whole") or {}).get("needed_bytes")
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
    facts, sec = result.get("facts") or {}, (result.get("whole") or {}).get("sec")
    n, pressure = facts.get("preemptions") or 0.0, facts.get("cpu_pressure") or 0.0
    said = []
    if sec and n / sec >= BUSY_PER_SEC:
        said.append(f"the step lost its processor {n / sec:,.0f} times a second")
    if pressure >= BUSY_PRESSURE:
        said.append(f"some program waited for a processor in {_percent(min(pressure, 1.0))} of the time")
    if not said:
        return
    # A thread that waits for another one's share of a product waits a whole slice of the scheduler, milliseconds.
    yield Explanation(
        "busy machine",
        0.0,
        f"other programs run beside this one: {' and '.join(said)}; threads then wait for each other, and every time "
        "here is worse than the machine's",
        "close other programs and measure again, or use fewer --threads",
    )


def _graph_break(result: Result) -> Iterator[Explanation]:
    n = (result.get("facts") or {}).get("graph_breaks") or 0
    if n:
        gap = _class_share(result, "launch gap")
        spent = f", and {_percent(gap)} of the step passes between kernels" if gap else ""
        yield Explanation(
            "graph break",
            gap,
            f"the compiled step falls apart at {n} graph break{'s' if n > 1 else ''}: Python runs between the pieces"
            + spent,
            "--config compile, which refuses graph breaks, or --config native",
            _gain(gap) if gap else None,
        )


def _emulated(result: Result) -> Iterator[Explanation]:
    facts, whole = result.get("facts") or {}, result.get("whole") or {}
    if facts.get("emulated"):
        yield Explanation(
            "emulated dtype",
            0.0,
            f"{whole.get('dtype')} is emulated on this machine ({facts['emulated_reason']})",
            "--config native, which reads 16-bit weights and computes in fp32, or fp32 (--config baseline)",
        )


def _dequantised(result: Result) -> Iterator[Explanation]:
    facts = result.get("facts") or {}
    made, stored = facts.get("converted_bytes") or 0, _stored(result)
    if not made or made < MUCH_CONVERTED * max(stored, 1):
        return
    affected = [row for row in _leaves(result) if row["converted_bytes"]]
    share = sum(row["share"] for row in affected)
    ceilings = _ceilings(result)
    cost = ""
    gain = None
    sec = (result.get("whole") or {}).get("sec")
    if ceilings and sec:
        # Written once and read once by the product.
        wasted = 2 * made / ceilings.bandwidth_at(made) / sec
        gain = _gain(min(wasted, share))
        cost = f"; writing and reading it takes at least {_percent(min(wasted, 1.0))} of the step"
    yield Explanation(
        "dequantisation on every call",
        share,
        f"each step makes {quantity(made, 'B')} of another form of its weights anew (dequantised, cast or masked) "
        f"beside {quantity(stored, 'B')} that are stored, in parts that take {_percent(share)} of it{cost}",
        "a format that is read as it is stored: --config native with int8, or plain 16-bit weights",
        gain,
    )


def _stored(result: Result) -> float:
    whole = result.get("whole") or {}
    return whole.get("needed_bytes") or (result.get("facts") or {}).get("product_weight_bytes") or 0


def _zeros(result: Result) -> Iterator[Explanation]:
    zeros = (result.get("facts") or {}).get("zero_share") or 0.0
    if zeros < MANY_ZEROS:
        return
    share = sum(row["share"] for row in _leaves(result) if row["product_weight_bytes"])
    yield Explanation(
        "masked dense weights",
        share * zeros,
        f"{_percent(zeros)} of the weights are zero, yet stored and multiplied as a dense matrix"
        + (f", in parts that take {_percent(share)} of the step" if share else ""),
        "pruning of whole columns, which makes the matrices smaller: zeros in a dense matrix save nothing",
        _gain(share * zeros) if share else None,
    )


# ---- what bounds it


def _weights(result: Result) -> Iterator[Explanation]:
    whole = result.get("whole") or {}
    dtype = str(whole.get("dtype"))
    leaves = [r for r in _leaves(result) if r["product_weight_bytes"] and r["limit"] == "memory"]
    if leaves:
        share, sec = sum(r["share"] for r in leaves), sum(r["sec"] for r in leaves)
        n_bytes = sum(r["bytes"] for r in leaves)
        reached = sum(r["least_sec"] for r in leaves) / sec if sec else 0.0
        what = f"reading weights takes {_percent(share)} of the step"
    elif not result.get("parts") and whole.get("mbu") and result.get("phase") == "decode":
        share, sec, n_bytes, reached = 1.0, whole["sec"], whole["needed_bytes"], whole["mbu"]
        what = "the step reads its weights and cache"
    else:
        return
    if share < LARGE or reached < NEAR_CEILING:
        return
    kept = _smallest_width(dtype)
    yield Explanation(
        "weight bandwidth",
        share,
        f"{what}: {quantity(n_bytes, 'B')} at {quantity(n_bytes / sec, 'B/s')}, {_percent(reached)} of what this "
        "machine reads",
        "fewer bytes a weight: --config native with int8, or bf16"
        if kept < 1
        else "a smaller model: these are the fewest bytes that this version stores",
        1 / (1 - share * (1 - kept)) if kept < 1 else None,
    )


def _smallest_width(dtype: str) -> float:
    """Bytes of int8 against those of the present format."""
    return _WIDTH["int8"] / _WIDTH.get(dtype, 4)


def _cache(result: Result) -> Iterator[Explanation]:
    leaves = [r for r in _leaves(result) if r["cache_bytes"]]
    share = sum(r["share"] for r in leaves)
    n_bytes, total = sum(r["cache_bytes"] for r in leaves), sum(r["bytes"] for r in _leaves(result))
    if share < NOTABLE or n_bytes < 0.3 * total:
        return
    sec = sum(r["sec"] for r in leaves)
    yield Explanation(
        "cache bandwidth",
        share,
        f"the key/value cache moves {quantity(n_bytes, 'B')} a step at {quantity(n_bytes / sec, 'B/s')}, "
        f"{_percent(n_bytes / total)} of all bytes and {_percent(share)} of the time",
        "a 16-bit cache (--config bf16), a shorter context, or attention in one kernel (--config baseline)",
        1 / (1 - share / 2),
    )


def _arithmetic(result: Result) -> Iterator[Explanation]:
    whole, ceilings = result.get("whole") or {}, _ceilings(result)
    leaves = [r for r in _leaves(result) if r["limit"] == "compute"]
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
    rates = ceilings.matrix_rates if ceilings else {}
    best = max((n for n in ("fp32", "bf16", "fp16") if n in rates), key=lambda n: rates[n], default=dtype)
    faster = rates[best] / rates[dtype] if dtype in rates and best in rates else 1.0
    yield Explanation(
        "arithmetic",
        share,
        f"matrix products take {_percent(share)} of the step and do {quantity(flops, 'FLOP')} at "
        f"{quantity(flops / sec, 'FLOP/s')}, {_percent(reached)} of what this machine computes in {dtype}",
        f"--config {best}, whose products run at {quantity(rates[best], 'FLOP/s')} here"
        if faster > 1.1
        else "a shorter prompt or a smaller model: no number format computes faster here",
        1 / (1 - share * (1 - 1 / faster)) if faster > 1.1 else None,
    )


def _class_share(result: Result, *kinds: str) -> float:
    return sum(row["share"] for row in result.get("kernel_classes") or () if row["kind"] in kinds)


def _dispatch(result: Result) -> Iterator[Explanation]:
    tiny = [k for k in result.get("kernels") or () if k["kind"] == "copy/reshape" and k["sec"] < 3e-6 * k["count"]]
    profiled = result.get("profiled_sec") or 0.0
    share = _class_share(result, *OVERHEAD) + (sum(k["sec"] for k in tiny) / profiled if profiled else 0.0)
    if share < NOTABLE:
        return
    n = sum(row["count"] for row in result["kernel_classes"] if row["kind"] != "launch gap")
    yield Explanation(
        "dispatch overhead",
        share,
        f"a step calls {n:,.0f} operators, and finding them, views and small allocations take {_percent(share)} of it "
        f"({_time(profiled * share / max(n, 1))} an operator)",
        "--config native (one call a step), or --config compile (fewer operators)",
        _gain(share),
    )


def _python(result: Result) -> Iterator[Explanation]:
    gap = sum(row["sec"] for row in result.get("kernel_classes") or () if row["kind"] == "launch gap")
    sec = (result.get("whole") or {}).get("sec")
    if not gap or not sec:
        return
    # What the profiler itself makes a step longer is taken off: most of it lies between kernels.
    gap -= max(0.0, (result.get("profiled_sec") or 0.0) - sec)
    share = gap / sec
    if share < NOTABLE:
        return
    where = "Python" if result.get("device") == "cpu" else "the GPU is idle"
    yield Explanation(
        "Python",
        min(share, 1.0),
        f"{_time(gap)} of a step ({_percent(share)}) pass between kernels, the profiler's own time taken off: {where}",
        "--config native or --config compile, which leave Python out of the step",
        _gain(share),
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
        f"a step touches {n:,.0f} fresh pages, at {_time(cost)} each {_percent(share)} of its time: "
        "large results are allocated anew and given back",
        "attention without a score matrix (--config baseline), or buffers that are kept (--config native, compile)",
        _gain(share),
    )


def _nothing(result: Result) -> Iterator[Explanation]:
    """Where no rule fires: what the roofline says."""
    sentence = (result.get("whole") or {}).get("bound_by")
    if sentence:
        yield Explanation("no single cause", 0.0, sentence, "paretune tune, which measures the alternatives")


_MISTAKES: tuple[Rule, ...] = (_busy, _threads, _graph_break, _emulated, _dequantised, _zeros)
_BOUNDS: tuple[Rule, ...] = (_weights, _cache, _arithmetic, _dispatch, _python, _allocation)
CAUSES = (
    "busy machine",
    "threads",
    "graph break",
    "emulated dtype",
    "dequantisation on every call",
    "masked dense weights",
    "weight bandwidth",
    "cache bandwidth",
    "arithmetic",
    "dispatch overhead",
    "Python",
    "memory allocation",
    "no single cause",
)
