"""Do the parts of a profile add up to the step, and does a second profile say the same?

    paretune new gpt2 -o gpt2 --random
    python benchmarks/profile_parts.py --model pocket,gpt2 -o benchmarks/results/profile_parts.json

Every model, preset and phase is profiled `--repeats` times, each time in a process of its own, in turns. Two claims are
judged: the parts sum to 95 to 105 % of the step timed on its own, in each profile; and the shares of a row differ by no
more than 3 percentage points between the profiles of one bandwidth state.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from paretune import files
from paretune.errors import ParetuneError
from paretune.measure import environment
from paretune.measure.profile import CLOSES
from paretune.report.tables import Column, to_markdown

POINTS = 0.03


def profiles(model: str, config: str, input_len: int, quick: bool) -> list[dict[str, Any]]:
    """A prefill and a decode profile from one fresh process."""
    command = [sys.executable, "-m", "paretune", "profile", model, "--config", config, "--input-len", str(input_len)]
    done = subprocess.run(
        [*command, "--json", "-q", *(["--quick"] if quick else [])], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def judged(name: str, taken: list[dict[str, Any]]) -> dict[str, Any]:
    """One row a model, preset and phase."""
    closing = [p["closing"]["share"] for p in taken]
    by_state: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in taken:
        by_state[one["blocks"]["state"]].append(one)
    spreads: dict[str, float] = {}
    for same in by_state.values():
        shares: dict[str, list[float]] = defaultdict(list)
        for one in same:
            for row in one["parts"]:
                shares[row["part"]].append(row["share"])
        for part, values in shares.items():
            if len(values) > 1:
                spreads[part] = max(spreads.get(part, 0.0), max(values) - min(values))
    worst = max(spreads, key=lambda part: spreads[part], default="")
    return {
        "what": name,
        "n": len(taken),
        "states": {state: len(same) for state, same in by_state.items()},
        "step_sec": [p["whole"]["sec"] for p in taken],
        "closing": closing,
        "closes": all(CLOSES[0] <= share <= CLOSES[1] for share in closing),
        "overhead": [p["overhead"]["share"] for p in taken],
        "busy": sum(any(e["cause"] == "busy machine" for e in p["explanations"]) for p in taken),
        "spreads": spreads,
        "worst": worst,
        "spread": spreads.get(worst),
        "repeats": bool(spreads) and max(spreads.values()) <= POINTS,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="folders, comma-separated")
    parser.add_argument("--config", default="baseline,eager_attn", help="presets of the eager runner")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="shorter profiles")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    cells = list(itertools.product(options.model.split(","), options.config.split(",")))
    taken: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for i in range(options.repeats):
        for model, config in cells:
            print(f"round {i + 1} of {options.repeats}: {Path(model).name}, {config}", flush=True)
            for one in profiles(model, config, options.input_len, options.quick):
                taken[f"{Path(model).name}, {config}, {one['phase']}"].append(one)
    rows = [judged(name, found) for name, found in taken.items()]
    files.write_json(options.output, {**environment.header(), "input_len": options.input_len, "rows": rows})
    columns = [
        Column("what", "Profile", numeric=False),
        Column("closing", "Parts / step", lambda r: f"{min(r['closing']):.3f} to {max(r['closing']):.3f}"),
        Column("closes", "95 to 105 %", lambda r: "yes" if r["closes"] else "NO", numeric=False),
        Column("spread", "Largest spread", lambda r: "-" if r["spread"] is None else f"{100 * r['spread']:.1f} points"),
        Column("worst", "In row", numeric=False),
        Column("repeats", "Within 3 points", lambda r: "yes" if r["repeats"] else "NO", numeric=False),
        Column("busy", "Busy", lambda r: f"{r['busy']} of {r['n']}"),
    ]
    print(to_markdown(rows, columns))
    return 0 if all(row["closes"] and row["repeats"] for row in rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ParetuneError as error:
        sys.exit(f"error: {error}")
