"""What a longer context costs a token of the native runner, beside the bytes it reads more, for weights x caches.

    paretune new gpt2 -o gpt2 --random
    python benchmarks/context.py --model gpt2 -o benchmarks/results/context.json

One cache is filled to position 128 and one to 896 without computing; steps at both are timed in turns, in slices of 16.
Passes where the ratio of the seconds is at most 1.10 times the ratio of the bytes (weights and keys and values).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention import decode_slice, interleaved

from paretune import files, hardware, stats
from paretune.engine.load import load_recipe
from paretune.errors import ParetuneError
from paretune.measure import environment
from paretune.measure.workload import step_weights_bytes
from paretune.recipe import preset

NEAR, FAR, LIMIT, N_TOKENS = 128, 896, 1.10, 16


def compare(runner: Any, args: argparse.Namespace) -> dict[str, Any]:
    def at(position: int) -> tuple[Callable[[], None], int]:
        run, cache = decode_slice(runner, FAR + N_TOKENS + 1, position, N_TOKENS)
        return run, round(cache.nbytes / cache.n_slots * (position + N_TOKENS / 2))

    near, near_bytes = at(NEAR)
    far, far_bytes = at(FAR)
    weights = step_weights_bytes(runner.model)
    taken, rows = interleaved({"near": near, "far": far}, args.blocks, args.seed, N_TOKENS)
    sec = stats.speed_ratio(taken["far"], taken["near"])  # far over near, block by block
    read = (weights + far_bytes) / (weights + near_bytes)
    return {
        "near_sec": float(np.median(taken["near"])),
        "far_sec": float(np.median(taken["far"])),
        "sec_ratio": sec.to_json(),
        "bytes_ratio": read,
        "of_bytes": sec.value / read if sec.value else None,
        "passes": bool(sec.value and sec.value <= LIMIT * read),
        "samples_sec": taken,
        "n": rows[0]["n"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--weights", default="native,native_bf16,native_int8,native_int4_a8", help="presets")
    parser.add_argument("--caches", default="fp32,bf16,int8,int4")
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: physical cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    if args.blocks < stats.MIN_BLOCKS:
        parser.error(f"--blocks is {args.blocks}: an interval needs {stats.MIN_BLOCKS} or more")
    try:
        files.ensure_folder(args.output.resolve().parent)
        threads = hardware.set_threads(args.threads)
        header = environment.header(seed=args.seed)
        rows = []
        with torch.inference_mode():
            for name in args.weights.split(","):
                runner = load_recipe(args.model, preset(name), "cpu").runner
                for cache in args.caches.split(","):
                    runner.set_cache_dtype_(cache)
                    row = {"weights": name, "cache": cache, **compare(runner, args)}
                    rows.append(row)
                    files.write_json(args.output, {**header, "threads": threads, "limit": LIMIT, "rows": rows})
                    ratio, near, far = row["sec_ratio"], 1e3 * row["near_sec"], 1e3 * row["far_sec"]
                    print(
                        f"{name:<16}{cache:<6}{near:7.2f} ms at {NEAR}, {far:7.2f} at {FAR}: {ratio['value']:.2f}x "
                        f"[{ratio['low']:.2f}, {ratio['high']:.2f}] the time, {row['bytes_ratio']:.2f}x the bytes: "
                        f"{'passes' if row['passes'] else 'DOES NOT PASS'}",
                        flush=True,
                    )
    except ParetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
