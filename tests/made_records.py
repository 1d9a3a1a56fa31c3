"""Records of `bench` put together by hand, for tests of what is made of them. Not a test file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from paretune.hardware import Ceilings as Measured
from paretune.records import bench, header
from paretune.records.record import from_json, to_json

MACHINE = header.Machine("0123456789ab", "AMD EPYC 7B13", 2, ["avx2"], 1 << 19, 1 << 25, 8 << 30, "Linux x86_64")
ENVIRONMENT = header.Environment(header.Threads(2, 2), None, {}, [0.1, 0.1, 0.1], None)


def machine(id: str) -> dict[str, Any]:
    """Another machine, as a file has it."""
    return to_json(replace(MACHINE, id=id))


def head() -> dict[str, Any]:
    """The fields of a header."""
    versions = {"paretune": "0.1.0", "torch": "2.11.0", "python": "3.11.9"}
    made = header.Header(
        schema_version=1,
        created="2026-05-04T10:11:12+00:00",
        command="paretune bench",
        seed=0,
        versions=versions,
        hardware=MACHINE,
        environment=ENVIRONMENT,
    )
    return dict(vars(made))


def phase(speedup: float | None, low: float | None = None, high: float | None = None, verdict: Any = None, **more: Any):
    """A phase of 9 slices with this ratio to the baseline."""
    values = {"n": 9, "p50_sec": None, "p90_sec": None, "n_repeated": 0}
    ratio = {"speedup": speedup, "speedup_low": low, "speedup_high": high, "verdict": verdict}
    return bench.Phase(**{**values, **ratio, **more})


def row(config: str, role: str = "", cause: str = "", **more: Any) -> bench.BenchRow:
    """A row of one cell; measured, unless there is a cause."""
    cell = {"cell": "16+8 x1", "input_len": 16, "output_len": 8, "batch_size": 1}
    status = "failed" if cause else "measured"
    named = {"config": config, "recipe": config, "role": role, "cause": cause, "status": status}
    return bench.BenchRow(**{**named, **cell, **more})


def resolution(half_width: float | None, kind: str = "tpot") -> bench.Resolution:
    return bench.Resolution("16+8 x1", 0, kind, half_width, header.Estimate(1.0, None, None, 9), "undecided")


def result(rows: list[bench.BenchRow], ceilings: Measured | None = None, **more: Any) -> bench.BenchResult:
    """A whole result of these rows, written and read once, so that it is what a file may hold."""
    made = bench.BenchResult(
        **{
            **head(),
            "model": bench.BenchModel("pocket", "gpt2", 7_000_000),
            "device": "cpu",
            "threads": bench.BenchThreads(2),
            "baseline": rows[0].config if rows else "baseline",
            "configs": {},
            "engines": [],
            "cells": [bench.Cell(16, 8, 1)],
            "settings": bench.BenchSettings(["tpot"], [8], 0.95, 0.02, 0.0, None),
            "ceilings": None if ceilings is None else from_json(header.Ceilings, ceilings.to_json()),
            "probe": None,
            "rows": rows,
            "aa": [],
            "samples": [],
            "warm_up": [],
            "definitions": {},
            **more,
        }
    )
    return from_json(bench.BenchResult, to_json(made))
