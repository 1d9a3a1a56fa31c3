"""The 4-bit cache in native code: PyTorch's bytes bit for bit, and attention over them."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

from paretune import native_build
from paretune.engine.cache import KVCache
from paretune.engine.cache_formats import groups_of, quantize_groups
from paretune.engine.load import load_recipe, prove
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.runners.native import NativeRunner
from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.ops.native import program
from paretune.recipe import preset
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.mechanism import Mechanism

pytestmark = pytest.mark.skipif(native_build.unavailable_reason() is not None, reason="no C++ compiler")


def native_bytes(x):
    """`quantize_groups` of `[n, D]` by native code; what is written over is no zero."""
    n, head_dim = x.shape
    q = torch.full((n, head_dim // 2), 0xA5, dtype=torch.uint8)
    scale = torch.full((n, groups_of(head_dim), 2), 7.0, dtype=torch.float16)
    program.library().paretune_keep(4, x.data_ptr(), n, head_dim, q.data_ptr(), scale.data_ptr())
    return q, scale


def hostile(head_dim):
    """Rows `[n, head_dim]`: plain, of every size, constant, at the edges of fp16, between two steps, no numbers."""
    g = torch.Generator().manual_seed(head_dim)
    plain = torch.randn(400, head_dim, generator=g)
    sizes = torch.randn(2000, head_dim, generator=g) * 2.0 ** torch.randint(-40, 18, (2000, 1), generator=g)
    moved = torch.randn(400, head_dim, generator=g) + 300 * torch.randn(400, 1, generator=g)
    constants = [0.0, 0.1, -0.1, 0.5, 1e-7, -6e-8, 3e-39, 65504.0, 65519.0, 65520.0, -65520.0, 1e6, -1e6, 3e38]
    ties = torch.randint(0, 31, (200, head_dim), generator=g) / 2.0  # the scale is 1 where both ends are there
    ties[:, 0], ties[:, -1] = 0.0, 15.0
    bad = torch.randn(200, head_dim, generator=g)
    for row, value in enumerate([torch.nan, torch.inf, -torch.inf, 7e4, -7e4, 1e6, -3e38, 3e38] * 25):
        bad[row, int(torch.randint(0, head_dim, (1,), generator=g))] = value
    bad[150:, 0] = -torch.inf
    all_bad = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None].expand(3, head_dim)
    same = torch.tensor(constants)[:, None].expand(len(constants), head_dim)
    return torch.cat([plain, sizes, moved, same, ties, bad, all_bad]).contiguous()


@pytest.mark.parametrize("head_dim", [2, 6, 32, 34, 40, 64, 80, 96, 128])
def test_bytes_are_those_of_pytorch(head_dim):
    x = hostile(head_dim)
    for ours, theirs in zip(native_bytes(x), quantize_groups(x), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        bits = (ours, theirs) if ours.dtype == torch.uint8 else (ours.view(torch.int16), theirs.view(torch.int16))
        rows = (bits[0] != bits[1]).flatten(1).any(1).nonzero()[:, 0]
        assert not len(rows), (x[rows[0]], ours[rows[0]], theirs[rows[0]])


# Head sizes of two groups, one of 40 and one of 6; grouped-query heads with and without queries enough to pack.
SHAPES = {
    "gpt2, heads of 64": ("gpt2", {"n_embd": 128, "n_head": 2, "n_positions": 700}),
    "gpt2, heads of 6": ("gpt2", {"n_embd": 18, "n_head": 3, "n_positions": 700}),
    "llama, 2 queries a key of 64": ("llama", {"hidden_size": 256, "max_position_embeddings": 700}),
    "llama, 8 queries a key of 40": (
        "llama",
        {"hidden_size": 320, "num_attention_heads": 8, "num_key_value_heads": 1, "max_position_embeddings": 700},
    ),
    "mistral, window": ("mistral", {"sliding_window": 300, "max_position_embeddings": 700}),
}


def runners_of(folder):
    model = Attention("sdpa").apply(checkpoint.load(folder), Context())
    runners = EagerRunner(copy.deepcopy(model)), NativeRunner(model)
    for runner in runners:
        runner.set_cache_dtype_("int4")
    return runners


def tensors_of(cache):
    return [t for layer in cache.layers for t in (layer.k, layer.v, layer.k_scale, layer.v_scale)]


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_attention_over_the_same_bytes(tiny, shape):
    """Rows of unequal length, several chunks; native code reads what PyTorch stored.

    Given the same bytes only the order of the sums differs: 1e-5, as for fp32. What a step itself stores may be rounded
    the other way where a number lies between two: seen in the bytes, rare, and then as good as a step of 4 bits."""
    family, changes = SHAPES[shape]
    eager, native = runners_of(tiny(family, **changes)[2])
    tokens = torch.randint(0, 131, (2, 560), generator=torch.Generator().manual_seed(21))
    caches = [r.new_cache(2, 600) for r in (eager, native)]
    for runner, cache in zip((eager, native), caches, strict=True):
        cache.stage_([530, 290])
        runner.forward(tokens[:, :530], cache)
    # Stored by native code on its own: as PyTorch's but where a number lies between two steps. Behind a row's end
    # anything may stand.
    ours, theirs = (torch.cat([c.layers[0].k[0, :, :530], c.layers[0].k[1, :, :290]], dim=1) for c in caches)
    low, high = (abs((ours >> s & 15).int() - (theirs >> s & 15).int()) for s in (0, 4))
    assert max(low.max(), high.max()) <= 1 and ((low + high) > 0).float().mean() < 1e-3
    n_same = 0
    for n in (1, 1, 1, 1, 1, 7, 15):
        for mine, other in zip(tensors_of(caches[1]), tensors_of(caches[0]), strict=True):
            mine.copy_(other)
        step = tokens[:, 530 : 530 + n]
        wanted, got = (r.forward(step, c, "all") for r, c in zip((eager, native), caches, strict=True))
        is_same = all(map(torch.equal, *map(tensors_of, caches)))
        n_same += is_same
        assert float((got - wanted).norm() / wanted.norm()) < (1e-5 if is_same else 1e-2)
    assert n_same >= 3


@pytest.mark.parametrize("shape", ["gpt2, heads of 64", "llama, 8 queries a key of 40"])
@torch.inference_mode()
def test_rows_pieces_and_rollback_give_the_same_bits(tiny, shape):
    family, changes = SHAPES[shape]
    _, native = runners_of(tiny(family, **changes)[2])
    tokens = torch.randint(0, 131, (3, 300), generator=torch.Generator().manual_seed(22))
    whole = native.forward(tokens, native.new_cache(3, 300), "all")
    cache = native.new_cache(3, 300)
    parts = [native.forward(tokens[:, a:b], cache, "all") for a, b in ((0, 3), (3, 4), (4, 280))]
    native.forward(130 - tokens[:, 280:285], cache)  # a draft that is not taken
    cache.truncate_(280)
    parts += [native.forward(tokens[:, a:b], cache, "all") for a, b in ((280, 284), (284, 285), (285, 300))]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    unequal = native.new_cache(3, 300)
    unequal.stage_([299, 30, 1])
    last = native.forward(tokens[:, :299], unequal)
    step = native.forward(tokens[:, :1], unequal)
    for row, n in enumerate((299, 30, 1)):
        alone = native.new_cache(1, 300)
        assert torch.equal(native.forward(tokens[row : row + 1, :n], alone), last[row : row + 1])
        assert torch.equal(native.forward(tokens[row : row + 1, :1], alone), step[row : row + 1])


@torch.inference_mode()
def test_a_ring_gives_the_bits_of_a_cache_that_holds_everything(tiny):
    model = Mechanism(pattern="prefix:5+window:40").apply(tiny("gpt2", n_positions=2048)[0], Context())
    native = NativeRunner(Attention("sdpa").apply(model, Context()))
    native.set_cache_dtype_("int4")
    tokens = torch.randint(0, 131, (2, 900), generator=torch.Generator().manual_seed(23))

    def logits(cache):
        cuts = (0, 250, 500, 700, 701, 702, 890, 900)
        out = [native.forward(tokens[:, a:b], cache, "all") for a, b in pairwise(cuts)]
        native.forward(130 - tokens[:, :6], cache)
        cache.truncate_(900)
        return torch.cat([*out, native.forward(tokens[:, :9], cache, "all")], dim=1)

    ring = native.new_cache(2, 2048)
    assert ring.ring and ring.n_slots < 900
    sizes = {"batch_size": 2, "n_kv_head": ring.n_kv_head, "capacity": 2048, "head_dim": ring.head_dim}
    flat = KVCache(n_layer=len(ring.layers), dtype=ring.dtype, **sizes)
    assert not flat.ring
    assert torch.equal(logits(ring), logits(flat))


@torch.inference_mode()
def test_a_recipe_keeps_four_bits_and_no_copy(tiny):
    """The proof of effect, and the bytes: half a byte a number, and 4 for each group of 32."""
    folder = tiny("gpt2", n_embd=128, n_head=2, n_positions=600)[2]
    loaded = load_recipe(folder, preset("native_int8_kv4"), check=False)
    said, probe = prove(loaded)
    assert "keys and values are kept in int4" in said and probe.runner["cache_dtype"] == "int4"
    assert any("native code" in s for s in said)
    runner = loaded.runner
    cache = runner.new_cache(4, 600)
    runner.forward(torch.zeros(4, 1, dtype=torch.int64), cache)
    before = runner.buffer_bytes
    for _ in range(3):
        runner.forward(torch.zeros(4, 100, dtype=torch.int64), cache)
    numbers = 2 * len(cache.layers) * 4 * 600 * 128
    assert cache.nbytes == numbers / 2 + numbers / 32 * 4
    # Buffers grow with the rows of a step, not with the cache.
    grown = runner.buffer_bytes - before
    for _ in range(2):
        runner.forward(torch.zeros(4, 100, dtype=torch.int64), cache)
    assert runner.buffer_bytes - before == grown


def test_odd_heads_are_refused(tiny):
    folder = tiny("gpt2", n_embd=36)[2]  # 4 heads of 9
    with pytest.raises(UsageError, match="a 4-bit cache needs an even head size, not 9"):
        load_recipe(folder, preset("native_int8_kv4"), check=False)
