"""The machine is described the same way twice, and measured without a compiler or a GPU too."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from paretune import clock, hardware, native_build
from paretune.cli.doctor import doctor, page
from paretune.errors import UsageError

SMALL = 1 << 20


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_fingerprint_is_stable_plain_data():
    first, second = hardware.fingerprint(), hardware.fingerprint()
    assert first == second == json.loads(json.dumps(first))
    assert hardware.fingerprint_id(first) == hardware.fingerprint_id(second)
    assert len(hardware.fingerprint_id(first)) == 12
    assert first["memory_bytes"] > 0 and first["n_cores"] >= 1


def test_fingerprint_id_sees_the_machine_and_not_a_few_pages():
    base = {**hardware.fingerprint(), "memory_bytes": 8 << 30}
    same = {**base, "memory_bytes": (8 << 30) - 4096}
    other = {**base, "n_cores": base["n_cores"] + 1}
    assert hardware.fingerprint_id(same) == hardware.fingerprint_id(base) != hardware.fingerprint_id(other)


def test_set_threads_reads_back():
    assert hardware.set_threads(1)["threads"] == 1 == torch.get_num_threads()
    assert hardware.set_threads()["threads"] == hardware.n_threads() == torch.get_num_threads()
    with pytest.raises(UsageError, match="0 threads"):
        hardware.set_threads(0)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_threads_respect_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    assert hardware.n_threads() == 1


def fake_files(monkeypatch, files):
    monkeypatch.setattr(hardware.machine, "_read", lambda path: files.get(path, ""))


@pytest.mark.parametrize(
    "files",
    [
        {"/proc/self/cgroup": "0::/box", "/sys/fs/cgroup/box/cpu.max": "250000 100000"},
        {"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "250000 100000"},
        {
            "/proc/self/cgroup": "4:cpu,cpuacct:/box",
            "/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "250000",
            "/sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
        },
    ],
)
def test_threads_respect_a_quota(monkeypatch, files):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    fake_files(monkeypatch, files)
    assert hardware.n_threads() == 2


def test_hyperthreads_share_a_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(4)), raising=False)
    name = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    fake_files(monkeypatch, {name.format(i): f"{i % 2},{i % 2 + 2}" for i in range(4)})
    assert hardware.n_threads() == 2


def test_memory_respects_the_control_group(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB",
        "/proc/self/cgroup": "0::/box",
        "/sys/fs/cgroup/box/memory.max": str(2 << 30),
        "/sys/fs/cgroup/box/memory.current": str(1536 << 20),
        "/sys/fs/cgroup/box/memory.stat": f"anon 5\ninactive_file {512 << 20}",
    }
    fake_files(monkeypatch, files)
    assert hardware.memory_bytes() == 2 << 30
    assert hardware.available_memory_bytes() == 1 << 30
    fake_files(monkeypatch, {**files, "/sys/fs/cgroup/box/memory.max": "max"})
    assert hardware.available_memory_bytes() == hardware.memory_left("cpu") == 4 << 30
    found = {"mem_get_info": (3 << 30, 8 << 30), "memory_reserved": 5 << 20, "memory_allocated": 1 << 20}
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert hardware.memory_left("cuda") == (3 << 30) + (4 << 20)  # what the allocator holds unused is free


@pytest.mark.skipif(native_build.compiler() is None, reason="no C++ compiler")
def test_native_probe():
    probe = hardware.BandwidthProbe(2, SMALL)
    assert probe.kind == "native" and probe.note == ""
    assert probe(0.002) > 0 and probe(0.002, threads=1) > 0


def test_probe_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")
    torch.set_num_threads(2)
    probe = hardware.BandwidthProbe(1, SMALL)
    assert probe.kind == "torch" and "PARETUNE_NO_COMPILER" in probe.note
    assert probe(0.002) > 0
    assert torch.get_num_threads() == 2
    with clock.use(clock.FakeClock()):
        assert probe(0.002) > 0  # a clock that stands still does not hang it


def test_sweep_has_a_row_by_size_and_threads():
    rows = hardware.read_bandwidth_sweep([SMALL, 2 * SMALL], seconds=0.002, repeats=2, threads=(1, 2))
    assert [(row["bytes"], row["threads"]) for row in rows] == [
        (SMALL, 1),
        (SMALL, 2),
        (2 * SMALL, 1),
        (2 * SMALL, 2),
    ]
    for row in rows:
        assert row["bytes_per_sec"] == max(row["samples"]) > 0 and len(row["samples"]) == 2
        assert row["state"] in ("high", "low", "mixed")


def test_bandwidth_between_sizes_is_logarithmic():
    sweep = [
        {"bytes": 1 << 20, "threads": 2, "bytes_per_sec": 100.0},
        {"bytes": 1 << 24, "threads": 2, "bytes_per_sec": 25.0},
        {"bytes": 1 << 20, "threads": 1, "bytes_per_sec": 60.0},
    ]
    assert hardware.bandwidth_at(sweep, 1 << 22) == pytest.approx(50.0)
    assert hardware.bandwidth_at(sweep, 1) == 100.0
    assert hardware.bandwidth_at(sweep, 1 << 30) == 25.0
    assert hardware.bandwidth_at(sweep, 1 << 22, threads=1) == 60.0


def test_matrix_rate():
    for dtype in ("fp32", torch.float32, "bf16", "fp16", "int8"):
        rate = hardware.matrix_rate(dtype, n=32, seconds=0.001)
        assert rate is None or (rate > 0 and math.isfinite(rate))
    assert hardware.matrix_rate("fp32", n=32, seconds=0.001)
    with pytest.raises(UsageError, match="unknown dtype"):
        hardware.matrix_rate("float31")


def test_a_format_without_gain_and_instruction_is_emulated():
    judge = hardware.judge_dtype
    assert judge("bf16", 1.0, 0.2, has_instruction=False, lacks="x").emulated
    assert judge("bf16", 0.5, 0.6, has_instruction=True).emulated  # it has the instruction and is slower anyway
    assert not judge("bf16", 1.8, 0.2, has_instruction=False, lacks="x").emulated
    assert not judge("bf16", 1.0, 1.0, has_instruction=True).emulated
    assert "without x" in judge("bf16", 1.0, 0.2, has_instruction=False, lacks="x").reason


def test_dtype_support_is_found_once():
    first = hardware.dtype_support()
    assert list(first) == ["fp32", "bf16", "fp16"]
    assert first["fp32"].works and not first["fp32"].emulated and first["fp32"].decode_ratio == 1.0
    assert all(s.reason and (not s.works or s.decode_ratio > 0) for s in first.values())
    assert hardware.dtype_support()["bf16"] is first["bf16"]
    first.clear()
    assert hardware.dtype_support()


def test_a_format_that_raises_or_lies_does_not_work(monkeypatch):
    real = hardware.rates._product

    def product(name, *rest):
        if name == "bf16":
            raise RuntimeError("not implemented for 'BFloat16'\nsecond line")
        kernel = real(name, *rest)
        return (lambda: kernel() * 2) if name == "fp16" else kernel

    monkeypatch.setattr(hardware.rates, "_product", product)
    found = hardware.rates._ratios((1, 64, 64), "cpu")
    assert found["fp32"] == 1.0
    assert found["bf16"] == "not implemented for 'BFloat16'"
    assert "away from fp32" in str(found["fp16"])


def few(monkeypatch):
    """Ceilings and formats on tiny sizes, so that the test is about the page and not about the machine."""
    rows = hardware.read_bandwidth_sweep([SMALL], seconds=0.001, repeats=1)
    monkeypatch.setattr(hardware.rates, "read_bandwidth_sweep", lambda *_args, **_kw: rows)
    rate = hardware.matrix_rate
    monkeypatch.setattr(hardware.rates, "matrix_rate", lambda name, *_args: rate(name, 32, "cpu", 0.001))


def test_the_better_of_two_ceilings_figure_by_figure():
    def made(bandwidths, rates, fma):
        rows = tuple(
            {"bytes": n, "threads": 2, "bytes_per_sec": b} for n, b in zip((1 << 20, 1 << 28), bandwidths, strict=True)
        )
        return hardware.Ceilings("cpu", "native", 2, rows, rates, fma)

    best = made((9e10, 2e10), {"fp32": 1e11}, None).or_better(made((5e10, 4e10), {"fp32": 3e11, "bf16": 2e11}, 6e11))
    assert [row["bytes_per_sec"] for row in best.read_bandwidth] == [9e10, 4e10]
    assert best.matrix_rates == {"fp32": 3e11, "bf16": 2e11} and best.fma_rate == 6e11


def test_ceilings_come_back_from_json(monkeypatch):
    few(monkeypatch)
    found = hardware.ceilings(quick=True)
    assert hardware.Ceilings.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.bandwidth_at(1e9) > 0 and found.matrix_rates["fp32"] > 0


def test_doctor_json_and_page(monkeypatch, capsys):
    few(monkeypatch)
    for place in (hardware, hardware.machine):
        monkeypatch.setattr(place, "has_cuda", lambda: False)
    doctor(json_output=True, quick=True)
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert "measuring" in err
    for key in (
        "schema_version",
        "command",
        "versions",
        "hardware",
        "device",
        "threads",
        "memory",
        "compiler",
    ):
        assert key in report
    for key in ("ceilings", "dtype_support", "missing"):
        assert key in report
    assert report["device"] == "cpu" and any(item["what"] == "CUDA" for item in report["missing"])
    text = page(report)
    for word in ("instruction sets", "threads", "read bandwidth", "bf16", "compiler", "missing", "CUDA"):
        assert word in text
    report["dtype_support"]["bf16"]["emulated"] = True
    assert "EMULATED" in page(report)


def test_doctor_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")
    few(monkeypatch)
    doctor(quick=True)
    out = capsys.readouterr().out
    assert "C++ compiler: PARETUNE_NO_COMPILER=1 is set" in out and "torch.sum" in out


def test_nothing_starts_cuda():
    hardware.fingerprint()
    hardware.dtype_support("cpu")
    assert torch.cuda.is_available() or not torch.cuda.is_initialized()


def test_a_format_is_known_to_work_without_being_timed(monkeypatch):
    from paretune.hardware import rates

    rates.dtype_failure.cache_clear()
    monkeypatch.setattr(rates, "_timed", lambda *args: pytest.fail("timed"))
    assert [hardware.dtype_failure(name) for name in ("fp32", "bf16", "fp16")] == [None] * 3
    rates.dtype_failure.cache_clear()
    real = rates._product
    wrong = lambda name, *shape: lambda: real(name, *shape)() * (1 if name == "fp32" else 2)  # noqa: E731
    monkeypatch.setattr(rates, "_product", wrong)
    assert hardware.dtype_failure("bf16") == "bf16 does not work here: its result is 100% away from fp32"
    rates.dtype_failure.cache_clear()
