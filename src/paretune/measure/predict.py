"""Times of a model on a device that is not here: the roofline of its data sheet, and the cost of launches.

    plain               = max(bytes / bandwidth, FLOP / rate)
    a device, on paper  = max(plain, operators x seconds an operator): launches run beside a GPU's kernels

Everything here is a prediction and says so. Bandwidth and rates are those of `hardware.devices`, with the share of the
bandwidth that streaming kernels get. Predictions for this machine: `predict_here`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paretune.hardware.devices import REAL_SHARE, DeviceProfile
from paretune.measure import roofline
from paretune.model import checkpoint
from paretune.model.config import ModelConfig

WIDTHS = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0}
APART, AT_ONCE = "eager", "one call or graph"  # how operators are launched


@dataclass(frozen=True)
class Sizes:
    """What a step has to read and compute, whatever runs it."""

    n_weights: int  # that a decode step reads
    kv_values: int  # keys and values a token, all layers
    n_operators: int
    config: ModelConfig

    @classmethod
    def of(cls, config: ModelConfig) -> Sizes:
        model = checkpoint.build(config)
        n = sum(p.numel() for p in model.parameters())
        looked_up = config.vocab_size * config.n_embd * (not config.tied_head)
        if config.has_learned_positions:
            looked_up += config.n_positions * config.n_embd
        each, around = model.family.operators
        kv = 2 * config.all_kv_heads * config.head_dim
        return cls(n - looked_up, kv, each * config.n_layer + around, config)


def predict(config: ModelConfig, device: DeviceProfile, input_len: int, batch_size: int = 1) -> list[dict[str, Any]]:
    """Predicted prefill and decode of a model by number format and by how operators are launched.

    Returns:
        one row a format and form: `roofline_sec` (plain), `predicted_sec` (with the cost of operators), what bounds it,
        whether it fits, and the gain over the first row of the same phase.
    """
    sizes = Sizes.of(config)
    rows: list[dict[str, Any]] = []
    bandwidth = REAL_SHARE * device.bandwidth
    for phase in ("decode", "prefill"):
        first: float | None = None
        for dtype, width in WIDTHS.items():
            # A format without units of its own computes in fp32; int8 weights are read as such and computed wider.
            computed = dtype if dtype in device.rates and dtype != "int8" else "fp16" if dtype == "int8" else "fp32"
            rate = device.rates.get(computed, device.rates["fp32"])
            cache_width = 4.0 if dtype == "fp32" else 2.0
            pattern = config.attention_pattern
            context = round(roofline.keys_seen(pattern, input_len + 1)) if phase == "decode" else input_len
            cached = sizes.kv_values * context * batch_size
            n_bytes, wide_bytes = width * sizes.n_weights + cache_width * cached, 4.0 * (sizes.n_weights + cached)
            flops = batch_size * (
                roofline.decode_flops(config, context)
                if phase == "decode"
                else roofline.prefill_flops(config, input_len, pattern=pattern)
            )
            compute = flops / rate
            for form in (APART, AT_ONCE):
                each = device.operator_sec if form == APART else device.graph_sec
                launch = sizes.n_operators * each
                # An emulated format is converted before it is used: no gain, unless one call reads it as it is.
                converted = dtype in device.emulated and not (device.reads_narrow and form != APART)
                read_bytes = wide_bytes if converted else n_bytes
                memory = read_bytes / bandwidth
                # Launches run beside the kernels: the longer of the two is what is waited for.
                predicted = max(memory, compute, launch)
                first = first or predicted
                kinds = {"memory": memory, "arithmetic": compute, "operator launches": launch}
                rows.append(
                    {
                        "phase": phase,
                        "dtype": dtype,
                        "form": form,
                        "bytes": read_bytes,
                        "flops": flops,
                        "roofline_sec": max(memory, compute),
                        "launch_sec": launch,
                        "predicted_sec": predicted,
                        "bound_by": max(kinds, key=lambda k: kinds[k]),
                        "speedup": first / predicted,
                        "fits": n_bytes < 0.9 * device.memory_bytes,
                        "note": f"{device.emulated[dtype]}: at best no gain" if converted else "",
                        "is_prediction": True,
                    }
                )
    return rows


def findings(device: DeviceProfile, rows: list[dict[str, Any]]) -> list[str]:
    """What the rows say, in sentences; each one a prediction."""
    by = {(r["phase"], r["dtype"], r["form"]): r for r in rows}
    eager, graph = by["decode", "fp32", APART], by["decode", "fp32", AT_ONCE]
    said = []
    half = next((dtype for dtype in ("fp16", "bf16") if dtype not in device.emulated), None)
    alone = by["decode", half or "fp32", APART]["speedup"]
    narrow, int8 = (by["decode", dtype, AT_ONCE]["speedup"] for dtype in (half or "bf16", "int8"))
    gains = f"{half} alone gains {alone:.2f}x" if half else "no 16-bit format gains"
    if eager["bound_by"] == "operator launches":
        said.append(
            f"decode in eager mode is bound by operator launches ({1e3 * eager['launch_sec']:.2f} ms against "
            f"{1e3 * eager['roofline_sec']:.2f} ms of reading): {gains} there; one graph or native call gains "
            f"{graph['speedup']:.2f}x, with {half or 'bf16'} {narrow:.2f}x"
        )
    else:
        said.append(
            f"decode is bound by {eager['bound_by']}: {gains} in eager mode; in one graph or native call "
            f"{half or 'bf16'} gains {narrow:.2f}x and int8 {int8:.2f}x"
        )
    said += [f"{dtype} brings no arithmetic of its own there: {why}" for dtype, why in device.emulated.items()]
    said.append(f"fused attention there: {device.attention}")
    if not all(r["fits"] for r in rows):
        large = sorted({r["dtype"] for r in rows if not r["fits"]})
        said.append(f"the model does not fit into {device.memory_bytes / 2**30:.0f} GiB in {', '.join(large)}")
    return said
