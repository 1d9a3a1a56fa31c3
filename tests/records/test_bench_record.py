"""The record of `bench` against files that earlier versions wrote, and against itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import made_records as made
from paretune.errors import UsageError
from paretune.records.bench import PHASES, Agreement, BenchResult
from paretune.records.record import from_json, read, to_json, write

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("study", ["quantization", "precision", "attention"])
def test_results_of_earlier_versions_are_read(study):
    data = json.loads((RESULTS / f"study_{study}.json").read_text("utf-8"))["bench"]
    for old in data if isinstance(data, list) else [data]:
        new = to_json(from_json(BenchResult, old))
        assert {key: new[key] for key in old} == old, "every value stays what it was"
        assert set(new) - set(old) <= {"ceilings", "is_noisy", "interrupted"}, "what was not recorded then"


def test_a_round_trip(tmp_path):
    agreement = Agreement(0.98, 1.0, 0.012, 64, 64, 256)
    rows = [
        made.row("baseline", "baseline", decode=made.phase(1.0, verdict="baseline"), tpot_sec=0.01),
        made.row("int8", decode=made.phase(2.0, 1.9, 2.1, "faster"), device_used_bytes=5),
        made.row("llama.cpp:Q8_0", "peer", engine="llama.cpp", format="Q8_0", agreement=agreement),
        made.row("bf16", cause="out of memory"),
    ]
    result = made.result(rows, aa=[made.resolution(0.01), made.resolution(None), made.resolution(0.03)])
    write(result, tmp_path / "bench.json")
    assert read(BenchResult, tmp_path / "bench.json") == result
    first, second, peer, _ = to_json(result)["rows"]
    assert second["decode_speedup_low"] == 1.9 and "prefill_n" not in second and second["device_used_bytes"] == 5
    assert "device_used_bytes" not in first and first["agreement_top1_share"] is None
    assert peer["agreement_top1_share"] == 0.98
    assert result.widest == 0.03 and made.result(rows).widest is None
    assert [name for name, _ in rows[1].phases] == ["decode"] and set(PHASES.values()) == {
        "prefill",
        "decode",
        "throughput",
    }


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("decode_verdict", "best", r"rows\[1\]\.decode_verdict is \"best\""),
        ("weights_bytes", -1, r"rows\[1\]\.weights_bytes is -1, not 0 or more"),
        ("agreement_top1_share", 1.2, r"rows\[1\]\.agreement_top1_share is 1.2, not between 0 and 1"),
        ("status", "done", r"rows\[1\]\.status is \"done\""),
    ],
)
def test_a_broken_row_is_named(path, value, words):
    agreement = Agreement(0.98, 1.0, 0.012, 64, 64, 256)
    row = made.row("int8", decode=made.phase(2.0, 1.9, 2.1, "faster"), agreement=agreement)
    data = to_json(made.result([made.row("baseline", "baseline"), row]))
    data["rows"][1][path] = value
    with pytest.raises(UsageError, match=words) as caught:
        from_json(BenchResult, data, "bench.json")
    assert caught.value.cure == "Run `paretune bench` again"
