"""The rows of a `bench` result: one flat dict a configuration and cell, units in the names of the keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paretune import hardware, stats
from paretune.measure import roofline
from paretune.measure.interleave import Blocks, Sample
from paretune.measure.workload import DECODE_SLICE
from paretune.model.config import ModelConfig
from paretune.ops.attention.pattern import parse
from paretune.recipe import Recipe

MAX_AA = 0.25  # an A/A half width above it: the machine is too noisy to judge
PHASES = {"ttft": "prefill", "tpot": "decode", "throughput": "throughput"}
SHORT_DTYPES = {long: short for short, long in hardware.TORCH_NAMES.items()}

AGREEMENT = (
    "agreement_top1_share",
    "agreement_top1_share_beyond_ties",
    "agreement_logits_rel_rms",
    "agreement_greedy_same",
    "agreement_greedy_n",
    "agreement_n_positions",
)

# Printed under every table: peers disagree about these words.
DEFINITIONS: dict[str, str] = {
    "Speed-up": "seconds of the baseline / seconds of the configuration: exp of the median over blocks of the log "
    "ratio, both sides from the same block. In brackets its interval: 95 % over all planned looks together.",
    "Result": "faster or slower where the interval lies beyond 2 % or beyond what the baseline differs from itself "
    "here and now (A/A), whichever is larger; no difference where it lies inside; else undecided.",
    "TTFT": "start of the request until the first token of every sequence is chosen (prefill and its argmax).",
    "TPOT": f"one decode step, over the first {DECODE_SLICE} steps after the prompt (fewer for shorter outputs): "
    "seconds per output token of a sequence. Output length is fixed, nothing stops early.",
    "Prefill tokens/s": "input tokens of the batch / TTFT.",
    "Decode tokens/s": "sequences of the batch / TPOT: output tokens per second of the whole batch.",
    "Throughput": "output tokens of the batch / whole request (TTFT + (output tokens - 1) * TPOT, or sampled).",
    "Median, p90": "over slices of at least 0.1 s, each the mean of its steps; p90 needs 36 slices.",
    "MBU": "bytes that a decode step must read (weights and the cache at its mean length) / TPOT / read bandwidth "
    "measured here at that size.",
    "MFU": "arithmetic of the phase / its seconds / matrix rate measured here in the same number format.",
    "Pays back after": "output tokens until the extra seconds of loading and compiling are won back.",
    "Same top token": "positions of text that the model wrote itself at which a peer's most likely token is that of "
    "our fp32 eager, teacher-forced. Invalid, and not timed: fewer than 99 % (32 bits), 95 % (16) or 90 % (8), near "
    "ties aside.",
    "Logit error": "root mean square of the difference of a peer's logits from ours / that of ours.",
    "Greedy tokens": "how many greedy tokens are equal before the first that differs; one near tie ends it.",
    "Peak memory": "largest resident memory of the process during one request, libraries included.",
}


@dataclass(frozen=True)
class Cell:
    """One workload of the grid."""

    input_len: int
    output_len: int
    batch_size: int

    @property
    def title(self) -> str:
        return f"{self.input_len}+{self.output_len} x{self.batch_size}"


@dataclass
class Pass:
    """The interleaved blocks of one kind of slice, all configurations of a group together."""

    kind: str
    level: float
    samples: list[Sample] = field(default_factory=list)
    n_blocks: int = 0
    is_cut: bool = False

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.samples)

    def resolution(self, baseline: str, twin: str) -> float:
        return self.blocks.aa_resolution(baseline, twin, self.level)

    def verdict(self, baseline: str, twin: str, name: str) -> stats.Verdict:
        ratio, resolution = self.blocks.ratio(baseline, name, self.level), self.resolution(baseline, twin)
        word = stats.verdict(ratio, resolution=resolution)
        # What goes beyond the noise does on any machine. But on one that cannot tell, all the rest would be
        # "indistinguishable", and that would be no finding.
        return "undecided" if word == "indistinguishable" and resolution > MAX_AA else word


@dataclass
class Trial:
    """What one process gave in one cell; `cause` says why it gave no more.

    `recipe` is None for a peer; `is_invalid`: it runs, and is not the same model; `labels` go into its row as they are.
    """

    name: str
    recipe: Recipe | None
    loaded: dict[str, Any] | None = None
    cause: str | None = None
    passes: dict[str, Pass] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    labels: dict[str, Any] = field(default_factory=dict)
    is_invalid: bool = False

    def seconds(self, kind: str) -> np.ndarray:
        """[n] seconds per unit of work."""
        return self.passes[kind].blocks.values(self.name) if kind in self.passes else np.array([])

    def median(self, kind: str) -> float | None:
        values = self.seconds(kind)
        return float(np.median(values)) if len(values) else None


def make_row(
    trial: Trial, baseline: Trial, twin: str, cell: Cell, config: ModelConfig, ceilings: hardware.Ceilings
) -> dict[str, Any]:
    """Everything that is known of a configuration in a cell. None: not measured."""
    loaded = trial.loaded or {}
    ttft, tpot = trial.median("ttft"), trial.median("tpot")
    status = "measured" if any(len(trial.seconds(k)) for k in PHASES) else "not_reached"
    if trial.cause:
        status = "invalid" if trial.is_invalid else "failed"
    cause = trial.cause or ("" if status == "measured" else "the time budget ended before its turn")
    role = "baseline" if trial.name == baseline.name else "twin" if trial.name == twin else ""
    role = "peer" if trial.recipe is None else role
    late = []
    if status == "measured":
        missing = [PHASES[kind] for kind in trial.passes if not len(trial.seconds(kind))]
        late = [f"{phase}: the time budget ended before its turn" for phase in missing]
    row: dict[str, Any] = {
        "config": trial.name,
        "recipe": trial.recipe.name if trial.recipe else "",
        "role": role,
        "cell": cell.title,
        "input_len": cell.input_len,
        "output_len": cell.output_len,
        "batch_size": cell.batch_size,
        "status": status,
        "cause": cause,
        "ttft_sec": ttft,
        "tpot_sec": tpot,
        "prefill_tokens_per_sec": ttft and cell.batch_size * cell.input_len / ttft,
        "decode_tokens_per_sec": tpot and cell.batch_size / tpot,
        "throughput_tokens_per_sec": _throughput(trial, cell),
    }
    for kind in trial.passes:
        row |= _phase(trial, baseline, twin, kind)
    parts = ("weights_bytes", "kv_cache_bytes", "activation_peak_bytes", "rss_bytes", "rss_peak_bytes")
    row |= {key: trial.memory.get(key, loaded.get(key)) for key in parts}
    row |= {key: value for key, value in trial.memory.items() if key.startswith("device_") and value is not None}
    row |= {
        "load_sec": loaded.get("load_sec"),
        "compile_sec": loaded.get("compile_sec"),
        "break_even_tokens": _break_even(trial, baseline, cell),
        **_limits(trial, cell, config, ceilings),
        "threads": (loaded.get("threads") or {}).get("threads"),
        "disk_bytes": loaded.get("disk_bytes"),
        "engine": "paretune",
        "format": None,
        "engine_version": loaded.get("version"),
        **dict.fromkeys(AGREEMENT),
        **trial.labels,
        "proof": list(loaded.get("proof", ())),
        "notes": [*loaded.get("notes", ()), *trial.notes, *late],
    }
    return row


def _phase(trial: Trial, baseline: Trial, twin: str, kind: str) -> dict[str, Any]:
    """Ratio, verdict and the spread of one phase, keys prefixed with its name."""
    done, phase, values = trial.passes[kind], PHASES[kind], trial.seconds(kind)
    blocks = done.blocks
    out: dict[str, Any] = {
        "n": len(values),
        "p50_sec": stats.percentile(values, 50),
        "p90_sec": stats.percentile(values, 90),
        "n_repeated": sum(s.n_repeated for s in done.samples if s.subject == trial.name),
        "speedup": None,
        "speedup_low": None,
        "speedup_high": None,
        "verdict": None,
        "by_state": None,
    }
    if trial.name == baseline.name:
        out |= {"speedup": 1.0 if len(values) else None, "verdict": "baseline"}
    elif len(values) and len(blocks.values(baseline.name)):
        ratio = blocks.ratio(baseline.name, trial.name, done.level).to_json()
        out |= {
            "speedup": ratio["value"],
            "speedup_low": ratio["low"] or None,  # 0 is "no information" here
            "speedup_high": ratio["high"],
            "verdict": done.verdict(baseline.name, twin, trial.name),
        }
        states = blocks.by_state(baseline.name, trial.name, done.level)
        if states:
            out["by_state"] = {word: states[i].to_json() for i, word in enumerate(("low", "high"))}
    return {f"{phase}_{key}": value for key, value in out.items()}


def _throughput(trial: Trial, cell: Cell) -> float | None:
    sampled, ttft, tpot = (trial.median(kind) for kind in ("throughput", "ttft", "tpot"))
    if sampled is not None:
        return 1 / sampled
    if ttft is None or tpot is None:
        return None
    return cell.batch_size * cell.output_len / (ttft + (cell.output_len - 1) * tpot)


def _break_even(trial: Trial, baseline: Trial, cell: Cell) -> float | None:
    """Output tokens of the batch; None where nothing is won per token, so that nothing pays back."""
    ours, theirs = trial.median("tpot"), baseline.median("tpot")
    if trial.loaded is None or baseline.loaded is None or ours is None or theirs is None or trial is baseline:
        return None
    if trial.recipe is None:  # a peer's conversion, kept in the cache, would have to be paid back too
        return None
    once = [t.loaded["load_sec"] + t.loaded["compile_sec"] for t in (trial, baseline) if t.loaded]
    gain = (theirs - ours) / cell.batch_size
    if gain <= 0:
        return None
    return float(math.ceil(max(0.0, once[0] - once[1]) / gain))


def _limits(trial: Trial, cell: Cell, config: ModelConfig, ceilings: hardware.Ceilings) -> dict[str, Any]:
    """MBU, MFU and what each phase is bound by."""
    out: dict[str, Any] = dict.fromkeys(
        ("decode_bytes", "tpot_roofline_sec", "mbu", "decode_mfu", "prefill_mfu", "bound_by", "prefill_bound_by")
    )
    loaded, ttft, tpot = trial.loaded, trial.median("ttft"), trial.median("tpot")
    if loaded is None or trial.recipe is None:  # what a peer reads in a step is its own affair
        return out
    weights = loaded.get("step_weights_bytes", loaded["weights_bytes"])
    per_token = loaded.get("kv_bytes_per_token", 0.0)
    pattern = parse(loaded.get("attention_pattern", "causal"))
    compute = str(loaded.get("compute_dtype"))
    rate = ceilings.matrix_rates.get(SHORT_DTYPES.get(compute, compute))
    if tpot is not None:
        n_steps = max(1, min(DECODE_SLICE, cell.output_len - 1))
        context = cell.input_len + (n_steps + 1) / 2  # the mean over the slice, the step's own token among them
        seen = roofline.keys_seen(pattern, context)
        n_bytes = roofline.decode_bytes(weights, round(per_token * seen))
        flops = cell.batch_size * roofline.decode_flops(config, round(seen))
        bandwidth = ceilings.bandwidth_at(n_bytes)
        out["decode_bytes"] = n_bytes
        out["tpot_roofline_sec"] = n_bytes / bandwidth  # a prediction: the least that these bytes take here
        out["mbu"] = roofline.mbu(n_bytes, tpot, bandwidth)
        out["decode_mfu"] = roofline.mfu(flops, tpot, rate) if rate else None
        out["bound_by"] = roofline.bound_by("decode", tpot, n_bytes, flops, bandwidth, rate)[1]
    if ttft is not None:
        n_bytes = weights + round(per_token * cell.input_len)
        flops = cell.batch_size * roofline.prefill_flops(config, cell.input_len, pattern=pattern)
        bandwidth = ceilings.bandwidth_at(n_bytes)
        out["prefill_mfu"] = roofline.mfu(flops, ttft, rate) if rate else None
        out["prefill_bound_by"] = roofline.bound_by("prefill", ttft, n_bytes, flops, bandwidth, rate)[1]
    return out
