"""Rows of a cache come and go: what a row gives depends on nobody beside it or before it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from paretune import native_build
from paretune.engine.cache import KVCache
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.runners.native import NativeRunner
from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.ops.attention.pattern import Kept
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.mechanism import Mechanism

needs_compiler = pytest.mark.skipif(native_build.unavailable_reason() is not None, reason="no C++ compiler")
CAPACITY = 704
# Prompts of sequences A, B, C, D; each is fed three tokens more. B and C are longer than the ring.
LENGTHS = {"dense": (9, 31, 1, 20), "ring": (9, 540, 530, 200)}
CACHES = ("fp32", "int8", "int4")


@pytest.fixture(scope="module")
def models(tiny_factory):
    def make(kind):
        _, _, folder = tiny_factory("gpt2", n_embd=64, n_positions=CAPACITY)
        model = checkpoint.load(folder)
        if kind == "ring":
            model = Mechanism(pattern="prefix:3+window:40").apply(model, Context())
        return Attention("sdpa").apply(model, Context())

    return make


def sequences(lengths):
    g = torch.Generator().manual_seed(5)
    return {name: torch.randint(2, 131, (n + 3,), generator=g) for name, n in zip("ABCD", lengths, strict=True)}


def poison_(cache, row):
    """What lies in a row is nothing that a query may see: the largest numbers that its format has."""
    for layer in cache.layers:
        for tensor in (layer.k, layer.v, layer.k_scale, layer.v_scale):
            if tensor is not None:
                tensor[row] = 3e4 if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max


class Run:
    """A cache of three rows, empty and poisoned at first, and the logits that each sequence got."""

    def __init__(self, runner, texts, static=False, n_rows=3):
        self.runner, self.texts = runner, texts
        self.cache = runner.new_cache(n_rows, CAPACITY)
        self.cache.static = static
        for row in range(n_rows):
            self.cache.evict_(row)
            poison_(self.cache, row)
        self.names = [None] * n_rows
        self.held = dict.fromkeys(texts, 0)
        self.logits = {name: [] for name in texts}

    def admit(self, name, row):
        self.cache.admit_(row)
        self.names[row] = name

    def evict(self, name):
        row = self.names.index(name)
        self.cache.evict_(row)
        poison_(self.cache, row)
        self.names[row] = None

    def step(self, **n_new):
        """One step: so many tokens of each sequence; the others have no part in it."""
        K = max(n_new.values())
        tokens = torch.full((len(self.names), K), 7)
        counts = [n_new.get(name, 0) for name in self.names]
        for row, (name, n) in enumerate(zip(self.names, counts, strict=True)):
            if n:
                at = self.held[name]
                tokens[row, :n] = self.texts[name][at : at + n]
                self.held[name] += n
        self.cache.stage_(counts)
        out = self.runner.forward(tokens, self.cache, "last")
        for row, name in enumerate(self.names):
            if counts[row]:
                self.logits[name].append(out[row, 0].clone())
            else:
                assert self.cache.static or not out[row].any()
        assert list(self.cache.host_lengths) == [0 if name is None else self.held[name] for name in self.names]


def story(run, lengths):
    """Everything that may happen to a row: alone, beside others that run, wait, come, are read in and leave."""
    a, b, c, d = lengths
    run.admit("A", 0)
    run.step(A=a)
    run.admit("B", 2)
    run.step(B=b)  # A waits
    run.step(A=1, B=1)  # rows 0 and 2
    run.admit("C", 1)
    run.step(A=1, C=c)  # one token of A beside C's prompt
    run.step(B=1, C=1)
    run.step(A=1)
    run.evict("A")
    run.admit("D", 0)
    run.step(D=d // 2)
    run.step(D=d - d // 2, B=1)  # in two pieces
    run.step(C=1, D=1)
    run.evict("B")
    run.step(C=1, D=1)
    run.evict("C")
    run.step(D=1)
    return run.logits


def alone(runner, texts, lengths, static=False):
    """Each sequence on a cache of its own, of one row that nobody had before."""
    found = {}
    for (name, text), n in zip(texts.items(), lengths, strict=True):
        run = Run(runner, {name: text}, static, n_rows=1)
        run.admit(name, 0)
        for k in (n, 1, 1, 1):
            run.step(**{name: k})
        found[name] = run.logits[name]
    return found


def compare(got, wanted, equal):
    for name, logits in wanted.items():
        assert torch.isfinite(torch.stack(got[name])).all()
        # D's prompt came in two pieces: the logits in the middle are of no use.
        mine = got[name][1:] if name == "D" else got[name]
        assert len(mine) == len(logits) == 4
        for ours, theirs in zip(mine, logits, strict=True):
            equal(ours, theirs)


def same_bits(a, b):
    assert torch.equal(a, b)


@needs_compiler
@pytest.mark.parametrize(("kind", "cache_dtype"), list(itertools.product(LENGTHS, CACHES)))
def test_native_rows_are_bit_equal_whatever_happens_beside_them(models, kind, cache_dtype):
    runner, lengths = NativeRunner(models(kind)), LENGTHS[kind]
    runner.set_cache_dtype_(cache_dtype)
    texts = sequences(lengths)
    run = Run(runner, texts)
    assert bool(run.cache.ring) == (kind == "ring")
    compare(story(run, lengths), alone(runner, texts, lengths), same_bits)


@needs_compiler
def test_native_picks_a_rows_own_token(models):
    """`greedy` of a few rows of many, in one piece and in several."""
    runner, texts = NativeRunner(models("dense")), sequences((9, 31, 1, 20))
    wanted = {}
    for name, text in texts.items():
        wanted[name] = runner.greedy(text[None], runner.new_cache(1, 64))[0]
    cache = runner.new_cache(600, 64)
    for row in range(600):
        cache.evict_(row)
    rows = dict(zip(texts, (3, 4, 77, 599), strict=True))
    tokens, n_new = torch.zeros(600, 34, dtype=torch.int64), [0] * 600
    for name, row in rows.items():
        cache.admit_(row)
        n_new[row] = len(texts[name])
        tokens[row, : n_new[row]] = texts[name]
    assert len(set(wanted.values())) > 1
    cache.stage_(n_new)
    assert cache.count_rows() == 4
    chosen = runner.greedy(tokens, cache)
    assert {name: chosen[row] for name, row in rows.items()} == wanted
    assert sum(chosen) == sum(wanted.values())


@pytest.mark.parametrize(
    ("kind", "static", "cache_dtype"),
    [*[("dense", False, dtype) for dtype in CACHES], ("dense", True, "fp32"), ("ring", False, "fp32")],
)
def test_eager_rows_are_what_they_are_alone(models, kind, static, cache_dtype):
    runner, lengths = EagerRunner(models(kind)), LENGTHS[kind]
    runner.set_cache_dtype_(cache_dtype)
    texts = sequences(lengths)
    # A number that is rounded the other way is a whole step of its format.
    atol = {"fp32": 2e-5, "int8": 1e-3, "int4": 1e-2}[cache_dtype]
    got, wanted = story(Run(runner, texts, static), lengths), alone(runner, texts, lengths, static)
    compare(got, wanted, lambda a, b: assert_close(a, b, atol=atol, rtol=1e-5))


def test_what_is_evicted_would_matter(models):
    """The opposite of the poison: in a row that is held it changes the result."""
    runner, texts = EagerRunner(models("dense")), sequences(LENGTHS["dense"])
    seen = []
    for spoil in (False, True):
        run = Run(runner, texts)
        run.admit("B", 1)
        run.step(B=31)
        if spoil:
            poison_(run.cache, 1)
        run.step(B=1)
        seen.append(run.logits["B"][1])
    assert not torch.equal(*seen)


def small(**changes):
    shape = {"n_layer": 1, "batch_size": 3, "n_kv_head": 1, "capacity": 10, "head_dim": 4, "dtype": torch.float32}
    return KVCache(**(shape | changes))


def test_rows_are_taken_and_freed():
    cache = small()
    assert cache.free_rows == []  # a new cache is a batch that begins together
    cache.begin_(4)
    cache.commit_()
    cache.evict_(1)
    assert cache.free_rows == [1] and cache.host_lengths == (4, 0, 4) and cache.lengths.tolist() == [4, 0, 4]
    assert cache.count_rows() == 2
    cache.begin_(2)  # without `stage_`: all that are taken
    assert cache.positions.tolist() == [[4, 5]] * 2 and cache.row_index.flatten().tolist() == [0, 2]
    assert cache.start == 4
    cache.commit_()
    assert cache.host_lengths == (6, 0, 6)
    cache.truncate_(5)
    assert cache.host_lengths == (5, 0, 5)
    cache.admit_(1)
    cache.stage_([0, 3, 0])
    cache.begin_(3)
    assert cache.positions.tolist() == [[0, 1, 2]] and cache.start == 0 and cache.extent == 3
    cache.commit_()
    assert cache.host_lengths == (5, 3, 5) and cache.free_rows == []
    cache.clear_()
    assert cache.free_rows == [0, 1, 2] and cache.host_lengths == (0, 0, 0) and not cache.lengths.any()


def test_a_row_without_tokens_needs_no_room():
    cache = small()
    cache.stage_([10, 3, 3])
    cache.begin_(10)
    cache.commit_()
    cache.stage_([0, 4, 4])
    cache.begin_(4)
    cache.commit_()
    assert cache.host_lengths == (10, 7, 7)
    with pytest.raises(UsageError, match="10 \\+ 1 tokens do not fit"):
        cache.begin_(1)
    static = small(static=True)  # writes all rows of every step
    static.stage_([10, 3, 3])
    static.begin_(10)
    static.commit_()
    static.stage_([0, 4, 4])
    with pytest.raises(UsageError, match="10 \\+ 4 tokens do not fit"):
        static.begin_(4)


def test_rows_are_not_mixed_up():
    cache = small()
    with pytest.raises(AssertionError, match="row 1 is taken"):
        cache.admit_(1)
    cache.evict_(1)
    with pytest.raises(AssertionError, match="row 1 is free"):
        cache.evict_(1)
    with pytest.raises(AssertionError, match="a free row has no tokens"):
        cache.stage_([1, 1, 1])


def test_a_ring_begins_again_after_an_eviction():
    cache = small(capacity=100_000, kept=Kept(7, 100))
    for _ in range(6):
        cache.begin_(200)
        cache.commit_()
    with pytest.raises(UsageError, match="cannot go back"):
        cache.truncate_([500, 1200, 1200])
    cache.evict_(0)
    cache.admit_(0)
    cache.stage_([50, 0, 0])
    cache.begin_(50)
    cache.commit_()
    cache.truncate_([20, 1200, 1200])
    assert cache.host_lengths == (20, 1200, 1200)
