"""GPT-2 against transformers: the same weights give the same logits, whatever the config says."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from paretune import native_build
from paretune.model import checkpoint
from paretune.model.entries import ACTIVATIONS
from paretune.model.families.gpt2.model import CausalSelfAttention
from paretune.registry import ATTENTION

# What runs on any machine without compiling graphs; the others have tests of their own (tests/ops).
FORMS = ("eager", "sdpa") if native_build.unavailable_reason() else ("eager", "sdpa", "native")


HF_NAMES = [
    "gelu_new",
    "gelu_pytorch_tanh",
    "gelu_fast",
    "gelu_accurate",
    "gelu_python_tanh",
    "gelu",
    "gelu_python",
]
HF_NAMES += ["quick_gelu", "relu", "silu", "swish"]


def use_attention(model, name):
    modules = [m for m in model.modules() if isinstance(m, CausalSelfAttention)]
    assert modules
    for module in modules:
        module.attention = ATTENTION.get(name)
    return model


@torch.inference_mode()
def assert_parity(ours, hf, tokens):
    expected = hf(tokens).logits
    assert expected.std() > 0.3  # logits that are all alike would prove nothing
    for attention in FORMS:
        assert_close(use_attention(ours, attention)(tokens), expected)
    assert_close(ours(tokens, logits="last"), expected[:, -1:])


def test_every_activation_name_is_tested():
    assert set(HF_NAMES) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", HF_NAMES)
def test_activation_names(tiny, tiny_tokens, name):
    assert_parity(*tiny("gpt2", activation_function=name)[:2], tiny_tokens)


def test_activations_differ_from_each_other(tiny, tiny_tokens):
    """A parity test of names would pass if one function served them all on both sides."""
    by_function = {function: name for name, function in ACTIVATIONS.items()}
    with torch.inference_mode():
        seen = [tiny("gpt2", activation_function=name)[0](tiny_tokens) for name in by_function.values()]
    for i, a in enumerate(seen):
        for b in seen[i + 1 :]:
            assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_inner": 40},
        {"n_inner": 7},
        {"tie_word_embeddings": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
        {"n_layer": 1, "n_head": 1, "n_embd": 32},
        {"n_layer": 3, "n_head": 8},
        {"layer_norm_epsilon": 1e-2},
        {"vocab_size": 200, "n_positions": 23},
    ],
    ids=str,
)
def test_config_variations(tiny, tiny_tokens, changes):
    assert_parity(*tiny("gpt2", **changes)[:2], tiny_tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"layer_norm_epsilon": 1e-2},
    ],
    ids=str,
)
def test_variations_change_the_logits(tiny, tiny_tokens, changes):
    """The options that leave every tensor alone must matter, else their parity says nothing."""
    with torch.inference_mode():
        plain, other = tiny("gpt2")[0](tiny_tokens), tiny("gpt2", **changes)[0](tiny_tokens)
    assert (plain - other).abs().max() > 1e-3


def test_old_config_with_n_ctx_and_no_activation(tiny, tiny_tokens):
    _, hf, folder = tiny("gpt2")
    config = json.loads((folder / "config.json").read_text())
    config["n_ctx"] = config.pop("n_positions")
    for key in ("activation_function", "layer_norm_epsilon", "tie_word_embeddings", "n_inner", "dtype"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert_parity(checkpoint.load(folder), hf, tiny_tokens)


def test_head_is_tied_or_not(tiny):
    tied, _, _ = tiny("gpt2")
    untied, _, _ = tiny("gpt2", tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight


def test_causal(tiny, tiny_tokens):
    """A later token changes no earlier logits, and does change its own."""
    model, _, _ = tiny("gpt2")
    other = tiny_tokens.clone()
    other[:, 15] = (other[:, 15] + 1) % 131
    with torch.inference_mode():
        a, b = model(tiny_tokens), model(other)
    assert torch.equal(a[:, :15], b[:, :15])
    assert (a[:, 15:] - b[:, 15:]).abs().amax(-1).min() > 0


def test_bf16_error_within_twice_that_of_transformers(tiny, tiny_tokens):
    _, hf, folder = tiny("gpt2")
    rounded = hf.to(torch.bfloat16)
    exact = copy.deepcopy(rounded).float()
    ours = checkpoint.load(folder, torch.bfloat16)
    with torch.inference_mode():
        reference = exact(tiny_tokens).logits
        theirs = (rounded(tiny_tokens).logits.float() - reference).abs()
        for attention in FORMS:
            logits = use_attention(ours, attention)(tiny_tokens)
            assert logits.dtype == torch.bfloat16
            error = (logits.float() - reference).abs()
            assert error.max() <= 2 * theirs.max()
            assert error.mean() <= 2 * theirs.mean()


def test_compiles_without_graph_breaks(tiny, tiny_tokens):
    model, _, _ = tiny("gpt2")
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(tiny_tokens)
    assert (explained.graph_break_count, explained.graph_count) == (0, 1), explained.break_reasons
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(tiny_tokens), model(tiny_tokens))
    torch._dynamo.reset()


@pytest.mark.parametrize("size", checkpoint.published_sizes())
def test_published_sizes_on_meta(size):
    """Parameter counts of the four published models, the tied head counted once."""
    millions = {"gpt2": 124.44, "gpt2-medium": 354.82, "gpt2-large": 774.03, "gpt2-xl": 1557.61}
    model = checkpoint.build(checkpoint.published(size))
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 2) == millions[size]


def test_new_is_reproducible_and_follows_the_seed():
    config = checkpoint.published("gpt2").from_hf(
        {"model_type": "gpt2", "vocab_size": 50, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    )
    a, b, c = (checkpoint.new(config, seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.wte.weight.values, c.wte.weight.values)
    assert a.lm_head.weight is a.wte.weight
    assert 0.015 < a.wte.weight.values.std() < 0.025
    assert 0.007 < a.h[0].mlp.c_proj.weight.values.std() < 0.013  # 0.02 / sqrt(2 n_layer)
    assert all(not p.requires_grad for p in a.parameters())


@torch.inference_mode()
@pytest.mark.parametrize("name", ["pocket", "pocket-draft"])
def test_embedded_models_equal_transformers(name):
    """Trained logits reach 15, where fp32 itself is off by 3e-5: fp64 is the judge of both."""
    folder = checkpoint.resolve(name)
    hf = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    ours = checkpoint.load(folder, torch.float32)
    tokens = torch.randint(0, ours.config.vocab_size, (2, 150))
    exact = checkpoint.load(folder, torch.float64)(tokens)
    expected = hf(tokens).logits
    assert expected.std() > 1
    assert_close(ours(tokens), expected, atol=1e-4, rtol=1.3e-6)
    error, theirs = (ours(tokens) - exact).abs(), (expected - exact).abs()
    assert error.mean() <= 2 * theirs.mean()
    assert error.max() <= 2 * theirs.max()
