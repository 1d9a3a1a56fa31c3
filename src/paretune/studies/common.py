"""What the studies share: the published row beside ours, the rows of a bench, and the files that a study leaves.

A study is one function `run(model, output_dir, *, quick, seed, device, threads, say) -> result`. It measures, fills
`Tables` and hands them to `write_results` with the sections of its page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paretune import files, hardware
from paretune.measure import environment
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.records.bench import BenchResult, BenchRow, PhaseName
from paretune.report import html
from paretune.report.tables import Column, Row, to_csv
from paretune.report.units import format_ratio

Tables = Mapping[str, Sequence[Row]]  # heading of a table -> its rows; the first value of a row names it
Say = Callable[[str], None]


def open_model(model: str) -> tuple[Path, ModelConfig, str]:
    """(folder, config, the name that a report may print: never a path)."""
    folder = checkpoint.resolve(model)
    return folder, checkpoint.read_config(folder), model if checkpoint.is_named(model) else folder.name


def header(study: str, name: str, config: ModelConfig, *, quick: bool, seed: int) -> dict[str, Any]:
    """The first keys of `results.json`."""
    about = {"study": study, "model": {"name": name, "family": config.family}, "quick": quick}
    return {**environment.header(seed=seed), **about}


# Of a bench; a quick study ends it by its time. What is decided ends sooner, what is not has the time that is left.
BLOCKS: dict[str, Any] = {"min_blocks": 8, "max_blocks": 27}


def noise_of(runs: Sequence[BenchResult]) -> dict[str, Any]:
    """What the noise of this machine did to the speeds of a study, from its results of `bench`.

    Returns:
        `is_noisy` (in some run the baseline differs from itself by more than a verdict can bear), `too_noisy` (and no
        run has a verdict at all), `noise`: sentences for the reader, none on a quiet machine.
    """
    noisy = [run for run in runs if run.is_noisy]
    too_noisy = bool(runs) and all(run.too_noisy for run in runs)
    said = []
    if noisy:
        width = max(run.widest or 0.0 for run in noisy)
        said.append(
            f"Speed could {'not be judged' if too_noisy else 'only in part be judged'} on this machine now: the "
            f"baseline differs from itself by up to {width:.0%}, so "
            f"{'every speed here is undecided' if too_noisy else 'smaller differences are undecided'}. "
            "What is not a speed stands."
        )
    return {"is_noisy": bool(noisy), "too_noisy": too_noisy, "noise": said}


def sixteen_bits(device: str) -> tuple[str, str]:
    """The 16-bit format of a study here, and why: the one that is not emulated, where there is one."""
    support = hardware.dtype_support(device)
    for name in ("fp16", "bf16") if device != "cpu" else ("bf16", "fp16"):
        if support[name].works and not support[name].emulated:
            return name, support[name].reason
    name = next((n for n in ("bf16", "fp16") if support[n].works), "bf16")
    return name, support[name].reason


def judged(row: BenchRow | None, phase: PhaseName) -> Row:
    """Of one row of a bench: the ratio of `phase` to the baseline, its interval, the verdict, or why there is none."""
    found = None if row is None else row.phase(phase)
    return {
        "speedup": found and found.speedup,
        "speedup_low": found and found.speedup_low,
        "speedup_high": found and found.speedup_high,
        "verdict": (found and found.verdict) or (row and row.cause) or "not reached",
        "n_slices": found and found.n,
    }


def beside(rows: Iterable[Row], published: Mapping[str, Mapping[str, Any]], key: str) -> list[Row]:
    """Each row with the published row of the same name: its values under `published_*`, None where there is none.

    Args:
        published: name -> values, all with the same keys.
        key: the column of `rows` that holds the name.
    """
    keys = list(dict.fromkeys(k for values in published.values() for k in values))
    return [{**row, **{f"published_{k}": published.get(str(row[key]), {}).get(k) for k in keys}} for row in rows]


def ratio_column(title: str, key: str = "speedup") -> Column:
    """A ratio with its interval, from `key`, `key_low` and `key_high`."""
    return Column(key, title, lambda row: format_ratio(*(row.get(f"{key}{end}") for end in ("", "_low", "_high"))))


def flat(tables: Tables) -> list[Row]:
    """All tables as one for a CSV: a column `table` tells them apart, every row has every column."""
    rows = [
        {"table": name, "row": next(iter(row.values()), None), **row} for name, rows in tables.items() for row in rows
    ]
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in columns} for row in rows]


def picture(out: Path, name: str, draw: Callable[[str], bytes], caption: str) -> tuple[bytes, str]:
    """Writes `NAME.png` and gives the SVG with its caption, as `html.section` wants it.

    Args:
        draw: gives the bytes of a format, "png" or "svg".
    """
    files.write_bytes(out / f"{name}.png", draw("png"))
    return draw("svg"), caption


def write_results(
    out: Path,
    result: Mapping[str, Any],
    tables: Tables,
    sections: Iterable[dict[str, Any]],
    lead: Iterable[str],
    threads: int,
) -> None:
    """Writes results.json, results.csv and report.html; the machine is the last section of the page.

    Raises:
        ParetuneError: a file cannot be written.
    """
    files.write_json(out / "results.json", result)
    files.write_text(out / "results.csv", to_csv(flat(tables)))
    machine = result["hardware"] | {"threads": threads, "versions": result["versions"]}
    title = f"{result['model']['name']}: the {result['study']} study"
    sections = [*sections, html.section("Machine", facts=machine)]
    html.write_page(out / "report.html", title, [*result["noise"], *lead], sections, result["command"])
