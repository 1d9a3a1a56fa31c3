"""Reading and writing of records: what comes back is what was written, and a broken file is one clear line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest

from paretune.errors import UsageError
from paretune.records.record import LEFT_OUT, SIGNED, Record, flat, from_json, null_is, read, to_json, write


@dataclass
class Part(Record):
    n: int
    load_sec: float | None
    word: Literal["a", "b"] | Literal["c"] | None = None


@dataclass
class Whole(Record):
    SCHEMA: ClassVar[int] = 3
    CURE: ClassVar[str] = "Run `it` again"

    schema_version: int
    name: str
    parts: list[Part]
    is_whole: bool
    top_share: float = 0.5
    change_sec: float = field(default=0.0, metadata=SIGNED)
    by_name: dict[str, float] = field(default_factory=dict)
    extra_bytes: int | None = field(default=None, metadata=LEFT_OUT)
    first: Part | None = field(default=None, metadata=flat("first_"))
    second: Part | None = field(default=None, metadata=flat("second_", nulls=True))


def whole(**changes: Any) -> dict[str, Any]:
    """Valid data of a whole."""
    return {"schema_version": 3, "name": "x", "parts": [{"n": 1, "load_sec": None}], "is_whole": True, **changes}


@pytest.mark.parametrize(
    "record",
    [
        Whole(3, "x", [Part(1, 0.5, "c"), Part(0, None)], False),
        Whole(3, "x", [], True, 1, -0.5, {"a": 1.5}, 7, Part(2, 1.0), Part(3, None, "a")),
    ],
)
def test_what_is_written_is_read(record, tmp_path):
    write(record, tmp_path / "x.json")
    assert read(Whole, tmp_path / "x.json") == record


def test_keys_of_flat_and_unknown_parts():
    data = to_json(Whole(3, "x", [], True, first=Part(2, 1.0)))
    assert data["first_n"] == 2 and data["first_load_sec"] == 1.0 and "first" not in data
    assert [data[f"second_{key}"] for key in ("n", "load_sec", "word")] == [None] * 3
    assert "extra_bytes" not in data
    without = to_json(Whole(3, "x", [], True))
    assert not [key for key in without if key.startswith("first_")]


def test_a_field_with_a_default_may_be_missing():
    record = from_json(Whole, whole())
    assert (record.top_share, record.by_name, record.first, record.parts[0].word) == (0.5, {}, None, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": 3}, "name is 3, not text"),
        ({"is_whole": 1}, "is_whole is 1, not true or false"),
        ({"parts": {}}, "parts is {}, not a list"),
        ({"parts": [3]}, "parts[0] is 3, not an object"),
        ({"parts": [{"n": 1}]}, "parts[0].load_sec is missing"),
        ({"parts": [{"n": 1.5, "load_sec": 1}]}, "parts[0].n is 1.5, not a whole number"),
        ({"parts": [{"n": True, "load_sec": 1}]}, "parts[0].n is true, not a whole number"),
        ({"parts": [{"n": 1, "load_sec": -1}]}, "parts[0].load_sec is -1, not 0 or more"),
        ({"parts": [{"n": 1, "load_sec": math.nan}]}, "parts[0].load_sec is NaN, not a number"),
        ({"parts": [{"n": 1, "load_sec": 1, "word": "d"}]}, "parts[0].word is \"d\", not one of 'a', 'b', 'c'"),
        ({"parts": [{"n": 1, "load_sec": 1, "x": 1}]}, "parts[0].x is not a field that this version knows"),
        ({"top_share": 1.5}, "top_share is 1.5, not between 0 and 1"),
        ({"by_name": {"a": "b"}}, 'by_name.a is "b", not a number'),
        ({"first_n": 1}, "first_load_sec is missing"),
        ({"other": 1}, "other is not a field that this version knows"),
        ({"extra_bytes": -1}, "extra_bytes is -1, not 0 or more"),
    ],
)
def test_a_broken_file_is_one_line_with_field_and_cure(changes, words, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(whole(**changes)))
    with pytest.raises(UsageError) as caught:
        read(Whole, path)
    assert caught.value.cause == f"{path} is damaged ({words})" and caught.value.cure == "Run `it` again"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 4, "versions": {"paretune": "0.9.0"}}, "by paretune 0.9.0, with schema version 4"),
        ({"schema_version": 2, "versions": 5}, "by another version of paretune, with schema version 2"),
        ({"schema_version": None}, "by another version of paretune, with schema version null"),
    ],
)
def test_a_file_of_another_schema_says_in_one_line_which_version_wrote_it(changes, words, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(whole(**changes)))
    with pytest.raises(UsageError) as caught:
        read(Whole, path)
    assert caught.value.cause == f"{path} was written {words}; this version reads schema version 3"
    assert caught.value.cure == "Run `it` again"


def test_a_number_that_is_not_finite_is_a_null_and_comes_back():
    @dataclass(frozen=True)
    class Loss(Record):
        upper: float = field(metadata=null_is(math.inf))
        names: tuple[str, ...] = ()

    data = to_json(Loss(math.inf, ("a", "b")))
    assert data == {"upper": None, "names": ["a", "b"]}
    assert from_json(Loss, data) == Loss(math.inf, ("a", "b")) and from_json(Loss, {"upper": 2.0}) == Loss(2.0)


@pytest.mark.parametrize("missing", ["name", "parts", "is_whole"])
def test_a_missing_field_is_named(missing):
    data = whole()
    del data[missing]
    with pytest.raises(UsageError, match=f"{missing} is missing"):
        from_json(Whole, data)


@pytest.mark.parametrize(
    ("text", "words"), [(None, "cannot read"), ("{", "is damaged"), ("[]", "the whole is"), ("[" * 9999, "is damaged")]
)
def test_what_is_no_result_at_all(text, words, tmp_path):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match=words):
        read(Whole, tmp_path / "x.json")
