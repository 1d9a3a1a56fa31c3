"""The workers' side: slices of known cost, the protocol in a bare interpreter, weights under common names."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from paretune.measure.interleave import SubjectError
from paretune.measure.peers import convert, envs
from paretune.measure.peers.workers import protocol
from paretune.measure.peers.workers.onnxruntime import BLOCK, pack
from paretune.measure.peers.workers.weights import Checkpoint
from paretune.measure.session import TrialProcess
from paretune.model import checkpoint
from paretune.model.families.llama.model import rope_frequencies


class CountingEngine(protocol.Engine):
    """Costs 0.1 s a prompt and 0.02 s a step, chooses how many tokens it has seen, and rewinds for 5 s."""

    n = n_prompt = 0

    def prefill(self, prompts):
        protocol.clock.sleep(0.1)
        self.n = self.n_prompt = len(prompts[0])
        return [self.n] * len(prompts)

    def step(self, chosen):
        assert chosen == [self.n] * len(chosen), "a step goes on from what was chosen before"
        protocol.clock.sleep(0.02)
        self.n += 1
        return [self.n] * len(chosen)

    def rewind(self):
        protocol.clock.sleep(5.0)
        self.n = self.n_prompt

    def logits(self, tokens):
        return np.eye(8, dtype=np.float32)[tokens]


@pytest.fixture
def trial():
    made = protocol.PeerTrial(lambda request: (CountingEngine(), {"proof": ["it counts"], "version": "1"}))
    with protocol.clock.use(protocol.clock.FakeClock()):
        said = made.load(
            {
                "workload": {"input_len": 3, "output_len": 9, "batch_size": 2, "seed": 0},
                "prompts": [[1, 2, 3], [4, 5, 6]],
                "slice": {"min_sec": 0.15, "decode_steps": 16},
            }
        )
        assert said["proof"] == ["it counts"] and said["load_sec"] == 0 and said["notes"] == []
        yield made


def test_known_costs_give_the_known_numbers(trial):
    assert trial.sample({"kind": "ttft"})["sec"] == pytest.approx(0.1)
    assert trial.sample({"kind": "tpot"})["sec"] == pytest.approx(0.02)  # going back is not timed
    assert trial.sample({"kind": "throughput"})["sec"] == pytest.approx((0.1 + 8 * 0.02) / 18)
    assert trial.engine.n == 3 + 8


def test_decode_slices_start_behind_the_prompt(trial):
    trial.sample({"kind": "tpot"})
    assert trial.engine.n == 3 + 8  # 8 steps for 9 output tokens, each slice from the prompt's end
    trial.request["workload"]["output_len"] = 100
    trial.sample({"kind": "tpot"})
    assert trial.engine.n == 3 + 16


def test_greedy_and_logits(trial, tmp_path):
    assert trial.greedy({"prompt": [1, 2], "n": 4}) == {"tokens": [2, 3, 4, 5]}
    path = tmp_path / "logits.npy"
    assert trial.logits({"sequences": [[1, 2], [3]], "path": str(path)})["shape"] == [3, 8]
    assert np.load(path).argmax(-1).tolist() == [1, 2, 3]
    assert trial.sample({"kind": "tpot"})["sec"] == pytest.approx(0.02)  # the prompt is read again first


def test_losses_are_those_of_cross_entropy():
    random = np.random.default_rng(0)
    logits = (50 * random.normal(size=(7, 90))).astype(np.float32)  # exp() of them overflows fp32
    targets = random.integers(0, 90, 7)
    wanted = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none"
    )
    np.testing.assert_allclose(protocol.token_nll(logits, targets), wanted.numpy(), rtol=1e-12, atol=1e-12)


def test_windows_are_scored_on_their_own(trial, tmp_path):
    """The engine's logits of a token are 1 at that token: its loss is log(e + 7) - 1 where the token comes again."""
    path = tmp_path / "nll.npy"
    assert trial.nll({"windows": [[1, 1, 2, 2], [3, 4, 4, 5]], "path": str(path)}) == {"n": 2}
    same, other = np.log(np.e + 7) - 1, np.log(np.e + 7)
    np.testing.assert_allclose(np.load(path), [[same, other, same], [other, same, other]], rtol=1e-12)
    assert trial.sample({"kind": "tpot"})["sec"] == pytest.approx(0.02)  # the prompt is read again first


def test_rows_of_a_batch_that_disagree_are_refused(trial, monkeypatch):
    monkeypatch.setattr(CountingEngine, "ids", lambda self, chosen: [7, 8])
    with pytest.raises(protocol.Refused, match="2 rows of one prompt give different tokens"):
        trial.greedy({"prompt": [1], "n": 4})


def test_memory_is_of_one_request(trial):
    parts = trial.memory({})
    assert parts["rss_peak_bytes"] >= parts["rss_bytes"] > 0


def test_a_worker_starts_without_paretune(tmp_path):
    """`-I -S`: no site-packages, so neither Paretune nor NumPy; the cause of the end is in the log."""
    process = TrialProcess(
        "bare", "tpot", log=tmp_path / "log", command=[sys.executable, "-I", "-S", str(envs.MAIN), "llama_cpp"]
    )
    with contextlib.closing(process), pytest.raises(SubjectError, match="No module named 'numpy'"):
        process.ask("ready", 30.0)


@pytest.mark.parametrize("worker", ["transformers", "llama_cpp", "ctranslate2", "onnxruntime", "openvino"])
def test_each_worker_answers_in_an_isolated_interpreter(worker):
    """What it needs beyond NumPy is imported when it loads: `ready` comes at once, and an error is an answer."""
    lines = "".join(json.dumps(r) + "\n" for r in ({"do": "ready"}, {"do": "nonsense"}))
    command = [sys.executable, "-I", "-u", str(envs.MAIN), worker]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, check=False)
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first == {"ok": True} and second["kind"] == "KeyError", done.stderr


def test_the_workers_share_the_one_clock():
    assert Path(protocol.clock.__file__).samefile(Path(checkpoint.__file__).parents[1] / "clock.py")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_are_read_as_our_own_reader_does(tiny, tmp_path, family, dtype):
    model, _, _ = tiny(family)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    checkpoint.save(model, tmp_path)
    config = checkpoint.read_config(tmp_path)
    read = Checkpoint(convert.request_config(config), [str(tmp_path / "model.safetensors")])

    def same(array, linear):
        assert array.dtype == np.float32 and array.flags.writeable
        np.testing.assert_array_equal(array, linear.weight.dequantize().float().numpy())

    same(read.embedding, model.embedding)
    assert (read.head is None) == config.tied_head
    layer = read.layer(1)
    if family == "gpt2":
        block = model.h[1]
        same(layer.qkv[0], block.attn.c_attn)
        same(layer.up[0], block.mlp.c_fc)
        same(layer.down[0], block.mlp.c_proj)
        assert layer.qkv[1].shape == (3 * config.n_embd,) and layer.gate is None
        np.testing.assert_array_equal(layer.norm_1[1], block.ln_1.bias.detach().float().numpy())
    else:
        block = model.layers[1]
        same(layer.k[0], block.self_attn.k_proj)
        same(layer.gate[0], block.mlp.gate_proj)
        assert layer.qkv[1] is None and layer.norm_2[1] is None
        np.testing.assert_allclose(read.rope_frequencies(), rope_frequencies(config).numpy(), rtol=1e-6)


def test_scaled_rope_frequencies_are_ours(tiny):
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model, _, folder = tiny("llama", rope_parameters=scaling)
    config = convert.request_config(model.config)
    read = Checkpoint(config, [str(p) for p in checkpoint.weight_files(folder)])
    np.testing.assert_allclose(read.rope_frequencies(), rope_frequencies(model.config).numpy(), rtol=1e-5)


@pytest.mark.parametrize(("bits", "rms"), [(4, 0.1), (8, 0.006)])
def test_packed_blocks_come_back_within_half_a_level(bits, rms):
    weight = np.random.default_rng(0).normal(size=(5, 2 * BLOCK + 3)).astype(np.float32)
    packed, scales = pack(weight, bits)
    assert packed.shape == (5, 3, BLOCK * bits // 8) and packed.dtype == np.uint8 and scales.shape == (5, 3)
    levels = packed.astype(np.float32)
    if bits == 4:
        levels = np.empty((5, 3, BLOCK), np.float32)
        levels[..., 0::2], levels[..., 1::2] = packed & 15, packed >> 4
    back = ((levels - 2 ** (bits - 1)) * scales[..., None]).reshape(5, -1)[:, : weight.shape[1]]
    limit = np.repeat(np.abs(scales), BLOCK, -1)[:, : weight.shape[1]]
    assert (np.abs(back - weight) <= limit * 1.001).all()  # a full level only at the far end, which is cut
    assert np.sqrt(np.square(back - weight).mean()) < rms
    assert not pack(np.zeros((1, BLOCK), np.float32), bits)[1].any()
