"""The quantization study: real folders and real perplexities of a small model; the bench is a fake."""

from __future__ import annotations

import json

import pytest
from fake_bench import fake_bench

from paretune.evaluate import texts
from paretune.measure import bench
from paretune.model import checkpoint
from paretune.studies import quantization


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pocket_folder):
    """A narrow model with pocket's tokenizer."""
    shape = dict(checkpoint.published("gpt2", 64).hf) | {"vocab_size": 8192, "n_embd": 64, "n_layer": 1, "n_head": 2}
    out = tmp_path_factory.mktemp("narrow")
    checkpoint.save(checkpoint.new(checkpoint.ModelConfig.from_hf(shape), 0), out, pocket_folder)
    return out


@pytest.mark.slow
def test_the_study_writes_everything(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "bench", fake_bench)
    monkeypatch.setattr(quantization, "QUICK_TOKENS", 5500)
    monkeypatch.setattr(quantization, "QUICK_FORMATS", ("int8", "int4"))
    result = quantization.run(str(folder), tmp_path / "out", quick=True)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "results.csv", "results.json", "perplexity.png", "size.png"}
    rows = {(r["format"], r["batch_size"]): r for r in result["rows"]}
    assert set(rows) == {(f, b) for f in ("fp32", "int8", "int4") for b in (4, 12)}
    assert rows["int8", 4]["published_memory_bytes"] == 2.51e9 and rows["int4", 4]["published_memory_bytes"] is None
    for row in rows.values():
        assert row["valid_perplexity_low"] < row["valid_perplexity"] < row["valid_perplexity_high"]
        assert row["valid_perplexity"] == pytest.approx(8192, rel=0.1)  # random weights know nothing
    # The batch changes no number: native sums do not depend on it, and eager's by their order alone.
    assert rows["int8", 4]["valid_perplexity"] == pytest.approx(rows["int8", 12]["valid_perplexity"], rel=1e-5)
    assert rows["int8", 4]["ppl_increase"] != 0 and abs(rows["int8", 4]["ppl_increase"]) < 1e-3
    sizes = {s["format"]: s for s in result["sizes"]}
    assert sizes["int4"]["model_bytes"] < sizes["int8"]["model_bytes"] < 0.28 * sizes["fp32"]["model_bytes"]
    assert sizes["int8"]["published_share"] == 0.29
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    for words in ("Published", "at most", "Peak of the process", "What follows", "bits a parameter"):
        assert words.lower() in page.lower(), words
    json.loads((tmp_path / "out" / "results.json").read_text())
    assert any("int8 weights are not exactly 25 %" in s and "norms and biases" in s for s in result["summary"])
    assert any("The batch size does not change quality" in s for s in result["summary"])


def test_a_format_that_cannot_hold_the_weights_is_a_row(folder, tmp_path, monkeypatch, pocket_folder):
    """Too large for fp16 scales, in an inner row that the layer after it takes nothing of."""
    odd = tmp_path / "odd"
    odd.mkdir()
    model = checkpoint.load(folder)
    model.h[0].mlp.c_fc.weight.values[0] = 1e5
    model.h[0].mlp.c_proj.weight.values[:, 0] = 0
    checkpoint.save(model, odd, pocket_folder)
    monkeypatch.setattr(bench, "bench", fake_bench)
    monkeypatch.setattr(quantization, "QUICK_TOKENS", 700)
    monkeypatch.setattr(quantization, "QUICK_FORMATS", ("int8", "nf4"))
    result = quantization.run(str(odd), tmp_path / "out", quick=True)
    assert any("nf4: not made" in s and "too large for fp16 scales" in s for s in result["summary"])
    assert {r["format"] for r in result["rows"]} == {"fp32", "int8"}


def test_the_two_texts_are_disjoint():
    assert set(quantization.TEXTS.values()) == {"search", "confirm"}
    assert not {p.text for p in texts.pieces("search")} & {p.text for p in texts.pieces("confirm")}
