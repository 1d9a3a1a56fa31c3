"""Streaming latency and utilisation, on clocks and counters of known values."""

from __future__ import annotations

import pytest
import torch

from paretune import clock
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import UsageError
from paretune.measure import streaming, utilization
from paretune.model import checkpoint
from paretune.model.config import ModelConfig


def runner(n_positions: int = 64):
    hf = {"model_type": "gpt2", "vocab_size": 61, "n_positions": n_positions, "n_layer": 1, "n_head": 2, "n_embd": 16}
    return EagerRunner(checkpoint.new(ModelConfig.from_hf(hf | {"eos_token_id": 0, "bos_token_id": 0})))


def test_chunks_and_gaps_are_timed_as_they_are(monkeypatch):
    fake = clock.FakeClock()
    subject = runner()
    inner = subject.forward
    steps = []

    def forward(tokens, cache, logits):
        steps.append(tokens.size(1))
        fake.sleep(1.0 if tokens.size(1) > 1 else 0.25)
        return inner(tokens, cache, logits)

    monkeypatch.setattr(subject, "forward", forward)
    with clock.use(fake):
        found = streaming.stream(subject, 20, n_new=4, chunk=8)
    assert steps == [8, 8, 4, 1, 1, 1]
    assert found.ttft_sec == 3.0 and found.itl_sec == (0.25, 0.25, 0.25)
    assert found.to_json()["itl_max_sec"] == 0.25 and found.kv_cache_bytes == 2 * 16 * 24 * 4


def test_a_document_that_does_not_fit():
    with pytest.raises(UsageError, match="60 tokens and 33 new ones exceed the context of 64"):
        streaming.stream(runner(), 60)


def test_busy_share():
    assert utilization.busy_share((10, 100), (40, 200)) == 0.3
    assert utilization.busy_share(None, (1, 2)) is None and utilization.busy_share((1, 2), (1, 2)) is None
    ticks = utilization.cpu_ticks()
    assert ticks is None or 0 <= ticks[0] <= ticks[1]


def test_the_sampler_counts_by_phase(monkeypatch):
    values = iter([(0, 0), (50, 100), (60, 200), (70, 300)])
    monkeypatch.setattr(utilization, "cpu_ticks", lambda: next(values))
    sampler = utilization.Sampler(every_sec=3600)
    with sampler:
        sampler.phase = "a"
        sampler._sample()
        sampler.phase = "b"
        sampler._sample()
    found = sampler.to_json()
    assert [(p["phase"], p["n_samples"]) for p in found["phases"]] == [("a", 1), ("b", 2)]
    assert found["phases"][0]["cpu_share"] == 0.5 and found["phases"][1]["cpu_share"] == pytest.approx(0.1)
    assert found["phases"][1]["gpu_share"] is None and found["phases"][0]["rss_peak_bytes"] > 0


def test_a_gpu_without_its_library_is_unknown_not_an_error(monkeypatch):
    def refuse(device):
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    assert utilization.gpu_share("cuda") is None and utilization.gpu_share("cpu") is None
