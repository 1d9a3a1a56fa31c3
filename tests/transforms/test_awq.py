"""AWQ: scales fold away exactly, and save error where some inputs are large."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from paretune.errors import ParetuneError, UsageError
from paretune.model.layers import Linear
from paretune.ops.weights import rounding
from paretune.transforms.awq import AWQ
from paretune.transforms.base import Context
from paretune.transforms.folding import fold_, folds_of
from paretune.transforms.groups import Groups

WIDE = {
    "gpt2": {"n_embd": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "mistral": {"hidden_size": 64, "intermediate_size": 128},
}
CALIBRATION = torch.randint(0, 131, (32, 32), generator=torch.Generator().manual_seed(1))
LARGE = (3, 17, 40)  # inputs that stand out


def blocks(model):
    return [(f"{'h' if hasattr(model, 'h') else 'layers'}.{i}") for i in range(model.config.n_layer)]


def all_folds(model):
    return [fold for block in blocks(model) for fold in folds_of(model, block)]


def width_of(model, fold):
    source = model.get_submodule(fold.source)
    return fold.rows[1] - fold.rows[0] if fold.rows else source.weight.numel()


def norms(model):
    return {n: p.clone() for n, p in model.named_parameters() if p.dim() == 1}


@pytest.mark.parametrize(
    ("family", "changes", "n_folds"),
    [
        ("gpt2", {}, 3),
        ("gpt2", {"activation_function": "relu"}, 4),
        ("gpt2", {"tie_word_embeddings": False}, 3),
        ("llama", {}, 4),
        ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}, 4),
        ("mistral", {"tie_word_embeddings": True}, 4),
    ],
)
def test_folding_alone_changes_nothing(tiny, tiny_tokens, family, changes, n_folds):
    """Against transformers' forward of the untouched weights; only the order of roundings in fp32 differs."""
    model, hf, _ = tiny(family, **changes)
    with torch.no_grad():
        exact = hf(tiny_tokens).logits
    ends = (model.embedding.weight, model.head.weight)
    values = [w.values.clone() for w in ends]
    before = {n: m.weight.values.clone() for n, m in model.named_modules() if isinstance(m, Linear)}
    folds = all_folds(model)
    assert len(folds) == n_folds * model.config.n_layer
    for fold in folds:
        fold_(model, fold, torch.empty(width_of(model, fold)).uniform_(0.1, 10))
        for reader in fold.readers:
            assert not torch.allclose(model.get_submodule(reader).weight.values, before[reader], rtol=0.05)
    torch.testing.assert_close(model(tiny_tokens, None, "all"), exact, atol=2e-4, rtol=2e-4)
    assert (model.embedding.weight, model.head.weight) == ends
    assert all(torch.equal(w.values, v) for w, v in zip(ends, values, strict=True))


def outliers(tiny, family, **changes):
    """A model whose norms give a few inputs twenty times the size of the others, as large models have them."""
    model = tiny(family, **WIDE[family], **changes)[0]
    for name, p in model.named_parameters():
        if "ln_1.weight" in name or "ln_2.weight" in name or "layernorm.weight" in name:
            p.data[list(LARGE)] *= 20
    return model


def inputs_of(model, name, tokens):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    model(tokens, None, "all")
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_large_inputs_keep_their_weights(tiny, family):
    """The first layer: its output error on the calibration text, from its real inputs before and after."""
    exact = outliers(tiny, family)
    layers = {"gpt2": ("h.0.attn.c_attn",)}.get(family, tuple(f"layers.0.self_attn.{p}_proj" for p in "qkv"))
    errors = {}
    ours = AWQ(head_bits=0).apply(outliers(tiny, family), Context(calibration=CALIBRATION))
    assert AWQ(head_bits=0).verify(ours, SimpleNamespace(kernels={}, compiled=False, runner={}, own_kernels=False))
    for name in layers:
        x, w = inputs_of(exact, name, CALIBRATION), exact.get_submodule(name).weight.values
        y = x @ w.T
        nearest = Groups(group=64, head_bits=0).apply(outliers(tiny, family), Context())
        searched = rounding.nearest_weighted(w, x.square().mean(0), 4, 64, False, 16)
        divided = torch.ones(w.size(0))
        if family == "gpt2" or name.endswith("v_proj"):
            # One over what the rows were divided by shows in the bias, or in the layer that reads them.
            rows = slice(128, 192) if family == "gpt2" else slice(None)
            mine = inputs_of(ours, name, CALIBRATION) @ ours.get_submodule(name).weight.dequantize().T
            divided[rows] = (mine * y).sum(0)[rows] / y.square().sum(0)[rows]
        got = inputs_of(ours, name, CALIBRATION) @ ours.get_submodule(name).weight.dequantize().T / divided
        for kind, value in (
            ("awq", got),
            ("nearest", x @ nearest.get_submodule(name).weight.dequantize().T),
            ("searched", x @ searched.dequantize().T),
        ):
            errors[kind] = errors.get(kind, 0.0) + float((value - y).square().sum() / y.square().sum())
    assert errors["awq"] < 0.4 * errors["nearest"] and errors["awq"] < 0.9 * errors["searched"], errors


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_a_model_with_large_inputs_keeps_its_logits(tiny, family):
    """On other tokens than those of the calibration."""
    tokens = torch.randint(0, 131, (16, 32), generator=torch.Generator().manual_seed(2))
    errors = {}
    for name, transform in (("nearest", Groups(group=64, head_bits=0)), ("awq", AWQ(head_bits=0))):
        model = outliers(tiny, family)
        exact = model(tokens, None, "all")
        transform.apply(model, Context(calibration=CALIBRATION))
        errors[name] = float((model(tokens, None, "all") - exact).norm() / exact.norm())
    assert errors["awq"] < 0.85 * errors["nearest"], errors


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("minimum", [False, True])
def test_forms(tiny, bits, minimum):
    model = AWQ(bits=bits, minimum=minimum, group=32).apply(outliers(tiny, "gpt2"), Context(calibration=CALIBRATION))
    weight = model.h[1].attn.c_attn.weight
    assert (weight.bits, weight.group, weight.minimum is not None) == (bits, 32, minimum)
    plain = Groups(bits=bits, minimum=minimum).apply(outliers(tiny, "gpt2"), Context())
    assert weight.stored_bytes == plain.h[1].attn.c_attn.weight.stored_bytes


def test_what_is_left_out_is_not_scaled(tiny):
    """A norm that also feeds a layer which stays as it is keeps its gain."""
    for exclude, kept in (
        ("*.q_proj", ("input_layernorm",)),
        ("*.v_proj", ("input_layernorm",)),
        ("*.up_proj", ("post_attention_layernorm",)),
    ):
        model = outliers(tiny, "llama")
        before = norms(model)
        left = {n: m.weight.values.clone() for n, m in model.named_modules() if n.endswith(exclude[1:])}
        AWQ(head_bits=0, exclude=exclude).apply(model, Context(calibration=CALIBRATION))
        changed = {n for n, p in norms(model).items() if not torch.equal(p, before[n])}
        assert changed and not any(part in n for n in changed for part in kept)
        assert all(torch.equal(model.get_submodule(n).weight.values, v) for n, v in left.items())


def test_an_input_that_is_never_seen(tiny):
    """It is scaled by 1: no logarithm of zero, no division by it."""
    errors = {}
    for name, transform in (("nearest", Groups(group=64, head_bits=0)), ("awq", AWQ(head_bits=0))):
        model = outliers(tiny, "llama")
        for block in model.layers:
            block.input_layernorm.weight.data[5] = 0
        exact = model(CALIBRATION, None, "all")
        transform.apply(model, Context(calibration=CALIBRATION))
        assert all(torch.isfinite(p).all() for p in norms(model).values())
        assert float(model.layers[0].input_layernorm.weight[5]) == 0
        errors[name] = float((model(CALIBRATION, None, "all") - exact).norm() / exact.norm())
    assert errors["awq"] < errors["nearest"], errors


def test_a_failure_half_way_leaves_norms_and_biases(tiny, tiny_tokens, monkeypatch):
    model = outliers(tiny, "gpt2")
    exact = model(tiny_tokens, None, "all")
    before = {n: m.weight for n, m in model.named_modules() if hasattr(m, "weight")}
    real, calls = rounding.nearest_weighted, []

    def fails(*args):
        calls.append(1)
        if len(calls) > 70:  # in the second block
            raise ParetuneError("no room")
        return real(*args)

    monkeypatch.setattr(rounding, "nearest_weighted", fails)
    with pytest.raises(ParetuneError, match=r"h\.1.*no room"):
        AWQ().apply(model, Context(calibration=CALIBRATION))
    assert torch.equal(model(tiny_tokens, None, "all"), exact)
    assert all(model.get_submodule(n).weight is w for n, w in before.items())


def test_calibration_text_is_asked_for(tiny):
    model = outliers(tiny, "gpt2")
    with pytest.raises(UsageError, match="awq-int4-g64 needs calibration text"):
        AWQ().apply(model, Context())
    with pytest.raises(UsageError, match="calibration text too short: 32 tokens for the mean size of a layer's inputs"):
        AWQ().apply(model, Context(calibration=CALIBRATION[:1]))
