"""Attention by mechanism: the operator alone, decode on a ring cache, and the whole model's prefill with its limit.

    python benchmarks/attention.py -o benchmarks/results/attention.json

operator: one layer of GPT-2's shape (12 heads of 64) on random inputs; peak memory is what the process grew by in one
call, inputs and output aside. decode: the native runner on a random GPT-2, the cache filled to a position without
computing it. prefill: the same model; the Amdahl limit is what the dense model would gain if attention cost nothing,
from the native runner's own counters. Cases of a table are interleaved: a block holds each once, in random order;
ratios are medians over blocks with 95 % intervals, above 1: faster than the first case.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretune import clock, files, hardware, process, stats
from paretune.engine.cache import KVCache
from paretune.engine.runners.native import NativeRunner
from paretune.errors import ParetuneError, UsageError
from paretune.measure import environment
from paretune.measure.interleave import block_order
from paretune.model import checkpoint
from paretune.ops.attention import alibi, native, sdpa
from paretune.ops.attention.pattern import parse
from paretune.ops.attention.spec import AttentionSpec
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.mechanism import Mechanism

TABLES = ("operator", "decode", "prefill")
HYBRID = "prefix:16+window:256"
# (function, pattern, ALiBi); the first is what the others are compared with.
OPERATORS = {
    "flash (sdpa)": (sdpa.attention, "causal", False),
    "flash (sdpa) again": (sdpa.attention, "causal", False),
    "native dense": (native.attention, "causal", False),
    "native ALiBi": (native.attention, "causal", True),
    "native window 256": (native.attention, "window:256", False),
    "native hybrid": (native.attention, HYBRID, True),
    "native BigBird": (native.attention, "prefix:64+window:256+random:3x64@0", False),
}
MODELS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "ALiBi": {"alibi": True},
    "window 256": {"pattern": "window:256"},
    "hybrid": {"alibi": True, "pattern": HYBRID},
}


def interleaved(
    cases: Mapping[str, Callable[[], Any]], blocks: int, seed: int, unit: int = 1
) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Seconds of each case by block, and its median and ratio to the first."""
    for case in cases.values():
        case()
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for block in range(blocks):
        for name in block_order(list(cases), seed, block):
            with clock.quiet():
                started = clock.now()
                cases[name]()
                taken[name].append((clock.now() - started) / unit)
    first = taken[next(iter(cases))]
    rows = []
    for name, values in taken.items():
        ratio = stats.speed_ratio(first, values).to_json()
        rows.append({"case": name, "sec": float(np.median(values)), "ratio": ratio, "n": len(values)})
    return taken, rows


def peak_bytes(call: Callable[[], torch.Tensor]) -> int | None:
    """What the process grew by at most during one call, its result aside; None where the system does not tell."""
    call()
    process.give_back_free_memory()  # a call that takes what earlier ones freed would seem to need nothing
    if not process.reset_peak_rss():
        return None
    before = process.rss_bytes()
    out = call()
    return max(0, process.peak_rss_bytes() - before - out.nbytes)


def operator(length: int, args: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(args.seed)
    q, k, v = (torch.randn(1, args.heads, length, args.head_dim, generator=generator) for _ in range(3))

    def case(function: Any, pattern: str, has_alibi: bool) -> Callable[[], Any]:
        slopes = alibi.slopes(args.heads) if has_alibi else None
        spec = AttentionSpec(args.head_dim**-0.5, parse(pattern), slopes)
        return lambda: function(q, k, v, None, spec)

    cases = {name: case(*what) for name, what in OPERATORS.items()}
    taken, rows = interleaved(cases, args.blocks, args.seed)
    for row in rows:
        _, pattern, _ = OPERATORS[row["case"]]
        row["work_share"] = parse(pattern).work_share(length)
        row["peak_bytes"] = peak_bytes(cases[row["case"]])
    return {"title": f"operator, {length} tokens", "rows": rows, "samples_sec": taken}


def random_model(args: argparse.Namespace, mechanism: dict[str, Any] | None) -> NativeRunner:
    config = checkpoint.published(args.model_size, args.n_positions)
    model = checkpoint.new(config, args.seed)
    if mechanism is not None:
        model = Mechanism(**mechanism).apply(model, Context())
    return NativeRunner(Attention("sdpa").apply(model, Context()))


def decode_slice(
    runner: NativeRunner, capacity: int, position: int, n_tokens: int
) -> tuple[Callable[[], None], KVCache]:
    """`n_tokens` decode steps from `position` on, again and again, on a cache that was filled without computing it."""
    cache = runner.new_cache(1, capacity)
    while cache.host_lengths[0] < position:
        cache.begin_(min(cache.max_step, position - cache.host_lengths[0]))
        cache.commit_()
    token = torch.zeros(1, 1, dtype=torch.int64)

    def run() -> None:
        for _ in range(n_tokens):
            runner.greedy(token, cache)
        cache.truncate_(position)

    return run, cache


def decode(args: argparse.Namespace) -> dict[str, Any]:
    runner = random_model(args, MODELS["window 256"])
    n_tokens = 16

    def at(position: int) -> Callable[[], None]:
        return decode_slice(runner, args.n_positions, position, n_tokens)[0]

    far = args.n_positions - 2 * n_tokens
    cases = {f"position {p}": at(p) for p in (min(512, far // 2), far)}
    taken, rows = interleaved(cases, max(args.blocks, args.decode_blocks), args.seed, n_tokens)
    sizes = {f"{n} tokens": runner.new_cache(1, n).nbytes for n in (1024, args.n_positions)}
    return {"title": "decode, window 256", "rows": rows, "cache_bytes": sizes, "samples_sec": taken}


def prefill(length: int, args: argparse.Namespace) -> dict[str, Any]:
    tokens = torch.randint(0, 50257, (1, length), generator=torch.Generator().manual_seed(args.seed))
    runners = {name: random_model(args, mechanism) for name, mechanism in MODELS.items()}

    def case(runner: NativeRunner) -> Callable[[], Any]:
        return lambda: runner.forward(tokens, runner.new_cache(1, length), "last")

    taken, rows = interleaved({n: case(r) for n, r in runners.items()}, args.blocks, args.seed)
    for row in rows:
        runner = runners[row["case"]]
        runner.count_(True)
        case(runner)()
        counted = runner.counters or []
        runner.count_(False)
        share = sum(c[3] for c in counted if "attention" in c[0]) / sum(c[3] for c in counted)
        row["attention_share"], row["amdahl_limit"] = share, 1 / (1 - share)
    return {"title": f"prefill of {args.model_size}, {length} tokens", "rows": rows, "samples_sec": taken}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(TABLES), help="tables, separated by commas")
    parser.add_argument("--lengths", default="1024,4096,16384", help="of the operator")
    parser.add_argument("--prefill-lengths", default="1024,4096", help="of the whole model; empty: none")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--model-size", default="gpt2")
    parser.add_argument("--n-positions", type=int, default=16384)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--decode-blocks", type=int, default=30)
    parser.add_argument("--threads", type=int, help="default: physical cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("attention.json"))
    args = parser.parse_args()
    try:
        only = [name.strip() for name in args.only.split(",")]
        unknown = [name for name in only if name not in TABLES]
        if unknown:
            raise UsageError(f"--only {args.only}: there is no table {unknown[0]!r}", f"Use {', '.join(TABLES)}")
        files.ensure_folder(args.output.resolve().parent)
        threads = hardware.set_threads(args.threads)
        header = environment.header(seed=args.seed)
        tables: list[dict[str, Any]] = []
        each = {
            "operator": [lambda n=int(n): operator(n, args) for n in args.lengths.split(",")],
            "decode": [lambda: decode(args)],
            "prefill": [lambda n=int(n): prefill(n, args) for n in args.prefill_lengths.split(",") if n],
        }
        steps = [step for name in TABLES if name in only for step in each[name]]
        with torch.inference_mode():
            for step in steps:
                tables.append(step())
                show(tables[-1])
                files.write_json(args.output, {**header, "threads": threads, "tables": tables})
    except ParetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def show(table: dict[str, Any]) -> None:
    print(f"\n{table['title']}")
    for row in table["rows"]:
        value, low, high = (row["ratio"][k] for k in ("value", "low", "high"))
        words = [f"{row['case']:<20}{1e3 * row['sec']:10.2f} ms  {value or 0:6.2f}x [{low or 0:.2f}, {high or 0:.2f}]"]
        if "work_share" in row:
            words.append(f"{row['work_share']:.1%} of the pairs")
        if row.get("peak_bytes") is not None:
            words.append(f"{row['peak_bytes'] / 1e6:.0f} MB")
        if "amdahl_limit" in row:
            words.append(f"attention {row['attention_share']:.0%}, limit {row['amdahl_limit']:.2f}x")
        print("  " + ", ".join(words), flush=True)
    for name, size in table.get("cache_bytes", {}).items():
        print(f"  cache for {name}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
