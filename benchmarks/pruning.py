"""Speed of pruned models and of products without zeros, in interleaved blocks; raw samples are kept.

    python benchmarks/pruning.py layers -o runs/sparse.json     single products: int8 rows against int8 without zeros
    python benchmarks/pruning.py models -o runs/pruned          whole steps: 124M shape by `paretune bench`

On a quiet machine only. Ratios are medians over blocks of dense seconds / pruned seconds, measured side by side.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import torch

from paretune import clock
from paretune.measure import environment
from paretune.ops.native import packed
from paretune.ops.weights.int8_rows import Int8Rows
from paretune.ops.weights.sparse8 import Sparse8

SHAPES = ((3072, 768), (768, 3072), (8192, 2048))  # of the 124M and the 1.1B shape
SHARES = (1.0, 0.5, 0.25, 0.1)
BLOCKS, SAMPLE_SEC = 30, 0.05
CONFIGS = (
    "native+int8",
    "native+magnitude(0.5)+sparse8",
    "native+magnitude(0.25)+sparse8",
    "native+magnitude(0.1)+sparse8",
    "native+neurons(0.5, by=magnitude)+int8",
    "native+layers(0.5, by=magnitude)+int8",
)


def layers(path: Path) -> None:
    """One row of inputs through one matrix, one thread, as `PackedWeight.matmul` does it."""
    generator, order = torch.Generator().manual_seed(0), random.Random(0)
    rows = []
    for n_out, n_in in SHAPES:
        subjects = {}
        for share in SHARES:
            w = torch.randn(n_out, n_in, generator=generator)
            w *= torch.rand(n_out, n_in, generator=generator) < share
            dense = Int8Rows.quantize(w)
            weight = dense if share == 1 else Sparse8.of(dense.q, dense.scale, torch.float32)
            # Many copies, together larger than the caches: weights come from memory, as in a model.
            n = max(1, (64 << 20) // (n_out * n_in))
            subjects[share] = list(packed.pack([weight] * n))
        x = torch.randn(1, n_in, generator=generator)
        samples: dict[float, list[float]] = {share: [] for share in SHARES}
        for _ in range(BLOCKS):
            for share in order.sample(SHARES, len(SHARES)):
                copies, n, began = subjects[share], 0, clock.now()
                while clock.now() - began < SAMPLE_SEC:
                    copies[n % len(copies)].matmul(x)
                    n += 1
                samples[share].append((clock.now() - began) / n)
        for share in SHARES:
            ratios = sorted(a / b for a, b in zip(samples[1.0], samples[share], strict=True))
            n_bytes = subjects[share][0].stored_bytes
            rows.append(
                {
                    "shape": [n_out, n_in],
                    "share": share,
                    "stored_bytes": n_bytes,
                    "ratio_median": ratios[len(ratios) // 2],
                    "ratio_p20_p80": [ratios[len(ratios) // 5], ratios[len(ratios) * 4 // 5]],
                    "samples_sec": samples[share],
                }
            )
            middle = ratios[len(ratios) // 2]
            print(f"{n_out}x{n_in} at {share:.0%}: {middle:.2f}x of dense int8, {n_bytes:,} bytes", flush=True)
    header = {**environment.header(), "isa": packed.isa()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**header, "rows": rows}, indent=2, allow_nan=False), "utf-8")


def models(folder: Path) -> None:
    """Random weights: speed only."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "paretune"]
    made = folder / "gpt2-shape"
    if not made.is_dir():
        subprocess.run([*command, "new", "gpt2", "-o", str(made)], check=True)
    subprocess.run(
        [*command, "bench", str(made), "--config", ",".join(CONFIGS), "-o", str(folder / "bench")], check=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "models"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    {"layers": layers, "models": models}[given.what](given.output)
