"""A run of `paretune tune` in one file for the record: what was asked, what came out, every raw sample.

paretune tune smollm2 --max-ppl-increase 1% --budget 10m --engine llama.cpp:Q8_0 -o plan
python benchmarks/tune_record.py plan -o benchmarks/results/tune_smollm2.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

KEPT = ("schema_version", "created", "command", "seed", "versions", "hardware", "model", "goal", "outcome", "winner_id",
        "verdict", "aa", "elapsed_sec", "space", "confirmation", "peers", "peers_measured")  # fmt: skip
OF_A_TRIAL = ("id", "name", "status", "standing", "speedup", "tpot_sec", "ttft_sec", "label", "load_sec", "reason")


def commit() -> str:
    """The commit of this checkout, marked where files differ from it."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=True
    ).stdout.strip()


def record(folder: Path) -> dict[str, Any]:
    """What is kept of a plan folder: the result without profiles and proofs, when trials were ready, the samples."""
    result = json.loads((folder / "report.json").read_text("utf-8"))
    out: dict[str, Any] = {key: result.get(key) for key in KEPT} | {"commit": commit()}
    out["command"] = str(out["command"]).replace(str(folder), "plan")
    out["space"] = {k: v for k, v in out["space"].items() if k != "illegal"}
    out["trials"] = []
    for trial in result["trials"]:
        row = {key: trial[key] for key in OF_A_TRIAL if trial.get(key) is not None}
        quality = trial.get("quality") or {}
        row["quality"] = {k: quality[k] for k in ("ppl_increase", "ppl_increase_upper", "n_windows") if k in quality}
        out["trials"].append(row)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text("utf-8").splitlines()]
    out["starts"] = [
        {"trial": e["trial"], "start_sec": e["start_sec"], "elapsed_sec": e["elapsed_sec"]}
        for e in events
        if e["event"] == "loaded"
    ]
    lines = (folder / "samples.jsonl").read_text("utf-8").splitlines()
    out["samples"] = [
        [s["subject"], s["block"], s["position"], float(f"{s['value_sec']:.5g}"), s["n_repeated"]]
        for s in map(json.loads, lines)
    ]
    out["sample_columns"] = ["subject", "block", "position", "value_sec", "n_repeated"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a plan that `paretune tune` wrote")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    text = json.dumps(record(arguments.folder), allow_nan=False, separators=(",", ":"))
    arguments.output.write_text(text.replace(',{"id"', ',\n{"id"') + "\n", "utf-8")


if __name__ == "__main__":
    main()
