"""Does `generate` give what `tune` claims? Seconds a token of both loops, in one process, in turns.

    python benchmarks/generate_claim.py --model pocket --model smollm2 -o benchmarks/results/generate_claim.json

A block holds every case once, in random order, each a slice of 0.15 s or more at the same positions after the same
prompt. The claim is the loop that `bench` and `tune` time (`measure.workload.Bench`); the other cases are calls of
`generate`, as the command line makes them: garbage collector on, text streamed through a pipe to another process.
The ratio is the median over blocks of generate / claim, with its 95 % interval; the bound is 1.10.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretune import files, stats
from paretune.engine import session
from paretune.engine.generate import generate
from paretune.engine.plan import is_plan
from paretune.errors import ParetuneError, UsageError
from paretune.evaluate import texts
from paretune.measure import environment
from paretune.measure.interleave import block_order
from paretune.measure.workload import MIN_SLICE_SEC, Bench, Workload

BOUND = 1.10
CASES = {
    "tokens": {},  # no text at all
    "text at the end": {"text": True},
    "streamed": {"text": True, "stream": True},
    "streamed, stop string": {"text": True, "stream": True, "stop": ["\u2603 never written \u2603"]},
}


class AllSteps(Bench):
    """`Bench` whose slice is all decode steps of a request, so that positions are those of `generate`."""

    @property
    def n_decode(self) -> int:
        return self.workload.output_len - 1


class Pipe:
    """What `paretune generate ... | cat` writes to: another process that reads as soon as there is something."""

    def __init__(self) -> None:
        code = "import os\nwhile os.read(0, 65536): pass"
        self._reader = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        assert self._reader.stdin is not None
        self._out = os.fdopen(os.dup(self._reader.stdin.fileno()), "w", encoding="utf-8")
        self._reader.stdin.close()

    def show(self, _row: int, piece: str) -> None:
        self._out.write(piece)
        self._out.flush()

    def close(self) -> None:
        self._out.close()
        self._reader.wait()


def generated(run: Callable[[], Any]) -> float:
    """Seconds a token after the first, over calls that take a slice together."""
    sec, n_steps = 0.0, 0
    while sec < MIN_SLICE_SEC:
        timing = run().timing
        sec += timing.total_sec - timing.ttft_sec
        n_steps += timing.n_steps
    return sec / n_steps


def measure(model: str, args: argparse.Namespace, pipe: Pipe) -> dict[str, Any]:
    """All blocks of one model."""
    opened = session.open(model, None if is_plan(model) else args.config)
    recipe, tokenizer = opened.recipe, opened.tokenizer()
    threads = opened.set_threads(args.threads)
    runner = opened.load().runner
    prompt = tokenizer.encode(texts.text_of("confirm"))[: args.input_len]
    n = args.new_tokens
    bench = AllSteps(runner, Workload(len(prompt), n), torch.tensor([prompt]))

    def case(text: bool = False, stream: bool = False, stop: tuple[str, ...] = ()) -> Callable[[], float]:
        options = {"tokenizer": tokenizer if text else None, "on_text": pipe.show if stream else None, "stop": stop}
        return lambda: generated(lambda: generate(runner, [prompt], n, ignore_eos=True, **options))

    runs = {"claim": lambda: bench.sample("tpot")} | {name: case(**options) for name, options in CASES.items()}
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for block in range(args.blocks):
        for name in block_order(list(runs), args.seed, block):
            samples[name].append(runs[name]())
    rows = []
    for name in CASES:
        ratio = stats.speed_ratio(samples[name], samples["claim"])
        rows.append({"case": name, "generate_over_claim": ratio.to_json()})
        word = "within" if ratio.high <= BOUND else "over" if ratio.low > BOUND else "undecided against"
        claim = stats.bootstrap(samples["claim"], np.median).value
        print(
            f"{model}, {recipe.name}: claim {1e3 * claim:.3f} ms; {name}: {ratio.value:.3f} "
            f"[{ratio.low:.3f}, {ratio.high:.3f}] of it, {word} {BOUND:.2f}",
            flush=True,
        )
    return {"model": model, "recipe": recipe.to_dict(), "threads": threads, "rows": rows, "samples_sec": samples}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="folder, plan or known name; may be repeated [pocket]")
    parser.add_argument("--config", default="native_int8", help="of a model that is no plan")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--threads", type=int, help="default: physical cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("generate_claim.json"))
    args = parser.parse_args()
    try:
        if args.new_tokens < 2 or args.input_len < 1 or args.blocks < stats.MIN_BLOCKS:
            raise UsageError("there is nothing to compare", f"--new-tokens 2, --blocks {stats.MIN_BLOCKS} or more")
        files.ensure_folder(args.output.resolve().parent)
        pipe = Pipe()
        try:
            found = [measure(model, args, pipe) for model in args.model or ["pocket"]]
        finally:
            pipe.close()
        options = {"input_len": args.input_len, "new_tokens": args.new_tokens, "blocks": args.blocks, "bound": BOUND}
        files.write_json(args.output, {**environment.header(seed=args.seed), **options, "models": found})
    except ParetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
