"""The time per output token of a model on this machine before it is loaded, or even downloaded: config alone.

    native          = bytes of weights and cache / read bandwidth at that working set   (the plain roofline)
    eager, compile  = sum over the linear layers of bytes / rate at that size
                      + bytes of keys and values / rate of attention + operators x seconds an operator

Rates of products are measured on matrices of fixed sizes that no cache holds, and read off between the sizes; the rest
comes from one profile of a small model under the same runner. Neither knows the model that is asked for. Batch 1, fp32
weights for the calibrated ones.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from paretune import clock, hardware
from paretune.measure import busy, roofline
from paretune.measure.explain_base import leaves_of
from paretune.measure.predict import Sizes
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.model.layers import Linear
from paretune.recipe import preset

SIDES = (256, 512, 1024, 2048, 4096)  # of square fp32 matrices: 0.25 to 64 MiB
MIN_SEC, MIN_PASSES = 0.4, 3  # over all matrices of a size
SMALL_MODEL, SMALL_LEN = "pocket", 128  # what the cost of operators is measured on
# Bytes a weight and a value of the cache, scales and all, by preset of the native runner.
NATIVE = {
    "native": (4.0, 4.0),
    "native_bf16": (2.0, 2.0),
    "native_int8": (1.0, 4.0),
    "native_int4": (0.5625, 4.0),
}
CALIBRATED = {"baseline": "eager", "compile": "compile"}


def product_rates(
    threads: int, sides: Sequence[int] | None = None, total_bytes: int | None = None
) -> list[dict[str, float]]:
    """Bytes/s of weights in PyTorch's fp32 product with one row, by the size of the matrix.

    Many matrices of a size take turns, `total_bytes` together, so that each comes from memory as it does in a step of
    a large model. The best of a few passes.
    """
    total = total_bytes or hardware.probe_bytes()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    try:
        with torch.inference_mode(), clock.quiet():
            for side in sides or SIDES:
                n_bytes = 4 * side * side
                weights = torch.ones(max(2, math.ceil(total / n_bytes)), side, side).unbind()
                x, bias = torch.ones(1, side), torch.ones(side)
                best, spent, n_passes = math.inf, 0.0, 0
                while n_passes < MIN_PASSES or spent < MIN_SEC:
                    started = clock.now()
                    for weight in weights:
                        torch.nn.functional.linear(x, weight, bias)
                    taken = max(clock.now() - started, 1e-9)
                    best, spent, n_passes = min(best, taken / len(weights)), spent + taken, n_passes + 1
                rows.append({"bytes": float(n_bytes), "bytes_per_sec": n_bytes / best})
    finally:
        torch.set_num_threads(before)
    return rows


@dataclass(frozen=True)
class CostModel:
    """What a step costs here under one runner.

    Args:
        products: rows of `product_rates`.
        attention_rate: bytes/s of keys and values, as attention reached.
        operator_sec: everything else of a step, an operator (counted as `predict.OPERATORS` does).
        spread: a fast and a slow step of the small model (10th and 90th percentile) over the one it was made from; a
            larger model's steps vary less, since what disturbs them costs milliseconds and no share.
    """

    products: tuple[Mapping[str, float], ...]
    attention_rate: float
    operator_sec: float
    spread: tuple[float, float] = (1.0, 1.0)

    def product_sec(self, n_bytes: float) -> float:
        """Seconds of a product with a weight of this size: between the sizes on a logarithmic scale, beyond them the
        end's rate."""
        sizes = [row["bytes"] for row in self.products]
        i = min(max(bisect.bisect_right(sizes, n_bytes), 1), len(sizes) - 1)
        low, high = self.products[i - 1], self.products[i]
        part = math.log(n_bytes / low["bytes"]) / math.log(high["bytes"] / low["bytes"])
        part = min(1.0, max(0.0, part))
        return n_bytes / (low["bytes_per_sec"] ** (1 - part) * high["bytes_per_sec"] ** part)

    def tpot_sec(self, config: ModelConfig, context: int) -> float:
        """Predicted seconds of a decode step of one sequence at the length `context`."""
        sizes = Sizes.of(config)
        layers = [m for m in checkpoint.build(config).modules() if isinstance(m, Linear)]
        products = sum(self.product_sec(4.0 * m.weight.out_features * m.weight.in_features) for m in layers)
        seen = roofline.keys_seen(config.attention_pattern, context)
        attention = 4.0 * sizes.kv_values * seen / self.attention_rate
        return products + attention + sizes.n_operators * self.operator_sec


def cost_model(profiled: Mapping[str, Any], products: Sequence[Mapping[str, float]], config: ModelConfig) -> CostModel:
    """The cost model of a runner from a decode profile of a small model of `config`."""
    kv_bytes = 4.0 * Sizes.of(config).kv_values * (profiled["input_len"] + 1)
    if profiled["parts"]:  # with what it takes to find the operators, as in `product_rates`
        leaves = leaves_of(profiled)
        product_sec = sum(r["sec"] for r in leaves if r["product_weight_bytes"])
        attention_sec = sum(r["sec"] for r in leaves if r["part"] == "fused_attention")
    else:
        by_kind = {row["kind"]: row["sec"] for row in profiled["kernel_classes"]}
        product_sec = by_kind.get("GEMV", 0.0) + by_kind.get("GEMM", 0.0)
        attention_sec = by_kind.get("attention", 0.0)
    rest = max(0.0, profiled["whole"]["sec"] - product_sec - attention_sec)
    steps = [sec / profiled["whole"]["sec"] for block in profiled["whole"].get("samples", ()) for sec in block]
    tenths = statistics.quantiles(steps, n=10, method="inclusive") if len(steps) > 1 else [1.0]
    spread = (min(tenths[0], 1.0), max(tenths[-1], 1.0))
    return CostModel(tuple(products), kv_bytes / attention_sec, rest / Sizes.of(config).n_operators, spread)


class Calibration(NamedTuple):
    """What predictions for this machine rest on; `busy`: what showed that other programs ran meanwhile."""

    ceilings: hardware.Ceilings
    models: dict[str, CostModel]
    busy: tuple[str, ...]


def calibrate(
    *,
    threads: int | None = None,
    runners: Sequence[str] = tuple(CALIBRATED),
    ceilings: hardware.Ceilings | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Ceilings and cost models of this machine, by preset; half a minute, most of it the compiler's."""
    from paretune.measure.profile import profile

    n = hardware.set_threads(threads)["threads"]
    watch = busy.BusyWatch()
    if ceilings is None:
        say("measuring the ceilings of this machine")
        ceilings = hardware.ceilings("cpu")
    say("measuring products with one row")
    products = product_rates(n)
    others = busy.words_of(watch())  # not of the time in which the compiler's own processes run
    folder = checkpoint.resolve(SMALL_MODEL)
    config = checkpoint.read_config(folder)
    models = {}
    for name in runners:
        profiled, _ = profile(
            folder,
            preset(name),
            name,
            input_len=SMALL_LEN,
            threads=threads,
            quick=True,
            with_trace=False,
            ceilings=ceilings,
            say=say,
        )
        models[name] = cost_model(profiled, products, config)
        others = others or busy.words_of_facts(profiled)
    return Calibration(ceilings, models, tuple(others))


def predict_here(
    config: ModelConfig, context: int, ceilings: hardware.Ceilings, models: Mapping[str, CostModel]
) -> list[dict[str, Any]]:
    """Predicted TPOT of one sequence by preset; each row says what it rests on.

    `range_sec` is the prediction in a fast and in a slow moment, as the measurements that it rests on varied.
    """
    sizes, seen = Sizes.of(config), roofline.keys_seen(config.attention_pattern, context)
    free = hardware.available_memory_bytes()
    widths = {**dict.fromkeys(models, (4.0, 4.0)), **NATIVE}
    rows = []
    for name, (width, cache_width) in widths.items():
        n_bytes = width * sizes.n_weights + cache_width * sizes.kv_values * seen
        least = n_bytes / ceilings.bandwidth_at(n_bytes)
        model = models.get(name)
        sec = model.tpot_sec(config, context) if model else least
        fast, slow = model.spread if model else _bandwidth_spread(ceilings, n_bytes)
        rows.append(
            {
                "config": name,
                "bytes": n_bytes,
                "roofline_sec": least,
                "predicted_tpot_sec": sec,
                "range_sec": [sec * fast, sec * slow],
                "predicted_tokens_per_sec": 1 / sec,
                "rests_on": "products and a small model measured here" if model else "the read bandwidth measured here",
                "fits": width * sizes.n_weights + 4 * sizes.kv_values * seen < 0.9 * free,
                "is_prediction": True,
            }
        )
    return rows


def _bandwidth_spread(ceilings: hardware.Ceilings, n_bytes: float) -> tuple[float, float]:
    """Times of reading at the best and the worst of the samples near this size, over the best's."""
    most = max(row["threads"] for row in ceilings.read_bandwidth)
    rows = [row for row in ceilings.read_bandwidth if row["threads"] == most]
    near = min(rows, key=lambda row: abs(math.log(row["bytes"] / max(n_bytes, 1.0))))
    samples = near.get("samples") or [near["bytes_per_sec"]]
    return 1.0, max(samples) / min(samples)
