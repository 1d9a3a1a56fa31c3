"""The attention benchmark's own parts: what it measures as memory, and which tables it runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from paretune import process
from paretune.ops.attention import native, reference
from paretune.ops.attention.spec import AttentionSpec


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "attention.py"
    spec = importlib.util.spec_from_file_location("attention_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.inference_mode()
def test_peak_memory_is_that_of_the_scores(benchmark):
    if not process.reset_peak_rss():
        pytest.skip("the system does not tell")
    large = torch.ones(7 << 20)  # 28 MiB: once freed, the C library keeps what is smaller for later calls
    del large
    found = {}
    for n in (512, 1024):
        q, k, v = (torch.randn(1, 4, n, 16) for _ in range(3))
        for form in (reference, native):
            call = lambda f=form: f.attention(q, k, v, None, AttentionSpec(0.25))  # noqa: B023, E731
            found[form, n] = benchmark.peak_bytes(call)
    scores = 4 * 512**2 * 4
    assert found[reference, 512] >= scores and found[reference, 1024] >= 4 * scores
    assert found[native, 1024] < found[reference, 1024] / 4  # has no scores in memory


def test_only_some_tables(benchmark, monkeypatch, tmp_path, capsys):
    ran = []
    table = {"title": "", "rows": []}
    monkeypatch.setattr(benchmark, "operator", lambda n, args: ran.append(n) or table)
    monkeypatch.setattr(benchmark, "decode", lambda args: ran.append("decode") or table)
    monkeypatch.setattr(benchmark, "prefill", lambda n, args: ran.append(f"prefill {n}") or table)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["attention.py", "-o", str(tmp_path / "a.json"), *flags])
        return benchmark.main()

    assert run("--only", "decode") == 0 and ran == ["decode"]
    assert run("--only", "prefill,operator", "--lengths", "7", "--prefill-lengths", "9") == 0
    assert ran == ["decode", 7, "prefill 9"]
    assert run("--only", "decoding") == 2 and "no table 'decoding'" in capsys.readouterr().err
