"""Predicted against measured time per output token, on models that no cost was calibrated on.

    paretune new gpt2 -o gpt2 --random
    paretune new benchmarks/llama-1.1b.json -o llama --random
    python benchmarks/predict.py --model gpt2,llama -o benchmarks/results/predict.json

Calibrates once (ceilings, products with one row, the embedded model), predicts every model from its config alone, then
measures each preset in a process of its own: `paretune profile --phase decode`, the mean over the middle half of the
steps. Passes where predicted / measured lies within 30 %: the plain roofline for `native`, the cost model for
`baseline` and `compile`. The other native formats are reported and not judged.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from paretune import files, hardware
from paretune.errors import ParetuneError
from paretune.measure import environment, predict_here
from paretune.model import checkpoint
from paretune.report.tables import Column, to_markdown

LIMIT = 0.30
JUDGED = ("baseline", "compile", "native")


def measure(folder: Path, config: str, input_len: int, quick: bool) -> tuple[dict[str, Any] | None, str]:
    """A decode profile in a process of its own, or why there is none."""
    command = [sys.executable, "-m", "paretune", "profile", str(folder), "--phase", "decode", "--config", config]
    command += ["--input-len", str(input_len), "--json", "-q", *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout), ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folders, comma-separated")
    parser.add_argument("--config", default=",".join(JUDGED), help="presets to measure")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="shorter profiles")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    wanted = options.config.split(",")
    runners = [name for name in predict_here.CALIBRATED if name in wanted]
    ceilings, models, _ = predict_here.calibrate(runners=runners, say=print)
    rows: list[dict[str, Any]] = []
    for name in options.model.split(","):
        folder = checkpoint.resolve(name)
        config = checkpoint.read_config(folder)
        predicted = predict_here.predict_here(config, options.input_len + 1, ceilings, models)
        for row in predicted:
            if row["config"] not in wanted:
                continue
            print(f"measuring {folder.name}, {row['config']}", flush=True)
            found, cause = measure(folder, row["config"], options.input_len, options.quick)
            row |= {"model": folder.name, "measured_tpot_sec": None, "ratio": None, "within": None, "cause": cause}
            if found is not None:
                row["measured_tpot_sec"] = found["whole"]["sec"]
                row["state"] = found["blocks"]["state"]
                row["ratio"] = row["predicted_tpot_sec"] / found["whole"]["sec"]
                row["within"] = abs(row["ratio"] - 1) <= LIMIT
            rows.append(row)
    result = {
        **environment.header(),
        "input_len": options.input_len,
        "threads": hardware.n_threads(),
        "ceilings": ceilings.to_json(),
        "cost_models": {name: vars(model) for name, model in models.items()},
        "rows": rows,
    }
    files.write_json(options.output, result)
    columns = [
        Column("model", "Model", numeric=False),
        Column("config", "Config", numeric=False),
        Column("predicted_tpot_sec", "Predicted"),
        Column("measured_tpot_sec", "Measured"),
        Column("ratio", "Predicted / measured", lambda r: "-" if r["ratio"] is None else f"{r['ratio']:.2f}"),
        Column("within", "Within 30 %", lambda r: r["cause"] or ("yes" if r["within"] else "NO"), numeric=False),
    ]
    print(to_markdown(rows, columns))
    return 0 if all(row["within"] for row in rows if row["config"] in JUDGED) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ParetuneError as error:
        sys.exit(f"error: {error}")
