"""Peers on the real model: what each computes beside our fp32, and what it does to perplexity.

The model is `smollm2` (`paretune get smollm2`); a peer is skipped where it is not installed.
"""

from __future__ import annotations

import functools

import pytest

from paretune.errors import ParetuneError, UsageError
from paretune.evaluate.fidelity import windows_of
from paretune.evaluate.texts import text_of
from paretune.measure.interleave import SubjectError
from paretune.measure.peers import agreement, envs, subject
from paretune.measure.peers.catalogue import PEERS, Engine, peer_of
from paretune.measure.peers.subject import INVALID, Peers
from paretune.measure.workload import Workload
from paretune.model import checkpoint
from paretune.model.tokenizer import Tokenizer
from paretune.tune import peer_quality
from paretune.tune.space import baseline

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

ENGINES = [Engine(peer, name) for peer in PEERS.values() for name in peer.formats]
# RMS of the error of the logits over that of ours. llama.cpp's caches are fp16 in every format. Blocks of 32 with
# 8 bits cost 0.02 here, CTranslate2's int8 0.06 to 0.09, ONNX Runtime's int8_dynamic 0.24, and 4 bits from 0.1 to 0.22.
LARGEST_RMS = {32: 2e-3, 16: 0.03, 8: 0.12, 4: 0.4}
# The bound on perplexity that a format with 8 bits in blocks of 32 keeps.
IN_BLOCKS = ("llama.cpp:Q8_0", "onnxruntime:int8")
N_WINDOWS = 20  # 40 blocks of 128 tokens, the least for a bound


@pytest.fixture(scope="module")
def folder():
    try:
        return checkpoint.resolve("smollm2")
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def scored(folder):
    """`scored() -> windows, the baseline's losses`: a minute, once, and only where a peer is installed."""

    @functools.cache
    def call():
        windows = windows_of(Tokenizer(folder).encode(text_of("confirm")), 257)[:N_WINDOWS]
        return windows, peer_quality.baseline_losses(folder, baseline(), windows, 2)

    return call


def needs(engine):
    try:
        envs.command(engine.peer)
    except ParetuneError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def peers(folder):
    """One reference for all."""
    return Peers(ENGINES, folder, checkpoint.read_config(folder), 2, lambda line: None)


def outcome(peers, engine, tmp_path):
    """(what was found, why it is invalid or None) of loading and checking an engine."""
    workload = Workload(24, 8, 1, seed=3)
    process = peers.start(engine.name, "ttft", workload, tmp_path / "log")
    try:
        peers.load(process, workload)
    except SubjectError as error:
        if "on this processor" in str(error):
            pytest.skip(str(error))
        if error.kind != INVALID:
            pytest.fail(f"{error}\n{(tmp_path / 'log').read_text()[-2000:]}")
        return peers._agreements[engine.name], str(error)
    finally:
        process.close()
    return peers._agreements[engine.name], None


@pytest.mark.parametrize("engine", [e for e in ENGINES if e.name != "onnxruntime:int8_dynamic"], ids=lambda e: e.name)
def test_a_peer_computes_the_real_model(peers, engine, tmp_path):
    needs(engine)
    found, cause = outcome(peers, engine, tmp_path)
    if cause is not None:  # CTranslate2's int8 is near the least that counts, and below it where it saturates
        assert engine.peer.formats[engine.format].saturates, cause
        assert "that is its cause" in cause or "8-bit products saturate" in cause
    assert found.logits_rel_rms < LARGEST_RMS[engine.bits]


@pytest.mark.skipif(not subject._lacks_dot_products(), reason="nothing saturates on this processor")
def test_ctranslate2_saturates_and_the_same_file_does_not_with_another_library(folder, monkeypatch, tmp_path):
    """So what its int8 loses here beyond its rounding is not the conversion."""
    engine = Engine(peer_of("ctranslate2"), "int8")
    needs(engine)
    monkeypatch.setattr(agreement, "shortfall", lambda found, bits: None)
    config, errors, reference = checkpoint.read_config(folder), {}, None
    for use_mkl in ("0", "1"):
        monkeypatch.setenv("CT2_USE_MKL", use_mkl)
        peers = Peers([engine], folder, config, 2, lambda line: None)
        peers._reference = reference
        outcome(peers, engine, tmp_path)
        errors[use_mkl], reference = peers._agreements[engine.name].logits_rel_rms, peers._reference
    assert errors["1"] < 0.8 * errors["0"]


def test_inputs_with_one_scale_a_tensor_lose_the_model_and_the_row_says_so(peers, tmp_path):
    """ONNX Runtime's dynamic quantisation: its fp32 agrees wholly, so it is no error of conversion."""
    engine = Engine(peer_of("onnxruntime"), "int8_dynamic")
    needs(engine)
    found, cause = outcome(peers, engine, tmp_path)
    assert cause is not None and found.top1_share_beyond_ties < agreement.LEAST_TOP1[8]
    assert "8 bits with one scale for a whole tensor" in cause and "that is its cause" in cause
    share = agreement.share_with_inputs(peers.folder, peers._reference, "tensor", 8, 2)
    # Two roundings of the same kind, 256 positions: the standard error of a share is 3 %.
    assert share == pytest.approx(found.top1_share_beyond_ties, abs=0.12)


@pytest.mark.parametrize("name", [*IN_BLOCKS, "ctranslate2:int8", "openvino:int8", "llama.cpp:Q4_0"])
def test_perplexity_of_a_peer_beside_ours(folder, scored, name):
    peer, _, format = name.partition(":")
    engine = Engine(peer_of(peer), format)
    needs(engine)
    windows, base = scored()
    found = peer_quality.measure(folder, [engine], windows, base, 0.01, threads=2)[name]
    assert found["n_windows"] == N_WINDOWS and found["keeps_bound"] is not None, found["quality_reason"]
    assert found["ppl_increase_upper"] >= found["ppl_increase"]
    if name in IN_BLOCKS:
        assert found["keeps_bound"] is True, found["quality_reason"]
    if engine.bits == 4:
        assert found["ppl_increase"] > 0.02, "four bits in plain blocks cost this model a multiple of the bound"
