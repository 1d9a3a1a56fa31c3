"""The published kernel study again: GPT-2 in fp32, 16 bits, compiled, and both; time by part and kernel, and why.

Published: "Beating PyTorch: Optimizing GPT-2 Small Inference" (GPT-2 small on an NVIDIA T4, 100 new tokens). Its
numbers are of another machine: ratios and shares are compared, never seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from paretune import files, hardware, stats
from paretune.hardware.devices import device_profile
from paretune.measure import bench, predict, profile_trace
from paretune.measure.profile import profile
from paretune.recipe import Recipe
from paretune.records.bench import BenchResult
from paretune.records.record import to_json
from paretune.report import breakdown, html
from paretune.report import profile as report
from paretune.report.roofline import caption, roofline
from paretune.report.tables import Column, Row
from paretune.report.units import format_ratio, format_sec
from paretune.studies import common

NEW_TOKENS = 100
SDPA = {"name": "attention", "form": "sdpa"}

# Seconds (standard deviation) for 100 new tokens, tokens/s, on a T4.
PUBLISHED_METHODS = {
    "FP32": (1.3099, 0.1762, 76.34),
    "16 bits": (1.2754, 0.1357, 78.41),
    "compile": (0.9065, 0.0309, 110.32),
    "16 bits + compile": (0.4851, 0.0664, 206.14),
}
# Shares of time, each within its own table (they add up to 99, 91, 83 and 90.5 %).
PUBLISHED_SHARES = {
    "blocks": 0.898,
    "head": 0.069,
    "final_norm": 0.011,
    "token_embedding": 0.005,
    "embedding_sum": 0.004,
    "position_embedding": 0.003,
    "attention": 0.376,
    "mlp": 0.256,
    "norm_1": 0.113,
    "norm_2": 0.112,
    "residual_1": 0.027,
    "residual_2": 0.026,
    "qkv_projection": 0.226,
    "mask": 0.136,
    "scores": 0.125,
    "output_projection": 0.113,
    "values": 0.085,
    "output_reshape": 0.065,
    "qkv_reshape": 0.042,
    "softmax": 0.038,
    "activation": 0.314,
    "projection": 0.299,
    "expansion": 0.292,
}
WHY_TRITON = (
    "Triton and not CUTLASS: the published study planned fused CUTLASS layers. CUTLASS is a library of C++ templates: "
    "each fused "
    "layer is a template instance that nvcc compiles for minutes, for one architecture at a time, and that cannot be "
    "run without that GPU. The products themselves are not what a step of a small model loses its time with: at batch "
    "1 they are bound by bytes, where a library's kernel is as good as a fused one, and what can be saved is the "
    "launches and the passes over activations between them. These are elementwise tails and reductions, which Triton "
    "writes in tens of lines of Python, compiles in seconds on the user's machine for the chip that is there, and runs "
    "on a CPU in its interpreter, so that their numerics are tested everywhere. What CUTLASS is better at, large "
    "products in new formats at full tensor-core rate, is what PyTorch's own libraries already call."
)


def methods(dtype: str) -> dict[str, Recipe]:
    """The four rows of the published table."""
    narrow = {"name": "precision", "dtype": dtype}

    def recipe(transforms: list[dict[str, Any]], runner: str) -> Recipe:
        return Recipe.from_dict({"transforms": transforms, "engine": {"runner": runner}})

    return {
        "FP32": recipe([SDPA], "eager"),
        "16 bits": recipe([SDPA, narrow], "eager"),
        "compile": recipe([SDPA], "compile"),
        "16 bits + compile": recipe([SDPA, narrow], "compile"),
    }


def run(
    model: str,
    output_dir: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures everything and writes report.html, results.json, results.csv, pictures and traces.

    Raises:
        ParetuneError: the folder cannot be written (before any measurement), or out of memory.
    """
    folder, config, model_name = common.open_model(model)
    out = files.ensure_folder(output_dir)
    input_len = min(32, config.n_positions // 2)
    new_tokens = min(NEW_TOKENS, config.n_positions - input_len)
    header = common.header("kernels", model_name, config, quick=quick, seed=seed)
    dtype, dtype_reason = common.sixteen_bits(device)
    say(f"methods: FP32, {dtype}, compile, both; {new_tokens} new tokens each")
    measured = bench.bench(
        folder,
        list(methods(dtype).items()),
        input_lens=[input_len],
        output_lens=[new_tokens],
        baseline="FP32",
        kinds=["throughput"],
        **common.BLOCKS,
        min_time_sec=1.5 if quick else 3.0,
        budget_sec=270.0 if quick else None,
        seed=seed,
        device=device,
        threads=threads,
        on_progress=say,
    )
    ceilings = hardware.Ceilings.from_json(to_json(measured.known_ceilings))
    plain = Recipe.from_dict({"transforms": []})
    profile_len = min(128, config.n_positions - 1)
    profiles = []
    for phase in ("prefill", "decode"):
        result, trace = profile(
            folder,
            plain,
            "attention by the formula, FP32",
            phase=phase,  # type: ignore[arg-type]
            input_len=profile_len,
            device=device,
            threads=threads,
            quick=quick,
            seed=seed,
            ceilings=ceilings,
            say=say,
        )
        result["model"]["name"] = model_name
        for row in result["parts"]:
            row["published_share"] = PUBLISHED_SHARES.get(row["part"])
        assert trace is not None
        profile_trace.write(out, f"trace-{phase}", trace)
        profiles.append(result)
    t4 = device_profile("t4")
    predicted = predict.predict(config, t4, input_len)
    result = {
        **header,
        "dtype": dtype,
        "dtype_reason": dtype_reason,
        "input_len": input_len,
        "new_tokens": new_tokens,
        "methods": method_rows(measured, dtype, new_tokens),
        "bench": to_json(measured),
        **common.noise_of([measured]),
        "profiles": profiles,
        "predicted_t4": predicted,
        "predicted_t4_findings": predict.findings(t4, predicted),
    }
    result["summary"] = [*lead_of(result), *(e["text"] for p in profiles for e in p["explanations"])]
    _write(out, result, measured)
    return result


def method_rows(measured: BenchResult, dtype: str, new_tokens: int) -> list[Row]:
    """The four rows: seconds for all new tokens, the ratio to FP32 with its interval, the verdict, the published."""
    rows: list[Row] = []
    for row in measured.rows:
        if row.role == "twin":
            continue
        per_sec = row.throughput_tokens_per_sec
        total_sec = new_tokens / per_sec if per_sec else None
        shown = {"total_sec": total_sec, "tokens_per_sec": per_sec, **common.judged(row, "throughput")}
        rows.append({"method": row.config, **shown})
    base = PUBLISHED_METHODS["FP32"][0]
    published = {
        name: {"sec": sec, "std_sec": std, "speedup": base / sec} for name, (sec, std, _) in PUBLISHED_METHODS.items()
    }
    beside = common.beside(rows, published, "method")
    return [{**row, "method": row["method"].replace("16 bits", dtype.upper())} for row in beside]


def tables_of(result: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Methods and parts, as the CSV has them."""
    tables: dict[str, list[Row]] = {"methods": list(result["methods"])}
    for taken in result["profiles"]:
        for part in taken["parts"]:
            tables.setdefault(f"{taken['phase']}: {part['group']}", []).append({"title": part["title"], **part})
    return tables


_METHOD_COLUMNS = [
    Column("method", "Method", numeric=False),
    Column("total_sec", "Time here"),
    Column("tokens_per_sec", "Tokens/s here"),
    common.ratio_column("Against FP32"),
    Column("verdict", "Verdict", numeric=False),
    Column(
        "published_sec",
        "Published (T4)",
        lambda r: f"{format_sec(r['published_sec'])} ({format_sec(r['published_std_sec'])})",
    ),
    Column("published_speedup", "Published ratio", lambda r: format_ratio(r["published_speedup"])),
]


def lead_of(result: Mapping[str, Any]) -> list[str]:
    """The findings in words."""
    said = []
    for row in result["methods"][1:]:
        if row["speedup"] is None:
            said.append(f"{row['method']}: {row['verdict']}.")
        else:
            ratio = format_ratio(row["speedup"], row["speedup_low"], row["speedup_high"])
            said.append(f"{row['method']} against FP32: {ratio}, {row['verdict']}.")
    return said


def _resolution(measured: BenchResult) -> str:
    """What the verdicts rest on, in words: FP32 against a second copy of itself."""
    if measured.widest is None:
        return "an unknown amount (too few blocks)"
    return f"{100 * max(stats.DELTA, measured.widest):.0f} %"


def _write(out: Path, result: Mapping[str, Any], measured: BenchResult) -> None:
    profiles = result["profiles"]
    n, shape = result["new_tokens"], f"{result['input_len']} prompt tokens, batch 1"
    sections = [
        html.section(
            f"Four methods, {n} new tokens",
            [
                f"{shape}; all four side by side in interleaved blocks, the interval over all planned looks is 95 %. "
                "The published column is of another machine (standard deviation in brackets): compare ratios, not "
                "seconds.",
                f"A claim is no smaller than {_resolution(measured)}: what FP32 differs from a second copy of itself "
                f"by, at least {stats.DELTA:.0%}. Indistinguishable: the whole interval lies within that. Undecided: "
                "it lies on both sides; more blocks, or a quieter machine, may decide it.",
                f"16 bits here are {result['dtype'].upper()}: {result['dtype_reason']}.",
                "Published, FP16 was called 2.6 % faster with a standard deviation of 13 %: that is indistinguishable.",
            ],
            result["methods"],
            _METHOD_COLUMNS,
        )
    ]
    pictures = [
        common.picture(out, "roofline", partial(roofline, profiles), caption(profiles)),
        common.picture(out, "breakdown", partial(breakdown.bars, profiles), breakdown.CAPTION),
    ]
    sections.append(html.section("Where the time goes", figures=pictures))
    for taken in profiles:
        name = report.PHASES[taken["phase"]]
        sections.append(html.section(f"{name}: why", report.lead_of(taken)))
        for group, title in report.GROUPS.items():
            rows = report.group_rows(taken, group)
            if rows:
                heading = f"{name}: {title[:1].lower()}{title[1:]}"
                sections.append(html.section(heading, rows=rows, columns=report.part_columns(published=True)))
        columns = report.kernel_columns(taken["profiled_sec"])
        classes = taken["kernel_classes"]
        sections.append(html.section(f"{name}: kernels by class", rows=classes, columns=report.CLASS_COLUMNS))
        sections.append(html.section(f"{name}: kernels", rows=taken["kernels"][:25], columns=columns))
        sections.append(html.section(f"{name}: how it was measured", report.measured_of(taken)))
    t4 = [f"Prediction: {sentence}." for sentence in result["predicted_t4_findings"]]
    sections.append(
        html.section(
            "The T4 of the study, predicted",
            ["From its data sheet and an assumed cost of a launch, for this model; nothing here was measured.", *t4],
        )
    )
    sections.append(html.section("Why Triton and not CUTLASS", [WHY_TRITON]))
    traces = ["trace-prefill.json.gz and trace-decode.json.gz hold one warm step each: open them in ui.perfetto.dev."]
    sections.append(html.section("Traces", traces))
    sections.append(html.section("What the columns mean", report.DEFINITIONS))
    threads = measured.threads.threads
    common.write_results(out, result, tables_of(result), sections, lead_of(result), threads)
