"""The page of the attention study: its tables with the published columns, its pictures, its findings in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from paretune.evaluate import summaries
from paretune.records.bench import BenchResult
from paretune.records.record import from_json
from paretune.report import html
from paretune.report.study_plots import Bar, bars, lines, utilization
from paretune.report.summaries import TITLES, metric_column, metric_text
from paretune.report.tables import Column, Row
from paretune.report.units import (
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_ratio,
    format_sec,
    number,
)
from paretune.studies import attention_data as data
from paretune.studies import common
from paretune.studies.attention_robust import shift_summary

_NONE = "-"
Result = Mapping[str, Any]


def _if(show: Callable[[Any], str], key: str) -> Callable[[Row], str]:
    """A cell of `key`, or a dash where the row has no such value (a published column of an unpublished row)."""
    return lambda row: _NONE if number(row.get(key)) is None else show(row[key])


def speed_rows(result: Result) -> list[Row]:
    """The inference table: prefill of the whole prompt, one decode step, memory in parts, the published row."""
    rows: list[Row] = []
    for row in from_json(BenchResult, result["bench"]).rows:
        if row.role == "twin":
            continue
        prefill, decode = common.judged(row, "prefill"), common.judged(row, "decode")
        rows.append(
            {
                "mechanism": row.config,
                "ttft_sec": row.ttft_sec,
                **{f"prefill_{k}": v for k, v in prefill.items()},
                "tpot_sec": row.tpot_sec,
                **{f"decode_{k}": v for k, v in decode.items()},
                "rss_peak_bytes": row.rss_peak_bytes,
                "weights_bytes": row.weights_bytes,
                "kv_cache_bytes": row.kv_cache_bytes,
                "activation_peak_bytes": row.activation_peak_bytes,
                "cause": row.cause,
            }
        )
    base = data.PUBLISHED_SPEED[data.FLASH]["sec"]
    published = {n: {**v, "speedup": base / v["sec"]} for n, v in data.PUBLISHED_SPEED.items()}
    return common.beside(rows, published, "mechanism")


def training_rows(result: Result) -> list[Row]:
    rows: list[Row] = []
    for row in result["training"]:
        sec = data.PUBLISHED_TRAINING.get((row["mechanism"], row["batch_size"]))
        kept = {k: v for k, v in row.items() if k != "samples_sec"}
        is_compared = row["mechanism"] != data.STANDARD
        kept["saving"] = 1 - 1 / row["speedup"] if row["speedup"] and is_compared else None
        saving = data.PUBLISHED_SAVING.get(row["batch_size"]) if row["mechanism"] == data.FLASH else None
        if not row["cause"] and row["speedup_low"] is None and is_compared:
            kept["cause"] = f"no claim: {row['n']} update{'s' * (row['n'] != 1)}"
        rows.append({**kept, "published_sec": sec, "published_saving": saving})
    return rows


def tables_of(result: Result) -> dict[str, list[Row]]:
    """Every table of the study, as the CSV has them."""
    return {
        "quality": common.beside(result["quality"], data.PUBLISHED_QUALITY, "system"),
        "inference": speed_rows(result),
        "training": training_rows(result),
        "fine-tuning": list(result["fine_tuning"]),
        "noise and other domains": list(result["noise"]),
        "adversarial edits": list(result["attack"]),
        "attention by head": list(result["heads"]),
        "beyond the trained length": list(result["length"]),
        "far against near": list(result["far"]),
        "streaming": list(result["streaming"]),
        "utilisation": list(result["utilization"]["phases"]),
    }


# --- words ------------------------------------------------------------------------------------------------


def lead_of(result: Result) -> list[str]:
    """The findings in words."""
    said = []
    quality = {r["system"]: r for r in result["quality"]}
    exact = quality[data.STANDARD]["verdict"]
    said.append(
        f"Flash attention writes the standard one's summaries: {exact}. ROUGE-L of both: "
        f"{metric_text('rougeL', quality[data.FLASH])}; lead-3 reaches {metric_text('rougeL', quality['lead-3'])}."
    )
    for name in (data.ALIBI, data.SPARSE, data.HYBRID):
        row = quality[name]
        said.append(f"{name}: ROUGE-L {metric_text('rougeL', row)}; against Flash: {row['verdict']}.")
    for row in speed_rows(result):
        if row["mechanism"] == data.FLASH:
            continue
        if row["prefill_speedup"] is None and row["decode_speedup"] is None:
            said.append(f"{row['mechanism']}: not timed ({row['cause'] or 'the time budget ended first'}).")
            continue
        parts = [
            f"{phase} {_ratio(row, phase)}, {row[f'{phase}_verdict']}"
            for phase in ("prefill", "decode")
            if row[f"{phase}_speedup"] is not None
        ]
        said.append(f"{row['mechanism']} against Flash GPT-2, times as fast: {'; '.join(parts)}.")
    refused = {r["mechanism"] for r in result["length"] if str(r["cause"]).startswith("refused")}
    for row in result["far"]:
        said.append(
            f"{row['mechanism']} up to four times the context: perplexity {_change_of(row)} against the same tokens in "
            "windows of the context."
        )
    if refused:
        said.append(
            f"These refuse texts beyond their context: {', '.join(sorted(refused))} (learned positions end there)."
        )
    return said


def _ratio(row: Row, phase: str) -> str:
    return format_ratio(*(row[f"{phase}_speedup{end}"] for end in ("", "_low", "_high")))


# --- columns ----------------------------------------------------------------------------------------------


def _published(key: str) -> Column:
    form = "{:.2f}" if key == "bleu" else "{:.4f}"
    return Column(f"published_{key}", "published", _if(form.format, f"published_{key}"))


def _here(key: str) -> Column:
    return Column(key, TITLES[key], _if(("{:.2f}" if key == "bleu" else "{:.4f}").format, key))


_TABLE_I = ("rouge1", "rouge2", "rougeL", "bleu")
QUALITY = [
    Column("system", "Model", numeric=False),
    *(column for key in _TABLE_I for column in (_here(key), _published(key))),
    Column("verdict", "Against Flash", numeric=False),
]
INTERVALS = [
    Column("system", "Model", numeric=False),
    *(metric_column(key) for key in TITLES),
    Column("length_ratio", "Length", _if("{:.2f}".format, "length_ratio")),
    Column("ended_share", "Ended", _if(format_percent, "ended_share")),
    Column("n_seeds", "Seeds", _if("{:.0f}".format, "n_seeds")),
]
SPEED = [
    Column("mechanism", "Model", numeric=False),
    Column("ttft_sec", "Prefill here", _if(format_sec, "ttft_sec")),
    Column("prefill_speedup", "x Flash", lambda r: _ratio(r, "prefill")),
    Column("prefill_verdict", "Verdict", numeric=False),
    Column("tpot_sec", "Decode step", _if(format_sec, "tpot_sec")),
    Column("decode_speedup", "x Flash", lambda r: _ratio(r, "decode")),
    Column("decode_verdict", "Verdict", numeric=False),
    Column("published_sec", "Published (A100)", _if(format_sec, "published_sec")),
    Column("published_speedup", "Published x Flash", _if(format_ratio, "published_speedup")),
]
MEMORY = [
    Column("mechanism", "Model", numeric=False),
    Column("rss_peak_bytes", "Peak of the process", _if(format_bytes, "rss_peak_bytes")),
    Column("weights_bytes", "Weights", _if(format_bytes, "weights_bytes")),
    Column("kv_cache_bytes", "Cache", _if(format_bytes, "kv_cache_bytes")),
    Column("activation_peak_bytes", "Activations, peak", _if(format_bytes, "activation_peak_bytes")),
    Column("published_bytes", "Published (A100)", _if(format_bytes, "published_bytes")),
]
TRAINING = [
    Column("mechanism", "Model", numeric=False),
    Column("batch_size", "Batch"),
    Column("micro_batch_size", "At once", _if("{:.0f}".format, "micro_batch_size")),
    Column("step_sec", "Update here", _if(format_sec, "step_sec")),
    Column("tokens_per_sec", "Tokens/s", _if(format_count, "tokens_per_sec")),
    Column("peak_bytes", "Peak memory", _if(format_bytes, "peak_bytes")),
    Column(
        "speedup",
        "x Standard",
        lambda r: _NONE if r["speedup"] is None else format_ratio(r["speedup"], r["speedup_low"], r["speedup_high"]),
    ),
    Column("saving", "Speedup", _if(partial(format_percent, signed=True), "saving")),
    Column("published_sec", "Published (A100)", _if(format_sec, "published_sec")),
    Column("published_saving", "Published speedup", _if(partial(format_percent, signed=True), "published_saving")),
    Column("cause", "Remark", lambda r: r["cause"] or _NONE, numeric=False),
]


def _change(row: Row) -> str:
    if row.get("change_rougeL") is None:
        return _NONE
    low, high = row["change_rougeL_low"], row["change_rougeL_high"]
    return _interval(row["change_rougeL"], low, high, "{:+.4f}".format)


NOISE = [
    Column("mechanism", "Model", numeric=False),
    Column("condition", "Articles", numeric=False),
    *(metric_column(key) for key in ("rouge1", "rougeL", "bleu")),
    Column("change_rougeL", "ROUGE-L against clean, paired", _change),
    Column("length_ratio", "Length", _if("{:.2f}".format, "length_ratio")),
]
ATTACK = [
    Column("mechanism", "Model", numeric=False),
    Column("edits", "Word changes", _if("{:.1f}".format, "edits")),
    Column("loss_before", "Loss before", _if("{:.3f}".format, "loss_before")),
    Column("loss_after", "Loss after", _if("{:.3f}".format, "loss_after")),
    Column("loss_random", "Random changes", _if("{:.3f}".format, "loss_random")),
    Column("change_rougeL", "ROUGE-L, paired change", _change),
    Column("example", "Example", numeric=False),
]
HEADS = [
    Column("mechanism", "Model", numeric=False),
    Column("kl", "KL from dense", _if("{:.3f}".format, "kl")),
    Column("kl_max", "Largest", lambda r: f"{r['kl_max']:.3f} (head {r['kl_max_head']})"),
    Column("entropy", "Entropy", _if("{:.2f}".format, "entropy")),
    Column("dense_entropy", "Dense entropy", _if("{:.2f}".format, "dense_entropy")),
    Column("distance", "Looks back", lambda r: f"{r['distance']:.1f} tokens"),
    Column("dense_distance", "Dense looks back", lambda r: f"{r['dense_distance']:.1f} tokens"),
]
LENGTH = [
    Column("mechanism", "Model", numeric=False),
    Column("positions", "Positions", numeric=False),
    Column(
        "perplexity",
        "Perplexity",
        lambda r: _NONE if r["perplexity"] is None else _interval(r["perplexity"], r["low"], r["high"]),
    ),
    Column("cause", "Cause", lambda r: r["cause"] or _NONE, numeric=False),
]
STREAMING = [
    Column("mechanism", "Model", numeric=False),
    Column("document_tokens", "Document, tokens"),
    Column("ttft_sec", "TTFT", _if(format_sec, "ttft_sec")),
    Column("itl_p50_sec", "Between tokens, median", _if(format_sec, "itl_p50_sec")),
    Column("itl_max_sec", "Longest gap", _if(format_sec, "itl_max_sec")),
    Column("kv_cache_bytes", "Cache", _if(format_bytes, "kv_cache_bytes")),
    Column("cause", "Cause", lambda r: r["cause"] or _NONE, numeric=False),
]
TUNING = [
    Column("weights", "Weights", numeric=False),
    Column("seed", "Seed"),
    Column("updates", "Updates"),
    Column("first_heldout_loss", "Loss before", _if("{:.4f}".format, "first_heldout_loss")),
    Column("heldout_loss", "Loss after", _if("{:.4f}".format, "heldout_loss")),
    Column("train_sec", "Time", _if(format_sec, "train_sec")),
    Column("train_tokens_per_sec", "Tokens/s", _if(format_count, "train_tokens_per_sec")),
]
UTILIZATION = [
    Column("phase", "Phase", numeric=False),
    Column("cpu_share", "Processor busy", _if(format_percent, "cpu_share")),
    Column("gpu_share", "Accelerator busy", _if(format_percent, "gpu_share")),
    Column("rss_peak_bytes", "Memory of this process", _if(format_bytes, "rss_peak_bytes")),
    Column("n_samples", "Samples"),
]


def _interval(value: float, low: float | None, high: float | None, show: Callable[[float], str] = format_number) -> str:
    return show(value) if low is None or high is None else f"{show(value)} [{show(low)}, {show(high)}]"


# --- pictures ---------------------------------------------------------------------------------------------


def quality_bars(result: Result, fmt: str = "svg") -> bytes:
    groups = {
        title: {r["system"]: Bar(r[key], r[f"{key}_low"], r[f"{key}_high"]) for r in result["quality"]}
        for key, title in TITLES.items()
        if key != "rougeLsum"
    }
    return bars(groups, "Score", "Quality of the summaries, 95 % intervals over documents", lambda v: f"{v:.3g}", fmt)


def memory_bars(result: Result, fmt: str = "svg") -> bytes:
    rows = speed_rows(result)
    groups = {
        title: {r["mechanism"]: Bar(number(r[key]) and r[key] / 1e6) for r in rows}
        for key, title in (("rss_peak_bytes", "Process, peak"), ("activation_peak_bytes", "Activations, peak"))
    }
    return bars(groups, "MB", "Memory of one request", lambda v: f"{v:.4g}", fmt)


def _series(rows: Any, x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    out: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        out.setdefault(row["mechanism"], [])
        if number(row[x]) is not None and number(row[y]) is not None:
            out[row["mechanism"]].append((float(row[x]), float(row[y])))
    return out


def latency_lines(result: Result, key: str, fmt: str = "svg") -> bytes:
    what = "Time to first token" if key == "ttft_sec" else "Time between tokens, median"
    return lines(
        _series(result["streaming"], "document_tokens", key),
        "Document, tokens",
        what,
        f"{what} by length of the document",
        show_x=lambda v: f"{v:,.0f}",
        show_y=format_sec,
        fmt=fmt,
    )


def training_lines(result: Result, fmt: str = "svg") -> bytes:
    return lines(
        _series(result["training"], "batch_size", "step_sec"),
        "Batch size (windows)",
        "Time of an update",
        "Training time by batch size",
        show_x=lambda v: f"{v:.0f}",
        show_y=format_sec,
        fmt=fmt,
    )


def length_lines(result: Result, fmt: str = "svg") -> bytes:
    rows = [{**r, "middle": (r["begin"] + r["end"]) / 2} for r in result["length"]]
    trained = max((r["end"] for r in rows), default=4) / 4
    return lines(
        _series(rows, "middle", "perplexity"),
        "Position in the text",
        "Perplexity",
        "Perplexity by position, up to four times the trained context",
        show_x=lambda v: f"{v:,.0f}",
        show_y=format_number,
        logarithmic=False,
        marks={"trained context": trained},
        fmt=fmt,
    )


# --- the page ---------------------------------------------------------------------------------------------


def write(out: Path, result: Result) -> None:
    """Writes report.html, results.json, results.csv and the pictures."""
    tables = tables_of(result)
    n_seeds, pairs = len(result["seeds"]), result["pairs"]
    prompt = result["prompt"]
    cell = from_json(BenchResult, result["bench"]).cells[0]
    about_seeds = (
        "One seed: fine-tuned rows differ by the luck of a run too, so no difference between them is claimed."
        if n_seeds < 3
        else f"{n_seeds} seeds: values are means over them; a difference needs every seed to agree."
    )
    figure = partial(common.picture, out)
    sections = [
        html.section(
            "Summarisation quality (Table I)",
            [
                f"{pairs['n_train']} training pairs ({pairs['train']}), {pairs['n_heldout']} held-out articles "
                f"({pairs['heldout']}), at most {prompt['max_len']} tokens, greedy, at most {prompt['max_new_tokens']} "
                f"new tokens. {about_seeds}",
                f"BLEU signature: {result['bleu_signature']}.",
            ],
            tables["quality"],
            QUALITY,
            [
                figure(
                    "quality",
                    partial(quality_bars, result),
                    "Bars are scores, upright lines 95 % intervals over documents. lead-3 and copy need no model.",
                )
            ],
        ),
        html.section("The same with intervals", rows=tables["quality"], columns=INTERVALS),
        html.section("What is wrong in the published tables", data.WHERE_IT_WENT_WRONG),
        html.section(
            "Inference time (Table II)",
            [
                f"{cell.input_len} prompt tokens, batch {cell.batch_size}, side by side in interleaved blocks. "
                f"Sparse: {result['pattern']}. {_forms(result)} The published column is of another machine: compare "
                "ratios, not seconds."
            ],
            tables["inference"],
            SPEED,
        ),
        html.section(
            "Memory (Table II)",
            ["Of one request in a process of its own, in parts. The published figures are device-wide."],
            tables["inference"],
            MEMORY,
            [figure("memory", partial(memory_bars, result), "The process includes the interpreter and libraries.")],
        ),
        html.section(
            "Training time by batch size",
            [
                f"One update on windows of {result['training'][0]['length']} tokens. Speedup as published: the share "
                "of Standard's time that is saved. Training runs on PyTorch's operators, where a pattern is a mask and "
                "skips nothing. "
                "A batch that does not fit goes through in parts ('at once'); intervals need six updates of each.",
            ],
            tables["training"],
            TRAINING,
            [figure("training", partial(training_lines, result), "Both axes are logarithmic; lower is faster.")],
        ),
        html.section("Fine-tuning", result["data_said"], result["fine_tuning"], TUNING),
        html.section("Noise and other domains", rows=result["noise"], columns=NOISE),
        html.section(
            "Adversarial edits",
            [
                "The few word changes that raise the loss of the reference summary most, found by gradient on each "
                "model itself; beside them as many random ones. Loss in nats per token."
            ],
            result["attack"],
            ATTACK,
        ),
        html.section(
            "Where attention went",
            ["Means over heads and queries against the dense fine-tuned model, in nats; every head is in results.csv."],
            shift_summary(result["heads"]),
            HEADS,
        ),
        html.section(
            "Beyond the trained length",
            [
                "Stretches hold different texts: only rows of the same positions compare. The same tokens far out "
                "and in windows of the context: "
                + ("; ".join(f"{r['mechanism']} {_change_of(r)}" for r in result["far"]) or "no model goes so far")
                + " (the last quarter of four contexts, 95 % over blocks of 128 tokens).",
            ],
            result["length"],
            LENGTH,
            figures=[figure("length", partial(length_lines, result), "Learned positions refuse beyond the line.")],
        ),
        html.section(
            "Streaming latency",
            [
                "Documents of random tokens through random weights with enough positions (speed does not depend on "
                "either), prefilled in chunks of 512 tokens; 32 gaps between tokens each."
            ],
            result["streaming"],
            STREAMING,
            [
                figure("latency", partial(latency_lines, result, "ttft_sec"), "Both axes are logarithmic."),
                figure("gaps", partial(latency_lines, result, "itl_p50_sec"), "Flat is what a window should give."),
            ],
        ),
        html.section("Worst summaries of Flash GPT-2", _worst(result)),
        html.section(
            "Utilisation",
            rows=result["utilization"]["phases"],
            columns=UTILIZATION,
            figures=[
                figure(
                    "utilization",
                    partial(utilization, result["utilization"]["points"]),
                    "Sampled once a second, all processes of the machine.",
                )
            ],
        ),
        html.section("What the columns mean", [f"{k}: {v}" for k, v in summaries.DEFINITIONS.items()]),
    ]
    common.write_results(out, result, tables, sections, lead_of(result), result["threads"]["threads"])


def _forms(result: Result) -> str:
    """Which code ran what."""
    if result["fast_form_cause"]:
        return f"All rows run through PyTorch's fused operator, with masks ({result['fast_form_cause']})."
    return (
        f"Flash runs through PyTorch's fused operator, and the prompt of ALiBi and sparse through the "
        f"{result['fast_form']} form. Their single tokens, whose cache holds no more than they see, run through "
        "PyTorch's operator with a bias or a mask."
    )


def _change_of(row: Row) -> str:
    """A relative change with its interval."""
    return _interval(row["change"], row["low"], row["high"], partial(format_percent, signed=True))


def _worst(result: Result) -> list[str]:
    return [
        f"{w['id']} (ROUGE-L {w['rougeL']:.3f}): \u201c{w['summary'] or '(nothing)'}\u201d; reference: "
        f"\u201c{w['reference']}\u201d"
        for w in result["worst"]
    ]
