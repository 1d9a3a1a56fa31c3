"""A mechanism declares itself once: toys of another package go the whole way through the house.

Each toy is one file and one registration. What is tested here is that nothing else has to know of it.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
from toys import relu_attention

from paretune import registry
from paretune.ops.attention.spec import AttentionSpec


def test_the_page_shows_a_toy_whole():
    here = Path(__file__).resolve().parent
    page = (here.parent.parent / "docs" / "extending.md").read_text("utf-8")
    assert textwrap.indent((here / "toys" / "relu_attention.py").read_text("utf-8"), "    ") in page
    groups = [table.group for table in vars(registry).values() if isinstance(table, registry.Registry)]
    assert groups and all(f"`{group}`" in page for group in groups)


def names(listed, section):
    return [entry["name"] for entry in listed[section]]


def test_ls_lists_the_toys_and_their_axes(listed):
    assert {"relu_attention", "three_bits"} <= set(names(listed, "transforms"))
    assert "halves" in names(listed, "runners") and "three_bits" in names(listed, "weight_formats")
    assert "toy" in names(listed, "model_families") and "sizes" in names(listed, "studies")
    assert "three_bits" in names(listed, "quantize_formats")
    axes = {entry["name"]: entry for entry in listed["axes"]}
    assert "relu_attention" in axes["attention"]["what"] and "three_bits" in axes["quantize"]["what"]
    assert "halves" in axes["runner"]["what"]
    tried = {option["name"]: option["reason"] for option in axes["quantize"]["tried"]}
    assert tried["three_bits"] == "every call dequantises: it saves memory, not time"
    what = {e["name"]: e["what"] for section in ("transforms", "runners", "studies") for e in listed[section]}
    assert what["relu_attention"].startswith("Attention without softmax") and what["sizes"].startswith("A small study")


@pytest.mark.slow
def test_a_device_is_asked_about_them(installed):
    found = json.loads(installed("ls", "--device", "cpu", "--json").stdout)
    verdicts = {e["name"]: e["verdicts"] for section in ("transforms", "runners") for e in found[section]}
    assert [v["state"] for v in verdicts["three_bits"]] == ["works"]
    assert [v["name"] for v in verdicts["relu_attention"]] == ["relu"]
    assert [v["state"] for v in verdicts["halves"]] == ["works"]


def test_a_package_that_cannot_be_imported_is_a_row_and_the_rest_works(installed):
    found = json.loads(installed("ls", "--json", with_broken=True).stdout)
    what = {e["name"]: e["what"] for section in ("transforms", "runners") for e in found[section]}
    assert what["broken"] == (
        "cannot be imported: ModuleNotFoundError: No module named 'toys.nowhere' (package paretune_broken)"
    )
    assert what["broken_runner"].startswith("cannot be imported: ModuleNotFoundError: No module named 'surely")
    assert what["int8"].startswith("int8 weights, 16-bit")  # nobody takes the name of one of ours
    assert what["int8 (paretune_broken)"] == "cannot be used: the name 'int8' is Paretune's own"
    assert what["nothing"] == "cannot be used: NotATransform is no subclass of paretune.transforms.base.Transform " + (
        "(package paretune_broken)"
    )
    assert [group["name"] for group in found["unknown_groups"]] == ["paretune.transform"]
    assert "three_bits" in names(found, "transforms")
    error = installed(
        "generate", "pocket", "--config", "broken_runner", "--prompt", "a", ok=False, with_broken=True
    ).stderr
    assert "the runner 'broken_runner' cannot be imported: ModuleNotFoundError" in error and "Traceback" not in error


def test_tune_has_them_in_its_space(installed):
    shown = installed("tune", "pocket", "--dry-run").stdout
    space, left_out = shown.split(" left out, ", 1)
    assert "\n  relu, eager\n" in space and "\n  sdpa, halves\n" in space and "relu + int8, halves" in space
    assert re.search(
        r"relu, native and \d+ more: the native runner computes attention itself, and has no relu", left_out
    )
    assert re.search(r"three_bits, eager and \d+ more: every call dequantises: it saves memory, not time", left_out)


CONFIGS = "baseline,relu_attention,three_bits+int8,halves+int4(group=64),relu_attention+halves+kv8"


@pytest.mark.slow
def test_generate_runs_an_expression_of_them(installed):
    done = installed(
        "generate", "pocket", "--config", "halves+three_bits+int8", "--prompt", "The", "--max-new-tokens", 5
    )
    assert "sdpa + three_bits + int8, halves" in done.stderr and "three_bits" in done.stderr
    refused = installed("generate", "pocket", "--config", "native+relu_attention", "--prompt", "The", ok=False)
    assert refused.returncode == 2 and "the native runner computes attention itself" in refused.stderr


@pytest.mark.slow
def test_bench_measures_them_and_the_report_names_them(installed, tmp_path):
    done = installed("bench", "pocket", "--config", CONFIGS, "--budget", "30s", "-o", tmp_path / "out", "--json")
    rows = {row["config"]: row for row in json.loads(done.stdout)["rows"]}
    assert set(CONFIGS.split(",")) <= set(rows)
    for name in CONFIGS.split(","):
        assert rows[name]["tpot_sec"] > 0, rows[name]
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "relu_attention" in page and "three_bits+int8" in page


@pytest.mark.slow
def test_quantize_stores_the_format_and_it_loads_again(installed, tmp_path):
    folder = tmp_path / "three"
    installed("quantize", "pocket", "--format", "three_bits", "-o", folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert "three_bits" in json.dumps(config)
    done = installed("generate", folder, "--prompt", "The", "--max-new-tokens", 4)
    assert "three_bits" in done.stderr


@pytest.mark.slow
def test_profile_takes_a_step_apart_under_them(installed, tmp_path):
    flags = ("--config", "relu_attention", "--phase", "decode,train", "--quick", "-o", tmp_path / "p", "--json")
    found = installed("profile", "pocket", *flags).stdout
    assert "relu" in found and "kernel_classes" in found


@pytest.mark.slow
def test_a_plan_holds_a_recipe_of_them(installed, tmp_path):
    """As `tune` writes it: the recipe is plain data with the toys' names."""
    code = (
        "from paretune.recipe import Recipe, preset; import sys;"
        "recipe = preset('relu_attention+three_bits+int8+halves');"
        "open(sys.argv[1], 'w').write(recipe.to_toml());"
        "assert Recipe.read(sys.argv[1]) == recipe and preset(sys.argv[1]).hash == recipe.hash"
    )
    path = tmp_path / "recipe.toml"
    installed.python("-c", code, path)
    done = installed("generate", "pocket", "--config", path, "--prompt", "The", "--max-new-tokens", 3)
    assert "relu + three_bits + int8, halves" in done.stderr


@pytest.mark.slow
def test_the_study_runs(installed, tmp_path):
    done = installed("study", "sizes", "--quick", "-o", tmp_path)
    assert "int8: " in done.stdout
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["study"] == "sizes"
    refused = installed("study", "sizes", "--pairs", "x.jsonl", ok=False)
    assert "the sizes study has no --pairs" in refused.stderr and "attention" in refused.stderr


def test_a_new_family_is_one_file_too(installed, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "toy", "vocab_size": 200, "context": 64, "depth": 2, "heads": 2, "width": 32})
    )
    installed("new", tmp_path / "config.json", "-o", tmp_path / "made", "--random")
    config = json.loads((tmp_path / "made" / "config.json").read_text("utf-8"))
    assert config["model_type"] == "toy" and config["width"] == 32


def test_the_toy_attention_adds_the_bias_of_alibi():
    """One head at a time, by the formula: relu(q k - slope * distance), by the number of keys that are seen."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    found = relu_attention.attention(q, k, v, None, AttentionSpec(scale=0.5, slopes=(0.5, 0.25)))
    distance = torch.arange(5)[:, None] - torch.arange(5)[None, :]
    for head, slope in enumerate((0.5, 0.25)):
        scores = torch.relu(0.5 * q[0, head] @ k[0, head].T - slope * distance).tril()
        expected = scores @ v[0, head] / torch.arange(1, 6)[:, None]
        torch.testing.assert_close(found[0, head], expected)


def test_the_toys_are_not_ours():
    for table in (registry.TRANSFORMS, registry.RUNNERS, registry.FORMATS, registry.STUDIES):
        assert not {"relu_attention", "three_bits", "halves", "sizes"} & set(table.names())
