"""The AVX-512 code on a processor that has AVX2 only, instruction by instruction (`simulated_avx512.h`)."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from paretune import native_build

HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-mavx2", "-mfma", "-mf16c", "-Wno-psabi"]
SIMULATED = {1: "avx512", 2: "avx512", 3: "avx512 + bf16 + vnni"}  # PARETUNE_SIMULATE and what it is called

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def compiler():
    if reason := native_build.unavailable_reason():
        pytest.skip(reason)
    if not {"avx2", "fma", "f16c"} <= native_build.cpu_info()[1]:
        pytest.skip("the simulation needs AVX2")
    return shlex.split(native_build.compiler())


def digests(folder, simulate):
    """Compiles and runs the checks against double; a line for each product. 0: AVX2, nothing simulated."""
    command, program = compiler(), folder / f"checks-{simulate}"
    defines = [f"-DPARETUNE_SIMULATE={simulate}"] if simulate else []
    paths = ["-I", str(native_build.SOURCES), "-I", str(HERE)]
    source = str(HERE / "native_avx512.cpp")
    built = subprocess.run(
        [*command, *FLAGS, *defines, *paths, source, "-o", str(program)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-4000:]
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.startswith(f"{SIMULATED.get(simulate, 'avx2')}: ")
    return dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def avx2(tmp_path_factory):
    return digests(tmp_path_factory.mktemp("avx2"), 0)


@pytest.mark.parametrize("simulate", SIMULATED)
def test_avx512(simulate, avx2, tmp_path):
    """Right against double, each row of a batch as alone, and the bits of AVX2: sums have the same order on both.

    Only where bf16 has an instruction of its own the inputs are rounded too."""
    probe = [*compiler(), "-x", "c++", "-E", "-"]
    if subprocess.run(probe, input="#include <simde/x86/avx512.h>", capture_output=True, text=True).returncode:
        pytest.skip("simde/x86/avx512.h is not installed (Debian: libsimde-dev)")
    found = digests(tmp_path, simulate)
    assert found.keys() == avx2.keys() and len(found) > 100
    differ = {name for name in found if found[name] != avx2[name]}
    own_order = {name for name in found if name.startswith("bf16:")} if "bf16" in SIMULATED[simulate] else set()
    assert differ <= own_order
