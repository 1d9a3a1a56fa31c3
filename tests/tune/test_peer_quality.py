"""The perplexity of peers beside the baseline's: known differences, what is not known, and our own side of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from paretune.engine.load import load_recipe
from paretune.errors import ParetuneError
from paretune.evaluate.fidelity import score
from paretune.measure.interleave import SubjectError
from paretune.measure.peers.catalogue import engines_of
from paretune.records.peers import PeerQuality
from paretune.tune import peer_quality
from paretune.tune.space import baseline


def losses(n=24, s=256, seed=0):
    return np.random.default_rng(seed).gamma(4.0, 1.0, (n, s))


def with_effect(base, mean, spread, seed=1):
    return base + np.random.default_rng(seed).normal(mean, spread, base.shape)


def test_a_known_difference_comes_out():
    base = losses()
    found = peer_quality.judge(base + math.log(1.02), base, 0.05)
    assert found.ppl_increase == pytest.approx(0.02) and found.ppl_increase_upper == pytest.approx(0.02)
    assert found.baseline_perplexity == pytest.approx(math.exp(base.mean()))
    assert found.perplexity == pytest.approx(1.02 * found.baseline_perplexity)
    assert found.keeps_bound is True and found.n_windows == 24
    assert "+2.00%" in found.quality_reason and "within the bound of +5.00%" in found.quality_reason


def test_the_bound_is_held_to_the_upper_bound_and_not_to_the_estimate():
    base = losses()
    other = with_effect(base, 0.005, 0.5)
    found = peer_quality.judge(other, base, 0.01)
    # 24 windows of 256: 48 blocks of 128 tokens, each mean with a standard deviation of 0.5 / sqrt(128).
    expected = math.exp(float((other - base).mean()) + 1.68 * 0.5 / math.sqrt(128 * 48)) - 1
    assert found.ppl_increase_upper == pytest.approx(expected, rel=0.15)
    assert found.ppl_increase < 0.01 < found.ppl_increase_upper and found.keeps_bound is False


@pytest.mark.parametrize(
    ("nll", "base", "keeps", "words"),
    [
        (losses(12), losses(24), None, "12 of 24 windows were scored within 600 s: perplexity"),
        (losses(10), losses(10), None, "too little text for a bound"),
        (losses(0), losses(10), None, "not one window was scored within 600 s"),
        (np.where(losses() > 12, np.nan, losses()), losses(), False, "NaN or infinity at"),
        (losses() + 800, losses(), False, "over the bound"),  # exp() of it overflows
    ],
    ids=["capped", "short", "nothing", "nan", "huge"],
)
def test_what_is_not_known_is_not_claimed(nll, base, keeps, words):
    found = peer_quality.judge(nll, base, 0.01)
    assert found.keeps_bound is keeps and words in found.quality_reason
    assert all(v is None or math.isfinite(v) for k, v in vars(found).items() if k != "quality_reason")


def test_our_losses_are_those_of_transformers_and_of_the_gate(tiny_llama_folder):
    """The gate scores half of a window by decode steps; the order that its losses are laid in is that of the text."""
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval()
    windows = torch.randint(0, model.config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(windows[:, :-1]).logits
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").numpy()
    ours = peer_quality.baseline_losses(tiny_llama_folder, baseline(), windows, 1)
    np.testing.assert_allclose(ours, wanted, atol=1e-4)  # fp32, another order of sums
    scores = score(load_recipe(tiny_llama_folder, baseline(), check=False).runner, windows)
    np.testing.assert_allclose(peer_quality.losses_of(scores), wanted, atol=1e-4)


def test_each_engine_has_its_result_and_one_that_fails_its_reason(tiny_llama_folder, monkeypatch):
    engines = engines_of("llama.cpp:Q8_0,llama.cpp:Q4_0")[1]
    windows = torch.zeros((24, 257), dtype=torch.int64)
    base = losses()

    def answer(self, name, given, scratch, cap_sec):
        assert given == windows.tolist() and scratch.is_dir() and cap_sec == 9.0
        if name == "llama.cpp:Q4_0":
            raise SubjectError("the process was killed (out of memory, most likely)")
        return base + 0.001

    monkeypatch.setattr(peer_quality.Peers, "losses", answer)
    told = []
    found = peer_quality.measure(
        tiny_llama_folder, engines, windows, base, 0.01, threads=1, cap_sec=9.0, on_result=lambda *r: told.append(r)
    )
    assert found["llama.cpp:Q8_0"].keeps_bound is True
    assert found["llama.cpp:Q4_0"] == PeerQuality.unknown(
        "it could not be scored: the process was killed (out of memory, most likely)"
    )
    assert dict(told) == found
    assert issubclass(SubjectError, ParetuneError)
