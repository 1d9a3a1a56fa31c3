"""What a device can do, found by running a small kernel of each mechanism and checking its result.

A table of chips is asked only for the reason why something failed. States: "works", "emulated" (runs without gain) and
"cannot"; each with why, and what is used instead.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

from paretune import native_build
from paretune.hardware.machine import instruction_sets
from paretune.hardware.rates import DTYPES, dtype_support

_INT8_DOT = ("avx512_vnni", "avx_vnni", "amx_int8", "neon_dotprod", "neon_i8mm")


@dataclasses.dataclass(frozen=True)
class Ability:
    """One mechanism on one device."""

    name: str
    state: str
    why: str
    instead: str = ""

    def to_json(self) -> dict[str, str]:
        return dataclasses.asdict(self)


def abilities(device: str = "cpu", compile_too: bool = False) -> list[Ability]:
    """Every mechanism on this device. About a second, beside the number formats (measured once a process).

    Args:
        compile_too: also compile a small function with `torch.compile` (several seconds).
    """
    return [
        *_formats(device),
        _int8_dot(device),
        _int8_rows(device),
        *_attention(device),
        _triton(device),
        _quantized_layers(device),
        _native(device),
        _compile(device, compile_too),
        _cuda_graphs(device),
    ]


def _formats(device: str) -> list[Ability]:
    found = []
    for name, support in dtype_support(device).items():
        if name not in DTYPES[1:]:
            continue
        state = "cannot" if not support.works else "emulated" if support.emulated else "works"
        instead = "" if state == "works" else "the native runner reads it and computes in fp32, or fp32 throughout"
        found.append(Ability(name, state, support.reason, instead if device == "cpu" else instead and "fp32 or fp16"))
    return found


def _tried(name: str, run: Callable[[], Any], why: str, instead: str) -> Ability:
    """Runs it: "works", or "cannot" with the first line of what went wrong."""
    try:
        error = run()
    except Exception as failure:  # whatever a kernel of somebody else's raises is the answer
        lines = str(failure).strip().splitlines()
        return Ability(name, "cannot", (lines[0] if lines else type(failure).__name__)[:160], instead)
    if error is not None and not error < 0.05:
        return Ability(name, "cannot", f"it ran, and its result is {error:.0%} away", instead)
    return Ability(name, "works", why)


def _error(got: Any, expected: Any) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def _int8_dot(device: str) -> Ability:
    import torch

    name, instead = "int8 dot products", "int8 weights with 16-bit or fp32 activations"

    def run() -> float:
        generator = torch.Generator().manual_seed(0)
        a = torch.randint(-127, 128, (32, 64), dtype=torch.int8, generator=generator)
        b = torch.randint(-127, 128, (64, 48), dtype=torch.int8, generator=generator)
        exact = a.double() @ b.double()
        return _error(torch._int_mm(a.to(device), b.to(device)).cpu(), exact)

    tried = _tried(name, run, "PyTorch multiplies int8 with int8 here, result exact", instead)
    if tried.state != "works" or device != "cpu":
        return tried
    has = sorted(set(instruction_sets()).intersection(_INT8_DOT))
    if has:
        return dataclasses.replace(tried, why=f"{tried.why}, with {', '.join(has)}")
    return Ability(name, "emulated", "the result is right, but the processor has no int8 dot product", instead)


def _int8_rows(device: str) -> Ability:
    import torch

    def run() -> float:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 64, generator=generator).to(torch.bfloat16)
        q = torch.randint(-127, 128, (48, 64), dtype=torch.int8, generator=generator)
        ones = torch.ones(48, dtype=torch.bfloat16)
        got = torch._weight_int8pack_mm(x.to(device), q.to(device), ones.to(device))
        return _error(got.cpu(), x.float() @ q.float().T)

    why = "PyTorch's kernel ran, result checked against fp32"
    instead = "int8 weights are converted on every call" if device == "cpu" else "quantised layers in Triton"
    return _tried("int8 matrix-vector kernel", run, why, instead)


def _attention(device: str) -> list[Ability]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.float16
    q, k, v = (torch.randn(1, 2, 32, 64, generator=generator).to(device, dtype) for _ in range(3))

    def run(backend: Any) -> Callable[[], float]:
        def once() -> float:
            with sdpa_kernel([SDPBackend.MATH]):
                exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            with sdpa_kernel([backend]):
                got = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return _error(got, exact)

        return once

    forms = [("flash attention (PyTorch)", "FLASH_ATTENTION", "the memory-efficient form, else the formula")]
    if device != "cpu":
        forms.append(("memory-efficient attention (PyTorch)", "EFFICIENT_ATTENTION", "the formula"))
        forms.append(("cuDNN attention (PyTorch)", "CUDNN_ATTENTION", "flash attention"))
    why = "the fused form ran, result checked against the formula"
    return [_tried(name, run(getattr(SDPBackend, backend)), why, instead) for name, backend, instead in forms]


def _triton(device: str) -> Ability:
    name, instead = "Triton", "PyTorch's kernels" if device != "cpu" else "native C++ code"
    if device == "cpu":
        return Ability(name, "cannot", "its kernels run on a GPU; a CPU has its interpreter alone, for tests", instead)
    if importlib.util.find_spec("triton") is None:
        return Ability(name, "cannot", "it is not installed", instead)

    def run() -> float:
        import torch

        x = torch.randn(256, device=device)
        return _error(torch.compile(lambda t: torch.relu(t) * 2)(x), torch.relu(x) * 2)

    return _tried(name, run, "a kernel was compiled and ran, result checked", instead)


def _quantized_layers(device: str) -> Ability:
    from paretune.ops.quantized_linear import op

    name = "quantised layers in Triton"
    if reason := op.unavailable_reason(device):
        instead = "native C++ code" if device == "cpu" else "a layer is dequantised on every call"
        return Ability(name, "cannot", reason, instead)
    return Ability(name, "works", "int8, int4 and nf4 layers were compiled and ran, results checked")


def _native(device: str) -> Ability:
    name, instead = "native code", "PyTorch's eager runner"
    if device != "cpu":
        return Ability(name, "cannot", "it is for CPUs", "CUDA graphs of PyTorch's kernels")

    def run() -> None:
        native_build.load("probe")

    reason = native_build.unavailable_reason()
    if reason:
        return Ability(name, "cannot", reason, instead)
    return _tried(name, run, "C++ was compiled here and loaded", instead)


def _compile(device: str, run_it: bool) -> Ability:
    name, instead = "torch.compile", "the native runner, else the eager one"
    if device == "cpu" and native_build.compiler() is None:
        return Ability(name, "cannot", "it needs a C++ compiler on a CPU, and none was found", instead)
    if not run_it:
        return Ability(name, "works", "a compiler is there (not tried: that takes seconds)")

    def run() -> float:
        import torch

        x = torch.randn(64, device=device)
        return _error(torch.compile(lambda t: torch.relu(t) * 2 + 1, fullgraph=True)(x), torch.relu(x) * 2 + 1)

    return _tried(name, run, "a function was compiled and ran, result checked", instead)


def _cuda_graphs(device: str) -> Ability:
    name = "CUDA graphs"
    if device == "cpu":
        return Ability(name, "cannot", "there is no GPU", "the native runner: one call a step")

    def run() -> float:
        import torch

        x = torch.ones(64, device=device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * 2
        graph.replay()
        torch.cuda.synchronize()
        return _error(y, torch.full_like(x, 2.0))

    return _tried(name, run, "a graph was captured and replayed, result checked", "eager launches")
