"""Seconds of GPTQ at the 124M shape: 64 x 512 calibration tokens, int4 in groups of 64 (bound: 6 minutes on 2 cores).

python benchmarks/gptq.py -o benchmarks/results/gptq.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from paretune import clock, hardware
from paretune.files import write_json
from paretune.measure import environment
from paretune.model import checkpoint
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.gptq import GPTQ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="gpt2", help="a published GPT-2 size; its weights are random")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window-len", type=int, default=512)
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    threads = hardware.set_threads(args.threads)
    model = Attention("sdpa").apply(checkpoint.new(checkpoint.published(args.size)), Context())
    tokens = torch.randint(50257, (args.windows, args.window_len), generator=torch.Generator().manual_seed(0))
    started = clock.now()
    GPTQ().apply(model, Context(calibration=tokens, progress=lambda said: print(said, file=sys.stderr, flush=True)))
    seconds = clock.now() - started
    print(f"{args.size}, {tokens.numel():,} tokens, {threads} threads: {seconds:.0f} s")
    if args.output is not None:
        result = {**environment.header(), "size": args.size, "n_tokens": tokens.numel(), "threads": threads}
        write_json(args.output, {**result, "gptq_sec": seconds})


if __name__ == "__main__":
    main()
