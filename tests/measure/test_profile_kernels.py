"""Kernels by class, traces by their format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from paretune.errors import ParetuneError
from paretune.measure import explain, profile_trace
from paretune.measure.profile_kernels import CLASSES, by_class, class_of, kernels_of, sum_up
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
        ("nvjet_hsh_128x64_64x9_1x2_h_bz_TNT", (), "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_f16_64x64_64x6_tn_align8>", (), "GEMM"),
        ("triton_tem_fused_mm_relu_0", (), "GEMM"),
        ("void gemvNSP_kernel<float, float, float, float, 1, 32, 4, 1024>", (), "GEMV"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64, 64, 256, 4>>", (), "attention"),
        ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", (), "attention"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", (), "reduction"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, ArgMaxOps<float>>>", (), "reduction"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 7, false>", (), "reduction"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", (), "elementwise"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", (), "copy/reshape"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, unsigned int, 4>", (), "copy/reshape"),
        ("void at::native::(anonymous namespace)::indexSelectSmallIndex<float, long>", (), "copy/reshape"),
        ("triton_poi_fused_add_native_layer_norm_3", (), "elementwise"),
        ("triton_per_fused_native_layer_norm_4", (), "reduction"),
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


def cuda_event(name: str, start: float, end: float, on_device: bool = True):
    kind = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
    span = SimpleNamespace(start=start, end=end)
    spent = end - start
    return SimpleNamespace(
        name=name,
        device_type=kind,
        time_range=span,
        input_shapes=None,
        self_device_time_total=spent if on_device else 0.0,
        self_cpu_time_total=0.0 if on_device else spent,
    )


def test_kernels_and_idle_time_of_a_gpu():
    """Two steps as a CUDA trace has them: launches on the CPU, kernels on the device, preparation between the steps."""
    events = []
    for t in (0.0, 1000.0):
        events += [
            cuda_event("paretune: between steps", t, t + 100, False),
            cuda_event("paretune: between steps", t + 50, t + 120),  # the same range as the device saw it
            cuda_event("cudaLaunchKernel", t + 20, t + 25, False),
            cuda_event("void at::native::FillFunctor<float>", t + 60, t + 70),
            cuda_event("aten::mm", t + 200, t + 230, False),
            cuda_event("cudaLaunchKernel", t + 210, t + 215, False),
            cuda_event("ampere_sgemm_128x64_tn", t + 300, t + 500),
            cuda_event("cudaLaunchKernel", t + 220, t + 225, False),
            cuda_event("void at::native::vectorized_elementwise_kernel<4>", t + 520, t + 570),
            cuda_event("cudaDeviceSynchronize", t + 230, t + 600, False),
        ]
    found = sum_up(events[::-1], 2, 2 * 400e-6, True)  # not in the order of time
    assert [(k.name[:13], k.kind, k.count) for k in found] == [
        ("ampere_sgemm_", "GEMM", 1),
        ("void at::nati", "elementwise", 1),
        ("between kerne", "launch gap", 2),
    ]
    assert [k.sec for k in found] == pytest.approx([200e-6, 50e-6, 150e-6]) and "GPU is idle" in found[-1].name
    classes = by_class(found)
    step = {"device": "cuda", "whole": {"sec": 400e-6}, "profiled_sec": 400e-6, "kernel_classes": classes}
    (idle,) = [e for e in explain.explain(step) if e.cause != "slow products"]
    assert idle.cause == "launch overhead" and "the GPU is idle" in idle.sentence and "38 %" in idle.sentence
    assert "native" not in idle.try_next and "--config compile" in idle.try_next


def test_a_trace_follows_the_format(tiny_gpt2_folder, tmp_path):
    model = checkpoint.load(tiny_gpt2_folder)
    tokens = torch.arange(5)[None]

    def run():
        with torch.no_grad():
            return model(tokens)

    data = profile_trace.record(run, lambda: None, model, "cpu", "prefill step")
    assert profile_trace.problems(data) == []
    operations = [("layer 0: norm_1+qkv_projection", 1e-4), ("final_norm+head", 2e-4)]
    native = profile_trace.record(run, lambda: None, None, "cpu", "prefill step", operations)
    assert profile_trace.problems(native) == []
    events = {e["name"]: e for e in json.loads(gzip.decompress(native))["traceEvents"]}
    first, second = (events[name] for name, _ in operations)
    assert first["ts"] == events["prefill step"]["ts"] and second["ts"] == pytest.approx(first["ts"] + first["dur"])
    assert second["dur"] == pytest.approx(200) and second["tid"] == first["tid"] != events["prefill step"]["tid"]
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
        ([event(dur=float("nan"))], "NaN is not JSON"),
        ([event(ph="s")], "an arrow without an id"),
        ([event(ph="M")], "metadata without arguments"),
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
    place = str(Path.home() / "x.json")
    raw = {"traceEvents": [*events, event("range", 0, 500, cat="user_annotation")], "traceName": place}
    kept = profile_trace.bounded(raw, 11)
    names = {e["name"] for e in kept["traceEvents"]}
    assert len(kept["traceEvents"]) == 11 and "range" in names and "49" in names and "1" not in names
    assert kept["otherData"]["events_left_out"] == 40 and "traceName" not in kept


@pytest.mark.parametrize(
    ("name", "kind"), [("quantized_gemv", "GEMV"), ("quantized_gemm", "GEMM"), ("gemm_sum_parts", "GEMM")]
)
def test_class_of_our_own_gpu_kernels(name, kind):
    assert class_of(name) == kind
