"""Training: what decays, what accumulates, exact resume, what is written."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from paretune.errors import CheckpointError, ParetuneError, UsageError
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.train import loop
from paretune.train.data import TokenStream, load_stream
from paretune.transforms.base import Context
from paretune.transforms.mechanism import Mechanism

POCKET = checkpoint.resolve("pocket")
OPTIONS = loop.TrainOptions(
    learning_rate=3e-3, steps=6, warmup_steps=2, batch_size=2, block_size=16, dtype="fp32", seed=3
)


def tiny(vocab_size: int = 64, seed: int = 1, family: str = "gpt2"):
    if family == "gpt2":
        hf = {"model_type": "gpt2", "vocab_size": vocab_size, "n_positions": 32, "n_layer": 2, "n_head": 2}
        hf |= {"n_embd": 32, "eos_token_id": 0, "bos_token_id": 0}
    else:
        hf = {"model_type": "llama", "vocab_size": vocab_size, "max_position_embeddings": 32}
        hf |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
        hf |= {"intermediate_size": 48, "rms_norm_eps": 1e-5}
    return checkpoint.new(ModelConfig.from_hf(hf), seed)


def stream(n: int = 600, vocab_size: int = 64, key: str = "key") -> TokenStream:
    """A repetitive text: four tokens in turn, now and then a random one."""
    random = np.random.RandomState(0)
    tokens = np.where(random.rand(n) < 0.1, random.randint(vocab_size, size=n), np.arange(n) % 4)
    return TokenStream(tokens.astype(np.uint16), 3 * n, ("a.txt",), key)


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.named_parameters()}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])]


def stop_at(step: int, error: type[BaseException] = KeyboardInterrupt):
    def progress(p):
        if p["step"] == step:
            raise error

    return progress


def run(out, options=OPTIONS, model=None, **kwargs):
    model = tiny() if model is None else model
    result = loop.train(model, None, stream(), stream(90), options, out, **kwargs)
    return model, result


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of six updates in one go: its folder, weights and result."""
    out = tmp_path_factory.mktemp("straight") / "out"
    model, result = run(out)
    return out, weights(model), result


def test_only_matrices_decay():
    model = tiny()
    decayed, plain = loop.parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight.values") and p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert sum("wte" in names[id(p)] or "lm_head" in names[id(p)] for p in decayed["params"]) == 1  # tied


def test_loss_falls_on_a_repetitive_text(tmp_path):
    options = replace(OPTIONS, steps=40, learning_rate=1e-2)
    model, result = run(tmp_path / "out", options)
    untrained = result.points[0]["heldout_loss"]
    assert untrained == pytest.approx(math.log(64), abs=0.2)  # knows nothing
    assert untrained == pytest.approx(loop.heldout_loss(tiny(), stream(90).tokens, 16, 2), rel=1e-6)
    assert result.points[-1]["heldout_loss"] < 0.6 * untrained
    assert result.loss < 0.6 * result.points[1]["loss"]
    assert result.points[1]["lr"] == 5e-3 and result.points[-1]["lr"] == pytest.approx(5e-4)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not model.training


def test_bits_per_byte_counts_the_bytes_of_the_text(straight):
    _, _, result = straight
    last = result.points[-1]
    assert last["heldout_bits_per_byte"] == pytest.approx(last["heldout_loss"] / math.log(2) * 90 / 270)
    assert result.heldout_bits_per_byte == last["heldout_bits_per_byte"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_accumulation_equals_the_big_batch(tmp_path, family):
    big, parts = tiny(family=family), tiny(family=family)
    run(tmp_path / "big", replace(OPTIONS, batch_size=4, steps=3), big)
    _, result = run(tmp_path / "parts", replace(OPTIONS, batch_size=1, grad_accumulation=4, steps=3), parts)
    for name, value in weights(big).items():
        torch.testing.assert_close(weights(parts)[name], value, atol=2e-5, rtol=1e-4)
    assert result.points[1]["loss"] == pytest.approx(math.log(64), abs=0.3)


@pytest.mark.parametrize("k", [1, 4])
def test_resume_is_exact(tmp_path, straight, k):
    _, expected, whole = straight
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(out, progress=stop_at(k))
    history = json.loads((out / "train.json").read_text())
    assert history["finished"] is False and history["points"][-1]["step"] == k
    torch.rand(5)  # the random state is put back as well
    model, result = run(out, model=tiny(seed=9), resume=True)  # its weights come from the checkpoint
    assert_same(weights(model), expected)
    assert [p.get("loss") for p in result.points] == [p.get("loss") for p in whole.points]
    assert [p.get("heldout_loss") for p in result.points] == [p.get("heldout_loss") for p in whole.points]
    assert not (out / "checkpoints").exists()


def test_resume_after_a_crash_goes_back_to_the_last_checkpoint(tmp_path, straight):
    out = tmp_path / "out"
    options = replace(OPTIONS, checkpoint_every=2)
    with pytest.raises(OSError):
        run(out, options, progress=stop_at(5, OSError))
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000004"]
    steps = []
    model, _ = run(out, replace(options, eval_every=1), resume=True, progress=lambda p: steps.append(p["step"]))
    assert steps == [5, 6]
    assert_same(weights(model), straight[1])


def test_interrupt_before_the_first_update(tmp_path, straight, monkeypatch):
    out = tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(loop, "summed_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            run(out)
    model, _ = run(out, resume=True)
    assert_same(weights(model), straight[1])


def test_ctrl_c_inside_an_update_waits_for_its_end(tmp_path, straight, monkeypatch):
    out = tmp_path / "out"
    whole_step = torch.optim.AdamW.step

    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return whole_step(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as m:
        m.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000001"]
    model, _ = run(out, resume=True)
    assert_same(weights(model), straight[1])


@pytest.fixture
def stopped(tmp_path):
    """A folder with a checkpoint of step 2."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(out, progress=stop_at(2))
    return out


def test_a_checkpoint_is_a_model_folder_without_pickle(stopped):
    folder = stopped / "checkpoints" / "step-00000002"
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    checkpoint.load(folder)


def test_resume_refuses_what_changed(stopped):
    with pytest.raises(UsageError, match=r"learning_rate was 0\.003 and is 0\.004"):
        run(stopped, replace(OPTIONS, learning_rate=0.004), resume=True)
    with pytest.raises(UsageError, match="training text"):
        loop.train(tiny(), None, stream(key="other"), None, OPTIONS, stopped, True)
    with pytest.raises(UsageError, match="another shape"):
        run(stopped, model=tiny(vocab_size=80), resume=True)
    with pytest.raises(UsageError, match="unfinished run"):
        run(stopped)


@pytest.mark.parametrize(
    ("mechanism", "words"),
    [
        ({"pattern": "window:8"}, "pattern was None and is 'window:8'"),
        ({"alibi": True, "positions": "kept"}, "alibi was False and is True"),
    ],
)
def test_resume_refuses_another_attention(stopped, mechanism, words):
    """Neither changes the name or the shape of a weight."""
    converted = Mechanism(**mechanism).apply(tiny(), Context())
    with pytest.raises(UsageError, match=words) as refused:
        run(stopped, model=converted, resume=True)
    assert "--config" in str(refused.value)


def test_resume_goes_on_with_the_converted_attention(tmp_path):
    """A checkpoint's config.json says all of the mechanism: the same one is not refused."""

    def converted():
        return Mechanism(alibi=True, pattern="prefix:2+window:8").apply(tiny(), Context())

    straight, _ = run(tmp_path / "a", model=converted())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", model=converted(), progress=stop_at(2))
    with pytest.raises(UsageError, match="another shape"):  # ALiBi took the positions out
        run(tmp_path / "b", resume=True)
    model, _ = run(tmp_path / "b", model=converted(), resume=True)
    assert_same(weights(model), weights(straight))


def test_auto_dtype_stays_what_it_was(stopped, straight):
    def measure():
        pytest.fail("measured again")

    model, result = run(stopped, replace(OPTIONS, dtype="auto"), resume=True, bf16_is_real=measure)
    assert result.dtype == "fp32"
    assert_same(weights(model), straight[1])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_checkpoint(stopped, file, damage):
    path = stopped / "checkpoints" / "step-00000002" / file
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else raw)
    if damage == "gone":
        path.unlink()
    with pytest.raises(CheckpointError, match="step-00000002 is damaged"):
        run(stopped, resume=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": {}, "schema_version": 1}'])
def test_damaged_state(stopped, text):
    (stopped / "checkpoints" / "step-00000002" / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        run(stopped, resume=True)


def test_nothing_to_resume_and_nothing_overwritten(tmp_path, straight):
    with pytest.raises(UsageError, match="holds no checkpoint"):
        run(tmp_path / "new", resume=True)
    with pytest.raises(UsageError, match="the run is finished"):
        run(straight[0], resume=True)
    with pytest.raises(UsageError, match="holds a model already"):
        run(straight[0])


def test_history_file(straight):
    out, _, result = straight
    history = json.loads((out / "train.json").read_text())
    assert {
        "schema_version",
        "command",
        "seed",
        "versions",
        "hardware",
        "options",
        "points",
    } <= history.keys()
    assert history["finished"] is True
    assert history["options"]["dtype"] == "fp32"
    assert history["points"] == list(result.points)
    assert [p["step"] for p in history["points"]] == list(range(7))
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "train.json"]


def test_progress_reports(tmp_path):
    seen: list[dict] = []
    run(tmp_path / "out", replace(OPTIONS, eval_every=2), progress=seen.append)
    assert [p["step"] for p in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1]["eta_sec"] == 0 and seen[0]["eta_sec"] > 0
    assert all(p["tokens_per_sec"] > 0 and p["steps"] == 6 for p in seen)
    assert seen[2]["heldout_bits_per_byte"] == seen[1]["heldout_bits_per_byte"]


def test_nan_stops_and_names_the_step(tmp_path):
    model = tiny()
    model.wpe.weight.values.data[0, 0] = float("nan")
    with pytest.raises(ParetuneError, match=r"the loss is nan .* at step 1 of 6"):
        run(tmp_path / "out", model=model)
    assert not (tmp_path / "out" / "config.json").exists()


def test_bf16_autocast_trains_and_keeps_fp32_weights(tmp_path):
    model, result = run(tmp_path / "out", replace(OPTIONS, dtype="auto", steps=3), bf16_is_real=True)
    assert result.dtype == "bf16"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert math.isfinite(result.loss)


def test_wrong_inputs(tmp_path):
    with pytest.raises(UsageError, match="--block-size 64 exceeds"):
        run(tmp_path / "a", replace(OPTIONS, block_size=64))
    with pytest.raises(UsageError, match="token 59, the model knows 40"):
        run(tmp_path / "b", model=tiny(vocab_size=40))
    with pytest.raises(ParetuneError, match="10 tokens, one block of 16 needs 17"):
        loop.train(tiny(), None, stream(10), None, OPTIONS, tmp_path / "c")
    with pytest.raises(UsageError, match="unknown dtype"):
        run(tmp_path / "d", save_dtype="int3")


def test_saved_folder_loads_here_and_in_transformers(tmp_path):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    text = tmp_path / "a.txt"
    text.write_text("A short text, said over and over again.\n" * 30)
    from paretune.train.data import Document

    tokens = load_stream([Document("a.txt", text)], POCKET, tmp_path / "cache")
    out = tmp_path / "out"
    net = tiny(vocab_size=8192)
    loop.train(net, POCKET, tokens, None, replace(OPTIONS, steps=3), out, save_dtype="fp16")
    shown = torch.arange(1, 21)[None]
    stored = checkpoint.load(out)
    assert {p.dtype for p in stored.parameters()} == {torch.float16}
    ours = checkpoint.load(out, torch.float32)
    theirs = GPT2LMHeadModel.from_pretrained(out, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(shown), theirs(shown).logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(shown), net(shown), atol=5e-3, rtol=1e-2)  # fp16 rounding
    decoded = AutoTokenizer.from_pretrained(out).decode(tokens.tokens[:5].tolist())
    assert str(decoded).startswith("A short")


def test_patience_without_heldout_data_is_refused(tmp_path):
    options = replace(OPTIONS, eval_every=1, patience=2)
    with pytest.raises(UsageError, match="needs held-out data"):
        loop.train(tiny(), None, stream(), None, options, tmp_path / "out")
    assert not (tmp_path / "out").exists()
