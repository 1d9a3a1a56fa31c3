"""Mechanisms are tried, not looked up; profiles of devices give predictions that say so."""

from __future__ import annotations

import json

import pytest
import torch

from paretune import native_build
from paretune.cli.ls import mechanism_lines
from paretune.errors import UsageError
from paretune.hardware import DtypeSupport, abilities
from paretune.hardware.devices import PROFILES, device_profile
from paretune.measure import predict
from paretune.model import checkpoint

STATES = {"works", "emulated", "cannot"}
SUPPORT = {
    "fp32": DtypeSupport(True, False, 1.0, 1.0, ""),
    "bf16": DtypeSupport(True, True, 0.4, 0.3, "bf16 is only emulated here"),
    "fp16": DtypeSupport(False, False, 0.0, 0.0, "fp16 does not work here"),
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(abilities, "dtype_support", lambda device: SUPPORT)


def by_name(**options):
    return {a.name: a for a in abilities.abilities("cpu", **options)}


def test_every_mechanism_has_a_state_a_reason_and_a_substitute(quick):
    found = by_name()
    assert {"bf16", "fp16", "int8 dot products", "flash attention (PyTorch)", "Triton", "native code"} <= set(found)
    for ability in found.values():
        assert ability.state in STATES and ability.why
        assert ability.state == "works" or ability.instead, ability.name
    assert (found["bf16"].state, found["fp16"].state) == ("emulated", "cannot")
    page = "\n".join(mechanism_lines([a.to_json() for a in found.values()], "cpu"))
    assert "bf16" in page and "instead:" in page and "fp16 does not work here" in page


def test_a_kernel_that_fails_or_lies_cannot(quick, monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.ones(a.size(0), b.size(1), dtype=torch.int32))

    def refuses(*args):
        raise RuntimeError("not on this chip\nand a long tail")

    monkeypatch.setattr(torch, "_weight_int8pack_mm", refuses)
    found = by_name()
    assert found["int8 dot products"].state == "cannot" and "away" in found["int8 dot products"].why
    assert found["int8 matrix-vector kernel"].why == "not on this chip"


def test_int8_without_the_instruction_is_emulated(quick, monkeypatch):
    monkeypatch.setattr(abilities, "instruction_sets", lambda: ["avx2"])
    assert by_name()["int8 dot products"].state == "emulated"


def test_without_a_compiler(quick, monkeypatch):
    monkeypatch.setattr(native_build, "compiler", lambda: None)
    monkeypatch.setattr(native_build, "unavailable_reason", lambda: "no C++ compiler was found")
    found = by_name()
    assert found["native code"].state == found["torch.compile"].state == "cannot"


def test_study_002_falls_out_of_the_t4(tiny_gpt2_folder):
    """Its finding: on a T4, 16 bits alone gain next to nothing, a compiled step does, both together most."""
    config = checkpoint.published("gpt2")
    device = device_profile("t4")
    rows = predict.predict(config, device, 64)
    assert all(row["is_prediction"] for row in rows)
    decode = {(r["dtype"], r["form"]): r for r in rows if r["phase"] == "decode"}
    graph = "one call or graph"
    assert decode["fp16", "eager"]["speedup"] < 1.1
    assert decode["fp16", graph]["speedup"] > decode["fp32", graph]["speedup"]
    # 124 million weights in fp32 at 80 % of 320 GB/s.
    assert decode["fp32", graph]["roofline_sec"] == pytest.approx(124e6 * 4 / 256e9, rel=0.05)
    said = " ".join(predict.findings(device, rows))
    assert "operator launches" in said and "no bf16 units" in said and "capability 8.0" in said
    assert decode["bf16", graph]["speedup"] == decode["fp32", graph]["speedup"]  # converted: no gain
    assert "at best no gain" in decode["bf16", graph]["note"] and decode["fp16", graph]["note"] == ""


def test_an_emulated_format_gains_where_one_call_reads_it_as_it_is():
    """A laptop without bf16: PyTorch converts, the native runner reads 16 bits and computes in fp32."""
    config, device = checkpoint.published("gpt2"), device_profile("laptop-cpu")
    rows = predict.predict(config, device, 64)
    gains = {(r["dtype"], r["form"]): r["speedup"] for r in rows if r["phase"] == "decode"}
    assert gains["bf16", "eager"] == 1.0 and gains["bf16", "one call or graph"] == pytest.approx(2.0, rel=0.01)
    assert "no 16-bit format gains in eager mode" in predict.findings(device, rows)[0]


@pytest.mark.parametrize("name", PROFILES)
def test_every_device_profile_predicts(name, tiny_llama_folder):
    device = device_profile(name)
    rows = predict.predict(checkpoint.read_config(tiny_llama_folder), device, 16, 2)
    json.dumps(rows, allow_nan=False)
    assert len(rows) == 16 and all(r["predicted_sec"] >= r["roofline_sec"] > 0 and r["fits"] for r in rows)


def test_a_model_too_large_for_the_device():
    config = checkpoint.published("gpt2-xl", n_positions=1024)
    small = {**vars(device_profile("t4")), "memory_bytes": 1 << 30}
    device = type(device_profile("t4"))(**small)
    assert "does not fit" in " ".join(predict.findings(device, predict.predict(config, device, 128)))


def test_an_unknown_device_profile():
    with pytest.raises(UsageError, match=r"unknown device profile 'tpu'. Known: t4, a100"):
        device_profile("tpu")


def test_quantised_layers_say_whether_their_kernels_run(monkeypatch):
    from paretune.ops.quantized_linear import op

    assert abilities._quantized_layers("cpu").instead == "native C++ code"
    monkeypatch.setattr(op, "unavailable_reason", lambda device: None)
    assert abilities._quantized_layers("cuda").state == "works"
    monkeypatch.setattr(op, "unavailable_reason", lambda device: "Triton is not installed")
    found = abilities._quantized_layers("cuda")
    assert (found.state, found.why) == ("cannot", "Triton is not installed") and "dequantised" in found.instead
