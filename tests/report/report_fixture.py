"""A result of `tune` as the report meets it: a winner, and everything that can go wrong beside it."""

from __future__ import annotations

import copy
from typing import Any


def speedup(value: float, low: float, high: float, verdict: str, states: bool = True) -> dict[str, Any]:
    by_state = {"low": value - 0.05, "high": value + 0.04} if states else None
    return {
        "value": value,
        "low": low,
        "high": high,
        "n_blocks": 12,
        "verdict": verdict,
        "by_state": by_state,
    }


def quality(increase: float, upper: float, within: bool, phase: str = "decode") -> dict[str, Any]:
    return {
        "protocol": "pocket/heldout/ctx256/stride256/token",
        "perplexity": 21.4 * (1 + increase),
        "baseline_perplexity": 21.4,
        "ppl_increase": increase,
        "ppl_increase_upper": upper,
        "kl_mean": abs(increase) * 0.4,
        "top1_agreement": max(0.1, 1 - 4 * abs(increase)),
        "n_windows": 64,
        "phase": phase,
        "within_bound": within,
    }


def memory(weights: float, rss: float = 412e6) -> dict[str, Any]:
    return {
        "weights_bytes": weights,
        "kv_cache_bytes": 1.18e6,
        "activation_peak_bytes": 2.9e6,
        "rss_peak_bytes": rss,
    }


def trial(trial_id: str, name: str, status: str = "measured", **fields: Any) -> dict[str, Any]:
    return {
        "id": trial_id,
        "name": name,
        "recipe": {"transforms": [{"kind": part.strip()} for part in name.split("+")], "engine": {}},
        "status": status,
        "reason": None,
        "speedup": None,
        "tpot_sec": None,
        "ttft_sec": None,
        "memory": None,
        "quality": None,
        "label": None,
        "load_sec": None,
        "compile_sec": None,
        "break_even_tokens": None,
        "mbu": None,
        "bound_by": None,
        "proof": [],
        **fields,
    }


def make_result(**changes: Any) -> dict[str, Any]:
    """The whole result, a fresh copy each time; `changes` replace fields at the top."""
    trials = [
        trial(
            "t0",
            "baseline",
            speedup=speedup(1.0, 1.0, 1.0, "indistinguishable"),
            tpot_sec=3.42e-3,
            ttft_sec=24.1e-3,
            memory=memory(28.4e6),
            quality=quality(0.0, 0.0, True),
            label="lossless",
            load_sec=0.08,
            compile_sec=0.0,
            mbu=0.71,
            bound_by="reading the weights: 8.6 GB/s of the 12.1 GB/s that this machine delivers",
        ),
        trial(
            "t1",
            "sdpa",
            speedup=speedup(1.06, 1.04, 1.09, "faster"),
            tpot_sec=3.23e-3,
            ttft_sec=21.7e-3,
            memory=memory(28.4e6),
            quality=quality(0.0, 0.0, True),
            label="lossless",
            load_sec=0.08,
            compile_sec=0.0,
            break_even_tokens=0,
            mbu=0.74,
            proof=["the fused attention kernel ran in 6 of 6 layers"],
        ),
        trial(
            "t2",
            "int8 + sdpa, compile",
            speedup=speedup(1.54, 1.49, 1.59, "faster"),
            tpot_sec=2.22e-3,
            ttft_sec=19.8e-3,
            memory=memory(7.3e6, 388e6),
            quality=quality(0.0031, 0.0062, True),
            label="bounded",
            load_sec=0.31,
            compile_sec=14.2,
            break_even_tokens=12033.0,
            mbu=0.34,
            explanations=[
                {
                    "cause": "dispatch overhead",
                    "text": "a step calls 713 operators, and finding them takes 31 % of it. To try: --config native. "
                    "Predicted gain: at most 1.45x.",
                },
                {"cause": "no single cause", "text": "what the roofline says"},
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
            memory=memory(7.3e6, 371e6),
            quality=quality(0.0031, 0.0061, True),
            label="bounded",
            load_sec=0.29,
            compile_sec=0.0,
            break_even_tokens=212.0,
            mbu=0.31,
        ),
        trial(
            "t4",
            "bf16",
            speedup=speedup(0.63, 0.61, 0.66, "slower"),
            tpot_sec=5.43e-3,
            ttft_sec=61.2e-3,
            memory=memory(14.2e6),
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
            memory=memory(28.4e6),
            label="lossless",
        ),
        trial(
            "t6",
            "int4 groups of 32 + sdpa, compile",
            speedup=speedup(1.88, 1.79, 1.96, "faster", states=False),
            tpot_sec=1.82e-3,
            ttft_sec=22.4e-3,
            memory=memory(4.4e6, 380e6),
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
            memory=memory(28.4e6),
            quality=quality(0.42, 0.47, False),
            label="changed weights",
        ),
        trial("t8", "int8 + flex", "failed", reason="out of memory: the worker was ended at 3.1 GB"),
        trial("t9", "fuse qkv", "invalid", reason="no effect: 0 of 6 layers were changed"),
        trial("t10", "compile max-autotune", "failed", reason="time-out after 60 s in compilation"),
        {"id": "t11", "name": "nf4 + sdpa", "status": "not_reached"},
        trial("t12", "nf4 + flex", "not_reached"),
    ]
    result: dict[str, Any] = {
        "schema_version": 1,
        "kind": "tune",
        "command": "paretune tune pocket --objective tpot --max-ppl-increase 1% --budget 4m",
        "seed": 1,
        "created": "2026-05-04T10:11:12+00:00",
        "versions": {"paretune": "0.1.0", "torch": "2.11.0", "python": "3.11.9"},
        "hardware": {
            "cpu": "AMD EPYC 7B13",
            "n_cores": 2,
            "instruction_sets": ["avx2", "fma", "f16c"],
            "memory_bytes": 8.3e9,
            "gpu": None,
        },
        "model": {
            "name": "pocket",
            "family": "gpt2",
            "n_parameters": 7_100_000,
            "n_layer": 6,
            "n_embd": 256,
            "vocab_size": 8192,
        },
        "goal": {
            "objective": "tpot",
            "max_ppl_increase": 0.01,
            "budget_sec": 240,
            "input_len": 128,
            "output_len": 16,
            "batch_size": 1,
        },
        "outcome": "winner",
        "winner_id": "t2",
        "baseline_id": "t0",
        "verdict": [
            "int8 + sdpa, compile writes a token in 2.25 ms instead of 3.42 ms: 1.52 times as fast.",
            "It costs 0.33 % of perplexity, at most 0.65 %; you allowed 1 %.",
            "Compiling takes 14.2 s; that is won back after 12,033 tokens.",
        ],
        "aa": {"value": 1.002, "low": 0.989, "high": 1.013, "half_width": 0.013, "n_blocks": 12},
        "bandwidth": {
            "sweep": [
                {"bytes": 2**e, "bytes_per_sec": rate * 1e9 * n**0.6, "n_threads": n}
                for n in (1, 2)
                for e, rate in zip(range(16, 28, 2), (38.0, 31.0, 22.0, 12.4, 8.4, 8.1), strict=True)
            ],
            "states": {"low": 8.1e9, "high": 12.3e9},
        },
        "matrix_rates": {"fp32": 71e9, "bf16": 22e9},
        "elapsed_sec": 231.0,
        "space": {
            "n_legal": 41,
            "n_illegal": 3,
            "n_measured": 8,
            "n_failed": 3,
            "n_not_reached": 2,
            "illegal": [
                {"name": "triton attention", "reason": "needs a CUDA device; this machine has none"},
                {"name": "cudagraph", "reason": "needs a CUDA device; this machine has none"},
                {"name": "int8 amx", "reason": "needs the instruction set amx-int8"},
            ],
        },
        "trials": trials,
        "confirmation": {
            "speedup": speedup(1.52, 1.48, 1.56, "faster"),
            "tpot_sec": 2.25e-3,
            "ttft_sec": 19.9e-3,
            "baseline_tpot_sec": 3.42e-3,
            "quality": quality(0.0033, 0.0065, True),
            "n_processes": 2,
            "note": None,
        },
        "samples_file": "samples.jsonl",
        "again": "paretune tune pocket --objective tpot --max-ppl-increase 1% --budget 4m --seed 1",
    }
    return copy.deepcopy({**result, **changes})
