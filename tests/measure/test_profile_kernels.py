"""Kernels by class, traces by their format."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from paretune.errors import ParetuneError
from paretune.measure import profile_trace
from paretune.measure.profile_kernels import CLASSES, by_class, class_of, kernels_of
from paretune.model import checkpoint


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::addmm", [[768], [1, 768], [768, 2304], [], []], "GEMV"),
        ("aten::addmm", [[768], [128, 768], [768, 2304], [], []], "GEMM"),
        ("aten::addmm", [[1, 768], [1, 768], [768, 768], [], [], [1, 768]], "GEMV"),
        ("aten::mm", [[1, 768], [768, 50257]], "GEMV"),
        ("aten::bmm", [[12, 1, 64], [12, 64, 129]], "GEMV"),
        ("aten::bmm", [[12, 128, 64], [12, 64, 128]], "GEMM"),
        ("aten::_weight_int8pack_mm", [[1, 768], [2304, 768], [2304]], "GEMV"),
        ("ampere_sgemm_128x64_tn", (), "GEMM"),
        ("void gemv2T_kernel_val", (), "GEMV"),
        ("mkl::_mkl_linear", [[128, 768], [1], [2304, 768]], "GEMM"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", (), "attention"),
        ("aten::_softmax", (), "reduction"),
        ("aten::native_layer_norm", (), "reduction"),
        ("graph_0_cpp_fused_add_native_layer_norm_3", (), "reduction"),
        ("triton_red_fused_mean_1", (), "reduction"),
        ("triton_poi_fused_gelu_2", (), "elementwise"),
        ("aten::gelu", (), "elementwise"),
        ("aten::add", (), "elementwise"),
        ("aten::copy_", (), "copy/reshape"),
        ("aten::transpose", (), "copy/reshape"),
        ("Memcpy HtoD (Pageable -> Device)", (), "copy/reshape"),
        ("aten::empty", (), "allocation"),
        ("aten::linear", [[1, 768]], "dispatch"),
        ("TorchDynamo Cache Lookup", (), "dispatch"),
    ],
)
def test_class_of(name, shapes, kind):
    assert class_of(name, shapes) == kind and kind in CLASSES


def test_kernels_add_up_to_the_step():
    x, w = torch.randn(1, 64), torch.randn(64, 64)
    prepared = []

    def run():
        return torch.softmax(x @ w, -1)

    found, per_step = kernels_of(run, lambda: prepared.append(torch.ones(3).exp()), "cpu", 0.0, 4)
    assert sum(k.sec for k in found) == pytest.approx(per_step)
    kinds = {k.name: (k.kind, k.count) for k in found}
    assert kinds["aten::mm"] == ("GEMV", 1) and kinds["aten::_softmax"] == ("reduction", 1)
    assert "aten::exp" not in kinds, "what happens between the steps is not in them"
    assert found[-1].kind == "launch gap" and len(prepared) >= 4
    rows = by_class(found)
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)


def test_a_trace_follows_the_format(tiny_gpt2_folder, tmp_path):
    model = checkpoint.load(tiny_gpt2_folder)
    tokens = torch.arange(5)[None]

    def run():
        with torch.no_grad():
            return model(tokens)

    data = profile_trace.record(run, lambda: None, model, "cpu", "prefill step")
    assert profile_trace.problems(data) == []
    trace = json.loads(gzip.decompress(data))
    ranges = {e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"}
    assert {"prefill step", "h.0.attn.c_attn", "h.1.mlp", "ln_f", "lm_head"} <= ranges
    assert any(e["name"] == "aten::addmm" for e in trace["traceEvents"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # One warm step, and nothing that names the machine.
    n_steps = sum(e["name"] == "prefill step" and e.get("cat") == "user_annotation" for e in trace["traceEvents"])
    assert n_steps == 1 and set(trace) <= {"schemaVersion", "displayTimeUnit", "traceEvents", "otherData"}
    path = profile_trace.write(tmp_path, "trace-prefill", data)
    assert path.name == "trace-prefill.json.gz" and path.read_bytes() == data


def event(name="a", ts=0.0, dur=1.0, **more):
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": 1, **more}


@pytest.mark.parametrize(
    ("events", "word"),
    [
        ([], "no list"),
        ([event(dur=-1)], "duration"),
        ([event(ts="soon")], "time stamp"),
        ([{"ph": "Z", "name": "a"}], "phase 'Z'"),
        ([{"ph": "X", "ts": 0, "dur": 1, "pid": 1, "tid": 1}], "no name"),
        ([{"ph": "X", "name": "a", "ts": 0, "dur": 1}], "process"),
        ([event("a", 0, 10), event("b", 5, 10)], "ends after"),
    ],
)
def test_a_broken_trace_is_refused(events, word, tmp_path):
    data = gzip.compress(json.dumps({"traceEvents": events}).encode())
    assert word in profile_trace.problems(data)[0]
    with pytest.raises(ParetuneError, match="not valid"):
        profile_trace.write(tmp_path, "t", data)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_trace():
    assert "not gzipped JSON" in profile_trace.problems(b"hello")[0]


def test_a_trace_is_bounded():
    events = [event(str(i), ts=10.0 * i, dur=float(i)) for i in range(50)]
    raw = {"traceEvents": [*events, event("range", 0, 500, cat="user_annotation")], "traceName": "/home/someone/x.json"}
    kept = profile_trace.bounded(raw, 11)
    names = {e["name"] for e in kept["traceEvents"]}
    assert len(kept["traceEvents"]) == 11 and "range" in names and "49" in names and "1" not in names
    assert kept["otherData"]["events_left_out"] == 40 and "traceName" not in kept
