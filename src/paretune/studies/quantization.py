"""The published quantisation study again: perplexity, memory and size in each format, at batch 4 and 12.

Published: "Default Project: Optimizations on Large Language Models" (GPT-2 Medium, WikiText-103, W8A16 rows). Its
perplexities with and without quantisation differ less than from batch to batch: here the comparison is paired, on the
same tokens, and has an interval.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paretune import clock, files, hardware
from paretune.engine.load import Loaded, load_recipe
from paretune.engine.quantize import Quantized, quantize
from paretune.errors import ParetuneError
from paretune.evaluate import fidelity, texts
from paretune.evaluate.perplexity import perplexity
from paretune.measure import bench
from paretune.measure.grid import n_parameters
from paretune.model import checkpoint
from paretune.model.tokenizer import Tokenizer
from paretune.recipe import Recipe
from paretune.records.bench import BenchRow, PhaseName
from paretune.records.record import to_json
from paretune.registry import RUNNERS
from paretune.report import html
from paretune.report.sweeps import bars
from paretune.report.tables import Column, Row
from paretune.report.units import format_bytes, format_number, format_percent
from paretune.studies import common
from paretune.studies.common import Say
from paretune.transforms.formats import formats, transforms_of

PLAIN, ROUNDED = "fp32", "int8"  # the two formats of the published table
BATCHES = (4, 12)
CONTEXT = 256  # tokens of a window
QUICK_TOKENS, QUICK_FORMATS = 10_300, ("int8", "int4", "llm_int8", "nf4")
# With and without quantisation, by batch: perplexity on training and validation text, bytes after inference.
PUBLISHED = {
    (PLAIN, 4): {"train_perplexity": 41.9369, "valid_perplexity": 43.0793, "memory_bytes": 4.23e9},
    (PLAIN, 12): {"train_perplexity": 42.5210, "valid_perplexity": 41.9354, "memory_bytes": 8.42e9},
    (ROUNDED, 4): {"train_perplexity": 41.8604, "valid_perplexity": 43.0131, "memory_bytes": 2.51e9},
    (ROUNDED, 12): {"train_perplexity": 41.8611, "valid_perplexity": 42.4083, "memory_bytes": 6.67e9},
}
PUBLISHED_SIZES = {PLAIN: {"model_bytes": 1.42e9, "share": 1.0}, "int8": {"model_bytes": 0.412e9, "share": 0.29}}
# The first stands for the text that a search and calibration see; neither is what `pocket` was trained on (books).
TEXTS = {"train": "search", "valid": "confirm"}


def run(
    model: str,
    output_dir: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Quantises the model in every format, measures each folder, and writes the results.

    Raises:
        ParetuneError: the folder cannot be written, or the model is quantised already.
    """
    folder, config, name = common.open_model(model)
    out = files.ensure_folder(output_dir)
    head = common.header("quantization", name, config, quick=quick, seed=seed)
    threads_read = hardware.set_threads(threads)
    begun = clock.now()
    context = min(CONTEXT, config.n_positions)
    tokenizer = Tokenizer(folder)
    ids = {split: tokenizer.encode(texts.text_of(text)) for split, text in TEXTS.items()}  # type: ignore[arg-type]
    if quick:
        ids = {split: found[:QUICK_TOKENS] for split, found in ids.items()}
    native = RUNNERS.get("native").requires(device) is None
    runners = ("native", "eager") if native else ("eager",)
    rows: list[Row] = []
    sizes: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="paretune-study-") as scratch:
        folders: dict[str, Path] = {PLAIN: folder}
        sizes.append(_size_of_source(folder, config))
        for format_name in QUICK_FORMATS if quick else formats():
            say(f"quantising: {format_name}")
            try:
                made = quantize(folder, transforms_of(format_name), Path(scratch) / format_name)
            except ParetuneError as error:  # whatever it is: a row with its cause
                sizes.append({"format": format_name, "model_bytes": None, "cause": error.cause})
                continue
            folders[format_name] = made.folder
            sizes.append(_size_of(format_name, made))
        reference: fidelity.Scores | None = None
        recipes: dict[str, Recipe] = {}
        for format_name, place in folders.items():
            say(f"quality: {format_name}")
            loaded = _load(place, runners, device)
            recipes[format_name] = loaded.recipe
            quality = {b: _perplexities(loaded.runner, ids, context, b, tokenizer) for b in BATCHES}
            windows = fidelity.windows_of(ids["valid"], min(257, context))
            scores = fidelity.score(loaded.runner, windows, batch_size=BATCHES[-1], text_name="valid")
            reference = reference or scores
            paired = {} if scores is reference else _paired(fidelity.compare(reference, scores))
            ran = loaded.recipe.engine.runner
            rows += [{"format": format_name, "batch_size": b, **quality[b], **paired, "runner": ran} for b in BATCHES]
            del loaded
        say("memory and speed")
        n_in = min(context, config.n_positions - 16)
        measured = bench.bench(
            folder,
            list(recipes.items()),
            input_lens=[n_in],
            output_lens=[16],
            batch_sizes=list(BATCHES),
            baseline=PLAIN,
            kinds=["ttft", "tpot"],
            **common.BLOCKS,
            min_time_sec=0.5 if quick else 3.0,
            budget_sec=150.0 if quick else None,
            loading_counts=False,  # a minute, whatever the budget
            keeps_processes=True,
            seed=seed,
            device=device,
            threads=threads,
            on_progress=say,
            folders=folders,
        )
    by_cell = {(r.config, r.batch_size): r for r in measured.rows if r.role != "twin"}
    for row in rows:
        row |= _memory(by_cell.get((row["format"], row["batch_size"])))
        row |= {f"published_{k}": PUBLISHED.get((row["format"], row["batch_size"]), {}).get(k) for k in _PUBLISHED_KEYS}
    sizes = common.beside(sizes, PUBLISHED_SIZES, "format")
    result = {
        **head,
        "context": context,
        "n_tokens": {split: len(found) for split, found in ids.items()},
        "rows": rows,
        "sizes": sizes,
        "bench": to_json(measured),
        "elapsed_sec": clock.now() - begun,
        **common.noise_of([measured]),
    }
    result["summary"] = summary(rows, sizes)
    _write(out, result, threads_read["threads"])
    return result


def _load(folder: Path, runners: Sequence[str], device: str) -> Loaded:
    """The folder in the first runner that has a form of its weights; the rows say which."""
    sdpa = {"name": "attention", "form": "sdpa"}
    recipes = [Recipe.from_dict({"transforms": [sdpa], "engine": {"runner": name}}) for name in runners]
    config = checkpoint.read_config(folder)
    recipe = next((recipe for recipe in recipes if recipe.fits(config) is None), recipes[-1])
    recipe.check(device, config)
    return load_recipe(folder, recipe, device, check=False)


_PUBLISHED_KEYS = ("train_perplexity", "valid_perplexity", "memory_bytes")


def _size_of_source(folder: Path, config: Any) -> Row:
    n = n_parameters(config)
    return {"format": PLAIN, "model_bytes": 4 * n, "share": 1.0, "bits_per_parameter": 32.0, "cause": ""}


def _size_of(name: str, made: Quantized) -> Row:
    share, bits = made.n_bytes / made.fp32_bytes, 8 * made.n_bytes / made.n_parameters
    size = {"format": name, "model_bytes": made.n_bytes, "share": share, "bits_per_parameter": bits, "cause": ""}
    return {**size, "parts": made.why_this_share}


def _perplexities(runner: Any, ids: Mapping[str, list[int]], context: int, batch_size: int, tokenizer: Any) -> Row:
    out: Row = {}
    for split, tokens in ids.items():
        n_bytes = len(tokenizer.decode(tokens).encode("utf-8"))
        shape: dict[str, Any] = {"context": context, "stride": context, "batch_size": batch_size}
        found = perplexity(runner, tokens, text_name=split, n_bytes=n_bytes, **shape)
        out |= {
            f"{split}_perplexity": found.perplexity,
            f"{split}_perplexity_low": found.low,
            f"{split}_perplexity_high": found.high,
        }
    return out


def _paired(found: fidelity.Fidelity) -> Row:
    return {
        "ppl_increase": found.ppl_increase,
        "ppl_increase_upper": found.ppl_increase_upper,
        "kl_mean": found.kl_mean,
        "top1_agreement": found.top1_agreement,
    }


def _memory(row: BenchRow | None) -> Row:
    out: Row = {
        "weights_bytes": row and row.weights_bytes,
        "kv_cache_bytes": row and row.kv_cache_bytes,
        "activation_peak_bytes": row and row.activation_peak_bytes,
        "rss_bytes": row and row.rss_bytes,
        "rss_peak_bytes": row and row.rss_peak_bytes,
    }
    phases: tuple[PhaseName, ...] = ("prefill", "decode")
    out |= {f"{phase}_{k}": v for phase in phases for k, v in common.judged(row, phase).items()}
    return out


def summary(rows: list[Row], sizes: list[Row]) -> list[str]:
    """The findings in words, each with its figures."""
    said = []
    for size in sizes:
        if size["cause"]:
            said.append(f"{size['format']}: not made: {size['cause']}.")
            continue
        row = next((r for r in rows if r["format"] == size["format"] and r.get("ppl_increase") is not None), None)
        if row is not None:
            word = "no loss on this text" if row["ppl_increase"] <= 0 else "a loss"
            share = format_percent(size["share"])
            said.append(f"{size['format']}: {share} of the fp32 bytes; perplexity {_loss(row)} ({word}).")
        if size["format"] == ROUNDED and size.get("parts"):
            said.append(
                f"int8 weights are not exactly 25 % of fp32 but {size['share']:.2%}: {size['parts']}. Scales come on "
                "top of the numbers, norms and biases stay as they are (published: 29 %, the embeddings stayed too)."
            )
    plain = {r["batch_size"]: r for r in rows if r["format"] == PLAIN}
    first, second = (plain[b]["valid_perplexity"] for b in BATCHES)
    said.append(
        f"The batch size does not change quality: fp32 at batch 4 and 12 differ by {abs(first - second) / first:.1e} "
        "of the perplexity. Published, they differ by 2.7 %, more than by quantisation: other text was drawn."
    )
    for row in rows:
        whole, small = plain[row["batch_size"]].get("rss_peak_bytes"), row.get("rss_peak_bytes")
        if row["format"] != ROUNDED or not whole or not small:
            continue
        saved = format_bytes(plain[row["batch_size"]]["weights_bytes"] - row["weights_bytes"])
        cache, more = format_bytes(row["kv_cache_bytes"]), format_bytes(row["activation_peak_bytes"])
        said.append(
            f"int8 at batch {row['batch_size']}: the process peaks at {format_bytes(small)} instead of "
            f"{format_bytes(whole)}, its weights take {saved} less; cache ({cache}), activations ({more}) and the "
            "libraries stay: that is why it is not 75 %."
        )
    return said


def _spread(key: str) -> Any:
    def show(row: Row) -> str:
        low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
        text = format_number(row.get(key))
        return text if low is None else f"{text} [{format_number(low)}, {format_number(high)}]"

    return show


def _loss(row: Row) -> str:
    if row.get("ppl_increase") is None:
        return "-"
    upper = format_percent(row["ppl_increase_upper"], signed=True)
    return f"{format_percent(row['ppl_increase'], signed=True)}, at most {upper}"


_QUALITY = [
    Column("format", "Format", numeric=False),
    Column("batch_size", "Batch"),
    Column("train_perplexity", "Perplexity, first text", _spread("train_perplexity")),
    Column("valid_perplexity", "Perplexity, held-out text", _spread("valid_perplexity")),
    Column("ppl_increase", "Paired change", _loss),
    Column("published_train_perplexity", "Published, training"),
    Column("published_valid_perplexity", "Published, validation"),
]
_MEMORY = [
    Column("format", "Format", numeric=False),
    Column("runner", "Runner", numeric=False),
    Column("batch_size", "Batch"),
    Column("weights_bytes", "Weights"),
    Column("kv_cache_bytes", "Cache"),
    Column("activation_peak_bytes", "Activations"),
    Column("rss_peak_bytes", "Peak of the process"),
    Column("published_memory_bytes", "Published (GPU)"),
    common.ratio_column("Prefill against fp32", "prefill_speedup"),
    Column("prefill_verdict", "Verdict", numeric=False),
    common.ratio_column("Decode against fp32", "decode_speedup"),
    Column("decode_verdict", "Verdict", numeric=False),
]
_SIZES = [
    Column("format", "Format", numeric=False),
    Column("model_bytes", "Model file"),
    Column("share", "Of fp32", lambda r: format_percent(r.get("share"))),
    Column("bits_per_parameter", "Bits a parameter"),
    Column("published_model_bytes", "Published"),
    Column("published_share", "Published share", lambda r: format_percent(r.get("published_share"))),
    Column("parts", "Where the bytes are, of fp32", numeric=False),
    Column("cause", "Not made because", numeric=False),
]


def _write(out: Path, result: Mapping[str, Any], threads: int) -> None:
    sizes = [s for s in result["sizes"] if s["model_bytes"]]
    size_bars = [("model_bytes", "bytes")]
    losses = [r for r in result["rows"] if r["batch_size"] == BATCHES[-1] and r.get("ppl_increase") is not None]
    drawn = [{**r, "loss": max(0.0, r["ppl_increase"]), "upper": max(0.0, r["ppl_increase_upper"])} for r in losses]
    loss_bars = [("loss", "estimate (0 where negative)"), ("upper", "upper bound, 95 %")]

    def draw_sizes(fmt: str) -> bytes:
        return bars(sizes, size_bars, "Bytes of the model file", format_bytes, "format", fmt)

    def draw_losses(fmt: str) -> bytes:
        return bars(drawn, loss_bars, "Increase of perplexity over fp32, paired", format_percent, "format", fmt)

    n = result["n_tokens"]
    quality = [
        f"Windows of {result['context']} tokens without overlap, run from the quantised folder by native code "
        f"where it has the format, else by PyTorch (column Runner). First text {n['train']:,} tokens (what a search "
        f"sees), held-out text {n['valid']:,}. Neither was trained on. In brackets 95 % intervals over "
        "blocks of 128 tokens.",
        "The paired change compares the same tokens with fp32, half of each window prefilled and half decoded; the "
        "worse half counts. Published perplexities are of GPT-2 Medium on WikiText-103, each on tokens of its own.",
    ]
    memory = [
        "One process a row: stored weights, the cache as allocated, the most that a step held beside them, and the "
        "whole process with its libraries, during a request. Published: memory of a GPU after inference.",
    ]
    sections = [
        html.section("What follows", result["summary"]),
        html.section(
            "Perplexity",
            quality,
            result["rows"],
            _QUALITY,
            [common.picture(out, "perplexity", draw_losses, "Held-out text; shorter is better.")],
        ),
        html.section("Memory and speed", memory, result["rows"], _MEMORY),
        html.section(
            "Model size",
            ["The weight file with its header, everything counted; fp32 is four bytes a parameter."],
            result["sizes"],
            _SIZES,
            [common.picture(out, "size", draw_sizes, "Bytes on the disk, packed as they are used.")],
        ),
    ]
    tables = {"quality and memory": result["rows"], "sizes": result["sizes"]}
    common.write_results(out, result, tables, sections, result["summary"][:2], threads)
