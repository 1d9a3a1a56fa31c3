"""The precision transform: tensors and cache in 16 bits, and an honest word where that is emulated."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from paretune import hardware
from paretune.engine.probe import observe
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import NoEffectError, UsageError
from paretune.model import checkpoint
from paretune.transforms.base import Context
from paretune.transforms.precision import Precision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def probe(cache_dtype):
    return SimpleNamespace(kernels={}, compiled=False, cache_dtype=str(cache_dtype), runner={})


@pytest.fixture(params=["gpt2", "llama", "mistral"])
def family(request):
    return request.param


@pytest.mark.parametrize("name", DTYPES)
def test_effect_and_proof(tiny, tiny_tokens, family, name):
    model, _, folder = tiny(family)
    n = sum(p.numel() for p in model.parameters())
    transform = Precision(name)
    model = transform.apply(model, Context())
    assert {p.dtype for p in model.parameters()} == {DTYPES[name]}
    runner = EagerRunner(model)
    seen = observe(runner)
    assert seen.bytes_by_dtype == {str(DTYPES[name]).removeprefix("torch."): 2 * n}
    (said,) = transform.verify(model, seen)
    assert f"{2 * n:,} bytes" in said and name in said
    # Numbers: nearer to fp32 than 16 bits of mantissa allow would be wrong, far from it as well.
    with torch.inference_mode():
        exact = checkpoint.load(folder)(tiny_tokens)
        ours = model(tiny_tokens)
    assert ours.dtype == DTYPES[name]
    error = float((ours.float() - exact).norm() / exact.norm())
    assert 1e-5 < error < {"bf16": 0.05, "fp16": 0.005}[name]
    assert runner.new_cache(1, 4).layers[0].v.dtype == DTYPES[name]


@pytest.mark.parametrize("name", DTYPES)
def test_positions_stay_exact(tiny, name):
    """bf16 cannot tell position 257 from 258: rotary angles stay in fp32 whatever the model's dtype."""
    model = tiny("llama")[0]
    before = model._rope.clone()
    Precision(name).apply(model, Context())
    assert model._rope.dtype == torch.float32 and torch.equal(model._rope, before)


def test_one_tensor_left_behind_is_no_effect(tiny):
    transform = Precision("bf16")
    model = transform.apply(tiny("gpt2")[0], Context())
    transform.verify(model, probe(torch.bfloat16))
    model.h[1].ln_2.float()
    with pytest.raises(NoEffectError, match=r"2 tensors kept another dtype, h\.1\.ln_2\.weight first"):
        transform.verify(model, probe(torch.bfloat16))


def test_never_applied_is_no_effect(tiny):
    model = tiny("llama")[0]
    with pytest.raises(NoEffectError, match="bf16 had no effect"):
        Precision("bf16").verify(model, observe(EagerRunner(model)))


def test_a_cache_in_another_dtype_is_no_effect(tiny):
    model = Precision("fp16").apply(tiny("gpt2")[0], Context())
    with pytest.raises(NoEffectError, match=r"the cache holds torch\.float32"):
        Precision("fp16").verify(model, probe(torch.float32))


def support(**changes):
    values = {
        "works": True,
        "emulated": False,
        "decode_ratio": 2.0,
        "prefill_ratio": 2.0,
        "reason": "as it is",
    }
    return hardware.DtypeSupport(**(values | changes))


def test_a_dtype_that_does_not_work_is_refused_with_the_reason(monkeypatch):
    asked = []

    def dtype_failure(name, device):
        asked.append((name, device))
        return "no product here" if name == "bf16" else None

    monkeypatch.setattr(hardware, "dtype_failure", dtype_failure)
    monkeypatch.setattr(hardware, "dtype_support", lambda device: pytest.fail("timed, to know whether it works"))
    assert Precision("bf16").requires("cpu") == "no product here"
    assert Precision("fp16").requires("cuda") is None
    assert asked == [("bf16", "cpu"), ("fp16", "cuda")]


def test_an_emulated_dtype_is_allowed_and_said_to_be(monkeypatch):
    table = {"bf16": support(emulated=True, reason="it is emulated and saves memory only"), "fp16": support()}
    monkeypatch.setattr(hardware, "dtype_support", lambda device: table)
    assert Precision("bf16").requires("cpu") is None
    assert Precision("bf16").notes("cpu") == ["it is emulated and saves memory only"]
    assert Precision("fp16").notes("cpu") == []


def test_the_names_of_dtypes():
    assert Precision("bfloat16") == Precision("bf16") == Precision() and Precision("half").title == "fp16"
    with pytest.raises(UsageError, match="int4"):
        Precision("int4")
    for name in ("fp32", "float32"):
        with pytest.raises(UsageError, match="changes nothing"):
            Precision(name)
    assert not Precision.exact
