"""Patterns against their definitions in plain Python, their derived forms against the dense mask, and bad ones."""

from __future__ import annotations

import pytest
import torch

from paretune.errors import UsageError
from paretune.ops.attention import alibi
from paretune.ops.attention.pattern import (
    CAUSAL,
    QUERY_BLOCK,
    Blocks,
    Kept,
    Prefix,
    Random,
    Strided,
    Union,
    Window,
    parse,
    prefix_and_window,
    query_blocks,
    work,
)

N = 448
# A pattern and who sees whom, in plain Python (causality aside).
RULES = {
    "causal": lambda i, j: True,
    "window:5": lambda i, j: i - j < 5,
    "blocks:16": lambda i, j: i // 16 == j // 16,
    "strided:8": lambda i, j: j % 8 == 0,
    "prefix:3+window:7": lambda i, j: j < 3 or i - j < 7,
    "blocks:32+strided:16+prefix:2": lambda i, j: i // 32 == j // 32 or j % 16 == 0 or j < 2,
    "window:70+strided:100": lambda i, j: i - j < 70 or j % 100 == 0,
}
ALL = [*RULES, "prefix:3+window:7+random:2x64@5", "window:70+random:1x64"]


@pytest.mark.parametrize("text", RULES)
def test_dense_equals_the_definition(text):
    dense = parse(text).dense(N)
    wanted = [[j <= i and RULES[text](i, j) for j in range(N)] for i in range(N)]
    assert dense.tolist() == wanted


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize(("start", "n"), [(0, N), (0, 1), (100, 1), (63, 2), (130, 64), (447, 1), (300, 148)])
def test_the_work_of_a_step_is_what_the_dense_mask_shows(text, start, n):
    seen = parse(text).dense(N)[start : start + n]
    assert work(parse(text), start, n) == (int(seen.any(0).sum()), int(seen.sum()))


@pytest.mark.parametrize("text", ALL)
def test_what_is_derived_equals_the_dense_mask(text):
    pattern = parse(text)
    dense = pattern.dense(N)
    assert str(parse(str(pattern))) == str(pattern)
    assert pattern.counts(N) == dense.sum(1).tolist()
    assert pattern.work_share(N) == pytest.approx(float(dense.sum()) / (N * (N + 1) / 2))
    for block in (64, 16):
        n = N // block
        assert torch.equal(pattern.block_mask(N, block), dense.view(n, block, n, block).any(3).any(1))
    at = torch.arange(N)
    assert torch.equal(pattern.mask(at[None, 40:90], at[None])[0, 0], dense[40:90])
    kept = pattern.kept
    if kept.window is not None:  # decode needs nothing else
        needed = (at[None] < kept.prefix) | (at[:, None] - at[None] < kept.window)
        assert not (dense & ~needed).any()


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize(
    ("start", "n", "block"), [(0, N, 64), (64, 300, 64), (37, 200, 64), (100, 1, 64), (5, 300, 32)]
)
def test_runs_cover_every_visible_key_once(text, start, n, block):
    pattern = parse(text)
    times = torch.zeros(N, N, dtype=torch.int32)
    for part in query_blocks(pattern, start, n, block):
        queries = torch.arange(part.start, part.end)[:, None]
        assert [r.start for r in part.runs] == sorted(r.start for r in part.runs)
        for run in part.runs:
            keys = torch.arange(run.start, run.end)[None]
            seen = (keys <= queries) & (keys >= pattern.begin(queries) if run.is_local else keys >= 0)
            times[part.start : part.end, run.start : run.end] += seen.int()
    assert torch.equal(times[start : start + n], pattern.dense(N)[start : start + n].int())
    assert int(times.sum()) == int(times[start : start + n].sum())


def test_runs_of_a_window_do_not_grow_with_the_length():
    """What makes the work of a kernel linear."""
    read = [sum(r.end - r.start for r in b.runs) for b in query_blocks(Window(256), 0, 8192)]
    assert max(read) == 256 + QUERY_BLOCK - 1


def test_random_blocks_are_drawn_once_and_from_what_is_before():
    pattern = Random(3, 64, seed=1)
    far = pattern.dense(64 * 40)[::64, ::64]
    assert far.sum(1).tolist() == [0, *[min(i, 3) for i in range(1, 40)]]
    assert not far.diagonal().any()
    assert torch.equal(pattern.dense(640), pattern.dense(1280)[:640, :640])  # the same at every length
    assert not torch.equal(pattern.dense(1280), Random(3, 64, seed=2).dense(1280))


def test_sums_and_texts():
    assert str(Window(3) + Strided(4) + Prefix(2)) == "window:3+strided:4+prefix:2"
    assert parse("window:3") == Window(3) and parse(" prefix:2 + blocks:8 ") == Union((Prefix(2), Blocks(8)))


def test_what_decode_keeps():
    kept = {"causal": Kept(0, None), "window:5": Kept(0, 5), "blocks:16": Kept(0, 16), "strided:8": Kept(0, None)}
    kept |= {"prefix:3+window:7": Kept(3, 7), "window:7+random:1x64": Kept(0, None), "window:9+window:4": Kept(0, 9)}
    assert {text: parse(text).kept for text in kept} == kept


def test_prefix_and_window():
    known = {"causal": (0, 0), "window:5": (0, 5), "prefix:3+window:7": (3, 7), "window:5+causal": (0, 0)}
    known |= {"blocks:16": None, "prefix:3": None, "window:5+strided:8": None, "window:5+random:1x64": None}
    assert {text: prefix_and_window(parse(text)) for text in known} == known


@pytest.mark.parametrize(
    ("text", "n", "match"),
    [
        ("window:65", 64, "a window of 65 is larger than the context of 64"),
        ("prefix:65+window:3", 64, "a prefix of 65 is larger than the context of 64"),
        ("blocks:128", 64, "blocks of 128 do not divide the context of 64"),
        ("blocks:48", 64, "blocks of 48 do not divide the context of 64"),
        ("blocks:16+random:1x64", 96, "blocks of 64 do not divide"),
        ("random:1x64", 128, "leaves the query at position 0 without keys"),
    ],
)
def test_patterns_that_do_not_fit(text, n, match):
    with pytest.raises(UsageError, match=match):
        parse(text).check(n)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "windows:3",
        "window",
        "window:",
        "window:-1",
        "window:0",
        "window:3+",
        "random:3",
        "random:1x63",
        "strided:0",
        "prefix:0",
        "causal:1",
        "random:1x64@9999999",
    ],
)
def test_texts_that_are_no_pattern(text):
    with pytest.raises(UsageError):
        parse(text)


def test_good_patterns_pass_the_check():
    for text in ALL:
        parse(text).check(N)
    assert CAUSAL.is_dense and not Window(3).is_dense


@pytest.mark.parametrize("n_head", [1, 2, 3, 4, 6, 8, 12, 16, 20, 25, 71])
def test_slopes_are_those_of_bloom_and_mpt(n_head):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bloom = build_alibi_tensor(torch.ones(1, 9, dtype=torch.int64), n_head, torch.float32)[:, 0]  # slope * position
    ours = torch.tensor(alibi.slopes(n_head))
    torch.testing.assert_close(ours[:, None] * torch.arange(9.0), bloom)
    mpt = build_mpt_alibi_tensor(n_head, 9)  # [H, 1, 9], up to a constant a row
    torch.testing.assert_close(ours[:, None] * (torch.arange(9.0) - 8), mpt.reshape(n_head, 9))
