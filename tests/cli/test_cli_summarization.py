"""`train`, `eval` and `generate` with --task summarization, as a user meets them."""

from __future__ import annotations

import json

import pytest
import torch

from paretune.cli.app import run
from paretune.evaluate import summaries
from paretune.evaluate.pairs import own_pairs
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.model.prompt import PromptFormat
from paretune.train.pairs import PairSource


@pytest.fixture
def command(capsys):
    before = torch.get_num_threads()

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(map(str, arguments)))
        out, err = capsys.readouterr()
        return code, out, err

    yield call
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model with pocket's tokenizer."""
    hf = {"model_type": "gpt2", "vocab_size": 8192, "n_positions": 96, "n_layer": 1, "n_head": 2, "n_embd": 16}
    folder = tmp_path_factory.mktemp("model")
    model = checkpoint.new(ModelConfig.from_hf(hf | {"eos_token_id": 0, "bos_token_id": 0}))
    checkpoint.save(model, folder, checkpoint.resolve("pocket"))
    return folder


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "news.jsonl"
    rows = [{"body": p.article, "gist": " ".join(p.summary.split()[:8])} for p in own_pairs("search").pairs[:10]]
    path.write_text("\n".join(json.dumps(r) for r in [*rows, {"body": "x", "gist": ""}]), "utf-8")
    return path


@pytest.fixture
def train(command, tiny, pairs_file):
    """`paretune train` on the pairs, three of them held out."""

    def call(out, *more):
        columns = ("--article-column", "body", "--summary-column", "gist")
        given = ("--task", "summarization", "--pairs", pairs_file, *columns, "--heldout-pairs", 3, "--dtype", "fp32")
        return command("train", tiny, *given, "-o", out, *more)

    return call


def test_train_then_generate_and_evaluate_in_the_recorded_format(command, train, tiny, pairs_file, tmp_path):
    out = tmp_path / "tuned"
    columns = ("--article-column", "body", "--summary-column", "gist")
    code, text, err = train(
        out, "--batch-size", 2, "--prompt-suffix", r"\n=>", "--eos", "sentence", "--max-len", 64,
        "--config", "flash_attn", "--distill", tiny,
    )  # fmt: skip
    assert code == 0, err
    assert "7 pairs; skipped: 1 without summary" in err and "held out: 3 pairs" in err and "4 updates" in text
    assert "held-out summaries:" in text
    form = PromptFormat.read(out)
    assert form is not None and (form.suffix, form.eos, form.max_len) == ("\n=>", "sentence", 64)

    code, text, err = command("generate", out, "-p", "A long article " * 40, "--task", "summarization", "--json")
    assert code == 0 and "1 of 1 articles cut to the limit of 64 tokens" in err
    assert json.loads(text)["n_prompt_tokens"] == 64 - form.max_new_tokens
    code, text, err = command("generate", out, "-p", "Once", "--max-new-tokens", 2)
    assert code == 0 and "--task summarization gives the prompt the form that it knows" in err

    code, text, err = command(
        "eval", out, "--task", "summarization", "--pairs", pairs_file, *columns, "--limit", 5, "-o", tmp_path / "e"
    )
    assert code == 0, err
    assert "lead-3" in text and "copy" in text and "nrefs:1" in text and "Worst by ROUGE-L" in text
    result = json.loads((tmp_path / "e" / "eval.json").read_text("utf-8"))
    assert result["prompt"] == form.to_json() and [r["system"] for r in result["rows"]] == [
        "baseline",
        "lead-3",
        "copy",
    ]
    assert {p.name for p in (tmp_path / "e").iterdir()} == {"eval.json", "eval.md", "results.csv"}


def test_eval_compares_two_configurations_on_the_same_articles(command, tiny):
    code, text, err = command(
        "eval", tiny, "--task", "summarization", "--limit", 3, "--config", "eager_attn", "--max-new-tokens", 5, "--json"
    )
    assert code == 0, err
    result = json.loads(text)
    assert [r["system"] for r in result["rows"]] == ["baseline", "eager_attn", "lead-3", "copy"]
    assert all(gap["value"] == gap["low"] == gap["high"] == 0 for gap in result["difference"].values())  # exact
    assert any("records no prompt format" in note for note in result["notes"])


def test_eval_shows_the_worst_summaries_of_the_configuration(command, tiny, monkeypatch):
    """Not those of the baseline, which is scored first."""
    texts = iter(["of the baseline", "of the configuration"])

    def summarize(runner, tokenizer, form, articles, **_):
        text = next(texts)
        return [summaries.Summary(text, 4, True) for _ in articles]

    monkeypatch.setattr(summaries, "summarize", summarize)
    code, text, err = command("eval", tiny, "--task", "summarization", "--limit", 2, "--config", "eager_attn")
    assert code == 0, err
    shown = text.partition("Worst by ROUGE-L, eager_attn:")[2]
    assert shown.count("of the configuration") == 2 and "of the baseline" not in shown


def test_train_says_which_weights_are_kept(train, tmp_path, monkeypatch):
    losses = iter([5.0, 1.0, 3.0])
    monkeypatch.setattr(PairSource, "evaluate", lambda self, model, options: {"heldout_loss": next(losses)})
    code, text, err = train(tmp_path / "k", "--steps", 2, "--eval-every", 1, "--patience", 5, "-q")
    assert code == 0, err
    assert "5.0000 -> 1.0000" in text and "the weights of step 1 are kept" in text and "stopped early" not in text


def test_seeds_have_folders_of_their_own(train, tmp_path):
    code, text, err = train(tmp_path / "s", "--seeds", 2, "--steps", 2, "--batch-size", 2, "-q")
    assert code == 0, err
    assert "2 seeds: held-out loss" in text
    seeds = [json.loads((tmp_path / "s" / f"seed-{i}" / "train.json").read_text())["seed"] for i in (0, 1)]
    assert seeds == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "poetry"], "unknown task 'poetry'"),
        (["--task", "summarization", "--text", "a.txt"], "--text belongs to --task language-model"),
        (["--epochs", "2"], "--epochs belongs to --task summarization"),
        (["--task", "summarization", "--pairs", "PAIRS"], "has none of the columns"),
        (["--task", "summarization", "--pairs", "PAIRS", "--article-column", "boddy"], "Did you mean 'body'"),
        (["--task", "summarization", "--eos", "word"], "--eos is 'word'"),
        (["--task", "summarization", "--max-len", "500"], "--max-len 500 exceeds the model's 96 positions"),
        (["--task", "summarization", "--config", "int8"], "cannot be trained"),
        (["--task", "summarization", "--patience", "2"], "Pass --eval-every too"),
        (["--task", "summarization", "--dtype", "fp16", "--device", "cpu"], "needs a GPU"),
        (["--task", "summarization", "--heldout-pairs", "-1"], "--heldout-pairs is -1"),
        (["--task", "summarization", "--distill-weight", "0", "--distill", "TINY"], "--distill-weight is 0"),
    ],
)
def test_wrong_flags_of_train(command, tiny, pairs_file, tmp_path, arguments, words):
    given = [{"PAIRS": str(pairs_file), "TINY": str(tiny)}.get(a, a) for a in arguments]
    code, _, err = command("train", tiny, *given, "-o", tmp_path / "x", "-q")
    assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "x" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pairs", "x.jsonl"], "--pairs does not apply to --task perplexity"),
        (["--task", "summarization", "--stride", "8"], "--stride does not apply to --task summarization"),
        (["--task", "summarization", "--article-column", "a"], "without a file of pairs"),
        (["--task", "summarization", "--pairs", "none.csv"], "there is no text file"),
    ],
)
def test_wrong_flags_of_eval(command, tiny, arguments, words):
    code, out, err = command("eval", tiny, *arguments, "-q")
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_wrong_flags_of_generate(command, tiny):
    assert "unknown task 'x'" in command("generate", tiny, "-p", "a", "--task", "x")[2]
    code, _, err = command("generate", tiny, "-p", "a", "--task", "summarization", "--chat")
    assert code == 2 and "--task and --chat" in err
