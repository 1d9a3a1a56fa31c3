"""Writes the tables of the pages in docs/results/ (and of README.md) from the records in benchmarks/results/.

    python benchmarks/tables.py            # after a record was replaced
    python benchmarks/tables.py --check    # changes nothing; exit code 1 where a page differs

A page holds `<!-- table: NAME ARGUMENT ... -->` and `<!-- end of table -->`; what stands between them is made here, the
rest of the page is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
WORDS = {"indistinguishable": "no difference"}


@cache
def read(name: str) -> Any:
    """The record `benchmarks/results/NAME.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def pages() -> list[Path]:
    """Every page that may hold tables."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs" / "results").glob("*.md"))]


def filled(text: str) -> str:
    """A page with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        return f"{match[1]}\n{TABLES[name](*arguments)}\n\n{match[3]}"

    return PLACE.sub(table, text)


# -- how values are written


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def times(ratio: dict[str, Any] | None, prefix: str = "", verdict: str = "") -> str:
    """`1.69x [1.49, 1.90]`, and the verdict where one is given."""
    keys = ("value", "low", "high") if not prefix else (prefix, f"{prefix}_low", f"{prefix}_high")
    value, low, high = ((ratio or {}).get(key) for key in keys)
    if value is None:
        return "-"
    text = f"{value:.2f}x"
    if low is not None and high is not None:
        text += f" [{low:.2f}, {high:.2f}]"
    return text + (f" ({WORDS.get(verdict, verdict)})" if verdict and verdict != "baseline" else "")


def ms(seconds: float | None) -> str:
    """Milliseconds with three significant digits."""
    if seconds is None:
        return "-"
    value = 1e3 * seconds
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def change(share: float) -> str:
    """A change in perplexity: `+0.66 %`."""
    return f"{100 * share:+.2f} %"


def megabytes(n_bytes: float | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e8 else f"{n_bytes / 1e6:,.0f} MB"


# -- the tables, in the order of the pages


def tune(name: str, n_rows: str = "") -> str:
    """The candidates that a search timed; with a number, those it judged, at most so many of a kind."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for trial in read(name)["trials"]:
        if trial.get("tpot_sec") is not None:
            kinds.setdefault(kind_of(trial), []).append(trial)
    order = ["chosen", "within", "over", "lossless", "not judged", "other", "baseline"]
    if n_rows:
        order.remove("not judged")
        order.remove("other")
    rows = []
    for kind in order:
        found = sorted(kinds.get(kind, []), key=lambda t: -(t.get("speedup") or {}).get("value", 0.0))
        for trial in found[: int(n_rows) if n_rows else None]:
            standing = trial["standing"]
            verdict = standing["word"] + (", lossless" if kind == "lossless" else "")
            speed = "1.00x" if kind == "baseline" else times(trial.get("speedup"))
            rows.append([trial["name"], verdict, speed, ms(trial["tpot_sec"]), loss_of(trial)])
    return grid(["candidate", "result", "speed-up of TPOT", "TPOT", "perplexity"], rows)


def kind_of(trial: dict[str, Any]) -> str:
    word = trial["standing"]["word"]
    if word in ("chosen", "baseline"):
        return str(word)
    if trial.get("label") == "lossless":
        return "lossless"
    return {
        "faster, within the limit": "within",
        "over the quality limit": "over",
        "faster, quality not judged": "not judged",
    }.get(word, "other")


def loss_of(trial: dict[str, Any]) -> str:
    quality = trial.get("quality") or {}
    if trial["standing"]["word"] == "baseline":
        return "reference"
    if trial.get("label") == "lossless":
        return "the reference's tokens"
    if trial["standing"]["word"] == "over the quality limit":
        found = re.search(r"at least (\S+?) ?% (after \d+ windows)", trial["standing"]["why"])
        return f"at least {found[1]} % {found[2]}" if found else re.split("[;:]", trial["standing"]["why"])[0]
    if "ppl_increase_upper" in quality:
        return f"{change(quality['ppl_increase'])}, at most {change(quality['ppl_increase_upper'])}"
    return "not judged"


def verdict(name: str) -> str:
    """What a search said at its end, from the confirmation in fresh processes."""
    found = read(name)
    space = found["space"]
    counts = (
        f"{space['n_measured']} of {space['n_legal']} legal recipes were measured, {space['n_excluded']} cannot win by "
        f"the figures, {space['n_not_reached']} were not reached."
    )
    lines = [f"    {line}" for line in [f"$ {found['command']}", *found["verdict"]]]
    return "\n".join([*lines, "", counts])


def peers(name: str, kind: str, cell: str = "") -> str:
    """Ours beside the other engines of one cell; `cell` is the beginning of its name."""
    cells = read(name)["cells"]
    chosen = next(value for key, value in cells.items() if key.startswith(cell.replace("_", " ")))
    compared = chosen["compared"][kind]
    per_unit = chosen["batch_size"] if "batch_size" in chosen else chosen["cells"][0]["batch_size"]
    rows = []
    for ours, row in compared["rows"].items():
        against = [
            f"{r['peer']} {times(r, verdict='' if r['verdict'] == 'faster' else r['verdict'])}"
            for ratios in compared["ratios"].values()
            for r in ratios
            if r["ours"] == ours
        ]
        if not against:
            continue
        cells_of_row = [f"`{ours}`", ms(row["sec"])]
        if kind == "tpot":
            share = row.get("share_of_floor")
            cells_of_row.append(percent(share) if share is not None else "-")
        rows.append([*cells_of_row, "; ".join(against)])
    unit = "the prompt" if kind == "ttft" else "a token" if per_unit == 1 else f"a step of {per_unit} sequences"
    head = ["ours", unit, *(["of the bandwidth limit"] if kind == "tpot" else []), "how many times as fast as"]
    return "\n".join([grid(head, rows), "", noise(chosen, kind)])


def noise(cell: dict[str, Any], kind: str) -> str:
    widths = [entry["half_width"] for entry in cell["aa"] if entry["kind"] == kind and entry["half_width"] is not None]
    n_blocks = cell["settings"]["looks_after_blocks"][-1]
    threads = cell["threads"]["threads"]
    out = f"{n_blocks} blocks, {threads} thread{'s' if threads > 1 else ''}; the twins of our own differ by up to "
    return out + f"{percent(max(widths))}{', which counts as a noisy run' if cell['too_noisy'] else ''}."


def operator() -> str:
    cases = {
        "flash (sdpa) again": "flash again (noise)",
        "native dense": "dense",
        "native ALiBi": "ALiBi",
        "native window 256": "window 256",
        "native hybrid": "prefix 16 + window 256 + ALiBi",
        "native BigBird": "window + prefix 64 + random",
    }
    rows = []
    for table in read("attention_operator")["tables"]:
        found = {row["case"]: row for row in table["rows"]}
        n_tokens = re.search(r"\d+", table["title"])
        rows.append([f"{int(n_tokens[0]):,}" if n_tokens else "", *(times(found[case]["ratio"]) for case in cases)])
    return grid(["tokens", *cases.values()], rows)


def prefill() -> str:
    rows = [
        [row["case"], f"{row['sec']:.2f} s", times(row["ratio"]), percent(row["attention_share"])]
        for table in read("attention")["tables"]
        if table["title"].startswith("prefill")
        for row in table["rows"]
    ]
    return grid(["attention", "4,096 tokens", "times as fast as dense", "share of attention"], rows)


def ring() -> str:
    (table,) = read("attention_decode")["tables"]
    sizes = ", ".join(f"{megabytes(size)} for {name}" for name, size in table["cache_bytes"].items())
    rows = [[row["case"], ms(row["sec"]), times(row["ratio"]), str(row["n"])] for row in table["rows"]]
    head = grid(["decode with a window of 256", "a token", "times as fast", "blocks"], rows)
    return f"{head}\n\nThe cache takes {sizes}."


def converted() -> str:
    found = read("convert")
    rows = []
    for title, key in (
        ("ALiBi, before training", "converted_untrained"),
        ("ALiBi, after training", "in_context"),
        ("the last quarter of four contexts", "at_4x"),
    ):
        r = found[key]
        bounds = f"{change(r['value'])} [{change(r['low'])}, {change(r['high'])}]"
        rows.append([title, f"{r['ours']:.1f}", f"{r['original']:.1f}", bounds])
    return grid(["converted model", "perplexity", "of the original", "difference"], rows)


def transformers() -> str:
    names = {
        "hf_fp32": "transformers fp32",
        "hf_bf16": "transformers bf16 (emulated here)",
        "fp32": "fp32, eager",
        "bf16": "bf16, eager",
        "int8": "int8 (W8A16), eager",
        "compile": "fp32, compile",
        "native": "fp32, native",
        "native_bf16": "bf16, native",
        "native_int8": "int8, native",
    }
    (cell,) = read("against_transformers")["cells"]
    found = {done["kind"]: {row["config"]: row for row in done["rows"]} for done in cell["passes"]}
    rows = []
    for name, title in names.items():
        decode, first = found["tpot"][name], found["ttft"][name]
        sides = [times(decode.get(f"against_{peer}")) for peer in ("hf_fp32", "hf_bf16")]
        rows.append([title, ms(decode["tpot_sec"]), *sides, ms(first["ttft_sec"])])
    return grid(["", "a token, 128 + 32", "x transformers fp32", "x transformers bf16", "prefill of 128"], rows)


def formats() -> str:
    rows = []
    for row in read("quantization")["rows"]:
        fidelity = row["fidelity"]
        sides = [change(fidelity[phase]["ppl_increase"]) for phase in ("prefill", "decode")]
        rows.append([row["format"], percent(row["of_fp32"], 1), *sides, change(fidelity["ppl_increase_upper"])])
    head = ["format", "of the fp32 bytes", "perplexity, prefill", "perplexity, decode", "the worse one, at most"]
    return grid(head, rows)


def study_quantization() -> str:
    found = read("study_quantization")
    rows = []
    for size in found["sizes"]:
        at = [row for row in found["rows"] if row["format"] == size["format"]]
        if not at:  # a size alone was measured
            rows.append([size["format"], percent(size["share"], 1), "", "-", "-"])
            continue
        published = percent(size["published_share"]) if size.get("published_share") else ""
        peaks = ", ".join(megabytes(row["rss_peak_bytes"]) for row in at)
        loss = at[0].get("ppl_increase")
        perplexity = f"{at[0]['valid_perplexity']:.1f}"
        if loss is not None and size["format"] != "fp32":
            perplexity = f"{change(loss)}, at most {change(at[0]['ppl_increase_upper'])}"
        rows.append([size["format"], percent(size["share"], 1), published, perplexity, peaks])
    head = ["format", "of the fp32 bytes", "published", "perplexity", "peak of the process at batch 4, 12"]
    return grid(head, rows)


def study_precision() -> str:
    rows = []
    for row in read("study_precision")["methods"]:
        speed = times(row, "speedup", row["verdict"])
        published = f"{row['published_speedup']:.2f}x" if row.get("published_speedup") else ""
        rows.append([f"`{row['config']}`", f"{row['tokens_per_sec']:,.0f}", speed, published])
    return grid(["configuration", "tokens/s", "times as fast as the baseline", "published, GPT-2 on an A100"], rows)


def study_attention_quality() -> str:
    rows = []
    for row in read("study_attention")["quality"]:
        scores = [f"{row[m]:.4f} [{row[f'{m}_low']:.4f}, {row[f'{m}_high']:.4f}]" for m in ("rouge1", "rougeL")]
        rows.append([row["system"], *scores, row["verdict"]])
    return grid(["system", "ROUGE-1", "ROUGE-L", "beside Flash"], rows)


def study_attention_speed() -> str:
    rows = []
    for row in read("study_attention")["bench"]["rows"]:
        sides = [times(row, f"{phase}_speedup", row[f"{phase}_verdict"]) for phase in ("prefill", "decode")]
        rows.append([row["config"], *sides, megabytes(row["activation_peak_bytes"])])
    return grid(["system", "prefill of 512 tokens, x Flash", "decode, x Flash", "activations"], rows)


def study_attention_length() -> str:
    found = read("study_attention")["streaming"]
    names = list(dict.fromkeys(row["mechanism"] for row in found))
    by_length: dict[int, dict[str, str]] = {}
    for row in found:
        cell = "-"
        if row["ttft_sec"] is not None:
            first = f"{row['ttft_sec']:.2f}" if row["ttft_sec"] < 10 else f"{row['ttft_sec']:.1f}"
            cell = f"{first} s, {ms(row['itl_p50_sec'])}, {megabytes(row['kv_cache_bytes'])}"
        by_length.setdefault(row["document_tokens"], {})[row["mechanism"]] = cell
    return grid(["tokens", *names], ([f"{n:,}", *(row.get(m, "-") for m in names)] for n, row in by_length.items()))


def context() -> str:
    rows = []
    for row in read("context")["rows"]:
        sec = [ms(row["near_sec"]), ms(row["far_sec"])]
        ratios = [times(row["sec_ratio"]), f"{row['bytes_ratio']:.2f}x", f"{row['of_bytes']:.2f}"]
        rows.append([f"`{row['weights']}`", row["cache"], *sec, *ratios])
    return grid(["weights", "cache", "at 128", "at 896", "seconds", "bytes", "seconds / bytes"], rows)


def overhead() -> str:
    rows = [
        [
            row["case"],
            f"{row['usec_per_token']:.0f} us [{row['low']:.0f}, {row['high']:.0f}]",
            f"{row['limit_usec']:.0f} us",
        ]
        for row in read("overhead")["rows"]
    ]
    return grid(["sampling", "outside the model, a token", "our limit"], rows)


def claim() -> str:
    rows = []
    for name in ("generate_claim", "generate_claim_smollm2"):
        for model in read(name)["models"]:
            rows += [[model["model"], row["case"], times(row["generate_over_claim"])] for row in model["rows"]]
    return grid(["model", "what `generate` writes", "its time over the time that was claimed"], rows)


def predict() -> str:
    rows = [
        [
            row["model"],
            row["config"],
            ms(row["predicted_tpot_sec"]),
            ms(row["measured_tpot_sec"]),
            f"{row['ratio']:.2f}",
        ]
        for row in read("predict")["rows"]
    ]
    return grid(["model", "configuration", "predicted", "measured", "predicted / measured"], rows)


def parts() -> str:
    rows = []
    for row in read("profile_parts")["rows"]:
        closing = f"{percent(min(row['closing']))} to {percent(max(row['closing']))}"
        spread = "-" if row["spread"] is None else f"{100 * row['spread']:.1f} points ({row['worst']})"
        rows.append([row["what"], closing, spread, str(row["n"])])
    return grid(["profile", "sum of the parts, of the step", "largest spread between repeats", "repeats"], rows)


TABLES: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        tune,
        verdict,
        peers,
        operator,
        prefill,
        ring,
        converted,
        transformers,
        formats,
        study_quantization,
        study_precision,
        study_attention_quality,
        study_attention_speed,
        study_attention_length,
        context,
        overhead,
        claim,
        predict,
        parts,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page differs")
    args = parser.parse_args()
    stale = []
    for page in pages():
        before = page.read_text("utf-8")
        after = filled(before)
        if after != before:
            stale.append(page)
            if not args.check:
                page.write_text(after, "utf-8")
    for page in stale:
        print(f"{page.relative_to(REPOSITORY)}: {'differs from the records' if args.check else 'written'}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
