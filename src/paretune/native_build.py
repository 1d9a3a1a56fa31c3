"""Native code: C++20 with a plain C interface, compiled on first use, cached, loaded with ctypes.

A compiled file is named by a hash of everything that it depends on (source, headers, flags, compiler version,
processor), so a stale one is never loaded and nothing has to be cleared by hand. Without a compiler, `load`
raises `NativeUnavailable` and the caller takes its PyTorch form.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from paretune.errors import ParetuneError

SOURCES = Path(__file__).parent / "ops" / "native"
COMPILE_TIMEOUT_SEC = 300

_loaded: dict[Path, ctypes.CDLL] = {}
# The same by what can change in a process and is quickly asked: hashing all sources takes milliseconds, and a model
# asks for each of its weights.
_found: dict[tuple[object, ...], ctypes.CDLL] = {}
_VARIABLES = ("PARETUNE_ISA", "PARETUNE_NO_COMPILER", "PARETUNE_CACHE", "XDG_CACHE_HOME", "HOME", "CXX", "PATH")
_lock = threading.Lock()


class NativeUnavailable(ParetuneError):
    """Native code cannot be built or loaded here; the PyTorch form has to do."""


def say(text: str) -> None:
    """One line of progress, on stderr because stdout is for results."""
    print(f"paretune: {text}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """$PARETUNE_CACHE, $XDG_CACHE_HOME/paretune or ~/.cache/paretune. It may not exist yet."""
    if chosen := os.environ.get("PARETUNE_CACHE"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "paretune"
    return Path.home() / ".cache" / "paretune"


def compiler() -> str | None:
    """The C++ compiler command, or None: $CXX (which may carry arguments), then c++, g++, clang++.

    PARETUNE_NO_COMPILER=1 forces None, for tests and for users who want no native code.
    """
    if os.environ.get("PARETUNE_NO_COMPILER") == "1" or sys.platform == "win32":
        return None
    if chosen := os.environ.get("CXX", "").strip():
        # A $CXX that is not there is not replaced in silence: the user asked for that one.
        return chosen if shutil.which(_words(chosen)[0]) else None
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def unavailable_reason() -> str | None:
    """Why `load` would fail before it starts a compiler, as a clause; None where there is a compiler."""
    if sys.platform == "win32":
        return "native code is not built on Windows"
    if os.environ.get("PARETUNE_NO_COMPILER") == "1":
        return "PARETUNE_NO_COMPILER=1 is set"
    if compiler() is None:
        chosen = os.environ.get("CXX", "").strip()
        return f"$CXX names {chosen}, which is not there" if chosen else "there is no C++ compiler"
    return None


def compiler_version(command: str) -> str:
    """The first line of `command --version`, "" if it has none."""
    return _version(command, os.environ.get("PATH", ""))


# What PARETUNE_ISA takes away from this processor, so that slower paths can be tested and compared.
_WITHOUT = {
    "": (),
    "avx2": ("-mno-avx512f",),
    "portable": ("-mno-avx512f", "-mno-avx2", "-mno-fma", "-mno-f16c", "-mno-avx"),
}


def flags() -> tuple[str, ...]:
    """The compiler flags of every source. `PARETUNE_ISA=avx2` or `portable` forces a slower path.

    Raises:
        NativeUnavailable: `PARETUNE_ISA` names none.
    """
    wanted = os.environ.get("PARETUNE_ISA", "")
    if wanted not in _WITHOUT:
        raise NativeUnavailable(f"PARETUNE_ISA is {wanted!r}", f"Known: {', '.join(k for k in _WITHOUT if k)}")
    without = _WITHOUT[wanted] if platform.machine().lower() in ("x86_64", "amd64") else ()
    # Apple's compiler for Arm knows the processor by -mcpu alone.
    apple_arm = sys.platform == "darwin" and platform.machine() == "arm64"
    native = "-mcpu=native" if apple_arm else "-march=native"
    return ("-O3", native, *without, "-std=c++20", "-shared", "-fPIC", "-pthread")


@functools.cache
def cpu_info() -> tuple[str, frozenset[str]]:
    """The processor as `(model, flags)`: its name with family, model and stepping, and the system's names of
    its features (`avx2`, `asimd`, ...). The name alone is not enough: many virtual machines say "AMD EPYC".
    """
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
        for line in f:
            key, _, value = line.partition(":")
            if not key.strip() and fields:
                break  # the first processor is enough, and a large machine has hundreds
            fields[key.strip()] = value.strip()
    features = frozenset((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or fields.get("Hardware") or platform.processor() or platform.machine()
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        if platform.machine() == "arm64":
            features |= {"asimd"}
    numbers = [
        f"{key.rpartition(' ')[2]} {fields[key]}"
        for key in ("cpu family", "model", "stepping", "CPU implementer", "CPU part")
        if key in fields
    ]
    return f"{name} ({', '.join(numbers)})" if numbers else name, features


def load(name: str) -> ctypes.CDLL:
    """The library of `ops/native/<name>.cpp`, compiled first if the cache does not have it.

    The caller sets `argtypes` and `restype`. Loading twice gives the same object. Calls release the GIL.

    Raises:
        NativeUnavailable: no compiler, a failing one, or a file that cannot be loaded (a `noexec` folder).
    """
    source = SOURCES / f"{name}.cpp"
    assert source.is_file(), f"no native source {source}"
    asked = source, source.stat().st_mtime_ns, *(os.environ.get(variable) for variable in _VARIABLES)
    if asked in _found:
        return _found[asked]
    if reason := unavailable_reason():
        cure = "The PyTorch form runs instead" if sys.platform == "win32" else _CURE
        raise NativeUnavailable(f"cannot build {name}.cpp: {reason}", cure)
    command = compiler()
    assert command is not None
    with _lock:
        target = _folder() / f"{name}-{_key(source, command)}.so"
        if target in _loaded:
            _found[asked] = _loaded[target]
            return _loaded[target]
        is_fresh = not target.is_file()
        if is_fresh:
            _compile(source, target, command)
        try:
            library = ctypes.CDLL(str(target))
        except OSError as error:
            if is_fresh:
                raise NativeUnavailable(f"cannot load the compiled {name}: {error}", _NOEXEC) from None
            # A damaged file in the cache: build it once more before giving up.
            _compile(source, target, command)
            try:
                library = ctypes.CDLL(str(target))
            except OSError as again:
                raise NativeUnavailable(f"cannot load the compiled {name}: {again}", _NOEXEC) from None
        _loaded[target] = _found[asked] = library
        return library


_CURE = "Install g++ or clang++, or set CXX; the PyTorch form runs meanwhile"
_NOEXEC = "Set PARETUNE_CACHE to a folder from which programs may run"


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command) or [command]
    except ValueError:  # an unclosed quote
        return [command]


@functools.cache
def _version(command: str, path: str) -> str:
    # `path` is an argument so that another $PATH is another answer.
    try:
        done = subprocess.run([*_words(command), "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip() if done.returncode == 0 else ""


def _key(source: Path, command: str) -> str:
    model, features = cpu_info()
    digest = hashlib.sha256()
    parts = [*flags(), command, compiler_version(command), platform.system(), model, *sorted(features)]
    for part in parts:
        digest.update(part.encode() + b"\0")
    for file in (source, *sorted(source.parent.glob("*.h"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def _writable(wanted: Path) -> Path:
    """`wanted`, or a private temporary folder (said once) where it cannot be written."""
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError as error:
        cause = error.strerror or str(error)
    try:
        folder = _private_temporary()
    except OSError as error:
        raise NativeUnavailable(f"cannot write {wanted} nor a temporary folder: {error}", _NOEXEC) from None
    say(f"cannot write {wanted} ({cause}): compiled code goes to {folder}")
    return folder


def _private_temporary() -> Path:
    """A folder that the next process finds again, if it is ours alone; else one for this process."""
    folder = Path(tempfile.gettempdir()) / f"paretune-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        info = folder.lstat()
        # Code is loaded from here: a folder or link that another user put there must not be trusted.
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022:
            with tempfile.TemporaryFile(dir=folder):
                return folder
    own = Path(tempfile.mkdtemp(prefix="paretune-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def _folder() -> Path:
    return _writable(cache_folder() / "native")


def _own_flags(source: Path) -> list[str]:
    """What a source asks for itself, in a line `// flags: ...` (part of the hash as all of its text)."""
    lines = source.read_text("utf-8").splitlines()
    return next((line.removeprefix("// flags:").split() for line in lines if line.startswith("// flags:")), [])


def _compile(source: Path, target: Path, command: str) -> None:
    """Builds under a temporary name, then renames: processes that compile at once never see half a file."""
    say(f"compiling {source.name} with {command} (once)")
    handle, temporary = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        full = [*_words(command), *flags(), *_own_flags(source), "-I", str(source.parent), str(source), "-o", temporary]
        try:
            done = subprocess.run(full, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_SEC, errors="replace")
        except (OSError, subprocess.SubprocessError) as error:
            raise NativeUnavailable(f"{command} could not compile {source.name}: {error}", _CURE) from None
        if done.returncode != 0:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            worst = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
            what = worst[:300] or f"exit status {done.returncode}"
            raise NativeUnavailable(f"{command} could not compile {source.name}: {what}", _CURE)
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
    except OSError as error:
        raise NativeUnavailable(f"cannot write {target}: {error.strerror or error}", _NOEXEC) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
