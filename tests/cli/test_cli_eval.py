"""`paretune eval` on `pocket`: the protocol, the formats, the exit codes and every wrong input."""

from __future__ import annotations

import json
import os

import pytest
import torch

from paretune import clock, native_build
from paretune.cli import eval_side, eval_text
from paretune.cli.app import run
from paretune.evaluate import texts
from paretune.model.tokenizer import Tokenizer

FAST = ["--context", "64", "--threads", "1", "--quiet"]


@pytest.fixture(autouse=True)
def _threads_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def evaluated(capsys, *arguments: str, code: int = 0) -> dict:
    capsys.readouterr()
    assert run(["eval", "pocket", *FAST, "--json", *arguments]) == code
    return json.loads(capsys.readouterr().out)


def test_perplexity_has_its_protocol_and_units(capsys):
    result = evaluated(capsys, "--limit", "1200")
    value = result["perplexity"]
    assert value["protocol"] == "paretune-pieces/confirm[:1200]/ctx64/stride32/token"
    assert value["n_tokens_scored"] == 1199 and result["text"]["n_tokens"] == 1200
    assert 5 < value["perplexity"] < 1000 and 0.5 < value["bits_per_byte"] < 4
    assert result["fidelity"] is None and result["proof"]
    assert {"schema_version", "command", "versions", "hardware"} <= set(result)


def test_non_overlapping_windows_are_stride_equal_context(capsys):
    value = evaluated(capsys, "--limit", "640", "--stride", "64")["perplexity"]
    assert value["protocol"].endswith("/ctx64/stride64/token")
    assert (value["n_windows"], value["n_tokens_scored"]) == (10, 630)


def test_it_is_the_runner_of_the_config_that_is_scored(capsys):
    base = evaluated(capsys, "--limit", "640")["perplexity"]["perplexity"]
    coarse = evaluated(capsys, "--limit", "640", "--config", "int8")["perplexity"]["perplexity"]
    assert coarse != base and coarse == pytest.approx(base, rel=0.05)


@pytest.mark.parametrize(
    "config",
    [
        "int8",
        pytest.param(
            "native_int8",
            marks=pytest.mark.skipif(native_build.unavailable_reason() is not None, reason="no C++ compiler"),
        ),
    ],
)
def test_perplexity_alone_is_prefill_of_one_config(capsys, monkeypatch, config):
    """Neither the baseline nor a decode step is paid for unasked."""
    from paretune.engine.load import load_recipe
    from paretune.evaluate import fidelity

    loaded = []
    monkeypatch.setattr(fidelity, "score", lambda *_, **__: pytest.fail("two phases were scored"))
    monkeypatch.setattr(
        "paretune.engine.load.load_recipe", lambda f, r, *rest: loaded.append(r.name) or load_recipe(f, r, *rest)
    )
    result = evaluated(capsys, "--limit", "640", "--config", config)
    assert len(loaded) == 1 and result["perplexity"]["n_tokens_scored"] == 639
    assert result["fidelity"] is None and result["baseline"] is None


def test_a_baseline_that_is_named_is_compared_with(capsys):
    result = evaluated(capsys, "--limit", "640", "--config", "int8", "--baseline", "fp32")
    assert result["perplexity"] and result["baseline"] == "fp32"
    assert result["fidelity"]["baseline_perplexity"] != result["fidelity"]["perplexity"]


def test_progress_names_what_is_left(capsys):
    with clock.use(clock.FakeClock()) as fake:
        progress = eval_side.progress_of("perplexity", "window", quiet=False)
        for done in range(1, 41):  # 5 s each
            fake.sleep(5.0)
            progress(done, 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "perplexity: window 2 of 40, about 3 min 10 s left"
    assert lines[1] == "perplexity: window 4 of 40, about 3 min left"
    assert len(lines) == 19  # every 10 s, and no line when all is done
    with clock.use(clock.FakeClock()) as fake:
        progress = eval_side.progress_of("perplexity", "window", quiet=True)
        fake.sleep(60.0)
        progress(1, 2)
    assert capsys.readouterr().err == ""


@pytest.fixture
def few_blocks(monkeypatch):
    """A bound from few blocks of text: the rule of 40 is tested elsewhere, and 11,000 tokens take a while."""
    monkeypatch.setattr("paretune.evaluate.fidelity.MIN_BLOCKS", 4)


def test_a_config_brings_fidelity_to_the_baseline(capsys, few_blocks):
    result = evaluated(capsys, "--limit", "1200", "--config", "int8", "--max-ppl-increase", "5%")
    value = result["fidelity"]
    assert result["perplexity"]["protocol"].startswith("paretune-pieces/confirm[:1200]")
    assert value["ppl_increase"] <= value["ppl_increase_upper"] < 0.05 and value["within_bound"] is True
    assert 0 < value["kl_mean"] < 0.1 and 0.9 < value["top1_agreement"] < 1 and not value["identical"]
    assert value["protocol"].endswith("/win64/prefill32+decode31/token")


def test_fidelity_alone_of_an_equal_config_is_exact(capsys):
    result = evaluated(capsys, "--limit", "640", "--task", "fidelity", "--config", "fp32")
    assert result["perplexity"] is None
    assert result["fidelity"]["identical"] and result["fidelity"]["top1_agreement"] == 1


def test_over_the_bound_exits_3_with_the_result_written(capsys, tmp_path, few_blocks):
    out = tmp_path / "out"
    arguments = ["--limit", "1200", "--task", "fidelity", "--config", "int8", "--max-ppl-increase", "0"]
    assert run(["eval", "pocket", *FAST, *arguments, "--output_dir", str(out)]) == 3
    captured = capsys.readouterr()
    assert "int8 does not meet the bound" in captured.err and captured.err.count("\n") == 1
    assert json.loads((out / "eval.json").read_text())["fidelity"]["within_bound"] is False
    page = (out / "eval.md").read_text()
    assert page == captured.out and "Quality loss" in page and "at most" in page


def test_too_little_text_for_a_bound_says_so(capsys):
    result = evaluated(
        capsys, "--limit", "640", "--task", "fidelity", "--config", "int8", "--max-ppl-increase", "5%", code=3
    )
    assert "too little text" in result["fidelity"]["reason"]


def test_the_page_names_protocol_and_definitions(capsys):
    assert run(["eval", "pocket", *FAST, "--limit", "640"]) == 0
    out = capsys.readouterr().out
    assert "`paretune-pieces/confirm[:640]/ctx64/stride32/token`" in out
    assert "Bits per byte: " in out and "nats per token" in out and "**Perplexity**" in out


def test_a_text_of_ones_own_and_its_name(capsys, tmp_path):
    text = texts.text_of("search")[:4000]
    (tmp_path / "my-text.txt").write_text(text, "utf-8")
    result = evaluated(capsys, "--text", str(tmp_path / "my-text.txt"))
    assert result["perplexity"]["protocol"] == "my-text/ctx64/stride32/token"
    assert result["text"]["bytes"] == len(text.encode())
    named = evaluated(capsys, "--text", str(tmp_path / "my-text.txt"), "--text-name", "wikitext2-raw/test")
    assert named["perplexity"]["protocol"] == "wikitext2-raw/test/ctx64/stride32/token"
    assert named["perplexity"]["perplexity"] == result["perplexity"]["perplexity"]


@pytest.mark.realdata
def test_wikitext_joined_is_the_published_text(data_dir):
    tokenizer = Tokenizer(data_dir / "gpt2_tokenizer")
    path = data_dir / "wikitext2" / "wiki.test.raw"
    flags = eval_text.TextFlags(path, "wikitext2-raw/test", True, None, None, None, None, None)
    ids, n_bytes, name = eval_text.tokens_of(tokenizer, flags)
    assert (len(ids), name) == (287_644, "wikitext2-raw/test") and n_bytes > 1_000_000


def test_a_plan_is_compared_with_its_source(capsys, tmp_path):
    from paretune.recipe import preset

    data = {"schema_version": 1, "recipe": preset("int8").to_dict(), "model": {"source": "pocket", "folder": None}}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert run(["eval", str(tmp_path), *FAST, "--json", "--limit", "640", "--task", "fidelity"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["config"], result["baseline"]) == ("plan", "baseline")
    assert result["fidelity"] and not result["fidelity"]["identical"]
    assert run(["eval", str(tmp_path), *FAST, "--json", "--limit", "640"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert (alone["config"], alone["baseline"], alone["fidelity"]) == ("plan", None, None)
    assert alone["perplexity"]["perplexity"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "int9"], "unknown config 'int9'"),
        (["--baseline", "nothing"], "unknown config 'nothing'"),
        (["--task", "rouge"], "unknown task 'rouge'"),
        (["--task", "fidelity"], "there is nothing to compare"),
        (["--max-ppl-increase", "1%"], "there is nothing to compare"),
        (["--config", "int8", "--baseline", "int8"], "there is nothing to compare"),
        (["--config", "int8", "--max-ppl-increase", "much"], "not a percentage"),
        (["--context", "5000"], "exceeds the model's 1024 positions"),
        (["--context", "1"], "--context 1"),
        (["--context", "64", "--stride", "65"], "--stride 65 is not in 1..64"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--limit", "0"], "--limit is 0"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--text", "/nowhere/text.txt"], "there is no text file"),
    ],
)
def test_wrong_input_is_one_line(capsys, arguments, message):
    assert run(["eval", "pocket", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""


def test_texts_that_cannot_be_scored(capsys, tmp_path):
    latin, short, empty = (tmp_path / f"{name}.txt" for name in ("latin", "short", "empty"))
    latin.write_bytes("caf\xe9 ".encode("latin-1") * 200)
    short.write_text("Too short.")
    empty.write_text(" \n")
    for path, code, message in (
        (latin, 2, "is not UTF-8 (byte 3)"),
        (short, 1, "fewer than one window of 1024"),
        (empty, 2, "is empty"),
        (tmp_path, 2, "is a folder"),
    ):
        assert run(["eval", "pocket", "--text", str(path)]) == code
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and out == ""


def test_a_read_only_output_folder_fails_before_the_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_text, "load_side", lambda *_: pytest.fail("a model was loaded"))
    if os.geteuid() == 0:  # root writes everywhere: a file in the way is as good
        (tmp_path / "out").write_text("")
    else:
        (tmp_path / "out").mkdir(mode=0o500)
    assert run(["eval", "pocket", "-o", str(tmp_path / "out" / "deeper")]) == 1
    err = capsys.readouterr().err
    assert "cannot write" in err and err.count("\n") == 1


def test_lossless_says_which_ways_give_the_same_text(capsys, tmp_path):
    how = ["--limit", "2", "--max-new-tokens", "10", "--batch-size", "2", "-q"]
    assert run(["eval", "pocket", "--task", "lossless", *how, "--config", "int8", "-o", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert (tmp_path / "eval.md").read_text("utf-8") == page and "int8+speculate(suffix), 2 at once" in page
    result = json.loads((tmp_path / "eval.json").read_text("utf-8"))
    assert result["reference"] == result["config"] == "int8" and len(result["ways"]) == 8
    assert {w["verdict"] for w in result["ways"]} <= {"identical", "numerics"}
    assert (
        run(["eval", "pocket", "--task", "lossless", *how, "--config", "int8", "--baseline", "baseline", "--json"]) == 0
    )
    ways = json.loads(capsys.readouterr().out)["ways"]
    assert len(ways) == 10 and {w["verdict"] for w in ways} <= {"identical", "other numbers"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stride", "8"], "--stride does not apply to --task lossless"),
        (["--limit", "5000"], "too few for 5000 prompts"),
        (["--max-new-tokens", "1020"], "leaves no room for prompts"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
    ],
)
def test_lossless_refuses_what_it_cannot_do(capsys, arguments, said):
    assert run(["eval", "pocket", "--task", "lossless", *arguments]) in (1, 2)
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out
