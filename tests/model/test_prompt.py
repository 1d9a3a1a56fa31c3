"""The recorded prompt format."""

from __future__ import annotations

import json

import pytest

from paretune.errors import CheckpointError, UsageError
from paretune.model import checkpoint
from paretune.model.prompt import FILE, PromptFormat, sentences
from paretune.model.tokenizer import Tokenizer

POCKET = checkpoint.resolve("pocket")
TOKENIZER = Tokenizer(POCKET)


def test_a_long_article_loses_its_end_and_says_so():
    form = PromptFormat(prefix="Article: ", max_len=64, max_new_tokens=16)
    ids, is_cut = form.prompt(TOKENIZER, "word " * 200)
    assert is_cut and len(ids) == 48
    assert TOKENIZER.decode(ids).startswith("Article: word") and TOKENIZER.decode(ids).endswith("TL;DR:")
    short, is_cut = form.prompt(TOKENIZER, " word. ")
    assert not is_cut and TOKENIZER.decode(short) == "Article: word.\n\nTL;DR:"


def test_where_the_end_tokens_stand():
    end = 0
    text = "It rained. The river rose. Nobody slept."
    whole = PromptFormat().answer(TOKENIZER, text, end)
    assert whole[-1] == end and whole.count(end) == 1 and TOKENIZER.decode(whole) == f" {text}"
    each = PromptFormat(eos="sentence").answer(TOKENIZER, text, end)
    assert each.count(end) == 4 and each[-2:] == [end, end] and TOKENIZER.decode(each) == f" {text}"
    assert (PromptFormat().eos_run, PromptFormat(eos="sentence").eos_run) == (1, 2)


def test_round_trip_and_damage(tmp_path):
    form = PromptFormat(suffix="\n=>", eos="sentence", max_new_tokens=9)
    assert PromptFormat.read(tmp_path) is None
    (tmp_path / FILE).write_text(json.dumps(form.to_json()))
    assert PromptFormat.read(tmp_path) == form
    for damaged in ("{", "[]", json.dumps(form.to_json() | {"more": 1}), json.dumps(form.to_json() | {"eos": "x"})):
        (tmp_path / FILE).write_text(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            PromptFormat.read(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"eos": "word"}, "--eos"),
        ({"suffix": " "}, "separator"),
        ({"max_new_tokens": 0}, "0 new"),
        ({"max_len": 2}, "2"),
    ],
)
def test_wrong_values(wrong, words):
    with pytest.raises(UsageError, match=words):
        PromptFormat(**wrong)


def test_no_room_for_the_article():
    with pytest.raises(UsageError, match="leave none for the article"):
        PromptFormat(max_len=16, max_new_tokens=16).prompt(TOKENIZER, "word")


def test_sentences():
    text = 'He said "Go." Then 3.5 miles on, it stopped! Why?\nNo one knew'
    assert sentences(text) == ['He said "Go."', "Then 3.5 miles on, it stopped!", "Why?", "No one knew"]
