"""A result of `tune` as the report meets it: a winner, and everything that can go wrong beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

from made_records import head
from paretune.records import tune
from paretune.records.evaluation import Fidelity, PhaseFidelity
from paretune.records.explanation import Explanation
from paretune.records.record import from_json, to_json
from paretune.records.trial import MemoryParts


def speedup(value: float, low: float, high: float, verdict: Any, states: bool = True) -> tune.TrialSpeedup:
    by_state = tune.States(value - 0.05, value + 0.04) if states else None
    return tune.TrialSpeedup(value, low, high, 12, verdict, by_state)


def quality(increase: float, upper: float, within: bool, phase: str = "decode") -> Fidelity:
    agreement = max(0.1, 1 - 4 * abs(increase))
    figures = (21.4, 21.4 * (1 + increase), increase, upper)
    part = PhaseFidelity(8192, 64, *figures, round(8192 * agreement), agreement, 128, abs(increase) * 0.4, 0)
    return Fidelity(
        protocol="pocket/heldout/ctx256/stride256/token",
        perplexity=21.4 * (1 + increase),
        baseline_perplexity=21.4,
        ppl_increase=increase,
        ppl_increase_upper=upper,
        max_ppl_increase=0.01,
        kl_mean=abs(increase) * 0.4,
        kl_p99=None,
        top1_agreement=agreement,
        n_windows=64,
        phase=phase,
        within_bound=within,
        too_little_text=False,
        identical=not increase,
        reason="made up",
        prefill=part,
        decode=part,
    )


def memory(weights: int, rss: int = 412_000_000) -> MemoryParts:
    return MemoryParts(weights, 1_180_000, 2_900_000, rss, rss)


def trial(
    id: str,
    name: str,
    status: tune.TrialStatus = "measured",
    reason: str | None = None,
    label: Any = None,
    is_chosen: bool = False,
    **found: Any,
) -> tune.TuneTrial:
    """A candidate; `found`: what was measured of it."""
    why = ""
    word: tune.Word = {"failed": "failed", "invalid": "invalid", "not_reached": "not reached"}.get(status, "slower")  # type: ignore[assignment]
    if status == "not_reached":
        why = "the budget was used up before it was its turn"
    if is_chosen:
        word = "chosen"
    elif status == "measured":
        ratio, loss = found.get("speedup"), found.get("quality")
        if ratio is None:
            word = "baseline"
        elif loss is not None and not loss.within_bound:
            word, why = "over the quality limit", f"perplexity may rise by up to {loss.ppl_increase_upper:+.1%}"
        elif ratio.verdict == "faster":
            word = "faster, within the limit"
        elif ratio.verdict != "slower":
            word = "no clear difference"
    row = tune.TuneTrial(
        id=id,
        name=name,
        recipe={"transforms": [{"kind": part.strip()} for part in name.split("+")], "engine": {}},
        status=status,
        reason=reason,
        label=label,
        standing=tune.Standing(word, why),
    )
    return dataclasses.replace(row, measured=measured(**found)) if status == "measured" else row


def measured(**found: Any) -> tune.TrialMeasured:
    unknown: dict[str, Any] = {
        "speedup": None,
        "tpot_sec": 3.42e-3,
        "ttft_sec": 24.1e-3,
        "throughput_tokens_per_sec": None,
        "memory": memory(28_400_000),
        "quality": None,
        "load_sec": 0.1,
        "compile_sec": 0.0,
        "break_even_tokens": None,
        "proof": [],
        "mbu": None,
        "mfu": None,
        "bound_by": None,
        "tpot_roofline_sec": None,
        "explanations": [],
    }
    return tune.TrialMeasured(**{**unknown, **found})


def changed(result: tune.TuneResult, id: str, **changes: Any) -> tune.TuneResult:
    """The result with other fields of one trial, or of what was measured of it."""

    def one(row: tune.TuneTrial) -> tune.TuneTrial:
        own = {k: v for k, v in changes.items() if hasattr(row, k)}
        found = {k: v for k, v in changes.items() if k not in own}
        if found:
            assert row.measured is not None
            own["measured"] = dataclasses.replace(row.measured, **found)
        return dataclasses.replace(row, **own)

    return dataclasses.replace(result, trials=[one(t) if t.id == id else t for t in result.trials])


def trials() -> list[tune.TuneTrial]:
    return [
        trial(
            "t0",
            "baseline",
            quality=quality(0.0, 0.0, True),
            label="lossless",
            load_sec=0.08,
            mbu=0.71,
            bound_by="reading the weights: 8.6 GB/s of the 12.1 GB/s that this machine delivers",
        ),
        trial(
            "t1",
            "sdpa",
            speedup=speedup(1.06, 1.04, 1.09, "faster"),
            tpot_sec=3.23e-3,
            ttft_sec=21.7e-3,
            quality=quality(0.0, 0.0, True),
            label="lossless",
            load_sec=0.08,
            break_even_tokens=0.0,
            mbu=0.74,
            proof=["the fused attention kernel ran in 6 of 6 layers"],
        ),
        trial(
            "t2",
            "int8 + sdpa, compile",
            is_chosen=True,
            speedup=speedup(1.54, 1.49, 1.59, "faster"),
            tpot_sec=2.22e-3,
            ttft_sec=19.8e-3,
            memory=memory(7_300_000, 388_000_000),
            quality=quality(0.0031, 0.0062, True),
            label="bounded",
            load_sec=0.31,
            compile_sec=14.2,
            break_even_tokens=12033.0,
            mbu=0.34,
            explanations=[
                Explanation(
                    "dispatch overhead",
                    0.31,
                    "a step calls 713 operators, and finding them takes 31 % of it",
                    "--config native",
                    1.45,
                ),
                Explanation("no single cause", 0.0, "what the roofline says", "nothing"),
            ],
            bound_by="launching many small operations: only 34 % of the read bandwidth is used",
            proof=[
                "48 linear layers hold int8: 28.4 MB became 7.3 MB",
                "the fused attention kernel ran in 6 of 6 layers",
                "compiled without a graph break (prefill and decode apart)",
            ],
        ),
        trial(
            "t3",
            "int8",
            speedup=speedup(1.41, 1.37, 1.45, "faster"),
            tpot_sec=2.43e-3,
            ttft_sec=24.9e-3,
            memory=memory(7_300_000, 371_000_000),
            quality=quality(0.0031, 0.0061, True),
            label="bounded",
            load_sec=0.29,
            break_even_tokens=212.0,
            mbu=0.31,
        ),
        trial(
            "t4",
            "bf16",
            speedup=speedup(0.63, 0.61, 0.66, "slower"),
            tpot_sec=5.43e-3,
            ttft_sec=61.2e-3,
            memory=memory(14_200_000),
            quality=quality(0.0012, 0.0024, True, "prefill"),
            label="bounded",
            load_sec=0.12,
            bound_by="arithmetic: this processor has no bfloat16 instructions and converts every value",
        ),
        trial(
            "t5",
            "static cache",
            speedup=speedup(1.004, 0.985, 1.021, "indistinguishable"),
            tpot_sec=3.41e-3,
            ttft_sec=24.0e-3,
            label="lossless",
        ),
        trial(
            "t6",
            "int4 groups of 32 + sdpa, compile",
            speedup=speedup(1.88, 1.79, 1.96, "faster", states=False),
            tpot_sec=1.82e-3,
            ttft_sec=22.4e-3,
            memory=memory(4_400_000, 380_000_000),
            quality=quality(0.031, 0.044, False),
            label="bounded",
            load_sec=0.4,
            compile_sec=15.0,
            mbu=0.27,
        ),
        trial(
            "t7",
            "prune 2:4",
            speedup=speedup(0.97, 0.92, 1.03, "undecided", states=False),
            tpot_sec=3.5e-3,
            quality=quality(0.42, 0.47, False),
        ),
        trial("t8", "int8 + flex", "failed", reason="out of memory: the worker was ended at 3.1 GB"),
        trial("t9", "fuse qkv", "invalid", reason="no effect: 0 of 6 layers were changed"),
        trial("t10", "compile max-autotune", "failed", reason="time-out after 60 s in compilation"),
        trial("t11", "nf4 + sdpa", "not_reached"),
        trial("t12", "nf4 + flex", "not_reached"),
    ]


CUDA = "needs a CUDA device; this machine has none"


def make_result(**changes: Any) -> tune.TuneResult:
    """The whole result, written and read once, so that it is what a file may hold; `changes`: other fields."""
    confirmation = tune.Confirmation(
        speedup=tune.Speedup(1.52, 1.48, 1.56, 12, "faster"),
        quality=quality(0.0033, 0.0065, True),
        n_processes=2,
        median_sec=tune.MedianTimes(2.25e-3, 3.42e-3),
        note="2 fresh pairs of processes, fresh prompts",
        ttft_sec=19.9e-3,
        baseline_ttft_sec=24.1e-3,
        tpot_sec=2.25e-3,
        baseline_tpot_sec=3.42e-3,
    )
    sizes = [(2**e, rate) for e, rate in zip(range(16, 28, 2), (38.0, 31.0, 22.0, 12.4, 8.4, 8.1), strict=True)]
    sweep = [tune.SweepPoint(size, rate * 1e9 * n**0.6, n) for n in (1, 2) for size, rate in sizes]
    fields: dict[str, Any] = {
        **head(),
        "command": "paretune tune pocket --objective tpot --max-ppl-increase 1% --budget 4m",
        "seed": 1,
        "model": tune.TuneModel("pocket", "gpt2", 7_100_000, 6, 256, 8192),
        "goal": tune.TuneGoal(budget_sec=240.0, output_len=16),
        "outcome": "winner",
        "too_noisy": False,
        "winner_id": "t2",
        "baseline_id": "t0",
        "aa": tune.Resolution(1.002, 0.989, 1.013, 12, 0.013),
        "bandwidth": tune.TuneBandwidth(sweep, tune.States(8.1e9, 12.3e9)),
        "matrix_rates": {"fp32": 71e9, "bf16": 22e9},
        "elapsed_sec": 231.0,
        "space": tune.TuneSpace(
            n_legal=41,
            n_illegal=3,
            n_measured=8,
            n_failed=3,
            n_excluded=0,
            n_not_reached=2,
            illegal=[
                tune.Illegal("triton attention", CUDA),
                tune.Illegal("cudagraph", CUDA),
                tune.Illegal("int8 amx", "needs the instruction set amx-int8"),
            ],
        ),
        "trials": trials(),
        "confirmation": confirmation,
        "n_repeated_slices": 0,
        "samples_file": "samples.jsonl",
        "peers": [],
        "peers_measured": None,
        "regimes": None,
        "again": "paretune tune pocket --objective tpot --max-ppl-increase 1% --budget 4m --seed 1",
        "verdict": [
            "int8 + sdpa, compile writes a token in 2.25 ms instead of 3.42 ms: 1.52 times as fast.",
            "It costs 0.33 % of perplexity, at most 0.65 %; you allowed 1 %.",
            "Compiling takes 14.2 s; that is won back after 12,033 tokens.",
        ],
    }
    made = tune.TuneResult(**{**fields, **changes})
    return from_json(tune.TuneResult, to_json(made))


def barest() -> tune.TuneResult:
    """All that a run may leave: one candidate that failed, and nothing known."""
    return make_result(
        outcome="baseline",
        winner_id=None,
        aa=None,
        bandwidth=tune.TuneBandwidth([], None),
        matrix_rates={},
        trials=[trial("a", "a", "failed", reason="no memory")],
        confirmation=None,
        verdict=[],
    )
