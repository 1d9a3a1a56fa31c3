"""Recipes as data: files, hashes, order, and errors that name what is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from paretune.engine.load import load_recipe, prove
from paretune.engine.runners.compiled import CompileRunner
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import ParetuneError, UsageError
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.ops.attention import reference
from paretune.recipe import EngineOptions, Recipe, preset
from paretune.registry import ATTENTION, TRANSFORMS
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context, Stage
from paretune.transforms.int8 import Int8
from paretune.transforms.precision import Precision
from recipe_names import HASHES

NAMES = tuple(HASHES)
EVERYTHING = Recipe(
    (Attention("sdpa"), Precision("fp16"), Int8(embeddings=False)),
    EngineOptions(runner="compile", compile_mode="freeze", threads=3),
)
RECIPES = {
    "empty": Recipe(),
    "all": EVERYTHING,
    "threads": Recipe(engine=EngineOptions(threads=1)),
    **{name: preset(name) for name in NAMES},
}


@pytest.mark.parametrize("name", RECIPES)
def test_round_trips(name, tmp_path):
    recipe = RECIPES[name]
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe
    (tmp_path / "r.json").write_text(recipe.to_json())
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    for file in ("r.json", "r.toml"):
        read = Recipe.read(tmp_path / file)
        assert read == recipe and read.hash == recipe.hash
        assert preset(str(tmp_path / file)) == recipe


def test_hash_is_the_same_in_every_process():
    code = "import sys; from paretune.recipe import preset; print(*[preset(n).hash for n in sys.argv[1:]])"
    ours = " ".join(HASHES.values())
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code, *HASHES], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == ours


def test_hash_is_frozen():
    """A change here makes every plan and journal that exists unreadable: raise SCHEMA_VERSION with it."""
    assert Recipe().hash == "36dac4e9b26b"
    assert EVERYTHING.hash == "16978550c8c5"


def test_hash_sees_every_field():
    changed = [
        EVERYTHING,
        Recipe(EVERYTHING.transforms[:2], EVERYTHING.engine),
        Recipe((Attention("eager"), *EVERYTHING.transforms[1:]), EVERYTHING.engine),
        Recipe((*EVERYTHING.transforms[:2], Int8()), EVERYTHING.engine),
        *(
            dataclasses.replace(EVERYTHING, engine=dataclasses.replace(EVERYTHING.engine, **change))
            for change in (
                {"runner": "eager"},
                {"compile_mode": "default"},
                {"threads": 2},
                {"threads": None},
            )
        ),
    ]
    assert len({r.hash for r in changed}) == len(changed)
    assert Recipe((Precision("bfloat16"),)).hash == Recipe((Precision("bf16"),)).hash  # two names of one thing


BAD = [
    ({"transfroms": []}, "transfroms"),
    ({"transforms": [{"name": "int8", "embedings": True}]}, "embedings"),
    ({"transforms": [{"name": "int9"}]}, "int8"),
    ({"transforms": [{"form": "sdpa"}]}, "name"),
    ({"transforms": ["int8"]}, "name"),
    ({"transforms": [{"name": 8}]}, "name"),
    ({"transforms": [{"name": ["int8"]}]}, "name"),
    ({"transforms": 3}, "transforms"),
    ({"transforms": "int8"}, "transforms"),
    ({"transforms": {"name": "int8"}}, "transforms"),
    ({"transforms": [{"name": "int8", "embeddings": "yes"}]}, "embeddings"),
    ({"transforms": [{"name": "int8", "embeddings": 1}]}, "embeddings"),
    ({"transforms": [{"name": "attention", "form": "flsh"}]}, "flsh"),
    ({"transforms": [{"name": "attention", "form": None}]}, "form"),
    ({"transforms": [{"name": "precision", "dtype": "bf61"}]}, "bf61"),
    ({"transforms": [{"name": "precision", "dtype": "fp32"}]}, "fp32"),
    ({"engine": {"runer": "eager"}}, "runer"),
    ({"engine": {"runner": "egaer"}}, "eager"),
    ({"engine": {"runner": None}}, "runner"),
    ({"engine": {"threads": "2"}}, "threads"),
    ({"engine": {"threads": True}}, "threads"),
    ({"engine": {"threads": 2.0}}, "threads"),
    ({"engine": {"threads": 0}}, "threads"),
    ({"engine": []}, "engine"),
    ({"schema_version": 99}, "99"),
    ([1, 2], "recipe"),
    (3, "recipe"),
    (None, "recipe"),
]


@pytest.mark.parametrize(("data", "named"), BAD, ids=[json.dumps(d) for d, _ in BAD])
def test_wrong_recipes_name_what_is_wrong(data, named, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    for attempt in (lambda: Recipe.from_dict(data), lambda: Recipe.read(path)):
        with pytest.raises(UsageError, match=named) as failure:
            attempt()
        assert "\n" not in str(failure.value) and failure.value.cure


@pytest.mark.parametrize(
    ("file", "content"),
    [("r.toml", "engine = ["), ("r.json", "{"), ("r.json", b"\xff\xfe"), ("r.toml", b"\xff\xfe")],
)
def test_damaged_files(file, content, tmp_path):
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=file):
        Recipe.read(tmp_path / file)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        preset(str(tmp_path / "nowhere.toml"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UsageError, match=r"folder\.json"):
        preset(str(tmp_path / "folder.json"))


def test_unknown_preset_offers_the_nearest():
    with pytest.raises(UsageError, match="'bf16'"):
        preset("bf61")


def test_absent_options_take_their_defaults():
    assert Recipe.from_dict({}) == Recipe()
    assert Recipe.from_dict({"engine": {"threads": None}}) == Recipe()
    assert Recipe.from_dict({"transforms": [{"name": "int8"}]}).transforms == (Int8(embeddings=True),)


@pytest.mark.parametrize("name", NAMES)
def test_presets_build_and_run(name):
    """On a model: every preset applies, and makes the runner that it names."""
    recipe = preset(name)
    config = checkpoint.published("gpt2").from_hf(
        {"model_type": "gpt2", "vocab_size": 64, "n_positions": 512, "n_layer": 1, "n_head": 2, "n_embd": 128}
    )
    runner = recipe.runner(recipe.apply(checkpoint.new(config), Context()))
    assert runner.name == recipe.engine.runner
    if isinstance(runner, CompileRunner):
        assert runner.mode == recipe.engine.compile_mode
    precisions = [t.dtype for t in recipe.transforms if isinstance(t, Precision)]
    assert runner.dtype == checkpoint.DTYPES[precisions[0] if precisions else "fp32"]
    assert torch.isfinite(EagerRunner(runner.model).forward(torch.tensor([[1, 2]]), runner_cache(runner))).all()


def runner_cache(runner):
    return EagerRunner(runner.model).new_cache(1, 4)


def test_the_baseline_is_no_straw_man():
    assert preset("baseline") == Recipe((Attention("sdpa"),))
    assert preset("eager_attn") == Recipe()


def test_every_transform_has_a_stage_and_the_order_is_enforced():
    kinds = [Attention(), Precision(), Int8()]
    assert {t.name for t in kinds} <= set(TRANSFORMS.names())
    for pair in itertools.permutations(kinds, 2):
        legal = pair[0].stage < pair[1].stage
        if legal:
            assert Recipe(pair).transforms == pair
        else:
            with pytest.raises(UsageError, match=f"{pair[0].title}.*cannot come before {pair[1].title}"):
                Recipe(pair)
    for t in kinds:
        with pytest.raises(UsageError, match="one transform a stage"):
            Recipe((t, t))
    assert [s.name for s in sorted(Stage)] == ["PRUNE", "MECHANISM", "ATTENTION", "PRECISION", "QUANTIZE", "FUSE"]


def test_one_format_twice_is_no_mix():
    part = preset("nf4").transforms[-1]
    assert part.is_partial and Recipe((part, Int8())).transforms == (part, Int8())
    with pytest.raises(UsageError, match="one transform a stage"):
        Recipe((part, part))


def test_names_are_short_and_tell_recipes_apart():
    assert preset("bf16_int8").name == "sdpa + bf16 + int8, eager"
    assert EVERYTHING.name == "sdpa + fp16 + int8-linear, compile(freeze) x3"
    assert Recipe().name == "as loaded, eager"
    distinct = set(RECIPES.values())
    assert len({r.name for r in distinct}) == len(distinct)


def test_more_parts_are_more_complex():
    order = ["eager_attn", "baseline", "bf16", "bf16_int8"]
    assert [preset(n).complexity for n in order] == [0, 1, 2, 3]
    assert preset("baseline").complexity < preset("compile").complexity < preset("compile_freeze").complexity


def test_changes_numbers():
    changing = {n for n in NAMES if preset(n).changes_numbers}
    marks = ("bf16", "fp16", "int8", "int4", "w8a8", "w8a7", "w7a7", "q8", "q4", "nf4", "fp8", "kv")
    marks += ("alibi", "window", "longformer", "bigbird", "strided", "blocks")
    assert changing == {n for n in NAMES if any(x in n for x in marks)}


def test_without_exact():
    twin = EVERYTHING.without_exact()
    assert twin.transforms == (Precision("fp16"), Int8(embeddings=False))
    assert twin.engine == EngineOptions(runner="eager", threads=3)
    assert preset("compile_max").without_exact() == Recipe()


def test_requires_gives_the_first_reason(monkeypatch):
    assert preset("compile_int8").requires("cpu") is None
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")
    assert "compiler" in preset("compile_int8").requires("cpu")
    monkeypatch.setattr(Int8, "requires", lambda self, device: f"no int8 on {device}")
    assert preset("compile_int8").requires("cpu") == "no int8 on cpu"
    assert preset("baseline").requires("cpu") is None


def test_apply_goes_in_order(monkeypatch):
    seen = []
    for kind in (Attention, Precision, Int8):
        monkeypatch.setattr(kind, "apply", lambda self, model, ctx: [*model, self.name])
    out = EVERYTHING.apply([], Context(progress=seen.append))
    assert out == ["attention", "precision", "int8"]
    assert seen == ["applying sdpa", "applying fp16", "applying int8-linear"]


# -- whether a recipe fits a model

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
BIGBIRD = {"name": "mechanism", "pattern": "prefix:16+window:16+random:1x64@0"}
MISFITS = {
    "odd heads": ({"n_embd": 39, "n_head": 3}, preset("kv4").to_dict(), "an even head size, not 13"),
    "odd heads, native": (
        {"n_embd": 39, "n_head": 3},
        preset("native_int4_kv4").to_dict(),
        "an even head size, not 13",
    ),
    "short context": ({}, preset("window256").to_dict(), "a window of 256 is larger than the context of 64"),
    "blocks": ({}, preset("blocks").to_dict(), "pattern blocks:128"),
    "pattern without native code": (
        {},
        {"transforms": [BIGBIRD], "engine": {"runner": "native"}},
        "native code has no .*random.* attention",
    ),
    "format without native code": (
        {},
        {"transforms": [{"name": "fp8"}], "engine": {"runner": "native"}},
        "native code has no weight format fp8",
    ),
    "a pattern of names": (
        {},
        {"transforms": [{"name": "int8", "include": "blocks.*"}]},
        r"'blocks.\*' matches no layer \(names look like",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_fits_a_real_shape(name):
    """576 inputs, of which groups of 128 leave 64."""
    assert preset(name).fits(ModelConfig.from_hf(SMOLLM2)) is None


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_what_could_not_run(name, tiny):
    """The answer needs the config alone; loaded all the same, the recipe fails."""
    changes, recipe, why = MISFITS[name]
    _, _, folder = tiny("gpt2", **changes)
    recipe = Recipe.from_dict(recipe)
    config = checkpoint.read_config(folder)
    with pytest.raises(UsageError, match=why) as refused:
        recipe.check("cpu", config)
    assert recipe.name in str(refused.value) and recipe.why_not("cpu", config) == recipe.fits(config)
    with pytest.raises(ParetuneError):
        prove(load_recipe(folder, recipe, check=False))


def test_alibi_is_not_applied_twice(tiny_gpt2_folder):
    config = checkpoint.read_config(tiny_gpt2_folder)
    recipe = preset("alibi")
    assert recipe.fits(config) is None
    (alibi,) = (t for t in recipe.transforms if t.stage == Stage.MECHANISM)
    assert recipe.fits(alibi.changed(config)) == "the model has ALiBi already"


def test_attention_that_would_drop_alibi_is_refused(tiny_gpt2_folder, monkeypatch):
    """Of another package: a transform or a function that does not say that it adds the bias."""
    config = checkpoint.read_config(tiny_gpt2_folder)
    assert preset("alibi").fits(config) is None
    with monkeypatch.context() as patch:
        patch.setattr(Attention, "replaces_attention", True)
        assert preset("baseline").fits(config) is None
        assert preset("alibi").fits(config) == "sdpa has no ALiBi: its attention does not declare `has_alibi`"
        patch.setattr(Attention, "has_alibi", True)
        assert preset("alibi").fits(config) is None
    monkeypatch.setattr(ATTENTION, "_own", {k: v for k, v in ATTENTION._own.items() if k != "eager"})
    monkeypatch.setattr(ATTENTION, "_others", {"eager": "paretune.ops.attention.reference:attention"})
    recipe = preset("alibi+attention(eager)")
    assert recipe.fits(config) == "eager has no ALiBi: its module does not declare `HAS_ALIBI`"
    monkeypatch.setattr(reference, "HAS_ALIBI", True, raising=False)
    assert recipe.fits(config) is None


def test_each_transform_is_asked_about_what_those_before_it_leave(tiny_gpt2_folder):
    """The pattern is not the model's own: flash-attn has to be asked about the one that it would run with."""
    config = checkpoint.read_config(tiny_gpt2_folder)
    flash = {"name": "attention", "form": "flash_attn"}
    plain = Recipe.from_dict({"transforms": [flash]})
    assert plain.fits(config) is None
    reason = Recipe.from_dict({"transforms": [BIGBIRD, flash]}).fits(config)
    assert reason is not None and reason.startswith("flash-attn has no prefix:16+window:16+random")


def test_layers_that_are_stored_in_another_format(tiny_gpt2_folder, tmp_path):
    """Their numbers would be left alone: the recipe would do nothing. Its own format is served by it."""
    for name in ("fp8", "int8"):
        model = checkpoint.load(tiny_gpt2_folder)
        checkpoint.save(preset(name).apply(model, Context()), tmp_path)
        config = checkpoint.read_config(tmp_path)
        assert preset(name).fits(config) is None
        assert (
            preset("native_int4").fits(config)
            == {
                "fp8": "its layers are stored as fp8 already",
                "int8": "its layers are stored as int8_rows already",
            }[name]
        )
    with pytest.raises(ParetuneError):
        prove(load_recipe(tmp_path, preset("native_int4"), check=False))
    assert preset("native").fits(config) is None
    model = checkpoint.load(tiny_gpt2_folder)
    checkpoint.save(preset("fp8").apply(model, Context()), tmp_path)
    assert "no weight format fp8" in (preset("native").fits(checkpoint.read_config(tmp_path)) or "")
