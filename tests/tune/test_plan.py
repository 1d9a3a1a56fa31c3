"""A plan: read back whole, refused when damaged, and the stored checkpoint gives the very same logits."""

from __future__ import annotations

import json

import pytest
import torch
from fake_race import MB, Machine, install, only, run
from points import recipe_of

from paretune import hardware
from paretune.engine.load import load_recipe
from paretune.engine.plan import Plan, is_plan, read_plan
from paretune.errors import ParetuneError, UsageError
from paretune.tune import result as results

INT8 = ("sdpa", None, "int8", "eager", None)
CHOICES = {
    "int8": INT8,
    "int8-linear": ("sdpa", None, "int8-linear", "eager", None),
    "bf16": ("sdpa", "bf16", None, "eager", None),
    "fp16": ("sdpa", "fp16", None, "eager", None),
    "bf16-int8": ("sdpa", "bf16", "int8", "eager", None),
}


def make(monkeypatch, folder, choice=INT8):
    """A plan whose winner is `choice`, made by a search on a machine made up."""
    name = only(monkeypatch, choice)[choice]
    machine = install(monkeypatch, Machine(cost={name: 0.005}, weights={name: 9 * MB}))
    monkeypatch.setattr("paretune.report.html.write_report", lambda result, path: path.write_text("-", "utf-8"))
    out = run(machine, folder, budget_sec=60.0)
    assert out.winner == recipe_of(choice).hash
    results.write(out, folder)
    return out


@pytest.fixture(scope="module")
def good_plan(tmp_path_factory):
    """The text of a whole `plan.json`."""
    folder = tmp_path_factory.mktemp("good") / "plan"
    with pytest.MonkeyPatch.context() as patch:
        make(patch, folder)
    return (folder / "plan.json").read_text("utf-8")


def test_a_plan_comes_back_whole(monkeypatch, tmp_path, pocket_folder):
    folder = tmp_path / "plan"
    make(monkeypatch, folder)
    assert is_plan(folder) and is_plan(folder / "plan.json") and not is_plan(tmp_path)
    for path in (folder, str(folder), folder / "plan.json"):
        plan = read_plan(path)
        assert isinstance(plan, Plan)
        assert plan.recipe == recipe_of(INT8)
        assert plan.folder == folder and plan.model_folder == pocket_folder
        assert plan.file.outcome == "winner" and plan.file.confirmation.n_processes >= 1
        assert plan.file.schema_version == 1 and plan.file.model.source == "pocket"
    assert not (folder / "model").exists(), "converting pocket is instant"


def test_a_folder_without_a_plan(tmp_path):
    with pytest.raises(UsageError) as caught:
        read_plan(tmp_path)
    assert str(tmp_path) in str(caught.value) and "plan.json" in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: '{"recipe": 5}',
        lambda text: text.replace('"recipe"', '"recipes"'),
        lambda text: json.dumps(json.loads(text) | {"model": {}}),
        lambda text: json.dumps(json.loads(text) | {"recipe": {"transforms": [{"name": "int7"}]}}),
        lambda text: json.dumps(json.loads(text) | {"recipe": None}),
        lambda text: json.dumps(json.loads(text) | {"schema_version": 99}),
        lambda text: json.dumps(json.loads(text) | {"hardware": None, "model": {"source": "pocket", "folder": 3}}),
    ],
    ids=["empty", "half", "list", "null", "number", "renamed", "no-model", "transform", "none", "version", "kinds"],
)
def test_a_damaged_plan_is_one_line_that_names_the_file_or_the_fault(good_plan, tmp_path, damage):
    (tmp_path / "plan.json").write_text(damage(good_plan), "utf-8")
    with pytest.raises(ParetuneError) as caught:
        read_plan(tmp_path).warnings()
    assert "\n" not in str(caught.value) and caught.value.cure


def test_a_plan_of_another_schema_says_which_version_wrote_it(good_plan, tmp_path):
    other = {"schema_version": 2, "versions": {"paretune": "9.1.0"}, "of_that_version": True}
    (tmp_path / "plan.json").write_text(json.dumps(json.loads(good_plan) | other), "utf-8")
    with pytest.raises(
        UsageError, match=r"written by paretune 9\.1\.0, with schema version 2; this version reads"
    ) as caught:
        read_plan(tmp_path)
    assert "\n" not in str(caught.value) and "tune" in caught.value.cure


def test_a_plan_runs_where_an_earlier_version_wrote_no_evidence(good_plan, tmp_path):
    kept = {"schema_version", "recipe", "model"}
    data = {key: value for key, value in json.loads(good_plan).items() if key in kept}
    (tmp_path / "plan.json").write_text(json.dumps(data | {"model": {"source": "pocket", "folder": None}}), "utf-8")
    plan = read_plan(tmp_path)
    assert plan.recipe == recipe_of(INT8) and plan.warnings() == [] and plan.file.confirmation is None


def test_a_plan_that_is_not_text(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError) as caught:
        read_plan(tmp_path)
    assert "damaged" in str(caught.value)


def test_a_plan_whose_model_is_gone(monkeypatch, tmp_path):
    folder = tmp_path / "plan"
    make(monkeypatch, folder)
    data = json.loads((folder / "plan.json").read_text("utf-8"))
    data["model"]["source"] = str(tmp_path / "gone")
    (folder / "plan.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(ParetuneError) as caught:
        read_plan(folder)
    assert "gone" in str(caught.value)


def test_a_plan_whose_stored_checkpoint_is_gone(monkeypatch, tmp_path):
    folder = tmp_path / "plan"
    monkeypatch.setattr(results, "INSTANT_SEC", 0.0)
    make(monkeypatch, folder)
    (folder / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(ParetuneError) as caught:
        read_plan(folder)
    assert str(folder) in str(caught.value)


def test_another_machine_is_warned_of(monkeypatch, tmp_path):
    folder = tmp_path / "plan"
    make(monkeypatch, folder)
    assert read_plan(folder).warnings() == []
    real = hardware.fingerprint()
    monkeypatch.setattr(hardware, "fingerprint", lambda: {**real, "cpu_model": "another"})
    (said,) = read_plan(folder).warnings()
    assert "another machine" in said and "tune" in said


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_a_stored_checkpoint_gives_bit_equal_logits(monkeypatch, tmp_path, pocket_folder, choice):
    folder = tmp_path / "plan"
    monkeypatch.setattr(results, "INSTANT_SEC", 0.0)
    make(monkeypatch, folder, choice)
    plan = read_plan(folder)
    assert plan.model_folder == folder / "model" and (folder / "model" / "tokenizer.json").is_file()
    assert not list(folder.rglob("*.tmp"))
    tokens = torch.randint(0, 8000, (2, 40), generator=torch.Generator().manual_seed(1))
    logits = []
    for source in (plan.model_folder, pocket_folder):
        runner = load_recipe(source, plan.recipe, check=False).runner
        cache = runner.new_cache(2, 48)
        prefill = runner.forward(tokens[:, :39], cache, "all")
        logits.append(torch.cat([prefill, runner.forward(tokens[:, 39:], cache, "last")], dim=1))
    assert logits[0].dtype == logits[1].dtype and torch.equal(*logits)


def test_the_python_api_runs_a_plan(monkeypatch, tmp_path):
    import paretune

    folder = tmp_path / "plan"
    monkeypatch.setattr(results, "INSTANT_SEC", 0.0)
    make(monkeypatch, folder)
    answer = paretune.load(str(folder)).generate("The river", 5)
    direct = paretune.load("pocket", recipe=recipe_of(INT8)).generate("The river", 5)
    assert answer.tokens == direct.tokens and len(answer.tokens) == 5


def test_a_stored_checkpoint_of_an_earlier_run_does_not_stay(monkeypatch, tmp_path):
    folder = tmp_path / "plan"
    with monkeypatch.context() as patch:
        patch.setattr(results, "INSTANT_SEC", 0.0)
        make(monkeypatch, folder)
    assert (folder / "model").is_dir()
    make(monkeypatch, folder)
    assert not (folder / "model").exists() and read_plan(folder).file.model.folder is None
