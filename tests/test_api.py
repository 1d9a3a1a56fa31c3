"""The six names of the Python API."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
import torch

import paretune
from made_records import machine
from paretune.engine.generate import naive_generate
from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.recipe import Recipe, preset

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def pocket():
    return paretune.load("pocket")


@pytest.fixture
def int8_plan(tmp_path):
    recipe = preset("int8").to_dict()
    (tmp_path / "plan.json").write_text(
        json.dumps(
            {
                "schema_version": 1,
                "recipe": recipe,
                "model": {"source": "pocket", "folder": None},
                "hardware": machine("other"),
            }
        )
    )
    return tmp_path


def test_import_costs_no_torch_and_all_names_are_there():
    code = """
import sys, paretune
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert paretune.Recipe().name == "as loaded, eager" and paretune.__version__
assert "torch" not in sys.modules
import paretune.tune.goal, paretune.evaluate.texts
for name in paretune.__all__:
    assert hasattr(paretune, name), name
for name in ("load", "generate", "evaluate", "bench", "tune"):
    assert callable(getattr(paretune, name)), name
try:
    paretune.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_version_is_the_packages():
    from importlib.metadata import version

    assert paretune.__version__ == version("paretune")


def test_logits_are_the_checkpoint_models(pocket, pocket_folder):
    tokens = torch.randint(0, 8192, (2, 17))
    with torch.no_grad():
        expected = checkpoint.load(pocket_folder, torch.float32)(tokens)
    got = pocket.model(tokens)
    assert got.shape == (2, 17, 8192)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(pocket.model(tokens.tolist()), got)  # a fresh cache every time


@pytest.mark.parametrize("tokens", [[], [[]], [1, 2], [[-1]], [[8192]], [[0] * 1025]])
def test_tokens_that_are_none_are_refused(pocket, tokens):
    with pytest.raises(UsageError):
        pocket.model(tokens)


def test_generate_one_and_several(pocket, pocket_folder):
    one = pocket.generate(PROMPT, max_new_tokens=8)
    tokens, _ = naive_generate(checkpoint.load(pocket_folder, torch.float32), one.prompt, 8)
    assert one.tokens == tokens and str(one) == one.text and one.finish_reason == "length"
    assert one.ttft_sec > 0 and one.tpot_sec > 0 and one.tokenize_sec >= 0
    several = pocket.generate([PROMPT, "The sea was calm and"], max_new_tokens=8)
    assert [g.tokens for g in several] == [
        one.tokens,
        pocket.generate("The sea was calm and", max_new_tokens=8).tokens,
    ]
    pieces = []
    text = pocket.generate(PROMPT, 8, on_text=lambda row, piece: pieces.append(piece), stop=" the").text
    assert "".join(pieces) == text and " the" not in text
    assert paretune.generate("pocket", PROMPT, max_new_tokens=8).tokens == one.tokens


def test_generate_refuses(pocket):
    with pytest.raises(UsageError, match="no option 'top_q'"):
        pocket.generate(PROMPT, top_q=1)
    for wrong in ("", ["a", ""], []):
        with pytest.raises(UsageError):
            pocket.generate(wrong)


def test_a_plan_brings_its_recipe_and_its_warnings(int8_plan, capsys):
    model = paretune.load(int8_plan)
    assert "measured on another machine" in capsys.readouterr().err
    assert model.recipe.name == "sdpa + int8, eager" and model.folder == checkpoint.resolve("pocket")
    by_name = paretune.load("pocket", "int8")
    torch.testing.assert_close(model.model([[1, 2, 3]]), by_name.model([[1, 2, 3]]), rtol=0, atol=0)
    with pytest.raises(UsageError, match="has its own recipe"):
        paretune.load(int8_plan, "int8")


def test_load_takes_a_recipe_and_refuses_what_is_not_there():
    assert paretune.load("pocket-draft", Recipe()).recipe == Recipe()
    with pytest.raises(UsageError, match="Did you mean 'int8'"):
        paretune.load("pocket", "int9")
    with pytest.raises(UsageError, match="no device"):
        paretune.load("pocket", device="tpu")


def test_a_folder_without_tokenizer_gives_logits_and_says_what_generation_needs(tiny_gpt2_folder, tiny_tokens):
    model = paretune.load(tiny_gpt2_folder)
    assert model.tokenizer is None and model.model(tiny_tokens).shape == (2, 23, 131)
    with pytest.raises(checkpoint.CheckpointError, match=r"no tokenizer\.json"):
        model.generate("a")


def test_evaluate(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The old man sat by the sea and looked at the boats. " * 12)
    got = paretune.evaluate("pocket-draft", text, context=64)
    assert got.protocol == "text.txt/ctx64/stride32/token" and 1 < got.perplexity < 8192
    with pytest.raises(UsageError, match="exceeds"):
        paretune.evaluate("pocket-draft", text, context=2048)


def test_bench_hands_over(monkeypatch, int8_plan):
    import paretune.measure.bench

    seen = {}
    monkeypatch.setattr(paretune.measure.bench, "bench", lambda *a, **k: seen.update(bench=(a, k)))
    paretune.bench("pocket", ["int8"], input_lens=[8])
    (folder, configs), options = seen["bench"]
    assert folder == checkpoint.resolve("pocket") and options == {"input_lens": [8]}
    assert [(name, recipe.name) for name, recipe in configs] == [("int8", "sdpa + int8, eager")]
    paretune.bench(int8_plan)
    assert seen["bench"][0][1][-1][0] == "plan" and seen["bench"][1]["folders"] == {
        "plan": checkpoint.resolve("pocket")
    }


def test_tune_hands_over(monkeypatch, tmp_path):
    import paretune.tune.run

    seen = {}

    class Search:
        def __init__(self, *arguments, **options):
            seen.update(arguments=arguments, options=options)
            options["prepare"]()
            self.journal = types.SimpleNamespace(close=lambda: seen.update(closed=True))

        def run(self):
            return "outcome"

    monkeypatch.setattr(paretune.tune.run, "Search", Search)
    monkeypatch.setattr(paretune.tune.run.results, "write", lambda out, folder: {"out": out, "folder": folder})
    folder = tmp_path / "plan"
    got = paretune.tune("pocket", folder, objective="ttft", budget_sec=9, quiet=True)
    assert got == {"out": "outcome", "folder": folder} and seen["closed"] and folder.is_dir()
    name, goal, where = seen["arguments"]
    assert (name, where, goal.objective, goal.budget_sec) == ("pocket", folder, "ttft", 9)
    assert seen["options"]["resume"] is False

    with pytest.raises(UsageError, match="no option 'budget'"):
        paretune.tune("pocket", folder, budget=9)
    with pytest.raises(UsageError, match="no run to continue"):
        paretune.tune("pocket", folder, resume=True)
    (folder / "events.jsonl").write_text("")
    with pytest.raises(UsageError, match="holds an earlier run"):
        paretune.tune("pocket", folder)
    paretune.tune("pocket", folder, resume=True, quiet=True)
    assert seen["options"]["resume"] is True
