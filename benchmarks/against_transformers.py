"""Our runners against eager `transformers`, on one model folder: prefill and decode, interleaved, with intervals.

    paretune new gpt2 -o gpt2 --random
    python benchmarks/against_transformers.py --model gpt2 -o benchmarks/results/against_transformers.json

Every configuration has a process of its own; a block holds each of them once, in random order, with bandwidth probes
around every slice. Both transformers rows have a twin (A/A): no claim is smaller than what the twins differ by.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from paretune import clock, files, hardware
from paretune.errors import ParetuneError
from paretune.measure import environment
from paretune.measure.interleave import Blocks, SubjectError, run_blocks, warm_up
from paretune.measure.session import WORKER, TrialProcess
from paretune.measure.workload import Workload
from paretune.recipe import preset
from paretune.records.judge import judge

HERE = Path(__file__).resolve().parent
OURS = ("fp32", "bf16", "int8", "bf16_int8", "compile", "compile_bf16")
THEIRS = {"hf_fp32": "float32", "hf_fp32 again": "float32", "hf_bf16": "bfloat16", "hf_bf16 again": "bfloat16"}
WORKLOADS = ((Workload(128, 32, 1, seed=1), ("ttft", "tpot")), (Workload(512, 2, 1, seed=2), ("ttft",)))
PHASES = {"ttft": "prefill", "tpot": "decode"}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def start(name: str, folder: Path, workload: Workload, threads: int | None, log: Path) -> tuple[TrialProcess, dict]:
    """A loaded process and its answer."""
    request: dict[str, Any] = {"folder": str(folder.resolve()), "workload": asdict(workload), "threads": threads}
    if name in THEIRS:
        module, extra = "transformers_worker", {"dtype": THEIRS[name]}
    else:
        module, extra = WORKER, {"recipe": preset(name).to_dict(), "check_prompt": list(range(1, 33))}
    process = TrialProcess(name, "ttft", log=log, module=module)
    try:
        return process, process.ask("load", 900.0, **request, **extra)
    except SubjectError:
        process.close()
        raise


def measure(
    folder: Path, names: list[str], workload: Workload, kinds: tuple[str, ...], args: argparse.Namespace
) -> dict[str, Any]:
    """One workload: loads all, samples each kind in a pass of its own."""
    title = f"{workload.input_len}+{workload.output_len} x{workload.batch_size}"
    out: dict[str, Any] = {"workload": asdict(workload), "trials": {}, "passes": []}
    probe = hardware.BandwidthProbe(args.threads)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes: dict[str, TrialProcess] = {}
        for i, name in enumerate(names):
            say(f"{title}: loading {name}")
            try:
                process, answer = start(name, folder, workload, args.threads, scratch / f"{i}.log")
            except SubjectError as error:
                out["trials"][name] = {"cause": str(error)}
                say(f"{title}: {name}: {error}")
                continue
            stack.callback(process.close)
            process.pause()
            processes[name], out["trials"][name] = process, answer
        for kind in kinds:
            warm: dict[str, list[float]] = {}
            failures: dict[str, str] = {}
            for name, process in processes.items():
                process.kind = kind
                say(f"{title}: warming up {name} ({kind})")
                try:
                    warm[name] = warm_up(process, max_sec=args.warm_up_sec)
                except SubjectError as error:
                    failures[name] = str(error)
            alive = [process for name, process in processes.items() if name in warm]
            say(f"{title}: {kind}, {args.blocks} blocks of {len(alive)}")
            run = run_blocks(alive, rng_seed=args.seed, n_blocks=args.blocks, probe=probe)
            failures |= {name: str(error) for name, error in run.failures.items()}
            out["passes"].append(
                {
                    "kind": kind,
                    "rows": rows_of(Blocks(run.samples), names, kind),
                    "warm_up": warm,
                    "failures": failures,
                    "samples": [sample.to_json() for sample in run.samples],
                }
            )
    return out


def rows_of(blocks: Blocks, names: list[str], kind: str) -> list[dict[str, Any]]:
    """A row a configuration: its median, and its ratio to both transformers rows with interval and verdict."""
    rows = []
    for name in names:
        values = blocks.values(name)
        if not len(values):
            continue
        row: dict[str, Any] = {"config": name, f"{kind}_sec": float(np.median(values)), "n": len(values)}
        for peer in ("hf_fp32", "hf_bf16"):
            if name == peer or not len(blocks.values(peer)):
                continue
            resolution = blocks.aa_resolution(peer, f"{peer} again")
            ratio = blocks.ratio(peer, name)
            states = blocks.by_state(peer, name)
            row[f"against_{peer}"] = {
                **ratio.to_json(),
                "verdict": judge(ratio, resolution),
                "aa_half_width": resolution if np.isfinite(resolution) else None,
                "by_state": states and {("low", "high")[i]: r.to_json() for i, r in states.items()},
            }
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    lines = []
    for cell in result["cells"]:
        w = cell["workload"]
        for done in cell["passes"]:
            kind = done["kind"]
            lines += ["", f"{PHASES[kind]}, {w['input_len']} input + {w['output_len']} output tokens ({kind})", ""]
            for row in done["rows"]:
                text = f"{row['config']:<16}{1e3 * row[f'{kind}_sec']:10.2f} ms"
                for peer in ("hf_fp32", "hf_bf16"):
                    ratio = row.get(f"against_{peer}")
                    if ratio:
                        low, high = (f"{ratio[k]:.2f}" if ratio[k] else "?" for k in ("low", "high"))
                        text += f"   {peer} {ratio['value']:.2f}x [{low}, {high}] {ratio['verdict']}"
                lines.append(text)
            lines += [f"{name}: {cause}" for name, cause in done["failures"].items()]
        lines += [f"{name}: {t['cause']}" for name, t in cell["trials"].items() if "cause" in t]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GPT-2 folder, e.g. of `paretune new`")
    parser.add_argument("--configs", default=",".join(OURS), help="our presets, comma-separated")
    parser.add_argument("--threads", type=int, help="default: physical cores")
    parser.add_argument("--blocks", type=int, default=27)
    parser.add_argument("--warm-up-sec", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["decode", "prefill"], help="the 128+32 or the 512 workload alone")
    parser.add_argument("-o", "--output", type=Path, default=Path("against_transformers.json"))
    args = parser.parse_args()
    # The workers find `transformers_worker` there.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    os.environ["HF_HUB_OFFLINE"] = "1"
    started = clock.now()
    try:
        files.ensure_folder(args.output.resolve().parent)
        names = [*THEIRS, *dict.fromkeys(args.configs.split(","))]
        for name in names[len(THEIRS) :]:
            preset(name)
        read_back = hardware.set_threads(args.threads)
        chosen = [w for w in WORKLOADS if args.only is None or (len(w[1]) == 2) == (args.only == "decode")]
        result: dict[str, Any] = {
            **environment.header(seed=args.seed),
            "threads": read_back,
            "ceilings": hardware.ceilings("cpu", quick=True).to_json(),
            "cells": [measure(args.model, names, workload, kinds, args) for workload, kinds in chosen],
        }
        result["elapsed_sec"] = clock.now() - started
        files.write_json(args.output, result)
    except ParetuneError as error:
        say(f"error: {error}")
        return error.exit_code
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
