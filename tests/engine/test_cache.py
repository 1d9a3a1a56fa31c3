"""The cache: any way of cutting a sequence into steps gives what one forward pass gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from paretune.engine.cache import KVCache
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context

T = 23  # longer than Mistral's window of 8
GARBAGE = 1e4  # not NaN: a weight of exactly 0 times NaN is NaN
FAMILIES = ("gpt2", "llama", "mistral")
EVERY_WAY = list(itertools.product(FAMILIES, ("eager", "sdpa"), (False, True)))
IDS = [f"{f}-{a}-{'static' if s else 'dynamic'}" for f, a, s in EVERY_WAY]


@pytest.fixture(scope="module")
def models(tiny_gpt2_folder, tiny_llama_folder, tiny_mistral_folder):
    folders = (tiny_gpt2_folder, tiny_llama_folder, tiny_mistral_folder)
    return {family: checkpoint.load(folder) for family, folder in zip(FAMILIES, folders, strict=True)}


@pytest.fixture(params=EVERY_WAY, ids=IDS)
def way(request, models):
    """`(model, new_cache(batch, capacity), forward)` of one family, attention form and kind of cache."""
    family, form, static = request.param
    runner = EagerRunner(Attention(form).apply(models[family], Context()))

    def new_cache(batch_size, capacity, fill=0.0):
        cache = runner.new_cache(batch_size, capacity)
        cache.static = static
        for layer in cache.layers:
            layer.k.fill_(fill)
            layer.v.fill_(fill)
        return cache

    return runner.model, new_cache, runner.forward


def stepped(forward, cache, tokens, pieces):
    """Logits of all positions, fed in pieces of the given lengths."""
    assert sum(pieces) == tokens.size(1)
    return torch.cat([forward(part, cache, "all") for part in tokens.split(pieces, dim=1)], dim=1)


def tokens_of(batch=2, n=T, seed=7):
    return torch.randint(2, 131, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def full(model, tokens):
    return model(tokens, None, "all")


@pytest.mark.parametrize(
    "pieces",
    [[T], [1] * T, [9] + [1] * 14, [4, 4, 4, 4, 4, 3], [5, 1, 5, 1, 11], [1, T - 1]],
    ids=["prefill", "steps", "prefill+steps", "chunks", "mixed", "one+rest"],
)
def test_incremental_equals_full(way, pieces):
    model, new_cache, forward = way
    tokens = tokens_of()
    cache = new_cache(2, T)
    assert_close(stepped(forward, cache, tokens, pieces), full(model, tokens), atol=2e-5, rtol=1e-5)
    assert cache.host_lengths == (T, T) and cache.lengths.tolist() == [T, T]


def test_last_equals_all(way):
    _, new_cache, forward = way
    tokens = tokens_of()
    a, b = new_cache(2, T), new_cache(2, T)
    last, every = forward(tokens, a, "last"), forward(tokens, b, "all")
    assert last.shape == (2, 1, every.size(-1))
    assert_close(last, every[:, -1:], atol=2e-5, rtol=1e-5)


def test_rows_of_unequal_lengths(way):
    """Each row gives what it gives alone, whatever stands in the padding, then steps on, then in chunks."""
    model, new_cache, forward = way
    lengths, tokens = [3, 11, 7], tokens_of(3)
    cache = new_cache(3, T, GARBAGE)
    padded = torch.where(torch.arange(11) < torch.tensor(lengths)[:, None], tokens[:, :11], 130)
    cache.stage_(lengths)
    expected = full(model, tokens)
    got = forward(padded, cache, "last")[:, 0]
    held = list(lengths)
    assert cache.host_lengths == tuple(held)
    for row, n in enumerate(held):
        assert_close(got[row], expected[row, n - 1], atol=2e-5, rtol=1e-5)
    for _ in range(4):  # single steps
        step = torch.stack([tokens[row, n : n + 1] for row, n in enumerate(held)])
        got = forward(step, cache, "last")[:, 0]
        for row, n in enumerate(held):
            assert_close(got[row], expected[row, n], atol=2e-5, rtol=1e-5)
        held = [n + 1 for n in held]
    for n_new in ([4, 1, 2], [1, 3, 0], [4, 4, 4]):  # verification: some of the K are real
        step = torch.stack([tokens[row, n : n + 4] for row, n in enumerate(held)])
        junk = torch.where(torch.arange(4) < torch.tensor(n_new)[:, None], step, 130)
        cache.stage_(n_new)
        got = forward(junk, cache, "all")
        for row, (n, new) in enumerate(zip(held, n_new, strict=True)):
            assert_close(got[row, :new], expected[row, n : n + new], atol=2e-5, rtol=1e-5)
        held = [n + new for n, new in zip(held, n_new, strict=True)]
        assert cache.host_lengths == tuple(held) and cache.lengths.tolist() == held


def test_rollback_is_exact(way):
    """Speculation: feed guesses, keep a prefix, go on. Bit-equal to a run that never guessed."""
    _, new_cache, forward = way
    tokens, wrong = tokens_of(), tokens_of(seed=8)
    straight, guessing = new_cache(2, T + 4), new_cache(2, T + 4, GARBAGE)
    for cache in (straight, guessing):
        forward(tokens[:, :9], cache, "last")
    forward(torch.cat([tokens[:, 9:11], wrong[:, :4]], dim=1), guessing, "all")  # two right, four wrong
    guessing.truncate_(11)
    forward(tokens[:, 9:11], straight, "all")
    for start, end in [(11, 12), (12, 16), (16, 17)]:
        part = tokens[:, start:end]
        a, b = forward(part, straight, "all"), forward(part, guessing, "all")
        assert_close(a, b, atol=2e-5, rtol=1e-5)
    # Positions 9 and 10 came from a step of another size: their last bits may differ. Back before them.
    straight.truncate_(9)
    guessing.truncate_(9)
    for start, end in [(9, 10), (10, 13), (13, 14), (14, 20)]:
        part = tokens[:, start:end]
        assert torch.equal(forward(part, straight, "all"), forward(part, guessing, "all"))


def test_rollback_per_row(way):
    model, new_cache, forward = way
    tokens, wrong = tokens_of(3), tokens_of(3, seed=9)
    cache = new_cache(3, T + 2)
    forward(tokens[:, :9], cache, "last")
    forward(torch.cat([tokens[:, 9:12], wrong[:, :3]], dim=1), cache, "all")
    held = [9, 12, 10]
    cache.truncate_(held)
    assert cache.host_lengths == tuple(held) and cache.lengths.tolist() == held
    expected = full(model, tokens)
    for _ in range(8):
        step = torch.stack([tokens[row, n : n + 1] for row, n in enumerate(held)])
        got = forward(step, cache, "last")[:, 0]
        for row, n in enumerate(held):
            assert_close(got[row], expected[row, n], atol=2e-5, rtol=1e-5)
        held = [n + 1 for n in held]


def test_garbage_in_free_slots_never_leaks(way):
    """Bit-equal with zeros and with garbage in what no row holds, also in rows apart and after a rollback."""
    _, new_cache, forward = way
    tokens, seen = tokens_of(3), []
    for fill in (0.0, GARBAGE, -GARBAGE):
        cache = new_cache(3, T + 6, fill)
        cache.stage_([3, 9, 7])
        out = [forward(tokens[:, :9], cache, "last")]
        out += [forward(tokens[:, i : i + 1], cache, "last") for i in range(9, 12)]
        cache.truncate_([5, 12, 8])
        for layer in cache.layers:
            for row, n in enumerate(cache.host_lengths):
                layer.k[row, :, n:] = fill
                layer.v[row, :, n:] = fill
        out.append(forward(tokens[:, 12:16], cache, "all"))
        out.append(forward(tokens[:, 16:17], cache, "all"))
        seen.append(torch.cat(out, dim=1))
    assert torch.isfinite(seen[0]).all()
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_what_a_row_holds_does_matter(way):
    """The opposite of the test above: garbage in a slot that is held changes the result."""
    _, new_cache, forward = way
    tokens, seen = tokens_of(1), []
    for fill in (None, 3.0):
        cache = new_cache(1, T)
        forward(tokens[:, :9], cache, "last")
        if fill is not None:
            cache.layers[0].v[:, :, 8] = fill
        seen.append(forward(tokens[:, 9:10], cache, "last"))
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_window_forgets(models):
    """One layer of Mistral: a key 8 tokens back is out of the window, one 7 back is in it."""
    runner = EagerRunner(models["mistral"])
    tokens = tokens_of(1)
    for slot, seen in ((T - 1 - 8, False), (T - 1 - 7, True)):
        results = []
        for spoil in (False, True):
            cache = runner.new_cache(1, T)
            runner.forward(tokens[:, :-1], cache, "last")
            if spoil:
                for layer in cache.layers:
                    layer.v[:, :, slot] += 5
            results.append(runner.forward(tokens[:, -1:], cache, "last"))
        assert torch.equal(*results) is not seen


def test_too_small_a_cache_is_a_usage_error(way):
    _, new_cache, forward = way
    tokens = tokens_of()
    cache = new_cache(2, 10)
    forward(tokens[:, :9], cache, "last")
    with pytest.raises(UsageError, match="9 \\+ 2 tokens do not fit into a cache of 10"):
        forward(tokens[:, 9:11], cache, "last")
    assert cache.host_lengths == (9, 9)  # and it still works
    fresh = new_cache(2, 10)
    forward(tokens[:, :9], fresh, "last")
    assert torch.equal(forward(tokens[:, 9:10], cache, "last"), forward(tokens[:, 9:10], fresh, "last"))
    with pytest.raises(UsageError):
        forward(tokens[:, :1], cache, "last")


def small(**changes):
    shape = {"n_layer": 3, "batch_size": 2, "n_kv_head": 2, "capacity": 10, "head_dim": 4}
    return KVCache(**(shape | {"dtype": torch.float32} | changes))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_nbytes(dtype, size):
    cache = small(dtype=dtype)
    assert cache.nbytes == 2 * 3 * (2 * 2 * 10 * 4) * size
    assert cache.layers[0].k.shape == (2, 2, 10, 4) and cache.layers[2].v.dtype == dtype
    assert small(capacity=20, dtype=dtype).nbytes == 2 * cache.nbytes


def test_capacity_is_capped_at_the_context(models):
    assert EagerRunner(models["gpt2"]).new_cache(1, 10**6).capacity == 64


def test_staged_lengths_hold_for_one_step():
    cache = small()
    cache.stage_([2, 4])
    cache.begin_(4)
    assert cache.positions.tolist() == [[0, 1, 2, 3]] * 2 and cache.last.tolist() == [1, 3]
    assert cache.start == 0 and cache.extent == 4
    assert cache.host_lengths == (0, 0)  # nothing is held before the commit
    cache.commit_()
    assert cache.host_lengths == (2, 4) and cache.lengths.tolist() == [2, 4]
    cache.begin_(2)  # not staged again: both tokens of both rows are real
    assert cache.positions.tolist() == [[2, 3], [4, 5]] and cache.last.tolist() == [1, 1]
    assert cache.start is None and cache.extent == 6
    cache.commit_()
    assert cache.host_lengths == (4, 6)


def test_take_last_takes_each_rows_own():
    cache = small()
    cache.stage_([1, 3])
    cache.begin_(3)
    x = torch.arange(6.0).view(2, 3, 1)
    assert cache.take_last(x).flatten().tolist() == [0.0, 5.0]


@pytest.mark.parametrize("wrong", [[1], [1, 2, 3], [5, 1], [-1, 2]])
def test_wrong_staging_is_caught(wrong):
    cache = small()
    with pytest.raises(AssertionError):
        cache.stage_(wrong)
        cache.begin_(4)


@pytest.mark.parametrize("wrong", [5, [4, 5], [-1, 0], [1]])
def test_rollback_goes_back_only(wrong):
    cache = small()
    cache.begin_(4)
    cache.commit_()
    with pytest.raises((AssertionError, ValueError)):
        cache.truncate_(wrong)
    cache.truncate_(4)
    cache.truncate_([0, 4])
    assert cache.host_lengths == (0, 4)
