"""llama.cpp on files that `paretune export` wrote: its logits and greedy tokens against ours on the same numbers."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from paretune.engine.load import load_recipe
from paretune.engine.quantize import quantize
from paretune.engine.sampling import argmax
from paretune.errors import ParetuneError
from paretune.measure.peers import agreement, convert, envs
from paretune.measure.peers.catalogue import PEERS
from paretune.measure.session import TrialProcess
from paretune.model import checkpoint
from paretune.model.gguf.save import save
from paretune.recipe import preset
from paretune.transforms.formats import transforms_of

pytestmark = pytest.mark.slow


def run_peer(gguf, config, reference, tmp_path):
    """llama.cpp's logits `[N, V]` and greedy tokens on a file."""
    try:
        command = envs.command(PEERS["llama.cpp"])
    except ParetuneError as error:
        pytest.skip(str(error))
    folder = tmp_path / "converted"
    folder.mkdir()
    shutil.copyfile(gguf, folder / "model.gguf")
    process = TrialProcess("llama.cpp", "ttft", log=tmp_path / "log", command=command)
    try:
        process.ask(
            "load",
            300,
            converted=str(folder),
            config=convert.request_config(config),
            format="",
            threads=2,
            workload={"input_len": 8, "output_len": 4, "batch_size": 1, "seed": 0},
            prompts=[reference.prompt[:8]],
            capacity=reference.n_tokens + 8,
            slice={"min_sec": 0.01, "decode_steps": 2},
        )
        greedy = process.ask("greedy", 300, prompt=reference.prompt, n=len(reference.greedy))["tokens"]
        process.ask("logits", 300, sequences=reference.sequences, path=str(tmp_path / "logits.npy"))
    finally:
        process.close()
    return np.load(tmp_path / "logits.npy", allow_pickle=False), greedy


@torch.inference_mode()
def reference_on_text(folder, tokens):
    """Ours, eager in fp32, on real tokens: a trained model is sure of some of them."""
    config = checkpoint.read_config(folder)
    runner = load_recipe(folder, preset("fp32"), check=False).runner
    length, n_prompt, n_greedy = agreement.lengths(config)
    rows = torch.tensor(tokens[: 2 * length]).view(2, length)
    logits = [runner.forward(row[None], runner.new_cache(1, length), "all")[0].numpy() for row in rows]
    cache, step, greedy = runner.new_cache(1, n_prompt + n_greedy), rows[:1, :n_prompt], []
    for _ in range(n_greedy):
        greedy += [int(i) for i in argmax(runner.forward(step, cache, "last")[:, 0])]
        step = torch.tensor([greedy[-1:]])
    return agreement.Reference(rows.tolist(), np.concatenate(logits), rows[0, :n_prompt].tolist(), greedy)


@pytest.mark.realdata
@pytest.mark.parametrize("quantised", [None, "q8_0", "q4_0", "int4"])
@pytest.mark.parametrize("model", ["pocket", "tinystories"])
def test_llama_cpp_computes_the_same_from_our_file(data_dir, pocket_folder, tmp_path, model, quantised):
    from paretune.evaluate import texts
    from paretune.model.tokenizer import Tokenizer

    folder = pocket_folder if model == "pocket" else data_dir / "tinystories_656k"
    if quantised:
        folder = quantize(folder, transforms_of(quantised), tmp_path / "quantised").folder
    tokens = Tokenizer(folder).encode(texts.text_of("search"))
    reference = reference_on_text(folder, tokens)
    made = save(folder, tmp_path / "out.gguf")
    assert set(made.how) == {"the stored bits"}
    logits, greedy = run_peer(tmp_path / "out.gguf", checkpoint.read_config(folder), reference, tmp_path)
    # llama.cpp keeps keys and values in fp16, and multiplies integer weights with inputs rounded to 8 bits.
    bits = 8 if quantised else 16
    found = agreement.compare(reference, logits, greedy, bits)
    assert agreement.shortfall(found, bits) is None
    assert found.logits_rel_rms < 0.015
    # Greedy tokens are equal until a near tie: one swap, and both go on with another text.
    same = found.greedy_same
    if same < found.greedy_n:
        margin, spread = margin_of(
            folder, reference.prompt + reference.greedy[:same], reference.greedy[same], greedy[same]
        )
        assert margin <= agreement.TIE_WIDTH[bits] * spread


@torch.inference_mode()
def margin_of(folder, tokens, ours, theirs):
    """How far our logits hold two next tokens apart, and the spread of all."""
    runner = load_recipe(folder, preset("fp32"), check=False).runner
    last = runner.forward(torch.tensor([tokens]), runner.new_cache(1, len(tokens)), "last")[0, 0]
    return float(last[ours] - last[theirs]), float(last.std())
