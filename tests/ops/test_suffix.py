"""The suffix index: the C++ form gives the answers of the plain one, and these are right."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune import native_build
from paretune.ops.suffix import native, reference

needs_compiler = pytest.mark.skipif(native_build.unavailable_reason() is not None, reason="no C++ compiler")
FORMS = [reference.SuffixIndex, pytest.param(native.SuffixIndex, marks=needs_compiler)]
quick = settings(max_examples=100, deadline=None)


def read(index, text):
    cursor = index.cursor()
    index.push(cursor, text)
    return cursor


@pytest.mark.parametrize("form", FORMS)
def test_the_longest_match_and_its_most_frequent_continuation(form):
    index = form(8)
    cursor = read(index, [1, 2, 3, 4, 9, 2, 3, 5, 9, 2, 3, 5, 9, 1, 2, 3])
    assert index.draft(cursor, 5, 1, 0.1) == ([4], 3)  # after 1 2 3 stood 4, once, though after 2 3 stood 5 twice
    assert index.draft(cursor, 2, 1, 0.1) == ([5], 2)
    assert index.draft(cursor, 2, 3, 0.1) == ([5, 9, 1], 2)  # the later one of 2 and 1
    assert index.draft(cursor, 2, 3, 0.4) == ([5, 9], 2)  # half of the two thirds is below the floor
    assert index.draft(cursor, 2, 3, 0.9) == ([], 0)
    assert index.draft(cursor, 1, 9, 0.1)[0] == [5, 9, 1]  # twice the match and one


@pytest.mark.parametrize("form", FORMS)
def test_a_new_text_knows_nothing(form):
    index = form(8)
    assert index.draft(read(index, [1, 2, 3]), 5, 4, 0.1) == ([], 0)
    assert index.draft(index.cursor(), 5, 4, 0.1) == ([], 0)


@pytest.mark.parametrize("form", FORMS)
def test_another_text_is_followed_without_being_added(form):
    index = form(8)
    read(index, [1, 2, 3, 4, 5])
    n_nodes, cursor = index.n_nodes, index.cursor()
    index.push(cursor, [7, 2, 3], grows=False)
    assert index.draft(cursor, 5, 4, 0.1) == ([4, 5], 2) and index.n_nodes == n_nodes


@pytest.mark.parametrize("form", FORMS)
def test_a_full_index_goes_on_counting(form):
    index = form(4, max_nodes=6)
    cursor = read(index, [1, 2, 1, 2, 1, 2, 3, 4, 5, 1])
    assert index.n_nodes == 6
    assert index.draft(cursor, 3, 3, 0.1)[0][:1] == [2]


@needs_compiler
@quick
@given(
    st.lists(st.lists(st.integers(0, 4), max_size=60), min_size=1, max_size=4),
    st.integers(2, 9),
    st.integers(1, 8),
    st.integers(1, 12),
    st.floats(0.0, 1.0),
    st.integers(1, 400),
)
def test_both_forms_agree(texts, depth, max_match, max_tokens, floor, max_nodes):
    ours, plain = native.SuffixIndex(depth, max_nodes), reference.SuffixIndex(depth, max_nodes)
    for i, text in enumerate(texts):
        cursors = ours.cursor(), plain.cursor()
        for token in text:
            ours.push(cursors[0], [token], i % 2 == 0)
            plain.push(cursors[1], [token], i % 2 == 0)
            assert cursors[0].at == cursors[1].at
            assert ours.draft(cursors[0], max_match, max_tokens, floor) == plain.draft(
                cursors[1], max_match, max_tokens, floor
            )
    assert ours.n_nodes == plain.n_nodes


def test_without_a_compiler_the_plain_form_runs(monkeypatch):
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")
    native._library.cache_clear()
    assert isinstance(native.best(), reference.SuffixIndex)
