"""The precision study: what it measures, and the sentences that it draws from the numbers. The bench is a fake."""

from __future__ import annotations

import json

import pytest
from fake_bench import CEILINGS, fake_bench

from paretune import hardware
from paretune.measure import bench
from paretune.records.bench import Cell
from paretune.studies import precision
from paretune.studies.precision import crossover


def point(x, verdict, speedup=1.2):
    return {"x": x, "config": "c", "speedup": speedup, "speedup_low": speedup - 0.1, "speedup_high": speedup + 0.1} | {
        "verdict": verdict
    }


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (["slower", "indistinguishable", "faster", "faster"], "faster from batch 4 on (1.20x [1.10, 1.30]); indist"),
        (["faster", "faster", "slower"], "faster up to batch 2 (1.20x [1.10, 1.30]); slower at batch 4"),
        (["faster", "undecided"], "faster up to batch 1"),
        (["faster", "faster"], "faster everywhere measured, batch 1 to batch 2"),
        (["indistinguishable"], "no different everywhere measured, batch 1:"),
        (["undecided", "faster", "undecided"], "undecided at batch 1"),
    ],
)
def test_a_crossover_is_where_the_verdicts_turn(verdicts, words):
    line = [point(2**i, verdict) for i, verdict in enumerate(verdicts)]
    assert words in crossover(line, "batch")


def test_what_was_not_measured_has_no_crossover():
    row = point(1, "cannot run here") | {"speedup": None}
    assert crossover([row], "size") == "not measured (cannot run here)"


def test_what_is_undecided_is_no_reason_to_stay():
    rows = [{"config": "baseline", "speedup": 1.0, "verdict": "baseline"}]
    rows += [{"config": "bf16", "speedup": 1.5, "speedup_low": 1.0, "speedup_high": 2.0, "verdict": "undecided"}]
    rows += [{"config": "int8", "speedup": 0.5, "speedup_low": 0.4, "speedup_high": 0.6, "verdict": "slower"}]
    first, second = precision.advice(rows, {}, quick=True)
    assert "undecided: bf16. A quieter machine, or the full study, may decide" in first and "Do not take int8" in second
    assert "full study" not in precision.advice(rows, {})[0]
    decided = [row for row in rows if row["verdict"] != "undecided"]
    assert "stay with the baseline" in precision.advice(decided, {})[0]


def test_configs_change_one_thing_each():
    found = precision.configs("cpu")
    assert list(found)[:6] == ["baseline", "fp16", "bf16", "int8", "flash_attn", "4bit"]
    assert [t.name for t in found["baseline"].transforms] == []
    assert all(len(found[name].transforms) == 1 for name in ("fp16", "bf16", "int8", "flash_attn", "4bit"))


def test_too_large_shapes_are_refused_before_anything_is_drawn(monkeypatch):
    shape = precision.sizes(quick=True)[0][1]
    cell = Cell(32, 100, 1)
    assert precision.does_not_fit(shape, cell) is None
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 1 << 30)
    assert "1.07 GB are free (predicted, not tried)" in precision.does_not_fit(shape, cell)


@pytest.mark.parametrize("seven", [False, True])
def test_the_study_writes_everything(tiny_gpt2_folder, tmp_path, monkeypatch, seven):
    monkeypatch.setattr(bench, "bench", fake_bench)
    drawn = [("small", precision.ModelConfig.from_hf(TINY)), ("huge", precision.checkpoint.published("gpt2-xl"))]
    monkeypatch.setattr(precision, "sizes", lambda quick: drawn)
    too_large = {48} | (set() if seven else {32})  # layers of gpt2-xl, of Mistral-7B
    monkeypatch.setattr(precision, "does_not_fit", lambda c, *a: "no room" if c.n_layer in too_large else None)
    if seven:  # a tiny one in its place
        small = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_attention_heads": 4}
        layers = {"num_key_value_heads": 2, "num_hidden_layers": 2}
        monkeypatch.setattr(precision, "MISTRAL_7B", precision.MISTRAL_7B | small | layers)
    result = precision.run(str(tiny_gpt2_folder), tmp_path / "out", quick=not seven)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    pictures = {"throughput.png", "memory.png", "over-batch.png", "over-length.png", "over-size.png"}
    assert names == {"report.html", "results.csv", "results.json", *pictures}
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    for words in ("Mistral-7B", "Published", "no room", "LLM.int8", "Over batch sizes"):
        assert words in page, words
    assert json.loads((tmp_path / "out" / "results.json").read_text())["advice"] == result["summary"]
    methods = {m["config"]: m for m in result["methods"]}
    assert methods["int8"]["published_speedup"] == 0.34 and methods["bf16"]["published_speedup"] is None
    four = next(r for r in result["mistral"] if r["config"] == "4bit")
    assert four["published_memory_bytes"] == 4.0e9
    assert (four["tokens_per_sec"] is not None) == seven
    if not seven:
        assert 3.5e9 < four["predicted_weights_bytes"] < 4.3e9
        sixteen = next(r for r in result["mistral"] if r["config"] == "fp16")
        assert sixteen["predicted_weights_bytes"] == pytest.approx(14.48e9, rel=1e-3)  # 7.24 billion parameters
        assert sixteen["most_tokens_per_sec"] < CEILINGS.read_bandwidth[0]["bytes_per_sec"] / 14.2e9
    assert any(s.startswith("Published: reserve FlashAttention") for s in result["advice"])


TINY = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
