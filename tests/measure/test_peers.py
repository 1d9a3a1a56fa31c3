"""Peers without any peer: names, agreement, and the cache of converted checkpoints."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

from paretune.errors import ParetuneError, UsageError
from paretune.measure.peers import agreement, convert
from paretune.measure.peers.catalogue import INPUTS, PEERS, Engine, engines_of, peer_of, refusal
from paretune.measure.peers.envs import MAIN
from paretune.model.checkpoint import read_config


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch, cache_with_native_code):
    monkeypatch.setenv("PARETUNE_CACHE", cache_with_native_code(tmp_path / "cache"))


# --- names ---


def test_engines_are_read_with_and_without_formats():
    ours, engines = engines_of("paretune, llama.cpp:q8_0,transformers,llama.cpp:Q8_0")
    assert ours and [e.name for e in engines] == ["llama.cpp:Q8_0", "transformers:fp32", "transformers:bf16"]
    assert engines[0].bits == 8
    ours, engines = engines_of("llama.cpp")
    assert not ours and [e.format for e in engines] == list(PEERS["llama.cpp"].default)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llamacpp", "unknown engine 'llamacpp'. Did you mean 'llama.cpp'?"),
        ("vllm", "unknown engine 'vllm'. Known: paretune, transformers, llama.cpp"),
        ("llama.cpp:Q3", "llama.cpp has no format 'Q3' here. Known: llama.cpp:F32"),
        ("paretune:int8", "Name them with --config"),
        (" , ", "--engine is empty"),
        ("llama.cpp:", "no format ''"),
    ],
)
def test_a_wrong_name_is_one_clear_line(text, message):
    with pytest.raises(UsageError) as error:
        engines_of(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_catalogue_is_whole():
    for name, peer in PEERS.items():
        assert peer.name == name and (MAIN.parent / f"{peer.worker}.py").is_file()
        assert all("==" in requirement for requirement in peer.requirements), "versions are pinned"
        assert peer.default and set(peer.default) <= set(peer.formats)
        for format in peer.formats.values():
            assert format.base is None or format.base in peer.formats
            assert format.stored_as is None or format.stored_as in peer.formats
            assert format.bits in agreement.TIE_WIDTH
            assert format.inputs is None or (format.inputs in INPUTS and format.bits in agreement.LEAST_TOP1)


def test_what_a_peer_does_not_take_is_said(tiny_mistral_folder, tiny_gpt2_folder):
    engine = engines_of("llama.cpp:F32")[1][0]
    assert "sliding window of 8" in refusal(engine, read_config(tiny_mistral_folder), 24)
    assert refusal(engine, read_config(tiny_mistral_folder), 8) is None
    assert refusal(engine, read_config(tiny_gpt2_folder), 24) is None


# --- agreement ---


def reference(logits, greedy=(1, 2, 3)):
    return agreement.Reference([list(range(len(logits)))], np.asarray(logits, np.float32), [0], list(greedy))


def random_logits(n=200, vocab=50, seed=0):
    return np.random.default_rng(seed).normal(size=(n, vocab)).astype(np.float32)


def test_equal_logits_agree_wholly():
    logits = random_logits()
    found = agreement.compare(reference(logits), logits.copy(), [1, 2, 3], 32)
    assert (found.top1_share, found.top1_share_beyond_ties, found.logits_rel_rms) == (1, 1, 0)
    assert (found.greedy_same, found.greedy_n, found.n_positions) == (3, 3, 200)
    assert agreement.shortfall(found, 32) is None


def test_the_known_error_comes_out():
    logits = random_logits()
    found = agreement.compare(reference(logits), 1.1 * logits, [1, 9, 3], 8)
    assert found.logits_rel_rms == pytest.approx(0.1, rel=1e-4)
    assert found.top1_share == 1 and found.greedy_same == 1


def test_a_swap_of_near_ties_counts_only_in_the_raw_share():
    logits = np.zeros((100, 4), np.float32)
    logits[:, 0], logits[:, 1], logits[:, 2] = 1.0, 0.999, -1.0
    other = logits.copy()
    other[:50, 0] = 0.998  # half of the tokens change places, over a gap of 0.001
    found = agreement.compare(reference(logits), other, [1, 2, 3], 32)
    assert (found.top1_share, found.top1_share_beyond_ties) == (0.5, 1.0)
    logits[:, 1] = 0.5  # no tie any more
    other = logits.copy()
    other[:50, 0] = 0.4
    found = agreement.compare(reference(logits), other, [1, 2, 3], 32)
    assert found.top1_share_beyond_ties == 0.5


@pytest.mark.parametrize(("bits", "share", "is_enough"), [(32, 0.985, False), (32, 0.99, True), (16, 0.94, False)])
def test_the_least_agreement_follows_from_the_format(bits, share, is_enough):
    found = agreement.Agreement(share, share, 0.0, 1, 1, 200)
    assert (agreement.shortfall(found, bits) is None) == is_enough
    assert agreement.shortfall(agreement.Agreement(0.1, 0.1, 0.5, 0, 1, 200), 4) is None  # reported only


def test_another_model_falls_short():
    logits = random_logits()
    found = agreement.compare(reference(logits), random_logits(seed=1), [5, 5, 5], 8)
    assert found.top1_share < 0.2 and found.greedy_same == 0
    assert "agrees with our fp32" in agreement.shortfall(found, 8)


@pytest.mark.parametrize("bad", [np.zeros((3, 50)), np.full((200, 50), np.nan)])
def test_logits_of_no_use_are_refused(bad):
    with pytest.raises(ValueError, match=r"logits"):
        agreement.compare(reference(random_logits()), bad.astype(np.float32), [1], 8)


@pytest.mark.parametrize("which", ["tiny_gpt2_folder", "tiny_mistral_folder"])
def test_the_reference_is_ours_and_long_enough(which, request):
    from paretune.engine.generate import naive_generate
    from paretune.model import checkpoint

    folder = request.getfixturevalue(which)
    config = read_config(folder)
    made = agreement.make_reference(folder, config, 1)
    assert len(made.logits) >= 128 and made.logits.shape[1] == config.vocab_size
    assert made.n_tokens <= min(config.n_positions, config.sliding_window or config.n_positions)
    model = checkpoint.load(folder)
    assert made.greedy == naive_generate(model, made.prompt, len(made.greedy))[0]


def test_it_is_compared_on_what_the_model_writes():
    """The embedded model finds its own text likely and tokens drawn evenly unlikely."""
    from paretune.model import checkpoint

    folder = checkpoint.resolve("pocket")
    config = read_config(folder)
    made = agreement.make_reference(folder, config, 2)
    model = checkpoint.load(folder)

    def loss(rows):
        tokens = torch.as_tensor(rows)
        logits = model(tokens[:, :-1], logits="all").flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).item()

    drawn = torch.randint(0, config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert loss(made.sequences) < loss(drawn) - 2  # nats a token


# --- how formats round their inputs ---


def test_a_tensor_is_rounded_as_onnx_does():
    """The example of the operator's specification (DynamicQuantizeLinear): scale 0.0196078438, zero point 153."""
    x = torch.tensor([0, 2, -3, -2.5, 1.34, 0.5])
    levels = torch.tensor([153, 255, 0, 26, 221, 179])
    torch.testing.assert_close(agreement._round_tensor(x), (levels - 153) * 0.0196078438, atol=1e-6, rtol=0)
    assert not agreement._round_tensor(torch.zeros(3)).any()


def test_rows_are_rounded_each_by_its_own_largest():
    x = torch.tensor([[127.0, 0.6, -3.4], [0.0127, 0.00006, -0.00034]])
    wanted = torch.tensor([[127.0, 1, -3], [0.0127, 0.0001, -0.0003]])
    torch.testing.assert_close(agreement._round_rows(x), wanted, atol=1e-9, rtol=1e-6)
    assert not agreement._round_rows(torch.zeros(1, 3)).any()


@pytest.fixture
def with_outlier(tiny_llama_folder, tmp_path):
    """The same function of the tokens, one input of each second matrix of the MLP a thousand times as large."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_llama_folder, tmp_path / "outlier")
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("up_proj.weight"):
            weight[0] *= 1024
        if name.endswith("down_proj.weight"):
            weight[:, 0] /= 1024
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("inputs", list(INPUTS))
def test_only_outliers_make_rounded_inputs_a_cause(tiny_llama_folder, with_outlier, inputs):
    """Both are the same function, so whatever differs between them comes of the rounding."""
    found = {}
    for folder in (tiny_llama_folder, with_outlier):
        made = agreement.make_reference(folder, read_config(folder), 1)
        found[folder] = agreement.share_with_inputs(folder, made, inputs, 8, 1)
    assert found[tiny_llama_folder] >= agreement.LEAST_TOP1[8]
    assert found[with_outlier] < found[tiny_llama_folder] - 0.1


# --- converted checkpoints ---


class Worker:
    """Answers `convert` with a file, and keeps what it was asked."""

    def __init__(self, fails=False):
        self.requests, self.fails = [], fails

    def __call__(self, do, **request):
        assert do == "convert"
        self.requests.append(request)
        with open(os.path.join(request["out"], "weights"), "w") as f:
            f.write(request["format"])
        if self.fails:
            raise ParetuneError("it broke in the middle")
        return {}


@pytest.fixture
def model(tiny_gpt2_folder, tmp_path):
    return shutil.copytree(tiny_gpt2_folder, tmp_path / "model")


def converted(folder, name, worker):
    engine = engines_of(name)[1][0]
    return convert.converted(folder, read_config(folder), engine, 1, worker, lambda line: None)


def test_a_conversion_is_made_once(model):
    worker = Worker()
    first = converted(model, "ctranslate2:int8", worker)
    assert (first / "weights").read_text() == "int8" and json.loads((first / convert.MARK).read_text())
    assert converted(model, "ctranslate2:int8", worker) == first and len(worker.requests) == 1
    request = worker.requests[0]
    assert not {"hf", "family"} & set(request["config"])
    assert request["config"]["facts"]["modules"]["embedding"] == "wte"  # what the family declares, as plain data
    assert json.loads(json.dumps(request["config"]))["facts"]["positions"] == "learned"
    assert request["weight_files"] == [str(model / "model.safetensors")]


def test_formats_are_converted_from_their_base(model):
    worker = Worker()
    converted(model, "llama.cpp:Q8_0", worker)
    assert [r["format"] for r in worker.requests] == ["F32", "Q8_0"]
    assert worker.requests[1]["base"] == str(convert.existing(model, engines_of("llama.cpp:F32")[1][0]))
    converted(model, "llama.cpp:Q4_0", worker)
    assert len(worker.requests) == 3


def test_the_key_sees_format_peer_config_and_weights(model):
    engines = engines_of("ctranslate2,llama.cpp:F32")[1]
    targets = {convert.target_of(model, engine) for engine in engines}
    assert len(targets) == 3
    config = model / "config.json"
    config.write_text(config.read_text() + " ")
    targets.add(convert.target_of(model, engines[0]))
    info = (model / "model.safetensors").stat()
    os.utime(model / "model.safetensors", ns=(info.st_atime_ns, info.st_mtime_ns + 10**9))
    targets.add(convert.target_of(model, engines[0]))
    assert len(targets) == 5


def test_a_failed_conversion_leaves_nothing(model):
    worker = Worker(fails=True)
    with pytest.raises(ParetuneError, match="it broke"):
        converted(model, "ctranslate2:fp32", worker)
    assert not list(convert.models_folder().iterdir())
    assert converted(model, "ctranslate2:fp32", Worker()).is_dir()


def test_half_a_conversion_is_not_taken_for_a_whole_one(model):
    engine = engines_of("ctranslate2:fp32")[1][0]
    target = convert.target_of(model, engine)
    target.mkdir(parents=True)
    (target / "weights").write_text("half")
    assert convert.existing(model, engine) is None
    assert (converted(model, engine.name, Worker()) / "weights").read_text() == "fp32"


def test_converted_models_are_counted_and_removed(model):
    converted(model, "ctranslate2:fp32", Worker())
    converted(model, "llama.cpp:F32", Worker())
    killed = convert.models_folder() / ".ctranslate2-fp32-model-0.77.tmp"
    killed.mkdir()
    assert convert.bytes_for("ctranslate2") > 4
    assert convert.remove_models(peer_of("ctranslate2")) > 4
    assert not killed.exists() and convert.bytes_for("ctranslate2") == 0 and convert.bytes_for("llama.cpp") > 0


def test_engines_are_equal_by_peer_and_format():
    assert Engine(PEERS["llama.cpp"], "F32") == engines_of("llama.cpp:f32")[1][0]
