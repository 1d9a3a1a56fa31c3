"""How far a result is from what this machine can do at most, in figures and in one sentence.

A decode step reads every weight and the keys and values so far, and does little arithmetic with each byte:
its limit is the read bandwidth. A prefill reads the weights once for all tokens: its limit is the matrix
rate. What reaches neither is bound by overhead (launches, threads, copies, small products). Rates are
bytes/s and FLOP/s, measured by `hardware.ceilings`; a multiply-add counts 2 FLOP.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

from paretune.ops.attention.pattern import CAUSAL, Pattern, work

Bound = Literal["memory", "compute", "overhead", "unknown"]

# Of the measured ceiling. Real kernels reach 60 to 90 % of it, so half of it means that the ceiling is what
# counts.
NEAR_CEILING = 0.5


class ShapeConfig(Protocol):
    """The sizes of a model; any object with these fields will do."""

    @property
    def n_layer(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_kv_head(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def n_inner(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def gated_mlp(self) -> bool: ...


def decode_bytes(weight_bytes: int, kv_bytes: int) -> int:
    """Bytes that one decode step must read, whatever the batch.

    Args:
        weight_bytes: the stored weights without what a step does not read whole (an untied token table,
            positions).
        kv_bytes: keys and values that the step sees (`keys_seen`), of all rows, at its mean length.
    """
    return weight_bytes + kv_bytes


def mbu(n_bytes: float, tpot_sec: float, bandwidth: float) -> float:
    """Memory bandwidth utilisation: bytes that a step must read / seconds per output token / measured
    bytes/s.

    Above 1 where the weights stay in a cache that the bandwidth was not measured for.
    """
    return n_bytes / tpot_sec / bandwidth


def mfu(flops: float, sec: float, rate: float) -> float:
    """Arithmetic utilisation: FLOP that the work needs / seconds / measured FLOP/s."""
    return flops / sec / rate


def _block_flops(config: ShapeConfig) -> int:
    """FLOP of the linear layers of all blocks for one token."""
    heads = 2 * _all(config, "n_head") + 2 * _all(config, "n_kv_head")  # queries in, heads out: the same size
    mlp = (3 if config.gated_mlp else 2) * _all(config, "n_inner")
    return 2 * config.n_embd * (heads * config.head_dim + mlp)


def _all(config: ShapeConfig, what: str) -> int:
    """A size of all layers together; they may differ in a pruned model."""
    layers = getattr(config, "layers", ())
    return sum(getattr(shape, what) for shape in layers) if layers else config.n_layer * getattr(config, what)


def _attention_flops(config: ShapeConfig, n_pairs: int) -> int:
    """FLOP of scores and weighted sums for `n_pairs` pairs of a query and a visible key, in all layers."""
    return 4 * _all(config, "n_head") * config.head_dim * n_pairs


def keys_seen(pattern: Pattern, context: float) -> float:
    """How many of the first `context` keys the newest token sees: all of them, or what a window leaves."""
    if pattern.is_dense:
        return context
    return min(context, work(pattern, max(1, math.ceil(context)) - 1, 1).n_keys)


def _head_flops(config: ShapeConfig) -> int:
    return 2 * config.n_embd * config.vocab_size


def decode_flops(config: ShapeConfig, context: int) -> int:
    """FLOP of one decode step of one row that sees `context` keys, its own among them.

    Matrix products only: norms, activations and softmax are under a percent.
    """
    return _block_flops(config) + _attention_flops(config, context) + _head_flops(config)


def prefill_flops(
    config: ShapeConfig, n_tokens: int, logits: Literal["last", "all"] = "last", pattern: Pattern = CAUSAL
) -> int:
    """FLOP of a causal prefill of one row: the scores that `pattern` leaves, logits for the last token or all."""
    n_pairs = work(pattern, 0, n_tokens).n_pairs
    n_logits = 1 if logits == "last" else n_tokens
    return n_tokens * _block_flops(config) + _attention_flops(config, n_pairs) + n_logits * _head_flops(config)


def quantity(value: float, unit: str) -> str:
    """A figure to three digits with a decimal prefix: 28.4 MB, 85 GB/s, 1.39 TFLOP/s."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{_digits(value / factor)} {prefix}{unit}"
    return f"{_digits(value)} {unit}"


def _digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    text = f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    return text.rstrip("0").rstrip(".")


def percent(share: float) -> str:
    """A share for people."""
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 else "under 1 %"


def bound_by(
    phase: Literal["decode", "prefill"],
    sec: float,
    n_bytes: float,
    flops: float,
    bandwidth: float | None,
    rate: float | None,
) -> tuple[Bound, str]:
    """What limits a phase, as a label and a sentence with the figures.

    Args:
        phase: decode (figures of one step) or prefill (figures of one prompt).
        sec: seconds of the step or the prompt.
        n_bytes, flops: what it must read and compute at least.
        bandwidth, rate: the ceilings measured here in bytes/s (at this working set) and FLOP/s (in this
            format); None: not measured.
    """
    assert sec > 0, f"{sec} seconds"
    each = "token" if phase == "decode" else "prompt"
    read = mbu(n_bytes, sec, bandwidth) if bandwidth else None
    work = mfu(flops, sec, rate) if rate else None
    reads = f"reads {quantity(n_bytes, 'B')} per {each} at {quantity(n_bytes / sec, 'B/s')}"
    does = f"does {quantity(flops, 'FLOP')} per {each} at {quantity(flops / sec, 'FLOP/s')}"
    if read is not None and bandwidth:
        reads += f", {percent(read)} of the {quantity(bandwidth, 'B/s')} measured here"
    if work is not None and rate:
        does += f", {percent(work)} of the {quantity(rate, 'FLOP/s')} measured here"
    if read is None and work is None:
        return "unknown", f"{phase} {reads}: no ceiling was measured, so what bounds it is not known"
    if max(read or 0.0, work or 0.0) < NEAR_CEILING:
        if read is None or work is None:
            missing = "bandwidth" if read is None else "matrix rate"
            other = "compute" if read is None else "memory"
            text = does if read is None else reads
            return "unknown", f"{phase} {text}: not bound by {other}; the {missing} was not measured"
        # The resource that the phase is known for comes first: it is the one the reader asks about.
        first, second = (reads, "compute") if phase == "decode" else (does, "memory")
        share = work if phase == "decode" else read
        name = "memory" if phase == "decode" else "compute"
        tail = f"it is bound by overhead, not by {name} ({second} stands at {percent(share)})"
        return "overhead", f"{phase} {first}: {tail}"
    if (read or 0.0) >= (work or 0.0):
        cached = "; the weights stay partly in cache" if (read or 0.0) > 1.0 else ""
        return "memory", f"{phase} {reads}: it is bound by memory{cached}"
    return "compute", f"{phase} {does}: it is bound by compute"
