"""The rows of a `bench` result, one a configuration and cell, from what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from paretune import hardware, stats
from paretune.measure import roofline
from paretune.measure.interleave import Blocks, Sample
from paretune.measure.workload import DECODE_SLICE
from paretune.model.config import ModelConfig
from paretune.ops.attention.pattern import parse
from paretune.recipe import Recipe
from paretune.records.bench import PHASES, Agreement, BenchRow, Cell, Phase, Role, States, Status
from paretune.records.header import Estimate
from paretune.records.judge import judge

# Of the answer of a process, in its row too.
SIZES = ("weights_bytes", "kv_cache_bytes", "activation_peak_bytes", "rss_bytes", "rss_peak_bytes",
         "device_allocated_bytes", "device_reserved_bytes", "device_used_bytes")  # fmt: skip
SHORT_DTYPES = {long: short for short, long in hardware.TORCH_NAMES.items()}

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
        return judge(self.blocks.ratio(baseline, name, self.level), self.resolution(baseline, twin))


@dataclass(frozen=True)
class Labels:
    """Whose row it is. `agreement`: of a peer that was checked."""

    engine: str = "paretune"
    format: str | None = None
    agreement: Agreement | None = None


@dataclass
class Trial:
    """What one process gave in one cell; `cause` says why it gave no more.

    `recipe` is None for a peer; `is_invalid`: it runs, and is not the same model.
    """

    name: str
    recipe: Recipe | None
    loaded: dict[str, Any] | None = None
    cause: str | None = None
    passes: dict[str, Pass] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    labels: Labels = Labels()
    is_invalid: bool = False

    def seconds(self, kind: str) -> np.ndarray:
        """[n] seconds per unit of work."""
        return self.passes[kind].blocks.values(self.name) if kind in self.passes else np.array([])

    def median(self, kind: str) -> float | None:
        values = self.seconds(kind)
        return float(np.median(values)) if len(values) else None


def is_judged(rows: Sequence[BenchRow]) -> bool:
    """Whether any configuration has a verdict beside the baseline."""
    words = [phase.verdict for row in rows if row.role in ("", "peer") for _, phase in row.phases]
    return any(word not in (None, "undecided") for word in words)


def make_row(
    trial: Trial,
    baseline: Trial,
    twin: str,
    cell: Cell,
    config: ModelConfig,
    ceilings: hardware.Ceilings | None,
    ended: str = "the time budget ended",
    group: int = 0,
) -> BenchRow:
    """Everything that is known of a configuration in a cell. None: not measured.

    Args:
        ceilings: None where they are not known (yet).
        ended: what ended the run before something was measured.
        group: the index of those that were measured side by side.
    """
    loaded = trial.loaded or {}
    ttft, tpot = trial.median("ttft"), trial.median("tpot")
    status: Status = "measured" if any(len(trial.seconds(k)) for k in PHASES) else "not_reached"
    if trial.cause:
        status = "invalid" if trial.is_invalid else "failed"
    late = []
    if status == "measured":
        missing = [PHASES[kind] for kind in trial.passes if not len(trial.seconds(kind))]
        late = [f"{phase}: {ended} before its turn" for phase in missing]
    phases = {PHASES[kind]: _phase(trial, baseline, twin, kind) for kind in trial.passes}
    sizes = {**{k: v for k, v in loaded.items() if k in SIZES}, **{k: v for k, v in trial.memory.items() if k in SIZES}}
    return BenchRow(
        config=trial.name,
        recipe=trial.recipe.name if trial.recipe else "",
        role=_role(trial, baseline, twin),
        cell=cell.title,
        input_len=cell.input_len,
        output_len=cell.output_len,
        batch_size=cell.batch_size,
        status=status,
        cause=trial.cause or ("" if status == "measured" else f"{ended} before its turn"),
        ttft_sec=ttft,
        tpot_sec=tpot,
        prefill_tokens_per_sec=ttft and cell.batch_size * cell.input_len / ttft,
        decode_tokens_per_sec=tpot and cell.batch_size / tpot,
        throughput_tokens_per_sec=_throughput(trial, cell),
        prefill=phases.get("prefill"),
        decode=phases.get("decode"),
        throughput=phases.get("throughput"),
        **sizes,
        load_sec=loaded.get("load_sec"),
        compile_sec=loaded.get("compile_sec"),
        break_even_tokens=_break_even(trial, baseline, cell),
        **_limits(trial, cell, config, ceilings),
        threads=(loaded.get("threads") or {}).get("threads"),
        disk_bytes=loaded.get("disk_bytes"),
        engine=trial.labels.engine,
        format=trial.labels.format,
        engine_version=loaded.get("version"),
        agreement=trial.labels.agreement,
        proof=list(loaded.get("proof", ())),
        notes=[*loaded.get("notes", ()), *trial.notes, *late],
        group=group,
    )


def _role(trial: Trial, baseline: Trial, twin: str) -> Role:
    if trial.recipe is None:
        return "peer"
    return "baseline" if trial.name == baseline.name else "twin" if trial.name == twin else ""


def _phase(trial: Trial, baseline: Trial, twin: str, kind: str) -> Phase:
    """Ratio, verdict and the spread of one phase."""
    done, values = trial.passes[kind], trial.seconds(kind)
    blocks = done.blocks
    out = Phase(
        n=len(values),
        p50_sec=stats.percentile(values, 50),
        p90_sec=stats.percentile(values, 90),
        n_repeated=sum(s.n_repeated for s in done.samples if s.subject == trial.name),
        speedup=None,
        speedup_low=None,
        speedup_high=None,
        verdict=None,
    )
    if trial.name == baseline.name:
        return replace(out, speedup=1.0 if len(values) else None, verdict="baseline")
    if not (len(values) and len(blocks.values(baseline.name))):
        return out
    ratio = estimate_of(blocks.ratio(baseline.name, trial.name, done.level))
    states = blocks.by_state(baseline.name, trial.name, done.level)
    return replace(
        out,
        speedup=ratio.value,
        speedup_low=ratio.low or None,  # 0 is "no information" here
        speedup_high=ratio.high,
        verdict=done.verdict(baseline.name, twin, trial.name),
        by_state=States(estimate_of(states[0]), estimate_of(states[1])) if states else None,
    )


def estimate_of(interval: stats.Interval) -> Estimate:
    """The interval as a record."""
    return Estimate(**interval.to_json())  # type: ignore[arg-type]


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


def _limits(trial: Trial, cell: Cell, config: ModelConfig, ceilings: hardware.Ceilings | None) -> dict[str, Any]:
    """MBU, MFU and what each phase is bound by."""
    out: dict[str, Any] = dict.fromkeys(
        ("decode_bytes", "tpot_roofline_sec", "mbu", "decode_mfu", "prefill_mfu", "bound_by", "prefill_bound_by")
    )
    loaded, ttft, tpot = trial.loaded, trial.median("ttft"), trial.median("tpot")
    # What a peer reads in a step is its own affair.
    if loaded is None or trial.recipe is None or ceilings is None:
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
