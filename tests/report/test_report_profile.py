"""Tables and pictures of a profile from figures made by hand."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from paretune.report import breakdown, profile, roofline


def row(part: str, group: str, share: float, **more):
    numbers = {"bytes": 10**6, "flops": 10**6, "bytes_per_sec": 1e9, "flops_per_sec": 1e9 * share, "intensity": 1.0}
    return {
        "part": part,
        "title": part.title(),
        "group": group,
        "sec": share * 1e-3,
        "share": share,
        "group_share": share,
        "ceiling_share": 0.5,
        "limit": "memory",
        **numbers,
        **more,
    }


def make(phase: str = "decode"):
    return {
        "phase": phase,
        "config": "baseline",
        "input_len": 8,
        "batch_size": 1,
        "model": {"name": "<b>tiny</b>"},
        "whole": {"sec": 1e-3, "tokens_per_sec": 1000.0, "dtype": "fp32", "n_steps": 9},
        "blocks": {"n": 3, "n_kept": 3, "state": "high"},
        "overhead": {"share": 0.01, "n_readings": 4, "sec_per_reading": 1e-7},
        "closing": {"share": 0.99, "between_sec": 1e-5, "sum_sec": 9.9e-4, "closes": True},
        "parts": [
            row("blocks", "model", 0.9),
            row("head", "model", 0.09, published_share=0.069),
            row("expansion", "mlp", 0.5, intensity=4.0),
            row("qkv_reshape", "attention", 0.001, bytes=0, flops=0, intensity=None, flops_per_sec=0.0),
        ],
        "layers": [{"layer": 0, "sec": 9e-4}],
        "kernels": [{"name": "aten::mm", "kind": "GEMV", "count": 1.0, "sec": 5e-4}],
        "kernel_classes": [{"kind": "GEMV", "count": 1.0, "sec": 5e-4, "share": 0.5}],
        "profiled_sec": 1.1e-3,
        "native": None,
        "notes": ["something was odd"],
        "explanations": [{"cause": "weight bandwidth", "text": "It reads weights. To try: int8."}],
        "ceilings": {
            "read_bandwidth": [
                {"bytes": 1 << 20, "threads": 2, "bytes_per_sec": 8e10},
                {"bytes": 1 << 28, "threads": 2, "bytes_per_sec": 2e10},
            ],
            "matrix_rates": {"fp32": 1e11},
        },
        "hardware": {"id": "x"},
        "threads": {"threads": 2},
        "versions": {},
        "command": "paretune profile",
    }


def texts(svg: bytes) -> str:
    return " ".join("".join(e.itertext()) for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"))


@pytest.mark.parametrize("draw", [roofline.roofline, breakdown.bars])
def test_pictures(draw):
    results = [make("prefill"), make("decode")]
    svg = draw(results)
    assert svg == draw(results) and draw(results, "png").startswith(b"\x89PNG")
    assert "prefill" in texts(svg) and "decode" in texts(svg)
    empty = {**make(), "parts": [], "whole": {"sec": 1e-3, "dtype": "fp32"}}
    assert texts(draw([empty]))


def test_the_roofline_draws_parts_and_not_sums():
    found = texts(roofline.roofline([make()]))
    assert "Expansion" in found and "Head" in found and "Blocks" not in found and "Qkv" not in found
    assert "20.0 GB/s" in found and "100 GFLOP/s" in found  # the measured roof
    assert "from the caches: 80.0 GB/s" in found


def test_a_step_without_parts_is_one_point():
    whole = {"sec": 1e-3, "dtype": "fp32", "needed_bytes": 1e7, "needed_flops": 2e7}
    (point,) = roofline.points_of({"parts": [], "whole": whole})
    assert point["x"] == 2.0 and point["y"] == pytest.approx(2e10)


def test_markdown_and_page(tmp_path):
    text = profile.markdown([make()])
    for word in ("Between the parts", "Weight bandwidth", "Something was odd", "50 % (memory)", "1 more", "1.00 ms"):
        assert (word in text) == (word != "1 more")
    profile.write(tmp_path, [make("prefill"), make("decode")])
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<b>tiny" not in page and "&lt;b&gt;tiny" in page and "Decode: the step" in page
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_profiler_that_takes_most_of_the_step_is_said():
    one = make()
    rough = "take these shares as rough"
    for factor, says in ((1.9, False), (2.1, True)):
        assert (rough in profile.markdown([one | {"profiled_sec": factor * one["whole"]["sec"]}])) == says


def test_native_rows_or_the_reason():
    native = {"available": False, "reason": "no counters", "rows": []}
    assert "Not available: no counters." in profile.markdown([{**make(), "native": native}])
    entry = {"operation": "head", "calls": 1.0, "sec": 1e-4, "bytes": 8e6, "bytes_per_sec": 8e10}
    entry |= {"flops": 1e5, "flops_per_sec": 1e9, "share": 0.1, "ceiling_share": 0.8, "limit": "memory"}
    native = {"available": True, "reason": "", "rows": [entry], "sum_sec": 9e-4, "step_sec": 1.2e-3}
    text = profile.markdown([{**make(), "native": native}])
    assert "80.0 GB/s" in text and "80 % (memory)" in text
    assert "took 20 % longer than the plain one" in text and "Operations are 75 % of it" in text
