"""Native programs under the sanitizers: no read beyond an end, no undefined arithmetic, no data race."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from paretune import native_build

HERE = Path(__file__).parent
SANITIZERS = {
    "address,undefined": ["-D_GLIBCXX_SANITIZE_VECTOR=1", "-D_GLIBCXX_ASSERTIONS"],
    "thread": [],
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("driver", ["native", "attend"])
def test_native_programs(driver, sanitizer, tmp_path):
    if reason := native_build.unavailable_reason():
        pytest.skip(reason)
    command, program = shlex.split(native_build.compiler()), str(tmp_path / "checks")
    flags = [f for f in native_build.flags() if f not in ("-O3", "-shared", "-fPIC")]
    flags += ["-O1", "-g", "-ffp-contract=off", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    (tmp_path / "empty.cpp").write_text("int main() { return 0; }\n")
    if run([*command, *flags, str(tmp_path / "empty.cpp"), "-o", program]).returncode or run([program]).returncode:
        pytest.skip(f"the compiler has no working -fsanitize={sanitizer}")
    paths = ["-I", str(native_build.SOURCES), "-I", str(HERE)]
    source = str(HERE / f"{driver}_sanitized.cpp")
    built = run([*command, *flags, *SANITIZERS[sanitizer], *paths, source, "-o", program])
    assert built.returncode == 0, built.stderr[-4000:]
    done = run([program], env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"})
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stderr.endswith(": done\n") and done.stderr.count("\n") == 1, done.stderr[-6000:]
