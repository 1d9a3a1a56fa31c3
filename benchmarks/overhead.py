"""What our own loop costs per token outside the model: a runner that answers at once, 50,257 logits.

    python benchmarks/overhead.py -o benchmarks/results/overhead.json

A sample is one `generate` call of `--tokens` tokens, divided by them. The cases are interleaved: each block holds every
case once, in random order.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from paretune import clock, files, hardware, stats
from paretune.engine.cache import KVCache
from paretune.engine.generate import generate
from paretune.engine.sampling import SamplingOptions
from paretune.errors import ParetuneError
from paretune.measure import environment
from paretune.measure.interleave import block_order

VOCABULARY = 50257
CASES = {
    "greedy": SamplingOptions(),
    "top-k 50": SamplingOptions(temperature=1.0, top_k=50, seed=0),
    "top-p 0.9": SamplingOptions(temperature=1.0, top_p=0.9, seed=0),
    "top-k 50, top-p 0.9": SamplingOptions(temperature=1.0, top_k=50, top_p=0.9, seed=0),
}
LIMITS_USEC = {"greedy": 50.0, "top-k 50": 500.0, "top-p 0.9": 500.0, "top-k 50, top-p 0.9": 500.0}


class FreeRunner:
    """Costs nothing: the same logits at every step, spread as a trained model's are (a few likely tokens)."""

    config = SimpleNamespace(vocab_size=VOCABULARY, longest=1 << 20, eos_token_ids=())
    device = torch.device("cpu")
    chooses, same_bits_at_any_width = False, True

    def __init__(self) -> None:
        self.logits = 3 * torch.randn(1, 1, VOCABULARY, generator=torch.Generator().manual_seed(0))

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        shape: Any = {"n_layer": 0, "n_kv_head": 1, "head_dim": 1, "dtype": torch.float32}
        return KVCache(batch_size=batch_size, capacity=capacity, **shape)

    def forward(self, tokens: Any, cache: Any, logits: str = "last") -> torch.Tensor:
        return self.logits


def sample(runner: Any, options: SamplingOptions, n_tokens: int) -> float:
    """Microseconds per token."""
    with clock.quiet():
        started = clock.now()
        generate(runner, [[1, 2, 3]], max_new_tokens=n_tokens, sampling=options, ignore_eos=True)
        return 1e6 * (clock.now() - started) / n_tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--threads", type=int, help="default: physical cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("overhead.json"))
    args = parser.parse_args()
    try:
        files.ensure_folder(args.output.resolve().parent)
        read_back = hardware.set_threads(args.threads)
        runner = FreeRunner()
        for options in CASES.values():
            sample(runner, options, args.tokens)
        taken: dict[str, list[float]] = {name: [] for name in CASES}
        for block in range(args.blocks):
            for name in block_order(list(CASES), args.seed, block):
                taken[name].append(sample(runner, CASES[name], args.tokens))
        rows = []
        for name, values in taken.items():
            interval = stats.bootstrap(values, np.median)
            p90 = stats.percentile(values, 90)
            row = {"case": name, "usec_per_token": interval.value, "low": interval.low, "high": interval.high}
            rows.append({**row, "p90_usec": p90, "limit_usec": LIMITS_USEC[name], "n": len(values)})
        header = environment.header(seed=args.seed)
        result = {**header, "threads": read_back, "tokens": args.tokens, "rows": rows, "samples_usec": taken}
        files.write_json(args.output, result)
    except ParetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for row in rows:
        word = "under" if row["usec_per_token"] < row["limit_usec"] else "OVER"
        print(
            f"{row['case']:<22}{row['usec_per_token']:8.1f} us per token [{row['low']:.1f}, {row['high']:.1f}], "
            f"{word} {row['limit_usec']:.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
