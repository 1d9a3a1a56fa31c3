"""The native runner against the fastest peers: the same model, prompts, lengths and threads, interleaved.

    paretune peers install all
    paretune new gpt2 -o gpt2 --random
    python benchmarks/peers.py --model gpt2 -o benchmarks/results/peers.json

A block holds every engine once in random order; ratios are medians over blocks with 95 % intervals. Each of ours is
laid beside every peer of the same number of bits. The share of the floor is bytes that a decode step must read (weights
and cache) / its seconds / the bandwidth that the probes around the same slice read. Ratios above 1: we are faster.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from paretune import files
from paretune.errors import ParetuneError
from paretune.measure import roofline
from paretune.measure.bench import bench
from paretune.measure.interleave import Blocks, Sample
from paretune.measure.peers.catalogue import engines_of
from paretune.recipe import preset
from paretune.records.judge import judge
from paretune.records.record import to_json

# Ours by the peers that they are compared with.
CLASSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fp32": (
        ("native",),
        ("llama.cpp:F32", "onnxruntime:fp32", "transformers:fp32"),
    ),
    "16 bits": (("native_bf16",), ("llama.cpp:BF16", "transformers:bf16", "openvino:bf16")),
    "8 bits": (
        ("native_int8", "native_int8_kv8", "native_w7a7"),
        ("llama.cpp:Q8_0", "ctranslate2:int8", "onnxruntime:int8", "openvino:int8"),
    ),
    "4 bits": (
        ("native_int4_a8", "native_q4_0_a8"),
        ("llama.cpp:Q4_0", "llama.cpp:Q4_K_M", "onnxruntime:int4", "openvino:int4"),
    ),
}
# (name, input tokens, output tokens, sequences, kinds)
CELLS = {
    "decode 128+128": (128, 128, 1, ("tpot",)),
    "512+128": (512, 128, 1, ("ttft", "tpot")),
    "prefill 1008": (1008, 16, 1, ("ttft",)),
    "context 896": (896, 64, 1, ("ttft", "tpot")),
    "batch 8, 128+128": (128, 128, 8, ("tpot",)),
}


def compare(result: dict[str, Any], kind: str, names: tuple[list[str], list[str]]) -> list[dict[str, Any]]:
    """Ours against each peer of a class: ratio, interval, verdict beyond what the twins differ by."""
    chosen = [s for s in result["samples"] if s["kind"] == kind]
    blocks = Blocks([Sample.from_json(s) for s in chosen])
    # Of every group: what a ratio rests on may be any of them.
    widths = [entry["half_width"] for entry in result["aa"] if entry["kind"] == kind]
    resolution = max((math.inf if w is None else w for w in widths), default=math.inf)
    out = []
    for ours in names[0]:
        for peer in names[1]:
            if not len(blocks.values(ours)) or not len(blocks.values(peer)):
                continue
            ratio = blocks.ratio(peer, ours)
            out.append({"ours": ours, "peer": peer, **ratio.to_json(), "verdict": judge(ratio, resolution)})
    return out


def rows_of(result: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Seconds, tokens/s and share of the floor of each engine."""
    chosen = [s for s in result["samples"] if s["kind"] == kind]
    blocks = Blocks([Sample.from_json(s) for s in chosen])
    cell = result["cells"][0]
    per_unit = cell["batch_size"] * (cell["input_len"] if kind == "ttft" else 1)
    rows: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        name = row["config"]
        values = blocks.values(name)
        if not len(values):
            rows[name] = {"cause": row.get("cause")}
            continue
        median = float(np.median(values))
        rows[name] = {"sec": median, "tokens_per_sec": per_unit / median, "n": len(values)}
        if kind == "tpot" and row.get("decode_bytes"):
            shares = [
                roofline.mbu(row["decode_bytes"], s.value_sec, (s.bandwidth_before + s.bandwidth_after) / 2)
                for s in blocks.samples.values()
                if s.subject == name and s.bandwidth_before and s.bandwidth_after
            ]
            rows[name]["share_of_floor"] = float(np.median(shares))
    return rows


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = []
    for title, result in results.items():
        for kind, found in result["compared"].items():
            lines += ["", f"{title}, {'prefill' if kind == 'ttft' else 'decode'}", ""]
            for name, row in found["rows"].items():
                if "sec" in row:
                    share = f"  {row['share_of_floor']:.0%} of the floor" if "share_of_floor" in row else ""
                    lines.append(f"  {name:<22}{1e3 * row['sec']:9.2f} ms {row['tokens_per_sec']:9.0f} tok/s{share}")
                else:
                    lines.append(f"  {name:<22}{row['cause']}")
            for bits, ratios in found["ratios"].items():
                for r in ratios:
                    value, low, high = (f"{r[k]:.2f}" if r[k] else "?" for k in ("value", "low", "high"))
                    names = f"{bits:<8} {r['ours']:<13} / {r['peer']:<18}"
                    lines.append(f"  {names} {value}x [{low}, {high}] {r['verdict']}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cells", default=",".join(CELLS), help=f"of {', '.join(CELLS)}")
    parser.add_argument("--classes", default=",".join(CLASSES), help=f"of {', '.join(CLASSES)}")
    parser.add_argument(
        "--ours", default="", help="configs instead of those of the classes (the first is the baseline)"
    )
    parser.add_argument("--without", default="", help="engines to leave out, comma-separated, e.g. transformers:bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    left_out = set(args.without.split(","))
    cells = {}
    wanted = [name for name in CELLS if name in args.cells]
    classes = {name: CLASSES[name] for name in CLASSES if name in args.classes}
    if args.ours:
        chosen = tuple(args.ours.split(","))
        classes = {name: (chosen, pair[1]) for name, pair in classes.items()}
    ours = list(dict.fromkeys(n for pair in classes.values() for n in pair[0]))
    peers = [n for pair in classes.values() for n in pair[1] if n not in left_out]
    for name in wanted:
        input_len, output_len, batch_size, kinds = CELLS[name]
        measured = bench(
            args.model,
            [(n, preset(n)) for n in ours],
            input_lens=[input_len],
            output_lens=[output_len],
            batch_sizes=[batch_size],
            baseline=ours[0],
            kinds=kinds,
            min_blocks=args.blocks,
            max_blocks=args.blocks,
            seed=args.seed,
            threads=args.threads,
            engines=engines_of(",".join(peers))[1],
            on_progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
        result = to_json(measured)
        result["compared"] = {
            kind: {
                "rows": rows_of(result, kind),
                "ratios": {c: compare(result, kind, (list(a), list(b))) for c, (a, b) in classes.items()},
            }
            for kind in kinds
        }
        cells[name] = result
        if args.output:
            files.write_json(args.output, {"command": sys.argv, "cells": cells})
        print(table({name: result}), flush=True)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ParetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
