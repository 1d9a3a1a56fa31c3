"""From a folder and a recipe to a runner, and the proofs: what is wrong must not pass."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from paretune import clock, hardware
from paretune.engine import load
from paretune.engine.exact import check_exact
from paretune.engine.load import load_recipe, prove
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import CheckpointError, NoEffectError, UsageError
from paretune.model import checkpoint
from paretune.native_build import compiler
from paretune.ops.weights.dense import Dense
from paretune.recipe import EngineOptions, Recipe, preset
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.int8 import Int8

PROMPT = list(range(5, 21))


def recipe_of(form, *more):
    return Recipe((Attention(form), *more))


def test_load_recipe_applies_what_it_says(tiny_llama_folder):
    loaded = load_recipe(tiny_llama_folder, preset("bf16_int8"))
    assert isinstance(loaded.runner, EagerRunner) and loaded.runner.dtype == torch.bfloat16
    assert loaded.recipe == preset("bf16_int8") and loaded.folder == tiny_llama_folder
    assert 0 < loaded.load_sec < 60
    said, probe = prove(loaded)
    assert [s for s in said if "sdpa" in s] and [s for s in said if "bf16" in s] and [s for s in said if "int8" in s]
    assert len(said) == 4 and not probe.compiled


def test_models_are_loaded_in_fp32_on_a_cpu(tmp_path, tiny_gpt2_folder):
    checkpoint.save(checkpoint.load(tiny_gpt2_folder, torch.float16), tmp_path)
    assert load_recipe(tmp_path, Recipe()).runner.dtype == torch.float32


def test_progress_names_each_transform(tiny_gpt2_folder):
    said = []
    load_recipe(tiny_gpt2_folder, preset("bf16_int8"), ctx=Context(progress=said.append))
    assert said == ["applying sdpa", "applying bf16", "applying int8"]


def test_load_time_goes_through_the_clock(tiny_gpt2_folder, monkeypatch):
    with clock.use(clock.FakeClock()) as fake:
        monkeypatch.setattr(Attention, "apply", lambda self, model, ctx: fake.sleep(2.5) or model)
        assert load_recipe(tiny_gpt2_folder, recipe_of("sdpa")).load_sec == 2.5


def test_threads_are_set(tiny_gpt2_folder):
    before = torch.get_num_threads()
    try:
        load_recipe(tiny_gpt2_folder, Recipe(engine=EngineOptions(threads=1)))
        assert torch.get_num_threads() == 1
    finally:
        hardware.set_threads(before)


def test_what_cannot_run_is_refused_with_its_reason(tiny_gpt2_folder, monkeypatch):
    monkeypatch.setattr(Int8, "requires", lambda self, device: "the moon is in the wrong quarter")
    with pytest.raises(UsageError, match=r"sdpa \+ int8, eager cannot run here: the moon"):
        load_recipe(tiny_gpt2_folder, preset("int8"))
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")
    with pytest.raises(UsageError, match="C\\+\\+ compiler"):
        load_recipe(tiny_gpt2_folder, preset("compile"))


def test_prove_refuses_a_transform_that_was_undone(tiny_gpt2_folder):
    loaded = load_recipe(tiny_gpt2_folder, preset("int8"))
    prove(loaded)
    layer = loaded.runner.model.h[1].mlp.c_fc
    layer.weight = Dense(layer.weight.dequantize())
    with pytest.raises(NoEffectError, match="int8 had no effect"):
        prove(loaded)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_prove_refuses_graph_breaks(tiny_gpt2_folder, monkeypatch):
    _, probe = prove(load_recipe(tiny_gpt2_folder, recipe_of("sdpa")))
    fine = dataclasses.replace(probe, compiled=True)
    loaded = load_recipe(tiny_gpt2_folder, preset("compile"))  # nothing is compiled before a step
    monkeypatch.setattr(load, "observe", lambda *_: fine)
    assert "0 graph breaks" in prove(loaded)[0][-1]
    monkeypatch.setattr(load, "observe", lambda *_: dataclasses.replace(fine, graph_breaks=2))
    with pytest.raises(NoEffectError, match="2 breaks"):
        prove(loaded)


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["compile", "compile_int8", "compile_bf16"])
def test_the_compiled_runner_is_proved_and_exact(tiny_gpt2_folder, name):
    torch._dynamo.reset()
    loaded = load_recipe(tiny_gpt2_folder, preset(name))
    said, probe = prove(loaded)
    assert probe.compiled and "0 graph breaks" in said[-1]
    assert check_exact(loaded, PROMPT)
    torch._dynamo.reset()


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_recipe(tmp_path, Recipe())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="bert"):
        load_recipe(tmp_path, Recipe())
