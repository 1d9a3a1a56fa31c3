"""Texts to streams, what is held out, and the order of batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paretune.errors import ParetuneError, UsageError
from paretune.model.checkpoint import resolve
from paretune.model.tokenizer import Tokenizer
from paretune.train import data

POCKET = resolve("pocket")


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("The second text, naïve and short.\n", "utf-8")
    (folder / "a.txt").write_text("The first text.\r\nTwo lines.", "utf-8", newline="")
    (folder / "deep" / "c.txt").write_text("Below.", "utf-8")
    (folder / "notes.md").write_text("not a text", "utf-8")
    return folder


def test_find_documents_sorts_and_names(texts):
    found = data.find_documents([texts, texts / "notes.md"])
    assert [d.name for d in found] == ["a.txt", "b.txt", "deep/c.txt", "notes.md"]


def test_find_documents_refuses(texts, tmp_path):
    with pytest.raises(UsageError, match=r"no file or folder"):
        data.find_documents([tmp_path / "absent"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(UsageError, match=r"no \*.txt"):
        data.find_documents([tmp_path / "bare"])
    with pytest.raises(UsageError, match=r"two texts are called b\.txt"):
        data.find_documents([texts, texts / "b.txt"])


def test_stream_is_the_texts_with_separators(texts, tmp_path):
    documents = data.find_documents([texts])
    stream = data.load_stream(documents, POCKET, tmp_path / "cache")
    tokenizer = Tokenizer(POCKET)
    raw = [d.path.read_bytes() for d in documents]
    expected = [i for r in raw for i in [*tokenizer.encode(r.decode(), special_tokens=False), 0]]
    assert stream.tokens.dtype == np.uint16
    assert stream.tokens.tolist() == expected
    assert stream.n_bytes == sum(len(r) for r in raw)  # é counts twice, separators not at all
    assert stream.documents == ("a.txt", "b.txt", "deep/c.txt")


def test_cache_is_used_and_keyed_by_content(texts, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    documents = data.find_documents([texts])
    first = data.load_stream(documents, POCKET, cache)
    with monkeypatch.context() as m:
        m.setattr(data, "_write_tokens", lambda *_: pytest.fail("encoded again"))
        assert data.load_stream(documents, POCKET, cache).key == first.key
    (texts / "b.txt").write_text("Changed.", "utf-8")
    assert data.load_stream(documents, POCKET, cache).key != first.key
    assert len(list(cache.glob("*.bin"))) == 2
    assert not list(cache.glob("*.tmp"))


def test_a_cut_cache_file_is_made_again(texts, tmp_path):
    documents = data.find_documents([texts])
    first = data.load_stream(documents, POCKET, tmp_path)
    expected = first.tokens.tolist()
    path = tmp_path / f"{first.key}.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert data.load_stream(documents, POCKET, tmp_path).tokens.tolist() == expected


@pytest.mark.parametrize(
    ("raw", "words"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"caf\xe9", r"not UTF-8 text \(byte 3 is 0xe9\)")],
)
def test_bad_texts(tmp_path, raw, words):
    (tmp_path / "bad.txt").write_bytes(raw)
    with pytest.raises(ParetuneError, match=words) as error:
        data.load_stream(data.find_documents([tmp_path]), POCKET, tmp_path / "cache")
    assert "bad.txt" in error.value.cause
    assert error.value.cure


def test_pieces_give_the_same_tokens():
    text = "One line.\n\n  Indented \n\nNext\nline\r\nend  \n\n\nlast\nof all" * 20
    tokenizer = Tokenizer(POCKET)
    cut = list(data.pieces(text, 50))
    assert len(cut) > 5
    assert "".join(cut) == text
    assert [i for p in cut for i in tokenizer.encode(p)] == tokenizer.encode(text)


def documents_named(*names):
    from pathlib import Path

    return [data.Document(n, Path(n)) for n in names]


def test_split_depends_on_names_alone():
    many = documents_named(*(f"book{i}.txt" for i in range(400)))
    kept, held = data.split_heldout(many, 0.1)
    assert 20 < len(held) < 65
    assert sorted(d.name for d in kept + held) == sorted(d.name for d in many)
    _, held_of_half = data.split_heldout(many[:200], 0.1)
    assert {d.name for d in held_of_half} == {d.name for d in held} & {d.name for d in many[:200]}


def test_split_of_few():
    two = documents_named("a", "b")
    assert [len(x) for x in data.split_heldout(two, 0.001)] == [1, 1]
    assert [len(x) for x in data.split_heldout(two, 0.999)] == [1, 1]
    assert [len(x) for x in data.split_heldout(two, 0)] == [2, 0]
    assert [len(x) for x in data.split_heldout(two[:1], 0.5)] == [1, 0]


def test_split_explicit():
    three = documents_named("one.txt", "two.txt", "three.txt")
    kept, held = data.split_heldout(three, 0.05, ["two.txt"])
    assert ([d.name for d in kept], [d.name for d in held]) == (["one.txt", "three.txt"], ["two.txt"])
    with pytest.raises(UsageError, match=r"Did you mean 'two.txt'"):
        data.split_heldout(three, 0.05, ["tow.txt"])
    with pytest.raises(UsageError, match="which leaves none"):
        data.split_heldout(three[:1], 0, ["one.txt"])
    with pytest.raises(UsageError, match="fraction"):
        data.split_heldout(three, 1.0)


def test_sampler_visits_every_window_once_an_epoch():
    tokens = np.arange(4 * 7 + 3, dtype=np.uint16)  # 7 windows and a rest
    sampler = data.BatchSampler(tokens, batch_size=7, block_size=4, seed=1)
    first, targets = sampler.next()
    second, _ = sampler.next()
    assert first.dtype == torch.int64
    assert torch.equal(targets, first + 1)
    assert sorted(first[:, 0].tolist()) == [4 * i for i in range(7)] == sorted(second[:, 0].tolist())
    assert not torch.equal(first, second)  # another order


def test_sampler_resumes_in_the_middle_and_across_epochs():
    tokens = np.arange(100, dtype=np.uint16)

    def make(seed=5):
        return data.BatchSampler(tokens, batch_size=3, block_size=9, seed=seed)

    straight, resumed = make(), make()
    for _ in range(6):  # 11 windows: well into the second epoch
        straight.next()
    resumed.restore(straight.state())
    for _ in range(6):
        assert torch.equal(straight.next()[0], resumed.next()[0])
    assert not torch.equal(make(5).next()[0], make(6).next()[0])
    with pytest.raises(ValueError, match="no such sampler state"):
        resumed.restore({"epoch": 0, "position": 12})


def test_sampler_order_is_pinned():
    sampler = data.BatchSampler(np.arange(11, dtype=np.uint16), batch_size=5, block_size=2, seed=0)
    expected = np.random.RandomState([0, 0, 0]).permutation(5) * 2
    assert sampler.next()[0][:, 0].tolist() == expected.tolist()


def test_too_short_for_a_block():
    with pytest.raises(ParetuneError, match="8 tokens, one block of 8 needs 9") as error:
        data.BatchSampler(np.zeros(8, dtype=np.uint16), 1, 8, 0)
    assert "--block-size 7" in error.value.cure


@pytest.mark.parametrize(("n", "shapes"), [(9, [(2, 5)]), (11, [(2, 5), (1, 3)]), (3, [(1, 3)])])
def test_heldout_batches_score_each_token_once(n, shapes):
    batches = list(data.heldout_batches(np.arange(n), block_size=4, batch_size=2))
    assert [tuple(b.shape) for b in batches] == shapes
    assert [t for b in batches for row in b for t in row[1:].tolist()] == list(range(1, n))


def test_heldout_batches_spread():
    firsts = [int(b[0, 0]) for b in data.heldout_batches(np.arange(401), 4, 1, n_windows=3)]
    assert firsts[0] == 0 and firsts[-1] == 396 and len(firsts) == 3
