"""The published precision study again: 16 bits, INT8, FlashAttention and NF4, for GPT-2 and a Mistral-7B shape.

Published: "Large Language Model Inference Optimization" (an A100, batch 1, 100 tokens). Its advice named crossovers,
"from batch 8 on", "512 tokens", "below 1B parameters", that it had not measured: here they are sweeps.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from paretune import clock, files, hardware
from paretune.measure import bench
from paretune.measure.grid import MEMORY_SHARE, n_parameters, shared_and_own_bytes, trial_bytes
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.recipe import Recipe
from paretune.records.bench import BenchResult, BenchRow, Cell
from paretune.records.record import to_json
from paretune.registry import RUNNERS
from paretune.report import html
from paretune.report.sweeps import CAPTION, bars, curves
from paretune.report.tables import Column, Row
from paretune.report.units import format_bytes, format_count, format_ratio
from paretune.studies import common
from paretune.studies.common import Say

BASELINE = "baseline"
QUICK_CONFIGS = (BASELINE, "flash_attn", "int8", "int8 native")  # that the quick study sweeps
NEW_TOKENS, QUICK_TOKENS = 100, 48
PUBLISHED_GPT2 = {
    "baseline": {"tokens_per_sec": 96.2, "memory_bytes": 0.51e9, "speedup": 1.0},
    "fp16": {"tokens_per_sec": 99.6, "memory_bytes": 0.26e9, "speedup": 1.04},
    "int8": {"tokens_per_sec": 32.7, "memory_bytes": 0.18e9, "speedup": 0.34},
}
PUBLISHED_MISTRAL = {
    "fp16": {"tokens_per_sec": 26.7, "memory_bytes": 14.5e9, "speedup": 1.0},
    "flash_attn": {"tokens_per_sec": 20.4, "memory_bytes": 14.5e9, "speedup": 0.76},
    "4bit": {"tokens_per_sec": 18.7, "memory_bytes": 4.0e9, "speedup": 0.70},
}
# What the study concluded: configuration, sweep, claim.
CLAIMS = (
    ("flash_attn", "batch", "reserve FlashAttention for batches of 8 and more"),
    ("flash_attn", "length", "it does not pay below 512 tokens"),
    ("fp16", "batch", "16 bits are the choice for a single user (1.04x)"),
    ("int8", "size", "8 bits degrade models below 1B parameters (0.34x)"),
    ("4bit", "size", "use 4 bits only when memory is short (0.70x)"),
)
SEVEN_B = "mistral"  # the entry of a result about the model of this shape
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-5,
}
_X = {"batch": "Sequences at once", "length": "Prompt tokens", "size": "Parameters of the model"}
_UNIT = {"batch": "batch {}", "length": "{} prompt tokens", "size": "{} parameters"}


def configs(device: str) -> dict[str, Recipe]:
    """The study's six, one change each, and beside them the forms that this tool runs them in.

    `baseline` is attention by the formula in fp32, as published; `flash_attn` changes that alone.
    """
    llm_int8, nf4 = {"name": "llm_int8"}, {"name": "nf4"}
    plain = {
        BASELINE: [],
        "fp16": [{"name": "precision", "dtype": "fp16"}],
        "bf16": [{"name": "precision", "dtype": "bf16"}],
        "int8": [llm_int8],
        "flash_attn": [{"name": "attention", "form": "sdpa"}],
        "4bit": [nf4],
    }
    out = {name: Recipe.from_dict({"transforms": transforms}) for name, transforms in plain.items()}
    if RUNNERS.get("native").requires(device) is None:
        for name, form in (("int8 native", {"name": "int8"}), ("4bit native", {"name": "groups"})):
            sdpa = {"name": "attention", "form": "sdpa"}
            out[name] = Recipe.from_dict({"transforms": [sdpa, form], "engine": {"runner": "native"}})
    return out


def sizes(quick: bool) -> list[tuple[str, ModelConfig]]:
    """Random GPT-2 models from small to large, Mistral-7B's shape last."""
    if quick:
        shapes = {"6 x 512": (6, 8, 512)}
        base = dict(checkpoint.published("gpt2").hf) | {"vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 0}
        made = []
        for name, (n_layer, n_head, n_embd) in shapes.items():
            hf = base | {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
            made.append((f"GPT-2 {name}", ModelConfig.from_hf(hf)))
        return made
    return [(name, checkpoint.published(name)) for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")]


def does_not_fit(config: ModelConfig, cell: Cell, value_bytes: float = 4.0) -> str | None:
    """Why a shape cannot be measured here: the baseline, its twin and one challenger live side by side.

    Args:
        value_bytes: of a weight in the widest configuration.
    """
    n = n_parameters(config)
    shared, own = shared_and_own_bytes(())
    each = trial_bytes(config, n, cell, own) - round((4.0 - value_bytes) * n)
    needed, free = shared + 3 * each + 4 * n, hardware.available_memory_bytes()  # one of them is loading
    if needed > MEMORY_SHARE * free:
        return (
            f"three processes would need {format_bytes(needed)}, {format_bytes(free)} are free (predicted, not tried)"
        )
    room = shutil.disk_usage(tempfile.gettempdir()).free
    if value_bytes * n > MEMORY_SHARE * room:
        return f"its random weights would need {format_bytes(value_bytes * n)} of disk, {format_bytes(room)} are free"
    return None


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
    """Measures the configurations once, then over batch, length and size, and writes the results.

    Raises:
        ParetuneError: the folder cannot be written, or out of memory for the model.
    """
    folder, config, name = common.open_model(model)
    out = files.ensure_folder(output_dir)
    head = common.header("precision", name, config, quick=quick, seed=seed)
    every = configs(device)
    swept = {k: v for k, v in every.items() if not quick or k in QUICK_CONFIGS}
    n_in = min(32, config.n_positions // 2)
    n_new = QUICK_TOKENS if quick else NEW_TOKENS
    n_out = min(n_new, config.n_positions - n_in)
    settings: dict[str, Any] = {
        "baseline": BASELINE,
        "kinds": ["throughput"],
        **common.BLOCKS,
        "min_time_sec": 1.0 if quick else 3.0,
        "seed": seed,
        "device": device,
        "threads": threads,
        "on_progress": say,
        "loading_counts": False,  # half a minute for each set of processes, whatever the budget
        "keeps_processes": True,
    }
    begun = clock.now()

    def measure(where: Path, chosen: Mapping[str, Recipe], budget: float, **grid: Any) -> BenchResult:
        return bench.bench(where, list(chosen.items()), budget_sec=budget if quick else None, **{**settings, **grid})

    say(f"the configurations at batch 1, {n_in} + {n_out} tokens")
    base = measure(folder, every, 95.0, input_lens=[n_in], output_lens=[n_out], batch_sizes=[1])
    points: dict[str, list[Row]] = {}
    say("over batch sizes")
    batches = [8] if quick else [2, 4, 8, 16, 32]
    over_batch = measure(folder, swept, 65.0, input_lens=[n_in], output_lens=[n_out], batch_sizes=batches)
    points["batch"] = [_point(r, r.batch_size) for r in [*base.rows, *over_batch.rows] if r.config in swept]
    say("over prompt lengths")
    out_len = n_out if quick else 16
    lengths = [n for n in ((896,) if quick else (64, 128, 256, 512, 896)) if n + out_len <= config.n_positions]
    lengths = lengths or [config.n_positions // 2]
    out_len = min(out_len, config.n_positions - max(lengths))
    over_length = measure(folder, swept, 65.0, input_lens=lengths, output_lens=[out_len], batch_sizes=[1])
    first = [r for r in base.rows if r.config in swept] if out_len == n_out else []
    points["length"] = [_point(r, r.input_len) for r in [*first, *over_length.rows]]
    say("over model sizes")
    shapes, runs = sizes(quick), [base, over_batch, over_length]
    n_base = n_parameters(config)
    is_new = n_base not in [n_parameters(shape) for _, shape in shapes]
    known = [r for r in base.rows if r.config in swept and is_new]
    points["size"] = [_point(r, n_base) for r in known]
    size_rows: list[Row] = [{"shape": name, "n_parameters": n_base, **_row(r)} for r in known if r.role != "twin"]
    for title, shape in shapes:
        cell = Cell(n_in, min(n_new, shape.n_positions - n_in), 1)
        reason = does_not_fit(shape, cell)
        n = n_parameters(shape)
        if reason:
            size_rows.append({"shape": title, "n_parameters": n, "config": "all", "verdict": f"not measured: {reason}"})
            continue
        with tempfile.TemporaryDirectory(prefix="paretune-study-") as scratch:
            say(f"{title}: drawing {format_count(n)} random weights")
            checkpoint.save(checkpoint.new(shape, seed), Path(scratch))
            grid = {"input_lens": [cell.input_len], "output_lens": [cell.output_len], "batch_sizes": [1]}
            measured = measure(Path(scratch), swept, 65.0, **grid)
        runs.append(measured)
        points["size"] += [_point(r, n) for r in measured.rows]
        size_rows += [{"shape": title, "n_parameters": n, **_row(r)} for r in measured.rows if r.role != "twin"]
    for found in points.values():
        found[:] = [p for p in found if p["config"] not in (BASELINE, f"{BASELINE} again")]
    shape = ModelConfig.from_hf(MISTRAL_7B)
    cell, seven = Cell(n_in, min(NEW_TOKENS, shape.n_positions - n_in), 1), []
    reason = "left out of the quick study" if quick else does_not_fit(shape, cell, 2.0)
    if reason is None:
        with tempfile.TemporaryDirectory(prefix="paretune-study-") as scratch:
            say("Mistral-7B: drawing random weights")
            checkpoint.save(checkpoint.new(shape, seed).to(torch.bfloat16), Path(scratch))
            grid = {"input_lens": [cell.input_len], "output_lens": [cell.output_len], "batch_sizes": [1]}
            runs.append(measure(Path(scratch), mistral_configs(device), 0.0, baseline="fp16", **grid))
            seven = [r for r in runs[-1].rows if r.role != "twin"]
    mistral = mistral_rows(hardware.Ceilings.from_json(to_json(base.known_ceilings)), reason, seven)
    methods = common.beside([_row(r) for r in base.rows if r.role != "twin"], PUBLISHED_GPT2, "config")
    result = {
        **head,
        "input_len": n_in,
        "output_len": n_out,
        "methods": methods,
        "sweeps": points,
        "sizes": size_rows,
        SEVEN_B: mistral,
        "crossovers": crossovers(points),
        "advice": advice(methods, points, quick),
        "bench": [{k: v for k, v in to_json(run).items() if k != "ceilings"} for run in runs],
        "ceilings": to_json(base.known_ceilings),
        "elapsed_sec": clock.now() - begun,
        **common.noise_of(runs),
    }
    result["summary"] = result["advice"]
    _write(out, result, base.threads.threads)
    return result


def _row(row: BenchRow | None) -> Row:
    """One row of a bench as the study shows it."""
    return {
        "config": row and row.config,
        "tokens_per_sec": row and row.throughput_tokens_per_sec,
        **common.judged(row, "throughput"),
        "weights_bytes": row and row.weights_bytes,
        "rss_peak_bytes": row and row.rss_peak_bytes,
    }


def _point(row: BenchRow, x: float) -> Row:
    return {"x": x, **_row(row)}


def crossovers(points: Mapping[str, Sequence[Row]]) -> list[Row]:
    """For each sweep and configuration: from where on it is faster, by verdicts that hold for all larger places."""
    out = []
    for sweep, rows in points.items():
        for name in dict.fromkeys(r["config"] for r in rows):
            line = sorted((r for r in rows if r["config"] == name), key=lambda r: r["x"])
            out.append({"sweep": sweep, "config": name, "finding": crossover(line, sweep)})
    return out


def crossover(line: Sequence[Row], sweep: str) -> str:
    """The sentence of one line, from its verdicts alone: an undecided place proves nothing in either direction."""

    def place(row: Row) -> str:
        x = format_count(row["x"]) if sweep == "size" else f"{row['x']:g}"
        return _UNIT[sweep].format(x)

    def shown(row: Row) -> str:
        return format_ratio(row["speedup"], row["speedup_low"], row["speedup_high"])

    known = [r for r in line if r.get("speedup") is not None]
    if not known:
        return f"not measured ({line[0]['verdict']})"
    verdicts = [r["verdict"] for r in known]
    span = place(known[0]) if len(known) == 1 else f"{place(known[0])} to {place(known[-1])}"
    first, last = known[0], known[-1]
    ends = shown(last) if len(known) == 1 else f"{shown(first)} at the first, {shown(last)} at the last"
    if len(set(verdicts)) == 1:
        word = {"faster": "faster", "slower": "slower", "indistinguishable": "no different"}.get(
            verdicts[0], "undecided"
        )
        return f"{word} everywhere measured, {span}: {ends}"
    for word in ("faster", "slower"):
        start = next((i for i in range(len(known)) if all(v == word for v in verdicts[i:])), None)
        if start is not None:
            before = known[start - 1]
            return (
                f"{word} from {place(known[start])} on ({shown(known[start])}); {before['verdict']} at {place(before)}"
            )
        stop = next((i for i in range(len(known) - 1, -1, -1) if all(v == word for v in verdicts[: i + 1])), None)
        if stop is not None:
            after = known[stop + 1]
            return f"{word} up to {place(known[stop])} ({shown(known[stop])}); {after['verdict']} at {place(after)}"
    return "; ".join(f"{r['verdict']} at {place(r)} ({shown(r)})" for r in known)


def advice(methods: Sequence[Row], points: Mapping[str, Sequence[Row]], quick: bool = False) -> list[str]:
    """What to do, each sentence with the figures that it rests on."""
    said = []
    known = [m for m in methods if m["config"] != BASELINE and m.get("speedup") is not None]
    winners = [m for m in known if m["verdict"] == "faster"]
    if winners:
        best = max(winners, key=lambda m: m["speedup_low"] or 0.0)
        ratio = format_ratio(best["speedup"], best["speedup_low"], best["speedup_high"])
        said.append(f"For one user take {best['config']}: {ratio} over fp32 with attention by the formula.")
    elif open_ := [m["config"] for m in known if m["verdict"] == "undecided"]:
        longer = ", or the full study," if quick else ""
        said.append(
            f"For one user nothing is shown to be faster; undecided: {', '.join(open_)}. A quieter machine{longer} may "
            "decide them."
        )
    elif known:
        said.append("For one user stay with the baseline: nothing measured here is faster beyond noise.")
    for m in known:
        if m["verdict"] == "slower":
            ratio = format_ratio(m["speedup"], m["speedup_low"], m["speedup_high"])
            said.append(f"Do not take {m['config']} for speed at batch 1: {ratio}.")
    smallest = min((m for m in methods if m.get("weights_bytes")), key=lambda m: m["weights_bytes"], default=None)
    largest = next((m for m in methods if m["config"] == BASELINE and m.get("weights_bytes")), None)
    if smallest and largest and smallest is not largest:
        share = smallest["weights_bytes"] / largest["weights_bytes"]
        said.append(
            f"Smallest in memory: {smallest['config']}, {format_bytes(smallest['weights_bytes'])} of weights, "
            f"{100 * share:.0f} % of the baseline's."
        )
    found = {(c["sweep"], c["config"]): c["finding"] for c in crossovers(points)}
    for name, sweep, claim in CLAIMS:
        here = found.get((sweep, name))
        if here:
            said.append(f"Published: {claim}. Measured here, {name}: {here}.")
    return said


def mistral_configs(device: str) -> dict[str, Recipe]:
    """As published: 16 bits are the baseline, and what everything else is computed in."""
    narrow = {"name": "precision", "dtype": common.sixteen_bits(device)[0]}
    more = {
        "fp16": ([], []),
        "flash_attn": ([{"name": "attention", "form": "sdpa"}], []),
        "int8": ([], [{"name": "llm_int8"}]),
        "4bit": ([], [{"name": "nf4"}]),
    }
    return {k: Recipe.from_dict({"transforms": [*before, narrow, *after]}) for k, (before, after) in more.items()}


def mistral_rows(ceilings: hardware.Ceilings, reason: str | None, measured: Sequence[BenchRow]) -> list[Row]:
    """Mistral-7B's shape: what each configuration stores, the most that it can reach, and what was measured.

    Args:
        reason: why nothing was measured, or None.
        measured: rows of a bench.
    """
    config = ModelConfig.from_hf(MISTRAL_7B)
    ends = config.vocab_size * config.n_embd  # embedding and head, each: they stay in 16 bits
    inner = n_parameters(config) - 2 * ends
    found = {r.config: _row(r) for r in measured}
    rows: list[Row] = []
    for name, width in {"fp16": 2.0, "flash_attn": 2.0, "int8": 1.0, "4bit": 0.5 + 1 / 64}.items():
        stored = round(width * inner + 4.0 * ends)
        read = stored - 2 * ends  # a step looks up one row of the embedding
        rows.append(
            {
                "config": name,
                "predicted_weights_bytes": stored,
                "most_tokens_per_sec": ceilings.bandwidth_at(read) / read,
                **(found.get(name) or {**_row(None), "config": name, "verdict": f"not measured: {reason}"}),
            }
        )
    return common.beside(rows, PUBLISHED_MISTRAL, "config")


_METHODS = [
    Column("config", "Form", numeric=False),
    Column("tokens_per_sec", "Tokens/s"),
    common.ratio_column("Against baseline"),
    Column("verdict", "Verdict", numeric=False),
    Column("weights_bytes", "Weights"),
    Column("rss_peak_bytes", "Process"),
    Column("published_tokens_per_sec", "Publ. tok/s"),
    Column("published_memory_bytes", "Publ. memory"),
    Column("published_speedup", "Publ. ratio", lambda r: format_ratio(r["published_speedup"])),
]
_SIZES = [Column("shape", "Model", numeric=False), Column("n_parameters", "Parameters"), *_METHODS[:5]]
_MISTRAL = [
    Column("config", "Configuration", numeric=False),
    Column("predicted_weights_bytes", "Weights, predicted"),
    Column("most_tokens_per_sec", "At most, predicted"),
    *_METHODS[1:],
]


def _write(out: Path, result: Mapping[str, Any], threads: int) -> None:
    def show(value: float) -> str:
        return f"{value:.3g}"

    figures = [
        common.picture(
            out,
            "throughput",
            lambda fmt: bars(
                result["methods"], [("tokens_per_sec", "here")], "Output tokens per second", show, fmt=fmt
            ),
            "Median over slices; batch 1. The published numbers are of another machine and stand in the table.",
        ),
        common.picture(
            out,
            "memory",
            lambda fmt: bars(
                result["methods"], [("weights_bytes", "weights")], "Stored weights", format_bytes, fmt=fmt
            ),
            "Bytes that the model stores, each tensor once.",
        ),
    ]
    shape = f"{result['input_len']} prompt and {result['output_len']} new tokens, batch 1"
    sections = [
        html.section("What follows", result["advice"]),
        html.section(
            "Six configurations",
            [
                f"{shape}; all side by side in interleaved blocks, against fp32 with attention by the formula. Each "
                "row changes one thing; `native` rows are the same idea in the form that this tool runs (int8 rows, "
                "int4 groups with an 8-bit head, native code). The published columns are GPT-2 on an A100: compare "
                "ratios.",
                "Published INT8 is LLM.int8 and 4-bit is NF4, both of bitsandbytes; here they are our own, through "
                "PyTorch, bit-equal in their numbers.",
            ],
            result["methods"],
            _METHODS,
            figures,
        ),
    ]
    titles = {"batch": "Over batch sizes", "length": "Over prompt lengths", "size": "Over model sizes"}
    for sweep, title in titles.items():
        x_show = (lambda v: format_count(float(v))) if sweep == "size" else None

        def draw(fmt: str, sweep: str = sweep, x_show: Any = x_show) -> bytes:
            return curves(result["sweeps"][sweep], _X[sweep], fmt, x_show)

        said = [f"{c['config']}: {c['finding']}." for c in result["crossovers"] if c["sweep"] == sweep]
        drawn = [common.picture(out, f"over-{sweep}", draw, CAPTION)]
        if sweep == "size":
            sections.append(html.section(title, said, result["sizes"], _SIZES, drawn))
        else:
            columns = [Column("x", _X[sweep]), *_METHODS[:5]]
            sections.append(html.section(title, said, result["sweeps"][sweep], columns, drawn))
    said = [
        "The shape of Mistral-7B with random weights. Predicted columns are arithmetic: bytes of the weights, and the "
        "read bandwidth measured here over the bytes that a step has to read. They are not measurements."
    ]
    sections.append(html.section("Mistral-7B", said, result[SEVEN_B], _MISTRAL))
    tables = {k: result[k] for k in ("methods", "sizes", SEVEN_B, "crossovers")}
    tables |= {f"over {k}": v for k, v in result["sweeps"].items()}
    common.write_results(out, result, tables, sections, result["advice"][:3], threads)
