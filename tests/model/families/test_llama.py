"""Llama and Mistral against transformers, and the real small Llama."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from paretune import native_build
from paretune.model import checkpoint
from paretune.model.families.llama.model import Attention, rope_frequencies
from paretune.model.tokenizer import Tokenizer
from paretune.registry import ATTENTION

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


# What runs on any machine without compiling graphs; the others have tests of their own (tests/ops).
FORMS = ("eager", "sdpa") if native_build.unavailable_reason() else ("eager", "sdpa", "native")


def use_attention(model, name):
    modules = [m for m in model.modules() if isinstance(m, Attention)]
    assert modules
    for module in modules:
        module.attention = ATTENTION.get(name)
    return model


@torch.inference_mode()
def assert_parity(ours, hf, tokens):
    expected = hf(tokens).logits
    assert expected.std() > 0.3
    for attention in FORMS:
        assert_close(use_attention(ours, attention)(tokens), expected)
    assert_close(ours(tokens, logits="last"), expected[:, -1:])


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "REMOVE"}))


LLAMA_VARIATIONS = [
    {},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 4},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {"tie_word_embeddings": True},
    {"head_dim": 20},
    {"head_dim": 6, "num_key_value_heads": 1},
    {"hidden_act": "gelu"},
    {"hidden_act": "gelu_pytorch_tanh"},
    {"hidden_act": "relu"},
    {"rms_norm_eps": 1e-2},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    {"rope_parameters": {"rope_theta": 300.0, **LLAMA3}},
    {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
]


@pytest.mark.parametrize("changes", LLAMA_VARIATIONS, ids=str)
def test_llama_config_variations(tiny, tiny_tokens, changes):
    assert_parity(*tiny("llama", **changes)[:2], tiny_tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 10000.0, **LLAMA3}},
        {"rms_norm_eps": 1e-2},
        {"hidden_act": "relu"},
    ],
    ids=str,
)
def test_variations_change_the_logits(tiny, tiny_tokens, changes):
    with torch.inference_mode():
        plain, other = tiny("llama")[0](tiny_tokens), tiny("llama", **changes)[0](tiny_tokens)
    assert (plain - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_theta": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {"rope_theta": 300.0, "rope_scaling": LLAMA3},
    ],
    ids=str,
)
def test_old_style_rope_config(tiny, tiny_tokens, rope):
    """Before transformers 5 there was no `rope_parameters`."""
    _, _, folder = tiny("llama")
    edit_config(folder, rope_parameters="REMOVE", **rope)
    hf = LlamaForCausalLM.from_pretrained(folder).eval()
    plain = {k: v for k, v in (hf.config.rope_parameters or {}).items() if k in ("rope_theta", "factor")}
    assert plain.get("rope_theta", 10000.0) == rope.get("rope_theta", 10000.0)
    assert_parity(checkpoint.load(folder), hf, tiny_tokens)


def test_llama3_frequencies_cover_all_three_bands(tiny):
    """Kept, blended and divided: a config in which one band is empty would not test it."""
    model, hf, _ = tiny("llama", head_dim=16, rope_parameters={"rope_theta": 300.0, **LLAMA3})
    got = rope_frequencies(model.config)
    plain = 300.0 ** (-torch.arange(0, 16, 2) / 16)
    ratio = got / plain
    assert (ratio > 0.999).any() and (ratio < 0.1251).any() and ((ratio > 0.13) & (ratio < 0.99)).any()
    assert_close(got, hf.model.rotary_emb.inv_freq.float())


MISTRAL_VARIATIONS = [
    {},  # window 8, length 23
    {"sliding_window": 1},
    {"sliding_window": 22},
    {"sliding_window": 23},
    {"sliding_window": 4096},
    {"sliding_window": None},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 4, "tie_word_embeddings": True},
    {"head_dim": 20},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
]


@pytest.mark.parametrize("changes", MISTRAL_VARIATIONS, ids=str)
def test_mistral_config_variations(tiny, tiny_tokens, changes):
    assert_parity(*tiny("mistral", **changes)[:2], tiny_tokens)


def test_window_hides_old_tokens(tiny, tiny_tokens):
    """With L layers and window w a logit depends on the last L (w - 1) + 1 tokens and on no earlier one."""
    other = tiny_tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % 131
    windowed, _, _ = tiny("mistral")
    whole, _, _ = tiny("mistral", sliding_window=None)
    with torch.inference_mode():
        changed = (windowed(tiny_tokens) - windowed(other)).abs().amax((0, 2)) > 0
        assert changed[:15].all()  # 2 layers reach 14 back
        assert not changed[15:].any()
        assert ((whole(tiny_tokens) - whole(other)).abs().amax((0, 2)) > 0).all()


def test_llama_ignores_a_sliding_window(tiny, tiny_tokens):
    _, hf, folder = tiny("llama")
    edit_config(folder, sliding_window=4)
    assert_parity(checkpoint.load(folder), hf, tiny_tokens)


def test_head_is_tied_or_not(tiny):
    tied, _, _ = tiny("llama", tie_word_embeddings=True)
    untied, _, _ = tiny("llama")
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_bf16_error_within_twice_that_of_transformers(tiny, tiny_tokens, family):
    _, hf, folder = tiny(family)
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


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_rotary_angles_stay_fp32(tiny, cast):
    """bf16 cannot tell position 257 from 258, so neither frequencies nor angles may be cast."""
    model, _, _ = tiny("llama")
    before = model._rope.clone()
    model.to(cast)
    assert model._rope.dtype == torch.float32
    assert torch.equal(model._rope, before)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_compiles_without_graph_breaks(tiny, tiny_tokens, family):
    model, _, _ = tiny(family)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(tiny_tokens)
    assert (explained.graph_break_count, explained.graph_count) == (0, 1), explained.break_reasons
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(tiny_tokens), model(tiny_tokens))
    torch._dynamo.reset()


@pytest.mark.realdata
@torch.inference_mode()
def test_tinystories_equals_transformers(data_dir):
    folder = data_dir / "tinystories_656k"
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = checkpoint.load(folder, torch.float32)
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("Once upon a time, there was a little girl who had a red ball. She wanted to")
    tokens = torch.tensor([ids])
    assert_parity(ours, hf, tokens)
    long = torch.randint(3, 2048, (1, 300))
    assert_close(use_attention(ours, "sdpa")(long), hf(long).logits)


@pytest.mark.realdata
@torch.inference_mode()
def test_tinystories_greedy_text(data_dir):
    """Sixty greedy tokens of the naive loop: the text of transformers' generate, and a story."""
    folder = data_dir / "tinystories_656k"
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, tokenizer = checkpoint.load(folder), Tokenizer(folder)
    tokens = torch.tensor([tokenizer.encode("Once upon a time")])
    expected = hf.generate(tokens, max_new_tokens=60, do_sample=False, attention_mask=torch.ones_like(tokens))
    for _ in range(expected.size(1) - tokens.size(1)):
        tokens = torch.cat((tokens, ours(tokens, logits="last").argmax(-1)), dim=1)
    assert tokens.tolist() == expected.tolist()
    text = tokenizer.decode(tokens[0].tolist())
    assert "Once upon a time, a little girl named Lily lived in a small house" in text
