"""Numbers with their units, and what they mean: one way to write them in every table, page and picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

NOT_MEASURED = "not measured"

# Peers disagree about these words (some count the first token in TPOT), so every table prints what it means.
DEFINITIONS: dict[str, str] = {
    "Baseline": ("the model as it was given, run in the ordinary way. Every other row is compared with it."),
    "Speed-up": (
        "how many times as fast as the baseline: the median over blocks in which both were timed side by "
        "side. 1.00x is the same speed, more is faster. The range in brackets is the 95 % confidence "
        "interval."
    ),
    "TTFT": (
        "time to first token: from the start of the request until the first output token is there. Median; "
        "lower is better."
    ),
    "TPOT": (
        "time per output token after the first: (whole request - TTFT) / (output tokens - 1). Median; lower is better."
    ),
    "ITL": "inter-token latency: each single gap between two output tokens.",
    "Throughput": "output tokens per second, over all requests of the batch.",
    "Weights": ("bytes of the model as stored in memory, shared tensors counted once. 1 MB = 1,000,000 bytes."),
    "Peak memory": "largest resident memory of the whole process, libraries included.",
    "Perplexity": "how surprised the model is by real text. Lower is better.",
    "Quality loss": (
        "increase of perplexity (how surprised the model is by real text) over the baseline on the same "
        "text. 'At most' is the upper end of a one-sided 95 % interval: that end has to stay within the "
        "limit."
    ),
    "Guarantee": (
        "'lossless': shown to give the same output. 'bounded': the output may differ, its quality was "
        "measured to be within the limit. 'changed weights': pruned or trained further, its quality was "
        "measured."
    ),
    "Pays back after": "output tokens until the extra time to load and compile is won back.",
    "Bandwidth use": (
        "bytes that one output token has to read (weights and cache) / TPOT, as a share of the read "
        "bandwidth measured on this machine. Also called MBU."
    ),
}


def number(value: Any) -> float | None:
    """`value` as a finite float, or None: results of failed trials hold None, NaN or nothing at all."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def dig(value: Any, *keys: str) -> Any:
    """`value[k1][k2]...`, or None as soon as something on the way is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _digits(value: float, n_digits: int = 3) -> str:
    """Three significant digits and never an exponent: 1.23, 12.3, 123."""
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    if round(abs(value), n_digits - 1 - magnitude) >= 10 ** (magnitude + 1):
        magnitude += 1  # 9.996 is 10.0, not 10.00
    return f"{value:,.{max(0, n_digits - 1 - magnitude)}f}"


def _scaled(value: Any, units: Sequence[tuple[float, str]]) -> str:
    """The value in the largest unit in which it is at least 1 after rounding."""
    x = number(value)
    if x is None:
        return NOT_MEASURED
    if x == 0:
        return f"0 {units[0][1]}"
    for scale, unit in reversed(units):
        if abs(x) >= scale * 0.9995:
            return f"{_digits(x / scale)} {unit}"
    return f"{_digits(x / units[0][0])} {units[0][1]}"


def format_sec(value: Any) -> str:
    """A time: "1.23 ms"."""
    x = number(value)
    if x is None:
        return NOT_MEASURED
    if abs(x) >= 119.5:
        minutes, seconds = divmod(round(x), 60)
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{hours} h {minutes} min"
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    if x == 0:
        return "0 s"
    return _scaled(x, [(1e-9, "ns"), (1e-6, "\u00b5s"), (1e-3, "ms"), (1.0, "s")])


def format_bytes(value: Any) -> str:
    """A size in decimal units: "7.30 MB"."""
    x = number(value)
    if x is not None and abs(x) < 999.5:
        return f"{x:.0f} B"
    return _scaled(x, [(1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB")])


def format_rate(value: Any, unit: str = "B/s") -> str:
    """Something per second: "12.3 GB/s", "1.20 TFLOP/s"."""
    return _scaled(value, [(1.0, unit), (1e3, f"k{unit}"), (1e6, f"M{unit}"), (1e9, f"G{unit}"), (1e12, f"T{unit}")])


def format_ratio(value: Any, low: Any = None, high: Any = None) -> str:
    """A ratio with its interval: "1.52x [1.48, 1.56]"."""
    x, a, b = number(value), number(low), number(high)
    if x is None:
        return NOT_MEASURED
    return f"{x:.2f}x" if a is None or b is None else f"{x:.2f}x [{a:.2f}, {b:.2f}]"


def format_percent(value: Any, signed: bool = False) -> str:
    """A share: 0.0123 is "1.23 %"; with `signed` "+1.23 %"."""
    x = number(value)
    if x is None:
        return NOT_MEASURED
    percent = 100 * x
    if abs(percent) < 0.0005:
        return "0 %"
    n_decimals = 3 if abs(percent) < 0.1 else 2 if abs(percent) < 10 else 1 if abs(percent) < 1000 else 0
    text = f"{percent:{'+' if signed else ''},.{n_decimals}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def format_number(value: Any) -> str:
    """A plain number with thousands separators; at most four digits after the point."""
    x = number(value)
    if x is None:
        return NOT_MEASURED
    if x == round(x) or abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:,.4g}" if abs(x) >= 1e-4 else f"{x:.1e}"


def format_count(value: Any) -> str:
    """A large count for reading: "12.3 million"."""
    x = number(value)
    if x is None or abs(x) < 999_500:
        return format_number(x)
    return _scaled(x, [(1e6, "million"), (1e9, "billion"), (1e12, "trillion")])


def plain(value: Any) -> str:
    """One printable line: control characters (a name may bring its own escape codes) and line breaks go."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return " ".join(text.split())


def format_value(key: str, value: Any) -> str:
    """The text of `value` by the unit in the ending of `key`."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value) or "none"
    if number(value) is None:
        return plain(value)
    if key.endswith("bytes_per_sec"):
        return format_rate(value)
    if key.endswith("_per_sec"):
        return format_number(float(f"{value:.4g}"))
    if key.endswith("_sec"):
        return format_sec(value)
    if key == "bytes" or key.endswith("_bytes"):
        return format_bytes(value)
    if key.endswith(("_ratio", "speedup")):
        return format_ratio(value)
    if key.endswith(("_share", "_agreement", "mbu")):
        return format_percent(value)
    if "ppl_increase" in key:
        return format_percent(value, signed=True)
    return format_number(value)
