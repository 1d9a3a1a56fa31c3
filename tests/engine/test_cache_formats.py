"""Caches in 8 and 4 bits: the formulas, the bytes, rollback and rings, and what they cost in quality."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from paretune.engine.cache_formats import dequantize_groups, groups_of, position_bytes, quantize_groups, quantize_heads
from paretune.engine.load import load_recipe, prove
from paretune.engine.runners.base import CACHE_DTYPES
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.runners.native import NativeRunner
from paretune.errors import UsageError
from paretune.evaluate import texts
from paretune.model.tokenizer import Tokenizer
from paretune.recipe import EngineOptions, Recipe, preset
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.mechanism import Mechanism

FAMILIES = ("gpt2", "llama", "mistral")


@pytest.mark.parametrize(("head_dim", "n_groups"), [(2, 1), (12, 1), (32, 1), (48, 1), (64, 2), (96, 3), (128, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bits_are_the_nearest_of_sixteen_steps(head_dim, n_groups, dtype):
    x = (torch.randn(2, 3, 5, head_dim) + 4).to(dtype)
    q, scale = quantize_groups(x)
    assert groups_of(head_dim) == n_groups
    assert q.shape == (2, 3, 5, head_dim // 2) and q.dtype == torch.uint8
    assert scale.shape == (2, 3, 5, n_groups, 2) and scale.dtype == torch.float16
    groups = x.double().unflatten(-1, (n_groups, -1))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    off = (dequantize_groups(q, scale).double().unflatten(-1, (n_groups, -1)) - groups).abs().amax(-1)
    # Half a step, and what fp16 rounds off the minimum and off fifteen scales.
    assert (off <= step / 2 + 2**-10 * groups.abs().amax(-1) + 2**-10 * 15 * step).all()


def test_a_group_of_equal_numbers_and_what_fp16_does_not_hold():
    same = torch.full((1, 64), 0.5)
    assert torch.equal(dequantize_groups(*quantize_groups(same)), same)
    assert torch.equal(dequantize_groups(*quantize_groups(torch.zeros(1, 64))), torch.zeros(1, 64))
    for bad in (torch.nan, torch.inf, -torch.inf, 1e6):
        x = torch.randn(1, 64)
        x[0, 40] = bad
        out = dequantize_groups(*quantize_groups(x))
        assert torch.isfinite(out[0, :32]).all() and torch.isnan(out[0, 32:]).all()
        if bad != 1e6:
            assert torch.isnan(quantize_heads(x)[1]).all()


def runner_of(model, dtype):
    runner = EagerRunner(Attention("sdpa").apply(model, Context()))
    runner.set_cache_dtype_(dtype)
    return runner


def logits_of(runner, cache, tokens, pieces):
    return torch.cat([runner.forward(part, cache, "all") for part in tokens.split(pieces, dim=1)], dim=1)


def error(a, exact):
    return float((a - exact).norm() / exact.norm())


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_pieces_rows_and_rollback(tiny, tiny_tokens, family):
    """A token's numbers depend on no other: in pieces, in a batch and after a step taken back they are the same."""
    model = tiny(family)[0]
    runner = runner_of(model, "int4")
    exact = logits_of(runner_of(tiny(family)[0], "fp32"), runner_of(model, "fp32").new_cache(2, 23), tiny_tokens, [23])
    runner.set_cache_dtype_("int4")
    whole = logits_of(runner, runner.new_cache(2, 23), tiny_tokens, [23])
    assert 1e-3 < error(whole, exact) < 0.3  # 4 bits of random keys; 8 bits are a tenth of it
    runner.set_cache_dtype_("int8")
    assert error(logits_of(runner, runner.new_cache(2, 23), tiny_tokens, [23]), exact) < 0.2 * error(whole, exact)
    runner.set_cache_dtype_("int4")
    # An input on the edge of two steps may fall to the other one where sums have another order.
    assert error(logits_of(runner, runner.new_cache(2, 23), tiny_tokens, [9, 5, *[1] * 9]), whole) < 0.03
    cache = runner.new_cache(2, 23)
    got = [logits_of(runner, cache, tiny_tokens[:, :15], [15])]
    runner.forward(130 - tiny_tokens[:, 15:20], cache)
    cache.truncate_(15)
    got.append(logits_of(runner, cache, tiny_tokens[:, 15:], [8]))
    plain = runner.new_cache(2, 23)
    expected = [
        logits_of(runner, plain, tiny_tokens[:, s], [tiny_tokens[:, s].size(1)]) for s in (slice(15), slice(15, 23))
    ]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    unequal = runner.new_cache(2, 23)
    unequal.stage_([4, 17])
    last = runner.forward(tiny_tokens[:, :17], unequal, "last")
    alone = runner.new_cache(1, 23)
    assert_close(last[0, 0], runner.forward(tiny_tokens[:1, :4], alone, "last")[0, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@torch.inference_mode()
def test_rings(tiny, dtype):
    """A window makes the cache a ring: the same numbers as a cache that holds everything, and rollback is exact."""
    model = tiny("gpt2", n_positions=1024)[0]
    model = Mechanism(pattern="prefix:5+window:40").apply(model, Context())
    tokens = torch.randint(0, 131, (2, 600), generator=torch.Generator().manual_seed(3))
    runner = runner_of(model, dtype)
    ring = runner.new_cache(2, 1024)
    assert ring.ring and ring.n_slots < 600
    out = [runner.forward(part, ring, "all") for part in tokens[:, :590].split(250, dim=1)]
    runner.forward(130 - tokens[:, 590:], ring)
    ring.truncate_(590)
    out.append(runner.forward(tokens[:, 590:], ring, "all"))
    got = torch.cat(out, dim=1)
    runner.set_cache_dtype_("fp32")
    exact = logits_of(runner, runner.new_cache(2, 1024), tokens, [250, 250, 100])
    assert error(got, exact) < {"int8": 0.02, "int4": 0.3}[dtype]
    runner.set_cache_dtype_(dtype)
    short = runner.new_cache(2, 300)
    assert not short.ring
    assert error(logits_of(runner, short, tokens[:, :300], [250, 50]), got[:, :300]) < 0.03


@pytest.mark.parametrize(("dtype", "bits"), [("fp32", 32), ("bf16", 16), ("int8", 8 + 32 / 64), ("int4", 4 + 32 / 32)])
@torch.inference_mode()
def test_bytes_of_a_token(tiny, dtype, bits):
    model = tiny("llama", hidden_size=256, intermediate_size=64)[0]  # 4 heads of 64
    c = model.config
    assert c.head_dim == 64
    runner = runner_of(model, dtype)
    cache = runner.new_cache(3, 50)
    assert cache.nbytes / (3 * 50) == 2 * c.n_layer * c.n_kv_head * 64 * bits / 8
    assert cache.layers[0].k.dtype == CACHE_DTYPES[dtype]
    assert 2 * c.n_layer * position_bytes(cache.dtype, c.n_kv_head, 64) * 3 * 50 == cache.nbytes


def test_a_recipe_says_what_its_cache_is(tiny, monkeypatch):
    folder = tiny("gpt2")[2]
    loaded = load_recipe(folder, preset("kv4"), check=False)
    said, probe = prove(loaded)
    assert "keys and values are kept in int4" in said and probe.runner["cache_dtype"] == "int4"
    monkeypatch.setattr(NativeRunner, "cache_dtypes", ("fp32", "int8"))
    recipe = Recipe((), EngineOptions(runner="native", cache_dtype="int4"))
    assert recipe.requires("cpu") == "the native runner has no int4 cache"
    with pytest.raises(UsageError, match="native runner has no int4 cache"):
        load_recipe(folder, recipe)
    odd = tiny("gpt2", n_embd=36)[2]  # 4 heads of 9
    with pytest.raises(UsageError, match="a 4-bit cache needs an even head size, not 9") as failure:
        load_recipe(odd, preset("kv4"), check=False)
    assert failure.value.exit_code == 2


@torch.inference_mode()
def test_quality_on_the_embedded_model(pocket_folder):
    """Mean KL divergence of the next token from the fp32 cache's, over 3 windows of new English."""
    ids = Tokenizer(pocket_folder).encode(texts.text_of("confirm"))
    tokens = torch.tensor(ids[: 3 * 192]).view(3, 192)
    runner = load_recipe(pocket_folder, preset("baseline"), check=False).runner
    found = {}
    for dtype in ("fp32", "int8", "int4"):
        runner.set_cache_dtype_(dtype)
        found[dtype] = runner.forward(tokens, runner.new_cache(3, 192), "all").log_softmax(-1)
    kl = {d: float((found["fp32"].exp() * (found["fp32"] - found[d])).sum(-1).mean()) for d in ("int8", "int4")}
    assert kl["int8"] < 2e-4 and kl["int4"] < 0.02, kl
