"""Every kernel of a step with its count, time and class, from PyTorch's own profiler.

On a CPU a kernel is an operator's own time (without the operators that it calls); on a GPU it is what the device ran.
The profiler costs time by itself, so shares are of the profiled step, and how much longer that one takes than the plain
step is stated beside them.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from paretune import clock

CLASSES = (
    "GEMM",
    "GEMV",
    "attention",
    "reduction",
    "elementwise",
    "copy/reshape",
    "allocation",
    "dispatch",
    "native code",
    "launch gap",
)
_LAUNCH = re.compile(r"LaunchKernel|GraphLaunch")
_TRITON = re.compile(r"triton_(poi|red|per|tem|mm|bmm)_")
_TRITON_KINDS = {"poi": "elementwise", "red": "reduction", "per": "reduction"}
_UNTIMED = "paretune: between steps"
_ATTENTION = re.compile(r"scaled_dot_product|flash|fmha|efficient_attention|flex_attention")
_PRODUCT = re.compile(
    r"\b(addmm|mm|bmm|baddbmm|_int_mm|_weight_int8pack_mm|_mkl_linear|_linear_pointwise|int8_few_rows|mkldnn_linear)\b"
    r"|gemm|gemv|cutlass|cublas|nvjet"
)
_REDUCTION = re.compile(r"softmax|layer_norm|rms_norm|\b(sum|mean|argmax|amax|max|norm|var_mean|nll_loss\w*)\b|reduce")
_COPY = re.compile(
    r"\b(copy_|clone|contiguous|view|_unsafe_view|reshape|_reshape_alias|transpose|permute|t|as_strided|slice|select|"
    r"expand|unbind|cat|chunk|split\w*|narrow|index|index_put_|_index_put_impl_|_to_copy|to|fill_|zero_|embedding|"
    r"gather|unsqueeze|squeeze|unflatten|detach|lift_fresh|alias|triu|arange|ones|index_select|movedim|_conj|resolve_\w+"
    r")\b|memcpy|memset|Memcpy|Memset|copy_kernel|CatArray|indexSelect|gather_kernel|index_elementwise|FillFunctor"
)
_ALLOCATION = re.compile(r"\b(empty|empty_strided|empty_like|new_empty\w*|resize_|zeros|zeros_like|set_)\b")
# Operators that only find and call another one.
_DISPATCH = re.compile(
    r"^aten::(linear|matmul|layer_norm|softmax|scaled_dot_product_attention|type_as|result_type|item|is_nonzero|"
    r"_local_scalar_dense|numpy_T|einsum|cross_entropy_loss\w*|nll_loss)$|Torch-Compiled|TorchDynamo|CompiledFxGraph|"
    r"guard|Pregraph|Postgraph|Optimizer|autograd::engine|Backward0?$|AccumulateGrad"
)


def class_of(name: str, shapes: Sequence[Any] = ()) -> str:
    """The class of a kernel by its name, and by its shapes for products: one row is a matrix-vector product."""
    if generated := _TRITON.match(name):  # the rest of the name lists what was fused into it
        return _TRITON_KINDS.get(generated[1], "GEMM")
    if _DISPATCH.search(name):
        return "dispatch"
    if _ATTENTION.search(name):
        return "attention"
    if _PRODUCT.search(name):
        return "GEMV" if "gemv" in name or _is_one_row(name, shapes) else "GEMM"
    if _REDUCTION.search(name):
        return "reduction"
    if _ALLOCATION.search(name):
        return "allocation"
    if _COPY.search(name):
        return "copy/reshape"
    return "elementwise"


def _is_one_row(name: str, shapes: Sequence[Any]) -> bool:
    """Whether the left matrix of a product has one row (one a batch entry for `bmm`)."""
    # What is added stands first in addmm and baddbmm; other products begin with the left matrix.
    place = 1 if "addmm" in name or "baddbmm" in name else 0
    left = shapes[place] if len(shapes) > place else ()
    if not isinstance(left, list | tuple) or len(left) < 2:
        return False
    return math.prod(int(size) for size in (left[1:-1] if "bmm" in name else left[:-1])) == 1


@dataclass
class Kernel:
    """One kind of kernel in a step."""

    name: str
    kind: str  # of `CLASSES`
    count: float  # a step
    sec: float  # a step

    def to_json(self) -> dict[str, Any]:
        return vars(self).copy()


def kernels_of(
    run: Callable[[], Any], prepare: Callable[[], Any], device: str, min_sec: float = 0.3, max_steps: int = 50
) -> tuple[list[Kernel], float]:
    """Kernels of a warm step, the mean over several, and the seconds of a step under the profiler.

    The last row is the launch gap: what of the step no kernel accounts for (on a CPU Python and the way to an operator,
    on a GPU the idle device). Rows add up to the step.
    """
    is_cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    sync = "cuda" if is_cuda else "cpu"
    with profile(activities=activities, record_shapes=True):  # its own first use is slow
        prepare()
        run()
    total, n_steps = 0.0, 0
    with clock.quiet(), profile(activities=activities, record_shapes=True, acc_events=True) as watched:
        while n_steps < max_steps and (total < min_sec or n_steps < 3):
            with record_function(_UNTIMED):
                prepare()
            clock.synchronize(sync)
            started = clock.now()
            run()
            clock.synchronize(sync)
            total += clock.now() - started
            n_steps += 1
    return sum_up(watched.events(), n_steps, total, is_cuda), total / n_steps


def sum_up(events: Sequence[Any], n_steps: int, total_sec: float, is_cuda: bool) -> list[Kernel]:
    """Kernels of a step by name, longest first, and the launch gap, from the events of `n_steps` steps.

    Args:
        events: of PyTorch's profiler; what happens between the steps is in a range of its own and left out.
        total_sec: wall time of all steps.
    """
    sums: dict[tuple[str, str], list[float]] = {}
    untimed = sorted((e.time_range for e in events if e.name == _UNTIMED), key=lambda span: span.start)
    n_launches = 0
    for event in events:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if event.name == _UNTIMED:
            continue
        if is_cuda and not on_device:
            n_launches += bool(_LAUNCH.search(event.name)) and not _inside(event.time_range, untimed)
        if is_cuda != on_device:
            continue
        if event.name.startswith(("ProfilerStep", "[memory]", "cudaDevice")) or _inside(event.time_range, untimed):
            continue
        spent = event.self_device_time_total if on_device else event.self_cpu_time_total
        entry = sums.setdefault((event.name, class_of(event.name, event.input_shapes or ())), [0.0, 0.0])
        entry[0] += 1
        entry[1] += max(0.0, spent) / 1e6
    found = [Kernel(name, kind, c / n_steps, s / n_steps) for (name, kind), (c, s) in sums.items()]
    found.sort(key=lambda k: -k.sec)
    gap = total_sec / n_steps - sum(k.sec for k in found)
    if is_cuda:  # a graph is one launch of many kernels
        return [*found, Kernel("between kernels (the GPU is idle)", "launch gap", n_launches / n_steps, gap)]
    return [*found, Kernel("between kernels", "launch gap", sum(k.count for k in found), gap)]


def _inside(span: Any, ranges: Sequence[Any]) -> bool:
    """Whether it lies in one of the ranges (in the order of time)."""
    i = bisect.bisect_right([r.start for r in ranges], span.start) - 1
    return i >= 0 and span.end <= ranges[i].end


def by_class(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """Count, seconds and share by class, in the order of `CLASSES`; absent classes are left out."""
    whole = sum(k.sec for k in kernels)
    rows = []
    for kind in CLASSES:
        members = [k for k in kernels if k.kind == kind]
        if members:
            sec = sum(k.sec for k in members)
            rows.append({"kind": kind, "count": sum(k.count for k in members), "sec": sec, "share": sec / whole})
    return rows
