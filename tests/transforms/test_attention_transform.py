"""The attention transform: every layer, the same numbers, and proof that it ran."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from paretune.engine.probe import observe
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import NoEffectError, UsageError
from paretune.ops.attention import reference, sdpa
from paretune.transforms.attention import Attention, attention_layers
from paretune.transforms.base import Context

FUSED = {"aten::scaled_dot_product_attention": 4, "aten::_scaled_dot_product_flash_attention_for_cpu": 4}


def probe(kernels=FUSED, compiled=False):
    return SimpleNamespace(kernels=kernels, compiled=compiled, cache_dtype="torch.float32")


@pytest.fixture(params=["gpt2", "llama", "mistral"])
def model(request, tiny):
    return tiny(request.param)[0]


def test_every_layer_is_swapped_and_the_logits_stay(model, tiny_tokens):
    layers = attention_layers(model)
    assert len(layers) == 2 and all(m.attention is reference.attention for m in layers)
    with torch.inference_mode():
        before = model(tiny_tokens)
        assert Attention("sdpa").apply(model, Context()) is model
        assert all(m.attention is sdpa.attention for m in layers)
        assert_close(model(tiny_tokens), before, atol=2e-5, rtol=1e-5)
    Attention("eager").apply(model, Context())
    assert all(m.attention is reference.attention for m in layers)


@pytest.mark.parametrize("form", ["eager", "sdpa"])
def test_proof_of_effect(model, form):
    transform = Attention(form)
    transform.apply(model, Context())
    (said,) = transform.verify(model, observe(EagerRunner(model)))
    assert f"all 2 layers run {form} attention" in said
    assert ("flash" in said) == (form == "sdpa")


@pytest.mark.parametrize("reset", [0, 1])
def test_one_layer_reset_is_no_effect(model, reset):
    transform = Attention("sdpa")
    transform.apply(model, Context())
    transform.verify(model, probe())
    attention_layers(model)[reset].attention = reference.attention
    with pytest.raises(NoEffectError, match="some layers kept another function"):
        transform.verify(model, probe())


def test_never_applied_is_no_effect(model):
    with pytest.raises(NoEffectError, match="sdpa had no effect"):
        Attention("sdpa").verify(model, observe(EagerRunner(model)))


def test_a_profile_without_the_kernel_is_no_effect(model):
    transform = Attention("sdpa")
    transform.apply(model, Context())
    with pytest.raises(NoEffectError, match="no fused attention kernel"):
        transform.verify(model, probe({"aten::softmax": 4}))
    transform.verify(model, probe({}, compiled=True))  # a compiled graph names its kernels otherwise
    (said,) = transform.verify(model, probe({"aten::scaled_dot_product_attention": 4}))
    assert "unfused math form" in said


def test_a_model_without_attention_is_no_effect():
    with pytest.raises(NoEffectError, match="no attention layer"):
        Attention("eager").verify(torch.nn.Linear(2, 2), probe())


def test_unknown_form():
    with pytest.raises(UsageError, match=r"unknown attention function 'flash'.*sdpa"):
        Attention("flash")


def test_it_claims_to_be_exact():
    assert Attention.exact and Attention().title == "sdpa" and Attention().requires("cpu") is None
