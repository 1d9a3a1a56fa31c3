"""From a folder and a recipe to a runner, and the proofs: what is wrong must not pass."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from paretune import clock, hardware
from paretune.engine import load
from paretune.engine.load import TIE_MARGIN, check_exact, load_recipe, prove
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import CheckpointError, NoEffectError, NotExactError, UsageError
from paretune.model import checkpoint
from paretune.native_build import compiler
from paretune.ops.attention import reference
from paretune.ops.weights.dense import Dense
from paretune.recipe import EngineOptions, Recipe, preset
from paretune.registry import ATTENTION
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.int8 import Int8
from paretune.transforms.precision import Precision

PROMPT = [5, 17, 99, 3, 42, 42, 8, 120, 64, 2, 77, 31, 90, 11, 56, 101]


def proper(q, k_new, v_new, layer_cache, spec):
    return reference.attention(q, k_new, v_new, layer_cache, spec)


def wrongly_scaled(q, k_new, v_new, layer_cache, spec):
    return reference.attention(q, k_new, v_new, layer_cache, dataclasses.replace(spec, scale=spec.scale / 2))


def wrong_in_decode_only(q, k_new, v_new, layer_cache, spec):
    y = reference.attention(q, k_new, v_new, layer_cache, spec)
    return y if q.size(2) > 1 else y * 1.5


@pytest.fixture(autouse=True)
def forms(monkeypatch):
    for function in (proper, wrongly_scaled, wrong_in_decode_only):
        monkeypatch.setitem(ATTENTION._targets, function.__name__, f"{__name__}:{function.__name__}")


@pytest.fixture(params=["gpt2", "llama", "mistral"])
def folder(request):
    return request.getfixturevalue(f"tiny_{request.param}_folder")


def recipe_of(form, *more):
    return Recipe((Attention(form), *more))


@pytest.mark.parametrize("form", ["eager", "sdpa", "proper"])
def test_what_is_exact_passes(folder, form):
    said = check_exact(load_recipe(folder, recipe_of(form)), PROMPT)
    assert said == ["12 greedy tokens equal the reference's"]
    assert check_exact(load_recipe(folder, recipe_of(form)), PROMPT, 3) == ["3 greedy tokens equal the reference's"]


@pytest.mark.parametrize("form", ["wrongly_scaled", "wrong_in_decode_only"])
def test_what_is_not_exact_is_refused(folder, form):
    with pytest.raises(NotExactError, match=f"{form}, eager is not exact: token \\d+ differs") as failure:
        check_exact(load_recipe(folder, recipe_of(form)), PROMPT)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("more", [(Precision("bf16"),), (Precision("fp16"),), (Int8(),), (Precision("bf16"), Int8())])
def test_rounded_numbers_are_held_to_twice_the_references_error(folder, more):
    """Exact forms stay within it; wrong ones, also in the decode step alone, do not."""
    for form in ("sdpa", "proper"):
        said = check_exact(load_recipe(folder, recipe_of(form, *more)), PROMPT)
        assert len(said) == 1 and "logit error against fp32" in said[0]
    for form in ("wrongly_scaled", "wrong_in_decode_only"):
        with pytest.raises(NotExactError, match=r"is off by .* from fp32, its reference form by"):
            check_exact(load_recipe(folder, recipe_of(form, *more)), PROMPT)


def test_a_nan_is_not_exact(tiny_gpt2_folder):
    loaded = load_recipe(tiny_gpt2_folder, recipe_of("sdpa", Precision("bf16")))
    loaded.runner.model.ln_f.weight.data[0] = float("nan")
    with pytest.raises(NotExactError):
        check_exact(loaded, PROMPT)


def test_prompts_of_one_token_and_of_the_whole_context(tiny_gpt2_folder):
    for more in ((), (Int8(),)):
        assert check_exact(load_recipe(tiny_gpt2_folder, recipe_of("sdpa", *more)), [7])
    whole = (PROMPT * 4)[:64]
    assert check_exact(load_recipe(tiny_gpt2_folder, recipe_of("sdpa", Int8())), whole)


@pytest.mark.parametrize(
    ("margin", "at", "passes"),
    [(TIE_MARGIN / 2, 4, True), (TIE_MARGIN * 2, 4, False), (TIE_MARGIN / 2, 0, True)],
)
def test_a_tie_is_no_difference(tiny_gpt2_folder, monkeypatch, margin, at, passes):
    """The oracle takes the other token of two equal ones: what follows is another text, and not compared."""
    real = load.naive_generate

    def other(model, prompt, n):
        tokens, margins = real(model, prompt, n)
        tokens = [*tokens[:at], *((t + 1) % 131 for t in tokens[at:])]
        return tokens, [*margins[:at], margin, *([1.0] * (n - at - 1))]

    monkeypatch.setattr(load, "naive_generate", other)
    loaded = load_recipe(tiny_gpt2_folder, recipe_of("sdpa"))
    if passes:
        (said,) = check_exact(loaded, PROMPT)
        assert f"up to a tie at token {at + 1} (margin 5.0e-05)" in said
    else:
        with pytest.raises(NotExactError, match=f"token {at + 1} differs, with a margin of 0.0002"):
            check_exact(loaded, PROMPT)


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
    loaded = load_recipe(tiny_gpt2_folder, recipe_of("sdpa"))
    _, probe = prove(loaded)
    fine = dataclasses.replace(probe, compiled=True)
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
