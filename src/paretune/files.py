"""Files that are whole or absent: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from paretune.errors import ParetuneError, WriteError

_CAUSES = {
    errno.ENOSPC: ("the disk is full", "Free some space or choose another folder with -o"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space or choose another folder with -o"),
    errno.EROFS: ("the file system is read-only", "Choose a writable folder with -o"),
    errno.EACCES: ("permission denied", "Choose a writable folder with -o"),
    errno.EPERM: ("permission denied", "Choose a writable folder with -o"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "Choose another folder with -o"),
    errno.EEXIST: ("a file of that name is in the way", "Remove it or choose another folder with -o"),
    errno.EISDIR: ("it is a folder", "Choose another name"),
}


def write_error(path: str | os.PathLike[str], error: OSError) -> WriteError:
    """The one-line form of a failed write."""
    cause, cure = _CAUSES.get(error.errno or 0, (error.strerror or str(error), "Choose another folder with -o"))
    return WriteError(f"cannot write {path}: {cause}", cure)


@contextlib.contextmanager
def into_cache() -> Iterator[None]:
    """What the body writes lies in the cache: where that fails, the cure is another cache, for there is no `-o`.

    Raises:
        WriteError: as the body raised it, with that cure.
    """
    try:
        yield
    except WriteError as error:
        raise WriteError(error.cause, "Free some space or set PARETUNE_CACHE to another folder") from None


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yields an open temporary file that replaces `path` when the body succeeds, and vanishes when it does not.

    Raises:
        ParetuneError: the folder is missing, read-only or full.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, target)
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise write_error(target, error) from None
        raise


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces `path` by `data`, or leaves it as it was.

    Raises:
        ParetuneError: the folder is missing, read-only or full.
    """
    with whole_file(path) as f:
        f.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Strict JSON (no NaN: `None` says 'not measured')."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def ensure_folder(path: str | os.PathLike[str]) -> Path:
    """Makes the folder and proves that it can be written, before any long work starts."""
    folder = Path(path)
    probe = folder / f".paretune-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise write_error(folder, error) from None
    return folder


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the body succeeds, and vanishes when it does not.

    Raises:
        ParetuneError: `path` exists and is not empty (without `overwrite`), or cannot be written.
    """
    target = Path(path).absolute()  # absolute: `.` has no name of its own
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
        raise ParetuneError(f"{target} exists already", "Choose another folder with -o, or pass --force")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(temporary, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
    except OSError as error:
        if error.errno == errno.ENOENT:  # the folders above were made: the body misses an input of its own
            raise
        raise write_error(target, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder beside `path` that vanishes at the end; after a kill `remove_leftovers(path)` finds it.

    Raises:
        WriteError: it cannot be made.
    """
    target = Path(path).absolute()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise write_error(temporary, error) from None
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes what killed processes left under the temporary names of `path`; that of a live one stays."""
    target = Path(path).absolute()
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.*"):
        pid, _, suffix = left.name.removeprefix(f".{target.name}.").partition(".")
        if pid.isdecimal() and suffix in ("tmp", "old") and not _is_running(int(pid)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # there is no harmless way to ask: what is left stays
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True
