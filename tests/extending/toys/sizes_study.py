"""A small study: the bytes of a model in each number format that needs no calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from paretune import files
from paretune.engine.load import load_recipe
from paretune.recipe import preset
from paretune.studies import common


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
    folder, config, name = common.open_model(model)
    out = files.ensure_folder(output_dir)
    result = common.header("sizes", name, config, quick=quick, seed=seed)
    rows = []
    for format_name in ("int8",) if quick else ("int8", "int4", "three_bits"):
        say(f"loading {format_name}")
        loaded = load_recipe(folder, preset(format_name), device)
        layers = {id(m.weight): m.weight for m in loaded.runner.model.modules() if hasattr(m, "weight")}
        weights = [w for w in layers.values() if hasattr(w, "stored_bytes")]
        rows.append({"format": format_name, "stored_bytes": sum(w.stored_bytes for w in weights)})
    result |= {"rows": rows, "is_noisy": False, "noise": []}
    result["summary"] = [f"{row['format']}: {row['stored_bytes']:,} bytes" for row in rows]
    files.write_json(out / "results.json", result)
    return result
