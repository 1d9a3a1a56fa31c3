"""What will run is decided once: model, plan, recipe, device, threads."""

from __future__ import annotations

import json

import pytest
import torch

from made_records import machine
from paretune.engine import session
from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.recipe import Recipe, preset
from paretune.transforms.attention import Attention


@pytest.fixture
def plan(tmp_path, tiny_gpt2_folder):
    """A plan whose converted model lies inside it."""
    converted = tmp_path / "plan" / "model"
    converted.mkdir(parents=True)
    for file in tiny_gpt2_folder.iterdir():
        (converted / file.name).write_bytes(file.read_bytes())
    data = {
        "schema_version": 1,
        "recipe": preset("int8").to_dict(),
        "model": {"source": str(tiny_gpt2_folder), "folder": "model"},
        "hardware": machine("another"),
    }
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(data))
    return tmp_path / "plan"


def test_a_folder_runs_the_baseline(tiny_gpt2_folder):
    opened = session.open(tiny_gpt2_folder)
    assert (opened.config, opened.recipe, opened.folder) == ("baseline", preset("baseline"), tiny_gpt2_folder)
    assert opened.plan is None and opened.table is None and opened.notes() == [] and not opened.has_tokenizer
    assert opened.model_config == checkpoint.read_config(tiny_gpt2_folder)
    loaded = opened.load()
    assert opened.forms(loaded) is None and loaded.recipe == opened.recipe


@pytest.mark.parametrize("config", ["int8", preset("int8")], ids=["name", "recipe"])
def test_a_config_is_a_name_or_a_recipe(tiny_gpt2_folder, config):
    opened = session.open(tiny_gpt2_folder, config)
    assert opened.recipe == preset("int8")
    assert opened.config == (config.name if isinstance(config, Recipe) else config)


def test_flags_stand_above_the_recipe(tiny_gpt2_folder):
    opened = session.open(tiny_gpt2_folder, "compile_max", threads=1, runner="eager")
    assert opened.recipe.engine.runner == "eager" and opened.recipe.engine.compile_mode == "default"
    assert opened.recipe.engine.threads == 1 and opened.config == "compile_max, eager"
    before = torch.get_num_threads()
    opened.set_threads(otherwise=2)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_a_plan_brings_model_and_recipe(plan, tiny_gpt2_folder):
    for path in (plan, plan / "plan.json"):
        for config in (None, "plan"):
            opened = session.open(path, config)
            assert opened.is_of_plan and opened.config == "plan" and opened.recipe == preset("int8")
            assert opened.folder == plan / "model"
            assert any("measured on another machine" in note for note in opened.notes())
    beside = session.open(plan, "bf16")
    assert not beside.is_of_plan and beside.folder == tiny_gpt2_folder and beside.plan is not None
    assert not any("another machine" in note for note in beside.notes())
    with pytest.raises(UsageError, match="is a plan and has its own recipe: bf16 cannot be added"):
        session.open(plan, "bf16", is_alone=True)


def test_side_by_side(plan, tiny_gpt2_folder):
    sides = session.compare(plan, ["baseline", "plan"])
    assert sides.folder == tiny_gpt2_folder and sides.folders == {"plan": plan / "model"} and sides.tables == {}
    assert sides.configs == [("baseline", preset("baseline")), ("plan", preset("int8"))]
    sides = session.compare(tiny_gpt2_folder, ["bf16"])
    assert sides.folder == tiny_gpt2_folder and not sides.folders and sides.configs == [("bf16", preset("bf16"))]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "tpu"}, "there is no device 'tpu' here"),
        ({"config": "int9"}, "int9"),
        ({"runner": "fast"}, "unknown runner 'fast'"),
        ({"config": "plan"}, "plan"),
    ],
)
def test_what_is_not_there_is_refused(tiny_gpt2_folder, options, said):
    with pytest.raises(UsageError, match=said):
        session.open(tiny_gpt2_folder, **options)


def test_it_is_refused_before_anything_is_loaded(tiny_gpt2_folder):
    opened = session.open(tiny_gpt2_folder, Recipe((Attention("flash_attn"),)))
    with pytest.raises(UsageError, match="flash-attn package is for CUDA GPUs"):
        opened.check()
