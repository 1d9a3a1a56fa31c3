"""Article/summary pairs: what is read, what is skipped and counted, what is refused."""

from __future__ import annotations

import json

import pytest

from paretune.errors import UsageError
from paretune.evaluate import pairs


def write(tmp_path, rows, name="pairs.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n", "utf-8")
    return path


def test_jsonl_and_csv_hold_the_same(tmp_path):
    rows = [{"article": 'A, "quoted"\nline.', "summary": "S é."}, {"article": "B.", "summary": "T."}]
    path = tmp_path / "p.csv"
    path.write_text('article,summary\n"A, ""quoted""\nline.",S é.\nB.,T.\n', "utf-8")
    first, second = pairs.read_pairs(write(tmp_path, rows)), pairs.read_pairs(path)
    assert [(p.article, p.summary) for p in first.pairs] == [(r["article"], r["summary"]) for r in rows]
    assert [(p.article, p.summary) for p in second.pairs] == [(r["article"], r["summary"]) for r in rows]


def test_what_cannot_be_used_is_counted(tmp_path):
    rows = [
        {"document": "one", "highlights": ["a", "b"]},
        {"document": "  ", "highlights": "x"},
        {"document": "two", "highlights": ""},
        {"document": "three"},
        {"document": "one", "highlights": "again"},
    ]
    found = pairs.read_pairs(write(tmp_path, rows))
    assert [p.summary for p in found.pairs] == ["a\nb"]
    assert found.skipped == {"without article": 1, "without summary": 2, "repeated article": 1}
    assert "1 pairs; skipped: 1 without article, 2 without summary" in found.said


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_row_ends_at_a_newline_alone(tmp_path, end):
    """JSON allows the other line ends of Unicode inside a string."""
    rows = [{"article": f"one{c}two", "summary": f"x{c}y"} for c in "\u2028\u2029\u0085"]
    path = tmp_path / "p.jsonl"
    path.write_bytes(end.join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
    assert [(p.article, p.summary) for p in pairs.read_pairs(path).pairs] == [
        (r["article"], r["summary"]) for r in rows
    ]


def test_half_of_a_character_is_counted(tmp_path):
    """An emoji that was cut in the middle: valid JSON, and no text that could be written or hashed."""
    rows = [
        {"article": "a", "summary": "b"},
        {"article": "cut \ud83d", "summary": "b"},
        {"article": "c", "summary": "cut \ude00"},
        {"article": "d", "summary": "b", "id": "cut \ud83d"},
        {"article": "whole \U0001f600", "summary": "b"},
    ]
    found = pairs.read_pairs(write(tmp_path, rows))
    assert [p.article for p in found.pairs] == ["a", "whole \U0001f600"]
    assert found.skipped == {"with half a character": 3}
    train, held = found.split(1)
    assert len(train) == len(held) == 1


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (b'{"article": "a", "summary": "b\xff"}\n', {}, "not UTF-8"),
        (b"{]\n", {}, "line 1 is not valid JSON"),
        (b"[1]\n", {}, "line 1 is not a JSON object"),
        (b'{"article": "a", "summary": "b"}\n', {"article_column": "artcle"}, "Did you mean 'article'"),
        (b'{"article": "a", "gist": "b"}\n', {}, "Pass --summary-column: article, gist"),
        (b'{"article": "a", "summary": 3}\n', {}, "summary is int, not text"),
        (b'{"article": "", "summary": "b"}\n', {}, "no usable pair: 1 without article"),
        (b"  \n", {}, "is empty"),
    ],
)
def test_wrong_files_are_one_clear_line(tmp_path, text, options, words):
    path = tmp_path / "p.jsonl"
    path.write_bytes(text)
    with pytest.raises(UsageError, match=words):
        pairs.read_pairs(path, **options)


def test_no_file_and_an_unknown_kind(tmp_path):
    with pytest.raises(UsageError, match="there is no text file"):
        pairs.read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="is not a file of pairs"):
        pairs.read_pairs(tmp_path / "pairs.txt")


def test_the_split_is_disjoint_and_depends_on_the_seed_alone():
    found = pairs.own_pairs("search")
    train, held = found.split(10, seed=1)
    assert (len(train), len(held)) == (42, 10) and not {p.id for p in train.pairs} & {p.id for p in held.pairs}
    assert found.split(10, seed=1)[1].key == held.key and found.split(10, seed=2)[1].key != held.key
    with pytest.raises(UsageError, match="which leaves none to train on"):
        found.split(52)


def test_own_training_pairs_never_touch_the_confirmation_text():
    train, held = pairs.own_training_pairs(148), pairs.own_pairs("confirm")
    assert len(train) == 148 and len(held) == 52 and len({p.id for p in train.pairs}) == 148
    assert not {p.summary for p in train.pairs} & {p.summary for p in held.pairs}


@pytest.mark.realdata
def test_the_news_files(data_dir):
    assert len(pairs.read_pairs(data_dir / "news" / "xsum_800.jsonl")) > 700
    assert len(pairs.read_pairs(data_dir / "news" / "cnn_dailymail_700.jsonl")) > 600
