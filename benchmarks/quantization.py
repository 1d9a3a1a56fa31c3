"""Every weight format: stored bytes, paired perplexity change against fp32, decode time, on one model.

    python benchmarks/quantization.py --model pocket --text TEXT -o benchmarks/results/quantization.json

Quality and size need no quiet machine; `--decode` adds the time of a decode step (interleaved by `paretune bench`).
The calibration of GPTQ and AWQ is written by the model itself, so no text is on both sides.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from paretune import hardware
from paretune.engine import calibration
from paretune.engine.load import load_recipe
from paretune.evaluate import fidelity, texts
from paretune.files import write_json, write_text
from paretune.measure import environment
from paretune.model import checkpoint
from paretune.model.layers import Embedding, Linear
from paretune.model.tokenizer import Tokenizer
from paretune.recipe import Recipe
from paretune.transforms.base import Context

GROUPS = {"name": "groups", "group": 64}
FORMATS: dict[str, list[dict[str, Any]]] = {
    "fp32": [],
    "bf16": [{"name": "precision", "dtype": "bf16"}],
    "int8 rows": [{"name": "int8"}],
    "int8 groups": [{**GROUPS, "bits": 8}],
    "W8A8": [{"name": "groups", "bits": 8, "group": 128, "activation_bits": 8}],
    "LLM.int8": [{"name": "llm_int8"}],
    "fp8": [{"name": "fp8"}],
    "NF4, int8 head": [{"name": "nf4"}, {"name": "int8"}],
    "NF4, all": [{"name": "nf4", "embeddings": True}],
    "int4 nearest, int8 head": [GROUPS],
    "int4 nearest, all": [{**GROUPS, "head_bits": 4}],
    "int4 HQQ, int8 head": [{"name": "hqq"}],
    "int4 AWQ, int8 head": [{"name": "awq"}],
    "int4 GPTQ, int8 head": [{"name": "gptq"}],
    "int4 GPTQ, all": [{"name": "gptq", "head_bits": 4}],
}


def recipe_of(transforms: list[dict[str, Any]], runner: str) -> Recipe:
    plain = [{"name": "attention", "form": "sdpa"}, *transforms]
    return Recipe.from_dict({"transforms": plain, "engine": {"runner": runner}})


def stored_bytes(model: Any) -> int:
    """Everything that is stored: matrices, scales, norms, biases; each once."""
    inside = {id(w) for m in model.modules() if isinstance(m, Linear | Embedding) for w in m.weight.modules()}
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, Linear | Embedding)}
    rest = [
        t
        for m in model.modules()
        if id(m) not in inside
        for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)]
    ]
    return sum(w.stored_bytes for w in weights.values()) + sum(t.nbytes for t in rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--text", help="a text file; default: the embedded confirmation text")
    parser.add_argument("--windows", type=int, default=60, help="of 257 tokens")
    parser.add_argument("--only", help="formats, separated by semicolons")
    parser.add_argument("--runner", default="eager", choices=["eager", "native"])
    parser.add_argument("--decode", action="store_true", help="also time a decode step of the native runner")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    hardware.set_threads(args.threads)
    folder = checkpoint.resolve(args.model)
    text = texts.text_of("confirm") if args.text is None else texts.read_text(args.text)
    windows = fidelity.windows_of(Tokenizer(folder).encode(text), 257)[: args.windows]
    names = [n for n in FORMATS if args.only is None or n == "fp32" or n in args.only.split(";")]
    context = Context(calibration=calibration.from_model(checkpoint.load(folder)))
    rows, baseline = [], None
    for name in names:
        loaded = load_recipe(folder, recipe_of(FORMATS[name], args.runner), ctx=context)
        scores = fidelity.score(loaded.runner, windows, batch_size=10, text_name="text")
        n_bytes = stored_bytes(loaded.runner.model)
        if baseline is None:
            baseline = (scores, n_bytes)
        found = fidelity.compare(baseline[0], scores)
        row = {"format": name, "bytes": n_bytes, "of_fp32": n_bytes / baseline[1], "fidelity": found.to_json()}
        row |= {"convert_sec": loaded.load_sec}
        rows.append(row)
        change = [100 * (getattr(found, p).ppl_increase) for p in ("prefill", "decode")]
        print(
            f"{name:26s} {100 * row['of_fp32']:6.2f} % of fp32   perplexity {change[0]:+.3f} % prefill, "
            f"{change[1]:+.3f} % decode, at most {100 * found.ppl_increase_upper:+.3f} %   KL {found.kl_mean:.5f}",
            flush=True,
        )
    result: dict[str, Any] = {**environment.header(), "model": args.model, "runner": args.runner, "rows": rows}
    write_json(args.output, result)
    if args.decode:
        _decode(args, names)


def _decode(args: argparse.Namespace, names: list[str]) -> None:
    """Through `paretune bench`, which interleaves; its own result lies beside ours."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name in names:
            path = Path(folder) / f"{name.replace(' ', '_').replace(',', '')}.toml"
            write_text(path, recipe_of(FORMATS[name], "native" if name != "fp8" else "eager").to_toml())
            files.append(str(path))
        command = [sys.executable, "-m", "paretune", "bench", args.model, "--config", ",".join(files)]
        subprocess.run([*command, "-o", str(args.output.with_suffix(""))], check=True)


if __name__ == "__main__":
    main()
