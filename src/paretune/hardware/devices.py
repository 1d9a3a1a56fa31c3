"""Well-known devices by their data sheets, for planning without one. What follows from them is a prediction.

Sources: NVIDIA's data sheets (T4, A100 SXM 80 GB, H100 SXM, H200 SXM; dense rates, not sparse); the laptop is a made-up
eight-core x86 with two channels of DDR4-3200 and AVX2. Units: bytes, bytes/s, FLOP/s, seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from paretune.errors import UsageError

REAL_SHARE = 0.8  # of the data sheet's bandwidth: what streaming kernels get on these devices, as a rule


@dataclass(frozen=True)
class DeviceProfile:
    """A device as its maker describes it.

    Args:
        memory_bytes, bandwidth: of its main memory.
        rates: matrix products by number format; a format that is absent has no unit of its own.
        operator_sec: assumed time that an eager operator takes at least, its way through Python and the launch.
        graph_sec: the same inside a CUDA graph, or in one native call.
        emulated: number formats that have no units, and why.
        reads_narrow: whether one native call reads an emulated format as it is stored and computes in fp32 (our CPU
            runner); elsewhere it is converted, which brings no gain.
        attention: what of the fused attention forms runs there.
    """

    name: str
    title: str
    memory_bytes: int
    bandwidth: float
    rates: dict[str, float]
    operator_sec: float
    graph_sec: float
    emulated: dict[str, str]
    attention: str
    reads_narrow: bool = False


_AMPERE_ON = "FlashAttention's library, PyTorch's fused forms and Triton"
_GPU_OPERATOR = 10e-6
_T4_OPERATOR = 20e-6  # T4s stand in hosts with slow, shared cores
_GPU_GRAPH = 1.5e-6
PROFILES = {
    profile.name: profile
    for profile in (
        DeviceProfile(
            "t4",
            "NVIDIA T4",
            16 << 30,
            320e9,
            {"fp32": 8.1e12, "fp16": 65e12, "int8": 130e12},
            _T4_OPERATOR,
            _GPU_GRAPH,
            {"bf16": "capability 7.5 has no bf16 units"},
            "PyTorch's memory-efficient form and Triton; FlashAttention's library needs capability 8.0, the algorithm "
            "does not",
        ),
        DeviceProfile(
            "a100",
            "NVIDIA A100 SXM 80 GB",
            80 << 30,
            2039e9,
            {"fp32": 19.5e12, "bf16": 312e12, "fp16": 312e12, "int8": 624e12},
            _GPU_OPERATOR,
            _GPU_GRAPH,
            {},
            _AMPERE_ON,
        ),
        DeviceProfile(
            "h100",
            "NVIDIA H100 SXM",
            80 << 30,
            3350e9,
            {"fp32": 67e12, "bf16": 989e12, "fp16": 989e12, "int8": 1979e12},
            _GPU_OPERATOR,
            _GPU_GRAPH,
            {},
            _AMPERE_ON,
        ),
        DeviceProfile(
            "h200",
            "NVIDIA H200 SXM",
            141 << 30,
            4800e9,
            {"fp32": 67e12, "bf16": 989e12, "fp16": 989e12, "int8": 1979e12},
            _GPU_OPERATOR,
            _GPU_GRAPH,
            {},
            _AMPERE_ON,
        ),
        DeviceProfile(
            "laptop-cpu",
            "a laptop's eight-core x86, AVX2, DDR4-3200",
            16 << 30,
            51.2e9,
            {"fp32": 400e9},
            4e-6,
            1e-6,
            {"bf16": "AVX2 has no bf16 instructions", "fp16": "AVX2 computes fp16 in fp32"},
            "PyTorch's flash form for CPUs, our native one",
            reads_narrow=True,
        ),
    )
}


def device_profile(name: str) -> DeviceProfile:
    """
    Raises:
        UsageError: there is no profile of that name.
    """
    if name not in PROFILES:
        raise UsageError(f"unknown device profile {name!r}", f"Known: {', '.join(PROFILES)}")
    return PROFILES[name]
