"""What speculation gains on real text, against plain decoding of the same requests; the texts have to be identical.

    python benchmarks/speculation.py smollm2 --prompts prompts.jsonl --configs native,native+int8 \
        --drafts lookup,suffix,self=int4 -o benchmarks/results/speculation.json

A block is one prompt under one config: plain decoding and every draft, in random order, each in the loop that users'
requests go through. A sample is the seconds from the first token to the last. Speed-ups are paired within blocks:
exp of the mean log ratio, with a bootstrap interval over prompts. `--temperature` samples with a seed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from paretune import clock, files, hardware
from paretune.engine import session, speculation
from paretune.engine.generate import generate
from paretune.engine.sampling import SamplingOptions
from paretune.errors import ParetuneError, UsageError
from paretune.measure import environment
from paretune.measure.interleave import block_order

PLAIN = "off"


def read_prompts(path: Path) -> list[str]:
    """Texts of a JSONL file (`prompt`, `text`, `instruction` or the first of `turns`), or a line each."""
    out = []
    for line in path.read_text("utf-8").splitlines():
        if not line.strip():
            continue
        if not line.startswith("{"):
            out.append(line)
            continue
        entry = json.loads(line)
        text = next((entry[k] for k in ("prompt", "text", "instruction", "turns") if k in entry), None)
        if text is None:
            raise UsageError(f"{path} has an entry without a prompt", "Name it `prompt`")
        out.append(text[0] if isinstance(text, list) else text)
    return out


def speed_up(ratios: list[float], seed: int) -> dict[str, float]:
    """exp of the mean log ratio, and its 95 % interval over prompts."""
    logs = np.log(np.array(ratios))
    rng = np.random.default_rng(seed)
    means = logs[rng.integers(0, len(logs), (2000, len(logs)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"speed_up": math.exp(logs.mean()), "low": math.exp(low), "high": math.exp(high), "n": len(ratios)}


def measure(args: argparse.Namespace, config: str, texts: list[str]) -> dict[str, Any]:
    opened = session.open(args.model, config)
    opened.check()
    loaded, tokenizer = opened.load(), opened.tokenizer()
    room = opened.model_config.longest - args.max_new_tokens
    prompts = [ids for text in texts if 0 < len(ids := tokenizer.encode(text)) <= room]
    makers: dict[str, speculation.Speculator | None] = {PLAIN: None}
    refused = {}
    for draft in args.drafts.split(","):
        try:
            makers[draft] = speculation.for_recipe(loaded.recipe, loaded.runner, loaded.folder, draft)
        except ParetuneError as error:
            refused[draft] = str(error)
            print(f"{config}, {draft}: refused, {error}", flush=True)
    sampling = SamplingOptions(args.temperature, seed=args.seed if args.temperature else None)
    samples, differing = [], []
    for block, ids in enumerate([prompts[0], *prompts]):  # the first once more: it warms up
        texts_of = {}
        for name in block_order(list(makers), args.seed, block):
            with clock.quiet():
                done = generate(
                    loaded.runner, [ids], args.max_new_tokens, sampling, ignore_eos=True, speculator=makers[name]
                )
            texts_of[name] = done.generations[0].tokens
            if block:
                samples.append({"block": block, "draft": name, "n_prompt": len(ids), "tpot_sec": done.tpot_sec})
        differing += [(block, name) for name, tokens in texts_of.items() if tokens != texts_of[PLAIN]]
    plain = {s["block"]: s["tpot_sec"] for s in samples if s["draft"] == PLAIN}
    rows = {}
    for name, maker in makers.items():
        if maker is not None:
            ratios = [plain[s["block"]] / s["tpot_sec"] for s in samples if s["draft"] == name]
            report = maker.report()
            report["break_even"] = {k: v if math.isfinite(v) else None for k, v in report["break_even"].items()}
            rows[name] = speed_up(ratios, args.seed) | {"report": report}
            print(f"{config}, {name}: {rows[name]['speed_up']:.3f}x [{rows[name]['low']:.3f}, {rows[name]['high']:.3f}]"
                  f"; {maker.summary()}", flush=True)  # fmt: skip
    identical = f"{len(differing)} of {len(prompts) * (len(makers) - 1)} texts differ from plain decoding"
    print(f"{config}: {identical}", flush=True)
    return {"config": config, "rows": rows, "refused": refused, "differing": differing, "samples": samples}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=40, help="prompts")
    parser.add_argument("--configs", default="native,native+bf16,native+int8")
    parser.add_argument("--drafts", default="lookup,suffix")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, help="default: physical cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("speculation.json"))
    args = parser.parse_args()
    try:
        files.ensure_folder(args.output.resolve().parent)
        threads = hardware.set_threads(args.threads)
        texts = read_prompts(args.prompts)[: args.limit]
        results = [measure(args, config, texts) for config in args.configs.split(",")]
        header = environment.header(seed=args.seed)
        files.write_json(args.output, {**header, "threads": threads, "prompts": str(args.prompts), "results": results})
    except ParetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 1 if any(result["differing"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
