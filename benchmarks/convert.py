"""A dense model becomes an ALiBi one: quality after a short fine-tune, in its context and at four times it.

    python benchmarks/convert.py --books BOOKS.tar.xz -o benchmarks/results/convert.json

Two runs of `paretune train` see the same batches in the same order: the original as it is, and the original without
positions and with ALiBi, which learns what the original says (`--distill-weight`) rather than the text. Then they are
scored on held-out books, token by token: in the context of the model (paired, bootstrap over blocks of 128 tokens), and
the converted one in windows of four contexts beside the original on the very same tokens in windows of its own context.

Goals: in the context at most 5 % above the original given the same tokens; over the last quarter of four contexts at
most 10 % above it. A rate that converts fast spoils a model that needs no conversion, so the original is trained at a
lower one, and what the goals are held against is the better of it with and without the extra tokens.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretune import clock, files, hardware, stats
from paretune.engine.load import load_recipe
from paretune.engine.runners.base import Runner
from paretune.errors import ParetuneError
from paretune.evaluate.length import losses_of
from paretune.evaluate.perplexity import block_means
from paretune.measure import environment
from paretune.model import checkpoint
from paretune.model.tokenizer import Tokenizer
from paretune.recipe import preset

FACTOR = 4
IN_CONTEXT_LIMIT, LONG_LIMIT = 0.05, 0.10


def unpack(archive: Path, folder: Path, n_train: int, n_heldout: int) -> list[Path]:
    """The first books of the archive by name into `folder / "train"`; the paths of those after them, held out."""
    (folder / "train").mkdir()
    heldout = []
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar if m.isfile() and m.name.endswith(".txt")), key=lambda m: m.name)
        if len(members) < n_train + n_heldout:
            raise ParetuneError(f"{archive} holds {len(members)} books", "Ask for fewer with --train-books")
        for i, member in enumerate(members[: n_train + n_heldout]):
            source = tar.extractfile(member)
            assert source is not None
            path = folder / ("train" if i < n_train else "") / f"{i:03}.txt"
            path.write_bytes(source.read())
            heldout += [path] if i >= n_train else []
    return heldout


def train(model: str, text: Path, out: Path, args: argparse.Namespace, *more: Any) -> float:
    """Seconds of one run of `paretune train`."""
    flags = ["--steps", args.steps, "--batch-size", args.batch_size]
    flags += ["--block-size", args.block_size, "--seed", args.seed, "--heldout-fraction", 0, "--save-dtype", "fp32"]
    flags += ["--threads", args.threads] if args.threads else []
    command = [sys.executable, "-m", "paretune", "train", model, "--text", text, "-o", out, *flags, *more]
    started = clock.now()
    if subprocess.run([str(c) for c in command], check=False).returncode:
        raise ParetuneError("training failed", "See its message above")
    return clock.now() - started


def in_windows(runner: Runner, tokens: torch.Tensor, length: int) -> np.ndarray:
    """[N, length - 1] nats of whole windows."""
    n = len(tokens) // length
    return np.stack([losses_of(runner, tokens[i * length : (i + 1) * length]) for i in range(n)])


def increase(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Relative increase of perplexity of the first over the second, paired, over blocks of about 128 tokens."""
    interval = stats.bootstrap(block_means(ours - theirs), np.mean)
    return {
        "ours": math.exp(float(ours.mean())),
        "original": math.exp(float(theirs.mean())),
        **{name: math.expm1(getattr(interval, name)) for name in ("value", "low", "high")},
        "n_tokens": ours.size,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--books", type=Path, required=True, help="archive of *.txt")
    parser.add_argument("--train-books", type=int, default=24)
    parser.add_argument("--heldout-books", type=int, default=6)
    parser.add_argument("--heldout-tokens", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=1, help="small: updates convert, tokens do not")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=7e-4, help="of the conversion")
    parser.add_argument("--original-learning-rate", type=float, default=1e-4, help="of the original's extra tokens")
    parser.add_argument("--distill-weight", type=float, default=1.0, help="0: no teacher")
    parser.add_argument("--distill-temperature", type=float, default=1.0)
    parser.add_argument("--threads", type=int, help="default: physical cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("convert.json"))
    args = parser.parse_args()
    try:
        files.ensure_folder(args.output.resolve().parent)
        read_back = hardware.set_threads(args.threads)
        source = checkpoint.resolve(args.model)
        context = checkpoint.read_config(source).n_positions
        with tempfile.TemporaryDirectory(prefix="paretune-convert-") as name:
            folder = Path(name)
            texts = [
                p.read_text("utf-8", "replace")
                for p in unpack(args.books, folder, args.train_books, args.heldout_books)
            ]
            ids = Tokenizer(source).encode("\n\n".join(texts))
            n = min(args.heldout_tokens, len(ids)) // (FACTOR * context) * FACTOR * context
            if n == 0:
                raise ParetuneError(f"{len(ids)} held-out tokens give no window", "Raise --heldout-books or -tokens")
            heldout = torch.tensor(ids[:n])
            books, rate = folder / "train", "--learning-rate"
            more: list[Any] = [rate, args.learning_rate, "--config", "alibi"]
            if args.distill_weight:
                more += ["--distill", args.model, "--distill-weight", args.distill_weight]
                more += ["--distill-temperature", args.distill_temperature]
            spent = {"alibi": train(args.model, books, folder / "alibi", args, *more)}
            spent["original"] = train(args.model, books, folder / "original", args, rate, args.original_learning_rate)
            runners = {
                "untrained": load_recipe(source, preset("alibi")).runner,
                "as it was": load_recipe(source, preset("baseline")).runner,
                "with the same tokens": load_recipe(folder / "original", preset("baseline")).runner,
                "alibi": load_recipe(folder / "alibi", preset("baseline")).runner,
            }
            near = {k: in_windows(r, heldout, context) for k, r in runners.items()}
            originals = ("as it was", "with the same tokens")
            best = min(originals, key=lambda k: float(near[k].mean()))
        far = in_windows(runners["alibi"], heldout, FACTOR * context)
        # Stretch by stretch: token 1 + i of a long window stands at i; the first of each short window has no loss.
        stretches = []
        for i in range(FACTOR):
            ours = far[:, i * context : (i + 1) * context - 1]
            theirs = near[best][i::FACTOR]
            stretches.append({"begin": i * context, "end": (i + 1) * context, **increase(ours, theirs)})
        inside = increase(near["alibi"], near[best])
        untrained = increase(near["untrained"], near[best])
        header = environment.header(seed=args.seed)
        result = {
            **header,
            "threads": read_back,
            "context": context,
            "settings": {k: v for k, v in vars(args).items() if isinstance(v, int | float)},
            "trained_tokens": args.steps * args.batch_size * args.block_size,
            "training_sec": spent,
            "held_against": f"the original {best}",
            "original_perplexity": {k: math.exp(float(near[k].mean())) for k in originals},
            "converted_untrained": untrained,
            "in_context": {**inside, "limit": IN_CONTEXT_LIMIT, "holds": inside["high"] <= IN_CONTEXT_LIMIT},
            "at_4x": {**stretches[-1], "limit": LONG_LIMIT, "holds": stretches[-1]["high"] <= LONG_LIMIT},
            "by_position": stretches,
        }
        files.write_json(args.output, result)
    except ParetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("original: " + ", ".join(f"{v:.2f} {k}" for k, v in result["original_perplexity"].items()))
    for title, row in (("untrained", untrained), ("in context", inside), ("at 4x", stretches[-1])):
        print(
            f"{title:<12}{row['ours']:9.2f} beside {row['original']:.2f} of the original: {row['value']:+.2%} "
            f"[{row['low']:+.2%}, {row['high']:+.2%}]"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
