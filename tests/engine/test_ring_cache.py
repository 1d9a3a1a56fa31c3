"""Ring caches: what a window forgets is overwritten, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from paretune import native_build
from paretune.engine.cache import RING_STEP, KVCache
from paretune.engine.generate import check_request, generate, naive_generate
from paretune.engine.runners.compiled import CompileRunner
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.runners.native import NativeRunner
from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.model.config import UNBOUNDED
from paretune.ops.attention.pattern import Kept, parse
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.mechanism import Mechanism

T = 960  # longer than any ring here
MODELS = {
    "gpt2 window": ("gpt2", {"n_positions": 1000}, {"pattern": "window:40"}),
    "gpt2 alibi": ("gpt2", {}, {"alibi": True, "pattern": "prefix:5+window:40"}),
    "llama": ("llama", {}, {"pattern": "prefix:3+window:30"}),
    "mistral": ("mistral", {}, None),
}
NO_COMPILER = native_build.unavailable_reason() is not None


SLOW = ("gpt2 window", "llama")  # the others take the same ways


@pytest.fixture(scope="module", params=[pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in MODELS])
def converted(request, tiny_factory):
    family, changes, mechanism = MODELS[request.param]
    _, _, folder = tiny_factory(family, **changes)

    def make():
        model = checkpoint.load(folder)
        if mechanism is not None:
            model = Mechanism(**mechanism).apply(model, Context())
        return Attention("sdpa").apply(model, Context())

    return make


def tokens_of(batch, n, seed=3):
    return torch.randint(2, 131, (batch, n), generator=torch.Generator().manual_seed(seed))


def logits_of(runner, cache, tokens, pieces):
    return torch.cat([runner.forward(part, cache, "all") for part in tokens.split(pieces, dim=1)], dim=1)


@torch.inference_mode()
def test_eager_equals_the_model_without_a_cache(converted):
    runner, tokens = EagerRunner(converted()), tokens_of(2, T)
    cache = runner.new_cache(2, T)
    assert cache.ring and cache.n_slots == cache.prefix + cache.ring < T
    got = logits_of(runner, cache, tokens, [600, 1, 1, 5, 330, *[1] * 23])
    assert_close(got, runner.model(tokens, None, "all"), atol=1e-4, rtol=1e-4)
    assert cache.host_lengths == (T, T)


@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
@torch.inference_mode()
def test_native_equals_eager_and_its_own_bits(converted):
    model = converted()
    tokens = tokens_of(2, T)
    wanted = model(tokens, None, "all")
    runner = NativeRunner(model)
    cache = runner.new_cache(2, T)
    assert cache.ring
    got = logits_of(runner, cache, tokens, [600, 1, 1, 5, 330, *[1] * 23])
    assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    for pieces in ([320, 320, 320], [*[1] * 20, 930, 10]):
        assert torch.equal(logits_of(runner, runner.new_cache(2, T), tokens, pieces), got)
    # A cache that is too short for a ring holds everything: the same bits.
    plain = runner.new_cache(2, 280)
    assert not plain.ring and torch.equal(logits_of(runner, plain, tokens[:, :280], [270, 10]), got[:, :280])


@pytest.mark.parametrize("kind", ["eager", pytest.param("native", marks=pytest.mark.skipif(NO_COMPILER, reason="cc"))])
@torch.inference_mode()
def test_rows_of_unequal_prompts_and_rollback(converted, kind):
    runner = (EagerRunner if kind == "eager" else NativeRunner)(converted())
    lengths, tokens = [3, 700, 290], tokens_of(3, T)
    cache = runner.new_cache(3, T)
    for layer in cache.layers:  # what nobody wrote may be anything
        layer.k.fill_(1e4), layer.v.fill_(1e4)
    cache.stage_(lengths)
    out = [runner.forward(torch.where(torch.arange(700) < torch.tensor(lengths)[:, None], tokens[:, :700], 130), cache)]
    held = list(lengths)

    def step(n, guess=False):
        part = torch.stack([tokens[b, at : at + n] for b, at in enumerate(held)])
        return runner.forward(130 - part if guess else part, cache, "all")

    for _ in range(3):
        step(RING_STEP, guess=True)  # the longest guess there is, taken back
        cache.truncate_(held)
        out.append(step(1))
        held = [n + 1 for n in held]
    for b, n in enumerate(lengths):
        alone = runner.new_cache(1, T)
        row = logits_of(runner, alone, tokens[b : b + 1, : n + 3], [n, 1, 1, 1])[0, n - 1 :]
        for i, found in enumerate(out):
            assert_close(found[b, 0], row[i], atol=1e-4, rtol=1e-4)


def small_ring(**changes):
    shape = {"n_layer": 1, "batch_size": 2, "n_kv_head": 1, "capacity": 100_000, "head_dim": 4, "dtype": torch.float32}
    return KVCache(**shape, kept=Kept(7, 100), **changes)


def test_memory_does_not_grow_with_the_capacity():
    assert small_ring().n_slots == 7 + 512
    sizes = {
        KVCache(n_layer=1, batch_size=1, n_kv_head=1, capacity=c, head_dim=4, dtype=torch.float32, kept=k).nbytes
        for c in (1_000, 1_000_000, UNBOUNDED)
        for k in (Kept(7, 100),)
    }
    assert len(sizes) == 1
    plain = KVCache(
        n_layer=1, batch_size=1, n_kv_head=1, capacity=1000, head_dim=4, dtype=torch.float32, kept=Kept(7, None)
    )
    assert plain.n_slots == 1000 and not plain.ring


def test_a_ring_refuses_to_go_back_further_than_it_can():
    cache = small_ring()
    for _ in range(5):
        cache.begin_(200)
        cache.commit_()
    cache.truncate_([800, 900])
    with pytest.raises(UsageError, match="cannot go back from 1000 to 500"):
        cache.truncate_([500, 900])
    cache.truncate_(0)
    cache.begin_(3)
    assert cache.key_positions[0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, -1, -1]


@pytest.mark.parametrize("kind", ["eager", pytest.param("native", marks=pytest.mark.skipif(NO_COMPILER, reason="cc"))])
def test_generation_past_the_trained_context(tiny, kind):
    """ALiBi without positions has no last position; the naive loop without a cache says the same."""
    model, _, _ = tiny("gpt2")
    model = Attention("sdpa").apply(Mechanism(alibi=True, pattern="window:20").apply(model, Context()), Context())
    assert model.config.n_positions == 64 and model.config.longest == UNBOUNDED
    prompt = tokens_of(1, 60)[0].tolist()
    expected, _ = naive_generate(model, prompt, 40)
    runner = (EagerRunner if kind == "eager" else NativeRunner)(model)
    assert generate(runner, [prompt], 40, ignore_eos=True).generations[0].tokens == expected


def test_learned_positions_refuse_to_go_past_their_end(tiny):
    model, _, _ = tiny("gpt2")
    kept = Mechanism(alibi=True, positions="kept").apply(model, Context())
    assert kept.config.longest == 64
    with pytest.raises(UsageError, match="exceed the context of 64"):
        check_request([[1] * 60], 40, kept.config.longest, 131)


@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize("cache_dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("pattern", ["causal", "prefix:5+window:40"])
def test_native_counters_count_what_a_window_leaves(tiny, pattern, cache_dtype):
    """Bytes and FLOP of attention are those of the dense mask's visible keys and pairs, whatever the cache holds."""
    model, _, _ = tiny("gpt2", n_positions=1000)
    if pattern != "causal":
        model = Mechanism(pattern=pattern).apply(model, Context())
    runner, tokens = NativeRunner(Attention("sdpa").apply(model, Context())), tokens_of(2, 620)
    if cache_dtype is not None:
        runner.set_cache_dtype_(cache_dtype)
    cache = runner.new_cache(2, 900)
    assert bool(cache.ring) == (pattern != "causal")
    runner.count_(True)
    for part in tokens.split([200, 400, *[1] * 20], dim=1):
        runner.forward(part, cache)
    attention = [c for c in runner.counters if "attention" in c[0]]
    dense = parse(pattern).dense(620)
    # The prompt of 400 goes in pieces of at most 256 rows, over both sequences; each piece reads its keys.
    cuts, at = [], 0
    for n in (200, 400, *[1] * 20):
        cuts += [(at + i, min(256, n - i)) for i in range(0, n, 256)]
        at += n
    seen = [dense[a : a + n] for a, n in cuts]
    n_keys, n_pairs = (2 * sum(int(x) for x in xs) for xs in ([s.any(0).sum() for s in seen], [s.sum() for s in seen]))
    c = runner.config
    a_head = {None: c.head_dim * 4, "int8": c.head_dim + 4, "int4": c.head_dim // 2 + 4}  # of 16: one group
    each = 2 * c.n_kv_head * a_head[cache_dtype]
    assert len(attention) == c.n_layer
    assert {(n_bytes, flops) for *_, n_bytes, flops in attention} == {
        (each * n_keys, 4 * c.n_head * c.head_dim * n_pairs)
    }


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
@torch.inference_mode()
def test_compiled_equals_eager_on_a_ring(tiny):
    """One graph for prompts of several lengths and one for decode, over a cache whose slots are not in order."""
    from torch._dynamo.utils import counters

    model, _, _ = tiny("gpt2", n_positions=1000)
    model = Attention("sdpa").apply(Mechanism(pattern="prefix:5+window:40").apply(model, Context()), Context())
    tokens = tokens_of(2, 640)
    wanted = model(tokens, None, "all")
    runner = CompileRunner(model)
    cache = runner.new_cache(2, 900)
    assert cache.ring and cache.static
    breaks = sum(counters["graph_break"].values())
    got = logits_of(runner, cache, tokens, [600, *[1] * 40])
    assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert cache.host_lengths == (640, 640) and sum(counters["graph_break"].values()) == breaks
    cache.truncate_(635)  # a step back, as speculation takes it
    assert_close(runner.forward(tokens[:, 635:636], cache)[:, 0], wanted[:, 635], atol=1e-4, rtol=1e-4)
