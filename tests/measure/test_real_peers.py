"""Real peers on tiny models, where they are installed: each fp32 form agrees with ours, each quantised one is near.

Environments are built by `paretune peers install`; without them a test is skipped.
"""

from __future__ import annotations

import pytest

from paretune.errors import ParetuneError
from paretune.measure.interleave import SubjectError
from paretune.measure.peers import agreement, envs
from paretune.measure.peers.catalogue import PEERS, Engine
from paretune.measure.peers.subject import Peers
from paretune.measure.workload import Workload
from paretune.model import checkpoint
from paretune.native_build import cache_folder

pytestmark = pytest.mark.slow

ENGINES = [Engine(peer, name) for peer in PEERS.values() for name in peer.formats]
# Widths that the blocks of every format divide, and a vocabulary of some size.
SHAPES = {
    "gpt2": {"n_embd": 256, "n_positions": 160, "vocab_size": 1000},
    "llama": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "max_position_embeddings": 160,
        "vocab_size": 1000,
        "tie_word_embeddings": False,
    },
}
LARGEST_RMS = {32: 2e-3, 16: 0.05, 8: 0.3, 4: 0.7}  # llama.cpp's fp32 keeps an fp16 cache


@pytest.fixture(scope="module")
def cache():
    return cache_folder()


@pytest.fixture
def plain(tmp_path):
    """`plain(family) -> folder`: weights as they are drawn for training, at which a quantised form is near."""

    def build(family):
        import transformers

        kinds = {
            "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, {"n_layer": 2, "n_head": 4}),
            "llama": (
                transformers.LlamaConfig,
                transformers.LlamaForCausalLM,
                {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
            ),
        }
        config, model, more = kinds[family]
        special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
        model(config(**SHAPES[family], **more, **special)).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return build


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_a_real_peer_agrees(plain, tmp_path, monkeypatch, cache, engine, family, batch_size):
    try:
        command = envs.command(engine.peer)
    except ParetuneError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))  # conversions go here, environments stay there
    monkeypatch.setattr(envs, "command", lambda peer: command)
    folder = plain(family)
    config = checkpoint.read_config(folder)
    peers = Peers([engine], folder, config, 2, lambda line: None)
    monkeypatch.setattr(agreement, "shortfall", lambda found, bits: None)  # this test has bounds of its own
    workload = Workload(24, 8, batch_size, seed=3)
    process = peers.start(engine.name, "ttft", workload, tmp_path / "log")
    try:
        answer = peers.load(process, workload)
        for kind in ("ttft", "tpot", "throughput"):
            process.kind = kind
            assert process.sample() > 0
        assert process.ask("memory")["rss_peak_bytes"] > 0
    except SubjectError as error:
        if "on this processor" in str(error):
            pytest.skip(str(error))
        pytest.fail(f"{error}\n{(tmp_path / 'log').read_text()[-2000:]}")
    finally:
        process.close()
    found = peers._agreements[engine.name]
    assert found.logits_rel_rms < LARGEST_RMS[engine.bits]
    if engine.bits == 32:
        assert found.top1_share_beyond_ties >= 0.99 and found.greedy_same >= 8
    assert answer["threads"]["threads"] == 2 and answer["proof"] and answer["disk_bytes"] > 0
