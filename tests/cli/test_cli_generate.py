"""`paretune generate`: what it prints, and every input that it refuses."""

from __future__ import annotations

import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from made_records import machine
from paretune.cli import app as cli
from paretune.engine.generate import naive_generate
from paretune.model import checkpoint
from paretune.model.tokenizer import Tokenizer

PROMPT = "Once upon a time"
INT8 = {"transforms": [{"name": "attention", "form": "sdpa"}, {"name": "int8"}], "engine": {"runner": "eager"}}


@pytest.fixture
def generate(capsys, monkeypatch):
    """`generate(*arguments) -> (exit code, stdout, stderr)`, in this process, without a traceback."""
    monkeypatch.delenv("PARETUNE_DEBUG", raising=False)

    def call(*arguments: str):
        code = cli.run(["generate", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


@pytest.fixture
def as_json(generate):
    def call(*arguments: str):
        code, out, err = generate(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def folder(tmp_path, tiny_gpt2_folder, pocket_folder):
    """A copy of a tiny model with a tokenizer (of more tokens than the model has), to be damaged."""
    target = tmp_path / "model"
    shutil.copytree(tiny_gpt2_folder, target)
    shutil.copy(pocket_folder / "tokenizer.json", target)
    return target


def plan_folder(tmp_path, recipe=INT8, **changes):
    folder = tmp_path / "plan"
    folder.mkdir()
    plan = {"schema_version": 1, "recipe": recipe, "model": {"source": "pocket", "folder": None}} | changes
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def test_greedy_tokens_are_those_of_the_naive_oracle(as_json, pocket_folder):
    got = as_json("-p", PROMPT, "--max-new-tokens", "12")
    model = checkpoint.load(pocket_folder, torch.float32)
    tokens, margins = naive_generate(model, Tokenizer(pocket_folder).encode(PROMPT), 12)
    assert min(margins) > 1e-4, "a tie: choose another prompt"
    assert got["tokens"] == tokens
    assert got["text"] == Tokenizer(pocket_folder).decode(tokens)


def test_json_has_the_result_the_times_and_what_ran(as_json):
    got = as_json("-p", PROMPT, "--max-new-tokens", "4", "--config", "int8", "--threads", "1")
    assert {"schema_version", "command", "seed", "versions", "hardware", "prompt", "tokenize_sec"} <= set(got)
    assert got["prompt"] == PROMPT and len(got["tokens"]) == 4 and got["finish_reason"] == "length"
    assert 0 < got["ttft_sec"] < got["total_sec"] and got["tpot_sec"] > 0
    assert got["ran"]["weight_formats"] == ["int8_rows"] and got["ran"]["dtype"] == "float32"
    assert got["ran"]["threads"] == 1 and got["recipe"]["engine"] == {
        "runner": "eager",
        "compile_mode": "default",
        "threads": 1,
    }
    assert got["generations"] == [{k: got[k] for k in got["generations"][0]}]


def test_a_batch_gives_each_prompt_what_it_gets_alone(as_json, generate):
    prompts = [PROMPT, "The old man looked at the sea and said that"]
    both = as_json("-p", prompts[0], "-p", prompts[1], "--max-new-tokens", "8")
    alone = [as_json("-p", p, "--max-new-tokens", "8") for p in prompts]
    assert [g["tokens"] for g in both["generations"]] == [a["tokens"] for a in alone]
    assert "tokens" not in both
    _, out, _ = generate("-p", prompts[0], "-p", prompts[1], "--max-new-tokens", "8")
    assert [line for line in out.split("\n") if line.startswith("--- prompt")][1].endswith(prompts[1])


def test_streaming_prints_what_is_printed_at_once(generate):
    flags = ["-p", PROMPT, "--max-new-tokens", "30", "--temperature", "1", "--seed", "5", "--stop", " the"]
    streamed, whole = generate(*flags), generate(*flags, "--no-stream")
    assert streamed[0] == whole[0] == 0
    assert streamed[1] == whole[1] and " the" not in whole[1] and len(whole[1]) > 1


def test_stderr_says_how_fast_and_what_ran(generate):
    _, out, err = generate("-p", PROMPT, "--max-new-tokens", "4", "--config", "int8")
    assert err.startswith("paretune: TTFT ") and ", TPOT " in err and "(4 tokens), prompt 5 tokens" in err
    assert "tokenisation" in err and "ran: sdpa + int8, eager (int8_rows weights, float32, cpu" in err
    assert "TTFT" not in out
    assert generate("-p", PROMPT, "--max-new-tokens", "4", "--config", "int8", "-q") == (0, out, "")


def test_sampling_without_a_seed_names_the_one_it_drew(as_json):
    flags = ["-p", PROMPT, "--max-new-tokens", "8", "--temperature", "1.5"]
    first = as_json(*flags)
    assert as_json(*flags, "--seed", first["seed"])["tokens"] == first["tokens"]


def test_options_without_effect_are_said(generate):
    _, _, err = generate("-p", PROMPT, "--max-new-tokens", "1", "--top-p", "0.5")
    assert "change nothing at temperature 0" in err


def test_prompt_from_a_file_and_from_stdin(as_json, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(f"{PROMPT}\r\n".encode())
    assert as_json("--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", "1")["prompt"] == PROMPT
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(f"{PROMPT}\n".encode())))
    assert as_json("--prompt-file", "-", "--max-new-tokens", "1")["prompt"] == PROMPT


def test_a_plan_runs_its_own_recipe(as_json, generate, tmp_path):
    plan = plan_folder(tmp_path)
    by_plan = as_json(plan, "-p", PROMPT, "--max-new-tokens", "6")
    by_preset = as_json("-p", PROMPT, "--max-new-tokens", "6", "--config", "int8")
    assert by_plan["tokens"] == by_preset["tokens"] and by_plan["ran"]["name"] == "sdpa + int8, eager"
    assert as_json(plan / "plan.json", "-p", PROMPT, "--max-new-tokens", "1")["ran"]["name"] == "sdpa + int8, eager"
    code, _, err = generate(plan, "-p", PROMPT, "--config", "fp32")
    assert code == 2 and "is a plan and has its own recipe" in err


def test_a_plan_of_another_machine_warns(generate, tmp_path):
    plan = plan_folder(tmp_path, hardware=machine("another"))
    code, _, err = generate(plan, "-p", PROMPT, "--max-new-tokens", "1", "-q")
    assert code == 0 and "measured on another machine" in err


def test_a_recipe_file(as_json, tmp_path):
    (tmp_path / "my.json").write_text(json.dumps(INT8))
    got = as_json("-p", PROMPT, "--max-new-tokens", "1", "--config", tmp_path / "my.json")
    assert got["ran"]["name"] == "sdpa + int8, eager"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is no prompt"),
        (["-p", ""], "the prompt is empty"),
        (["-p", "\udcff"], "not valid UTF-8"),
        (["--prompt-file", "/nowhere.txt"], "there is no prompt file"),
        (["-p", "word " * 1100], "the model's context is 1024"),
        (["-p", PROMPT, "--max-new-tokens", "1024"], "Ask for at most 1019 new tokens"),
        (["-p", PROMPT, "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["-p", PROMPT, "--config", "in8"], "unknown config 'in8'. Did you mean 'int8'?"),
        (["-p", PROMPT, "--config", "/nowhere.toml"], "there is no recipe file"),
        (["-p", PROMPT, "--runner", "compil"], "unknown runner 'compil'. Did you mean 'compile'?"),
        (["-p", PROMPT, "--device", "tpu"], "there is no device 'tpu'"),
        (["-p", PROMPT, "--temperature", "-1"], "temperature is -1"),
        (["-p", PROMPT, "--temperature", "nan"], "temperature is nan"),
        (["-p", PROMPT, "--top-p", "0"], "top-p is 0"),
        (["-p", PROMPT, "--seed", "-1"], "'--seed'"),
        (["-p", PROMPT, "--stop", ""], "--stop is empty"),
        (["-p", PROMPT, "--chat"], "no chat template"),
        (["./nowhere", "-p", PROMPT], "there is no folder './nowhere'"),
        (["no/such-model", "-p", PROMPT], "there is no folder or plan"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_code_2(generate, arguments, said):
    code, out, err = generate(*arguments)
    assert (code, out) == (2, "") and said in err
    assert err.count("\n") == 1 and err.startswith("paretune: error: ")


def without_config(folder):
    (folder / "config.json").unlink()
    return "has no config.json"


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "is truncated or damaged"


def garbage(folder):
    (folder / "model.safetensors").write_bytes(b"no safetensors at all")
    return "is truncated or damaged"


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "pickle"


def unknown_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    return "model_type 'mamba' is not supported"


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    return "has no tokenizer.json"


@pytest.mark.parametrize(
    "damage", [without_config, truncated, garbage, pickled, unknown_architecture, without_tokenizer]
)
def test_a_damaged_folder_is_one_line_that_names_it(generate, folder, damage):
    said = damage(folder)
    code, out, err = generate(folder, "-p", "a", "--max-new-tokens", "2", "--no-stream")
    assert (code, out) == (1, "") and said in err and "model" in err
    assert err.count("\n") == 1 and err.startswith("paretune: error: ")


def test_a_tokenizer_of_another_model_is_refused(generate, folder):
    code, _, err = generate(folder, "-p", PROMPT, "--max-new-tokens", "2")
    assert code == 2 and "belongs to another model" in err


def test_a_damaged_plan(generate, tmp_path):
    plan = plan_folder(tmp_path, recipe={"transforms": [{"name": "int9"}]})
    code, _, err = generate(plan, "-p", PROMPT)
    assert code == 2 and "unknown transform 'int9'. Did you mean 'int8'?" in err
    (plan / "plan.json").write_text("{")
    code, _, err = generate(plan, "-p", PROMPT)
    assert code == 2 and "is damaged" in err


def test_an_interrupt_keeps_what_was_streamed(generate, monkeypatch):
    def interrupted(runner, prompts, *args, on_text, **options):
        on_text(0, "half a sen")
        raise KeyboardInterrupt

    monkeypatch.setattr("paretune.engine.generate.generate", interrupted)
    assert generate("-p", PROMPT) == (130, "half a sen\n", "paretune: interrupted\n")


def test_a_plan_with_a_table_says_what_it_chose(as_json, generate, tmp_path):
    def recipe(form, *more):
        return {**INT8, "transforms": [*more, {"name": "attention", "form": form}, {"name": "int8"}]}

    def form(name, recipe, label="bounded", upper=0.002, n_bytes=0):
        fixed = {"longest": None, "weights_bytes": n_bytes}
        return {"name": name, "recipe": recipe, "label": label, "ppl_increase_upper": upper, **fixed}

    window = recipe("sdpa", {"name": "mechanism", "pattern": "window:4"})
    forms = [form("plan", INT8), form("eager", recipe("eager")), form("window", window)]
    forms.append(
        form("as it was", {"transforms": [{"name": "attention", "form": "sdpa"}]}, "lossless", None, 30_000_000)
    )
    cells = [
        [[{"form": n, "n_bytes": 1000} for n in names]]
        for names in (("window", "eager", "plan", "as it was"), ("plan",))
    ]
    table = {"batch_sizes": [1, 4], "lengths": [64], "forms": forms, "cells": cells}
    plan = plan_folder(tmp_path, dispatch=table)
    asked = (plan, "-p", PROMPT, "--max-new-tokens", "8")
    one = as_json(*asked)
    assert one["ran"]["chosen"]["form"] == "eager" and one["ran"]["name"] == "eager + int8, eager"
    assert one["recipe"]["transforms"][0] == {"name": "attention", "form": "eager"}
    assert one["tokens"] == as_json("pocket", "--config", "int8", *asked[1:])["tokens"]
    two = as_json(plan, *["-p", PROMPT] * 3, "--max-new-tokens", "2")
    assert two["ran"]["chosen"]["form"] == "plan" and "batch 4" in two["ran"]["chosen"]["regime"]
    changed = as_json(*asked, "--quality", "bounded")
    assert changed["ran"]["chosen"]["label"] == "bounded" and changed["ran"]["name"].startswith("window:4")
    assert changed["tokens"] != one["tokens"]
    code, _, err = generate(*asked, "--quality", "lossless")
    assert code == 2 and "no form of this plan keeps" in err and "--spare-memory 29MB" in err
    assert as_json(*asked, "--quality", "lossless", "--spare-memory", "29MB")["ran"]["name"] == "sdpa, eager"
    code, _, err = generate(*asked)
    assert code == 0, err
    assert "chosen by the plan's table: eager + int8, eager (bounded; regime of batch 1, 64 tokens" in err
    # Who names a runner has chosen; a damaged table, unknown levels and sizes are refused.
    assert "chosen" not in as_json(*asked, "--runner", "eager")["ran"]
    for more, words in (
        (("--quality", "best"), "unknown quality level"),
        (("--spare-memory", "much"), "--spare-memory"),
        (("--quality", "plan", "--runner", "eager"), "no choice here"),
    ):
        code, out, err = generate(*asked, *more)
        assert (code, out) == (2, "") and words in err
    assert generate("pocket", "-p", PROMPT, "--quality", "plan")[0] == 2
    table["lengths"] = [0]
    (plan / "plan.json").write_text(json.dumps(json.loads((plan / "plan.json").read_text()) | {"dispatch": table}))
    code, _, err = generate(*asked)
    assert code == 2 and "dispatch table" in err


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("random:1x64", "leaves the query at position 0 without keys"),
        ("window:2048", "a window of 2048 is larger than the context of 1024"),
        ("prefix:2000+window:5", "a prefix of 2000 is larger than the context of 1024"),
        ("blocks:100+window:4", "blocks of 100 do not divide the context of 1024"),
        ("windw:3", "'windw:3' cannot be read"),
        ("window:0", "a window of 0"),
    ],
)
def test_a_pattern_that_makes_no_sense_is_one_line(generate, tmp_path, pattern, words):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[[transforms]]\nname = "mechanism"\npattern = "{pattern}"\n', "utf-8")
    code, out, err = generate("-p", PROMPT, "--config", recipe, "-q")
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_an_empty_article_is_refused(generate):
    code, out, err = generate("-p", PROMPT, "-p", " \n", "--task", "summarization")
    assert (code, out) == (2, "") and "an article is empty" in err
