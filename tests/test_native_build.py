"""Native code is compiled once, shared safely, and its absence is one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from paretune import native_build

needs_compiler = pytest.mark.skipif(native_build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PARETUNE_NO_COMPILER", raising=False)


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_cache_folder_follows_the_variables(tmp_path, monkeypatch):
    assert native_build.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("PARETUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert native_build.cache_folder() == Path("/somewhere/paretune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert native_build.cache_folder() == Path.home() / ".cache" / "paretune"


@needs_compiler
def test_compiles_once_and_says_so(tmp_path, capfd):
    library = native_build.load("probe")
    out, err = capfd.readouterr()
    assert "compiling probe.cpp" in err and "(once)" in err and out == ""
    assert native_build.load("probe") is library
    assert capfd.readouterr().err == ""
    files = os.listdir(tmp_path / "cache" / "native")
    assert len(files) == 1 and files[0].startswith("probe-") and files[0].endswith(".so")


@needs_compiler
def test_the_name_depends_on_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "SOURCES", tmp_path)
    values = []
    for value in (1, 2):
        (tmp_path / "tiny.cpp").write_text(f'extern "C" int tiny() {{ return {value}; }}\n')
        values.append(native_build.load("tiny").tiny())
    assert values == [1, 2]


@needs_compiler
def test_a_damaged_cached_file_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "SOURCES", tmp_path)
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" int tiny() { return 7; }\n')
    target = tmp_path / "cache" / "native" / f"tiny-{native_build._key(source, native_build.compiler())}.so"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"not a library")
    assert native_build.load("tiny").tiny() == 7


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")
    assert native_build.compiler() is None
    with pytest.raises(native_build.NativeUnavailable, match="PARETUNE_NO_COMPILER=1 is set") as caught:
        native_build.load("probe")
    assert "\n" not in str(caught.value)


def test_a_cxx_that_is_absent_is_not_replaced(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/compiler -m64")
    assert native_build.compiler() is None
    with pytest.raises(native_build.NativeUnavailable, match="/nowhere/compiler"):
        native_build.load("probe")


def test_cxx_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(script(tmp_path / "mine", "exit 0")) + " -m64")
    assert native_build.compiler() == f"{tmp_path / 'mine'} -m64"


def test_a_compiler_that_says_nothing_and_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(script(tmp_path / "false", "exit 1")))
    with pytest.raises(native_build.NativeUnavailable, match="exit status 1"):
        native_build.load("probe")
    assert os.listdir(tmp_path / "cache" / "native") == []


def test_the_first_error_of_the_compiler_is_shown(tmp_path, monkeypatch):
    body = 'echo "note: x" >&2; echo "fatal error: no such header" >&2; echo "done" >&2; exit 1'
    monkeypatch.setenv("CXX", str(script(tmp_path / "cxx", body)))
    with pytest.raises(native_build.NativeUnavailable, match="fatal error: no such header") as caught:
        native_build.load("probe")
    assert "\n" not in str(caught.value)


@needs_compiler
def test_a_cache_that_cannot_be_written_falls_back(tmp_path, monkeypatch, capfd):
    # The tests may run as root, whom permissions do not stop: a file in the folder's place does.
    (tmp_path / "cache").write_text("in the way")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    native_build.load("probe")
    assert "cannot write" in capfd.readouterr().err
    (found,) = (tmp_path / "temporary").rglob("probe-*.so")
    assert not found.parent.stat().st_mode & 0o022
    native_build.load("probe")
    assert capfd.readouterr().err == ""  # said once


@needs_compiler
def test_a_temporary_folder_of_others_is_not_trusted(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("in the way")
    planted = tmp_path / "temporary" / f"paretune-{os.getuid()}"
    planted.mkdir(parents=True)
    planted.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    native_build.load("probe")
    assert os.listdir(planted) == []


@needs_compiler
def test_two_processes_compile_at_once(tmp_path):
    source = Path(native_build.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    code = "from paretune import native_build as n; n.load('probe').paretune_probe_free(None)"
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    (only,) = os.listdir(tmp_path / "cache" / "native")
    assert only.endswith(".so")
