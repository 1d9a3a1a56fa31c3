"""What the choice by regime costs: seconds of one look-up as a share of one decode step, and requests with and without.

    python benchmarks/dispatch.py -o benchmarks/results/dispatch.json

A table of six forms over 4 x 6 regimes is asked for random requests. The step is the embedded model's, at 128 tokens,
through the native runner where there is one (the fastest, so the share is the largest). Requests of `--tokens` tokens
through `Dispatcher.runner_for` and straight to the runner are interleaved in blocks. Goal: a look-up under 1 % of a
step.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch

from paretune import clock, files, hardware, stats
from paretune.engine.dispatch import PLAN, Dispatcher, Entry, Form, Table
from paretune.engine.generate import generate
from paretune.engine.load import load_recipe
from paretune.errors import ParetuneError
from paretune.measure import environment
from paretune.measure.interleave import block_order
from paretune.measure.workload import Bench, Workload
from paretune.model import checkpoint
from paretune.recipe import Recipe, preset

BATCHES, LENGTHS = (1, 4, 16, 64), (64, 128, 256, 512, 1024, 2048)
LIMIT = 0.01


def table_of(plan: Recipe) -> Table:
    """The plan's own recipe five times over, ranked in random order, and once beside it."""
    draw = random.Random(0)
    forms = {name: Form(name, plan, "lossless") for name in (PLAN, "a", "b", "c", "d", "e")}

    def cell() -> tuple[Entry, ...]:
        names = list(forms)
        draw.shuffle(names)
        return tuple(Entry(name, draw.randrange(1 << 30)) for name in names)

    return Table(BATCHES, LENGTHS, forms, tuple(tuple(cell() for _ in LENGTHS) for _ in BATCHES))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of a request")
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--lookups", type=int, default=2000, help="a sample")
    parser.add_argument("--threads", type=int, help="default: physical cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("dispatch.json"))
    args = parser.parse_args()
    if args.blocks < stats.MIN_BLOCKS:
        parser.error(f"--blocks is {args.blocks}: an interval needs {stats.MIN_BLOCKS} or more")
    try:
        files.ensure_folder(args.output.resolve().parent)
        read_back = hardware.set_threads(args.threads)
        folder = checkpoint.resolve(args.model)
        recipe = preset("native")
        if recipe.requires("cpu"):
            recipe = preset("baseline")
        loaded = load_recipe(folder, recipe)
        forms = Dispatcher(loaded, table_of(recipe), lambda: folder)
        bench = Bench(loaded.runner, Workload(128, 32, 1, args.seed))
        draw = random.Random(args.seed)
        requests = [(draw.randint(1, 64), draw.randint(8, 4096)) for _ in range(args.lookups)]
        prompt = [torch.randint(0, loaded.runner.config.vocab_size, (96,)).tolist()]
        n_asked = 0

        def ask() -> int:
            nonlocal n_asked
            n_asked += 1
            return hardware.available_memory_bytes()

        def look_up() -> float:
            started = clock.now()
            for batch_size, length in requests:
                forms.table.choose(batch_size, length, "plan", None)
            return (clock.now() - started) / len(requests)

        def with_memory() -> float:
            started = clock.now()
            for batch_size, length in requests[:200]:
                forms.table.choose(batch_size, length, "plan", ask)
            return (clock.now() - started) / 200

        def request(chooses: bool) -> float:
            started = clock.now()
            runner = forms.runner_for(1, 96 + args.tokens)[0] if chooses else loaded.runner
            generate(runner, prompt, args.tokens, ignore_eos=True)
            return clock.now() - started

        cases = {
            "look-up": look_up,
            "look-up that asks for memory": with_memory,
            "decode step": lambda: bench.sample("tpot"),
            "request, chosen": lambda: request(True),
            "request, direct": lambda: request(False),
        }
        taken: dict[str, list[float]] = {name: [] for name in cases}
        for name in [n for n in cases for _ in range(3)]:
            cases[name]()
        for block in range(args.blocks):
            for name in block_order(list(cases), args.seed, block):
                with clock.quiet():
                    taken[name].append(cases[name]())
        median = {name: stats.bootstrap(values, np.median).to_json() for name, values in taken.items()}
        share = stats.speed_ratio(np.array(taken["look-up"]), np.array(taken["decode step"]))
        beside = stats.speed_ratio(np.array(taken["request, direct"]), np.array(taken["request, chosen"]))
        header = environment.header(seed=args.seed)
        share_of_step = {"value": share.value, "low": share.low, "high": share.high}
        result = {
            **header,
            "threads": read_back,
            "recipe": recipe.name,
            "median_sec": median,
            "share_of_step": share_of_step,
            "request_speed_with_choice": beside.to_json(),
            "limit": LIMIT,
            "n_asked": n_asked,
            "samples_sec": taken,
        }
        files.write_json(args.output, result)
    except ParetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, found in median.items():
        print(f"{name:<30}{1e6 * found['value']:12.2f} us [{1e6 * found['low']:.2f}, {1e6 * found['high']:.2f}]")
    word = "under" if share.value < LIMIT else "OVER"
    print(f"a look-up is {share.value:.3%} of a decode step, {word} {LIMIT:.0%}")
    print(f"a request with the choice runs at {beside.value:.3f} of the speed [{beside.low:.3f}, {beside.high:.3f}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
