"""What quantising transforms share: filters, mixes, errors that leave the model alone, proof; and GPTQ on a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from paretune.engine.probe import observe
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import NoEffectError, ParetuneError, UsageError
from paretune.model.layers import Embedding, Linear
from paretune.ops.quantized_linear import op
from paretune.ops.weights.dense import Dense
from paretune.recipe import Recipe, preset
from paretune.transforms.awq import AWQ
from paretune.transforms.base import Context
from paretune.transforms.fp8 import Float8
from paretune.transforms.gptq import GPTQ
from paretune.transforms.groups import Groups
from paretune.transforms.hqq import HQQ
from paretune.transforms.int8 import Int8
from paretune.transforms.llm_int8 import LLMInt8
from paretune.transforms.nf4 import NormalFloat4

WIDE = {
    "gpt2": {"n_embd": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "mistral": {"hidden_size": 64, "intermediate_size": 128},
}
CALIBRATION = torch.randint(0, 131, (32, 32), generator=torch.Generator().manual_seed(1))
CONTEXT = Context(calibration=CALIBRATION)
EVERY = [Int8(), Groups(), LLMInt8(), NormalFloat4(), GPTQ(), AWQ(), HQQ(), Float8()]


@pytest.fixture(params=["gpt2", "llama"])
def model(request, tiny):
    return tiny(request.param, **WIDE[request.param])[0]


def formats(model):
    return {n: m.weight.format for n, m in model.named_modules() if isinstance(m, Linear | Embedding)}


def fake(**runner):
    return SimpleNamespace(kernels={}, compiled=True, own_kernels=False, cache_dtype="torch.float32", runner=runner)


@pytest.mark.parametrize("transform", EVERY, ids=lambda t: t.title)
def test_filters(model, transform):
    from dataclasses import replace

    some = replace(transform, include="*.0.*", exclude="*.mlp.*,*head")
    before = formats(model)
    some.apply(model, CONTEXT)
    after = formats(model)
    changed = {n for n in after if after[n] != before[n]}
    assert changed and changed == {n for n in after if ".0." in n and ".mlp." not in n}
    assert some.verify(model, fake())
    assert "of *.0.* but" in some.title and some.title != transform.title
    assert Recipe.from_dict(Recipe((some,)).to_dict()).transforms == (some,)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(model, option):
    with pytest.raises(UsageError, match=f"int8: {option} pattern 'h.9.\\*' matches no layer"):
        Int8(**{option: "h.9.*"}).apply(model, Context())
    assert set(formats(model).values()) == {"dense"}


def test_a_tied_pair_is_chosen_by_either_name(tiny):
    for name in ("wte", "lm_head"):
        model = tiny("gpt2", **WIDE["gpt2"])[0]
        Int8(include=name).apply(model, Context())
        assert model.lm_head.weight is model.wte.weight and model.wte.weight.format == "int8_rows"


def test_a_mix_in_one_recipe(model, tiny_tokens):
    recipe = Recipe((NormalFloat4(include="*.0.*"), Groups(bits=8, group=64, include="*.1.*"), Int8()))
    again = Recipe.from_dict(recipe.to_dict())
    assert again == recipe and again.hash == recipe.hash and "nf4 of *.0.* + int8-g64 of *.1.* + int8" in recipe.name
    recipe.apply(model, Context())
    for name, found in formats(model).items():
        assert found == ("nf4" if ".0." in name else "int_groups" if ".1." in name else "int8_rows"), name
    probe = observe(EagerRunner(model))
    said = [s for t in recipe.transforms for s in t.verify(model, probe)]
    assert "4 matrices hold NF4 blocks" in said[0] or "7 matrices hold NF4 blocks" in said[0]
    assert any("were quantised before (int_groups, nf4)" in s for s in said)


def test_all_but_the_last_of_a_mix_name_their_layers():
    with pytest.raises(UsageError, match="all but the last have"):
        Recipe((Groups(), Int8()))
    assert Recipe((NormalFloat4(), Int8())).name.startswith("nf4 + int8")  # it leaves the ends by itself
    assert preset("nf4_head8").transforms[1:] == (NormalFloat4(positions=True), Int8())


def test_an_already_quantised_model_is_no_silent_no_op(model):
    Int8().apply(model, Context())
    for transform in (Groups(), NormalFloat4(), GPTQ(), AWQ()):
        transform.apply(model, CONTEXT)
        with pytest.raises(NoEffectError, match=r"its layers were already quantised \(int8_rows\)"):
            transform.verify(model, fake())


@pytest.mark.parametrize("transform", EVERY, ids=lambda t: t.title)
def test_nan_names_the_layer_and_leaves_the_model(model, transform):
    last = [n for n, m in model.named_modules() if isinstance(m, Linear) and ".1." in n][-1]
    values = model.get_submodule(last).weight.values
    values.data[3, 5] = float("nan")
    before = {n: m.weight for n, m in model.named_modules() if isinstance(m, Linear | Embedding)}
    with pytest.raises(ParetuneError, match=f"{last}: a weight holds NaN or infinity"):
        transform.apply(model, CONTEXT)
    assert all(model.get_submodule(n).weight is w for n, w in before.items())


@pytest.mark.parametrize("shape", [("llama", {"hidden_size": 72, "intermediate_size": 101}), ("gpt2", {"n_embd": 36})])
@pytest.mark.parametrize("transform", EVERY, ids=lambda t: t.title)
def test_widths_that_groups_do_not_divide(tiny, tiny_tokens, transform, shape):
    """Odd ones too: every chosen layer is converted, proven, and near what it was."""
    model = tiny(shape[0], **shape[1])[0]
    assert transform.fits(model.config) is None
    exact = model(tiny_tokens, None, "all")
    transform.apply(model, CONTEXT)
    assert transform.verify(model, observe(EagerRunner(model)))
    assert all(c.weight.format == transform.format for c in transform.chosen(model))
    error = float((model(tiny_tokens, None, "all") - exact).norm() / exact.norm())
    assert 0 < error < 0.5  # 4 bits of random weights are off by a tenth of a layer's output


def test_a_kept_copy_is_no_effect(model):
    for transform in (NormalFloat4(), LLMInt8(), Float8()):
        fresh = transform.apply(model, Context())
        weight = next(
            m.weight for m in fresh.modules() if isinstance(m, Linear) and m.weight.format == transform.format
        )
        weight.register_buffer("cached", weight.dequantize())
        with pytest.raises(NoEffectError, match=r"stores too much: .* bytes are stored"):
            transform.verify(fresh, fake())
        for m in fresh.modules():
            if isinstance(m, Linear | Embedding):
                m.weight = Dense(m.weight.dequantize())


def test_llm_int8_needs_its_kernel_in_the_profile(model):
    LLMInt8().apply(model, Context())
    assert "paretune::mixed_int8_linear ran" in LLMInt8().verify(model, observe(EagerRunner(model)))[1]
    with pytest.raises(NoEffectError, match="shows no paretune::mixed_int8_linear"):
        LLMInt8().verify(model, SimpleNamespace(kernels={}, compiled=False, own_kernels=False, runner={}))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_planted_outliers_cost_w8a8_its_bits_and_llm_int8_none(tiny, tiny_tokens, family):
    """A few inputs a hundred times as large as the others, with weights as much smaller, as in large models.

    8 bits for each row of inputs are then gone; LLM.int8 stays near the same weights with exact inputs.
    """

    def planted():
        model = tiny(family, **WIDE[family])[0]
        for name, readers in (
            ("ln_1", ("attn.c_attn",)),
            ("ln_2", ("mlp.c_fc",)),
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            for block in getattr(model, "h", None) or model.layers:
                if hasattr(block, name):
                    getattr(block, name).weight.data[[5, 33]] *= 100
                    for reader in readers:
                        block.get_submodule(reader).weight.values.data[:, [5, 33]] /= 100
        return model

    def logits(transform):
        return transform.apply(planted(), Context())(tiny_tokens, None, "all")

    def error(of, exact):
        return float((of - exact).norm() / exact.norm())

    groups = {"bits": 8, "group": 64, "head_bits": 0}
    w8a8 = error(logits(Groups(**groups, activation_bits=8)), logits(Groups(**groups)))
    exact = logits(Int8(embeddings=False))  # the same weights
    ours, none = error(logits(LLMInt8()), exact), error(logits(LLMInt8(threshold=1e9)), exact)
    assert ours < 0.05 and w8a8 > 5 * ours and none > 5 * ours, (ours, w8a8, none)


def test_llm_int8_proves_its_outliers(model, monkeypatch):
    from paretune.ops.weights import mixed_int8

    LLMInt8().apply(model, Context())
    said = LLMInt8().verify(model, observe(EagerRunner(model)))
    assert any("an input of 600 in" in s and "with all inputs in 8 bits" in s for s in said)
    real = mixed_int8.mixed_int8_linear  # a kernel that takes no input for an outlier
    monkeypatch.setattr(mixed_int8, "mixed_int8_linear", lambda x, q, s, threshold, *rest: real(x, q, s, 1e9, *rest))
    with pytest.raises(NoEffectError, match="an outlier takes the bits of others"):
        LLMInt8().verify(model, observe(EagerRunner(model)))


@pytest.mark.parametrize("transform", [Int8(), Groups(), NormalFloat4(), HQQ()], ids=lambda t: t.title)
def test_a_gpu_has_to_show_its_kernels(transform, monkeypatch):
    on_gpu = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    on_gpu.named_modules = lambda: []
    on_gpu.head = None
    monkeypatch.setattr(op, "unavailable_reason", lambda device: None)
    assert transform.notes("cuda") == []
    probe = fake(runner="eager")
    with pytest.raises(NoEffectError, match="runs none of quantized_gemv, quantized_gemm"):
        transform.proof_of_kernel(on_gpu, probe)
    probe.kernels = {"quantized_gemv": 7, "ampere_gemm": 1}
    assert transform.proof_of_kernel(on_gpu, probe) == ["quantized_gemv ran 7 times in one prefill and one decode step"]
    # Without kernels it runs, slowly, and says so before and after.
    monkeypatch.setattr(op, "unavailable_reason", lambda device: "Triton is not installed")
    slow = "dequantised at every call: Triton is not installed"
    assert slow in transform.notes("cuda")[0] and slow in transform.proof_of_kernel(on_gpu, probe)[0]
    assert transform.notes("cpu") == []


def test_what_gains_nothing_on_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(op, "unavailable_reason", lambda device: None)
    assert "multiplied in 16 on a GPU" in Groups(bits=8, activation_bits=8).notes("cuda")[0]
    assert "the host waits" in LLMInt8().notes("cuda:0")[0] and LLMInt8().notes("cpu") == []


def test_bad_options():
    for make, said in (
        (lambda: GPTQ(damping=0.0), "damping is 0.0"),
        (lambda: LLMInt8(threshold=0.0), "threshold is 0.0"),
        (lambda: HQQ(minimum=False), "minimum is False"),
        (lambda: GPTQ(group=48), "gptq: group is 48"),
    ):
        with pytest.raises(UsageError, match=said):
            make()


def test_fp8_says_that_a_cpu_only_stores_it():
    assert Float8().requires("cpu") is None and "storage only" in Float8().notes("cpu")[0]
    assert "no fp8 numbers" in Float8().requires("mps")


# ---- GPTQ


def output_error(model, exact, tokens):
    return float((model(tokens, None, "all") - exact).norm() / exact.norm())


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_gptq_beats_nearest_on_a_model(tiny, family):
    """On tokens of the kind that it was calibrated on, not the same ones. Shared inputs (q, k, v) share moments."""
    calibration = torch.randint(0, 30, (64, 32), generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(0, 30, (16, 32), generator=torch.Generator().manual_seed(2))
    errors = {}
    for name, transform in (("nearest", Groups(group=64, head_bits=0)), ("gptq", GPTQ(head_bits=0))):
        model = tiny(family, **WIDE[family])[0]
        exact = model(tokens, None, "all")
        transform.apply(model, Context(calibration=calibration))
        assert transform.verify(model, fake())
        errors[name] = output_error(model, exact, tokens)
    assert errors["gptq"] < 0.75 * errors["nearest"], errors


def test_gptq_wants_calibration_text(model):
    with pytest.raises(UsageError, match="needs calibration text"):
        GPTQ().apply(model, Context())
    with pytest.raises(UsageError, match="calibration text too short: 32 tokens for layers of"):
        GPTQ().apply(model, Context(calibration=CALIBRATION[:1]))
    assert set(formats(model).values()) == {"dense"}


def test_gptq_twice_is_once(model):
    GPTQ().apply(model, CONTEXT)
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, Linear)}
    GPTQ().apply(model, Context())  # a converted checkpoint needs no text
    assert all(model.get_submodule(n).weight is w for n, w in weights.items())


def test_a_failure_half_way_leaves_the_model(model, monkeypatch):
    from paretune.ops.weights import rounding

    solved = []

    def fails(*args, **options):
        solved.append(1)
        if len(solved) == 6:
            raise ParetuneError("no inverse")
        return real(*args, **options)

    real = rounding.gptq
    monkeypatch.setattr(rounding, "gptq", fails)
    before = {n: m.weight for n, m in model.named_modules() if isinstance(m, Linear | Embedding)}
    with pytest.raises(ParetuneError, match="no inverse"):
        GPTQ().apply(model, CONTEXT)
    assert all(model.get_submodule(n).weight is w for n, w in before.items())
    assert not any(m._forward_pre_hooks for m in model.modules())
