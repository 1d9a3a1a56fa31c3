"""Every legal combination of transforms, on every family: it runs, proves itself, is near fp32, and saves."""

from __future__ import annotations

import itertools

import pytest
import torch

from paretune.engine.load import prove
from paretune.engine.probe import observe
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.recipe import Recipe
from paretune.registry import TRANSFORMS
from paretune.transforms.attention import Attention
from paretune.transforms.awq import AWQ
from paretune.transforms.base import Context
from paretune.transforms.fp8 import Float8
from paretune.transforms.gptq import GPTQ
from paretune.transforms.groups import Groups
from paretune.transforms.hqq import HQQ
from paretune.transforms.int8 import Int8
from paretune.transforms.llm_int8 import LLMInt8
from paretune.transforms.nf4 import NormalFloat4
from paretune.transforms.precision import Precision

FAMILIES = ("gpt2", "llama", "mistral")
STAGES = [
    [None, Attention("eager"), Attention("sdpa")],
    [None, Precision("bf16"), Precision("fp16")],
    [
        None,
        Int8(),
        Int8(embeddings=False),
        Groups(),
        Groups(bits=8, minimum=True, head_bits=0),
        LLMInt8(),
        NormalFloat4(),
        GPTQ(),
        AWQ(),
        HQQ(),
        Float8(),
    ],
]
# Widths that groups divide.
WIDE = {
    "gpt2": {"n_embd": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "mistral": {"hidden_size": 64, "intermediate_size": 128},
}
# What quantises does not know how attention runs: with all three forms of it, five formats are enough.
ONE_ATTENTION = (LLMInt8(), NormalFloat4(), GPTQ(), AWQ(), HQQ(), Float8())
RECIPES = [
    Recipe(tuple(t for t in choice if t))
    for choice in itertools.product(*STAGES)
    if choice[2] not in ONE_ATTENTION or choice[0] == Attention("sdpa")
]
# Relative L2 error of the logits against fp32; bf16 and int8 together give about 0.02.
LIMIT = 0.05
LIMITS = {Float8(): 0.15, Groups(): 0.4, NormalFloat4(): 0.4, GPTQ(): 0.4, AWQ(): 0.5, HQQ(): 0.4}
PREFILL = 15
CONTEXT = Context(calibration=torch.randint(0, 131, (32, 32), generator=torch.Generator().manual_seed(2)))


@pytest.fixture(params=FAMILIES, scope="module")
def folder(request, tiny_factory):
    return tiny_factory(request.param, **WIDE[request.param])[2]


def logits_of(model, tokens):
    """All logits: a prefill, a chunk and single steps, so that every phase is in them."""
    runner = EagerRunner(model)
    cache = runner.new_cache(tokens.size(0), tokens.size(1))
    pieces = [PREFILL, 4] + [1] * (tokens.size(1) - PREFILL - 4)
    return torch.cat([runner.forward(t, cache, "all") for t in tokens.split(pieces, dim=1)], dim=1)


PRUNING = ("sparse8", "magnitude", "wanda", "sparsegpt", "neurons", "heads", "layers", "columns")


def test_every_transform_is_in_the_test():
    """A new transform has to be added to STAGES, but for what changes the model's words (`test_mechanism.py`,
    `test_prune_weights.py`, `test_prune_structures.py`)."""
    elsewhere = {"mechanism", *PRUNING}
    assert {t.name for stage in STAGES for t in stage if t} | elsewhere == set(TRANSFORMS.names())
    assert len(RECIPES) == 63 and len({r.hash for r in RECIPES}) == 63


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_composes(folder, recipe, tiny_tokens, tmp_path):
    exact = logits_of(checkpoint.load(folder), tiny_tokens)
    model = recipe.apply(checkpoint.load(folder), CONTEXT)
    logits = logits_of(model, tiny_tokens)
    error = float((logits.double() - exact).norm() / exact.norm())
    assert error < max([LIMIT, *(LIMITS[t] for t in recipe.transforms if t in LIMITS)])
    assert (error > 1e-4) == recipe.changes_numbers  # and what claims to change nothing does not
    probe = observe(EagerRunner(model))
    said = [s for t in recipe.transforms for s in t.verify(model, probe)]
    assert len(said) >= len(recipe.transforms)
    assert (model.lm_head.weight is getattr(model, model.embedding_name).weight) == model.config.tied_head

    # Saved and loaded, as stored and as `load_recipe` does (fp32): the recipe again changes no bit.
    checkpoint.save(model, tmp_path)
    for dtype in (None, torch.float32):
        again = recipe.apply(checkpoint.load(tmp_path, dtype), CONTEXT)
        assert torch.equal(logits_of(again, tiny_tokens), logits), f"loaded as {dtype}"
        twice = recipe.apply(again, CONTEXT)
        assert torch.equal(logits_of(twice, tiny_tokens), logits)
    # Without the recipe the stored numbers are the same; only the attention function is not stored.
    plain = checkpoint.load(tmp_path)
    attention = [t for t in recipe.transforms if isinstance(t, Attention)]
    assert torch.equal(logits_of(Recipe(tuple(attention)).apply(plain, Context()), tiny_tokens), logits)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_the_bar_is_not_empty(tiny_factory, recipe, tiny_tokens):
    """Another model of the same shape misses the limit by far."""
    model = recipe.apply(checkpoint.load(tiny_factory("gpt2", **WIDE["gpt2"])[2]), CONTEXT)
    other = checkpoint.new(model.config, seed=3)
    exact = logits_of(other, tiny_tokens)
    assert float((logits_of(model, tiny_tokens).double() - exact).norm() / exact.norm()) > 0.5


def test_illegal_orders():
    chosen = [t for stage in STAGES for t in stage if t]
    seen = 0
    for n in (2, 3):
        for order in itertools.permutations(chosen, n):
            stages = [t.stage for t in order]
            is_mix = all(a.is_partial or a.stage != b.stage for a, b in itertools.pairwise(order))
            if stages == sorted(stages) and is_mix:
                Recipe(order)
                continue
            seen += 1
            with pytest.raises(UsageError, match="PRUNE < MECHANISM < ATTENTION < PRECISION < QUANTIZE < FUSE"):
                Recipe(order)
    # 14 transforms in three stages of 2, 2 and 10: 44 legal pairs and 40 legal triples. And mixes: 4 of the 10 leave
    # the ends to another, which makes 4 * 9 pairs more, 4 * 36 triples with them, and 4 * 3 * 8 of formats alone.
    assert seen == 14 * 13 - 44 - 36 + 14 * 13 * 12 - 40 - 144 - 96


@pytest.mark.parametrize("family", FAMILIES)
def test_composes_untied_and_tied(tiny, tiny_tokens, family):
    """The richest recipe, with the head that is not the family's usual one."""
    for tied in (True, False):
        model, _, folder = tiny(family, tie_word_embeddings=tied)
        exact = logits_of(model, tiny_tokens)
        ours = Recipe((Attention("sdpa"), Precision("bf16"), Int8())).apply(checkpoint.load(folder), Context())
        assert float((logits_of(ours, tiny_tokens).double() - exact).norm() / exact.norm()) < LIMIT
        assert (ours.lm_head.weight is getattr(ours, ours.embedding_name).weight) == tied


def test_a_converted_folder_is_served_by_its_recipe(tiny_llama_folder, tmp_path):
    """The way of a plan: convert, save, load through the recipe, prove."""
    from paretune.engine.load import load_recipe

    recipe = Recipe((Attention("sdpa"), Precision("fp16"), Int8()))
    checkpoint.save(load_recipe(tiny_llama_folder, recipe).runner.model, tmp_path)
    said, _ = prove(load_recipe(tmp_path, recipe))
    assert any("int8" in s for s in said) and any("fp16" in s for s in said)
