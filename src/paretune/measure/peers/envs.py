"""An environment for each peer in the user's cache folder: they clash in one.

An environment is built under a temporary name and renamed when its modules have been imported in it, so what an
interrupted installation leaves is never taken for a finished one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paretune import clock, files
from paretune.errors import ParetuneError
from paretune.measure.peers.catalogue import PEERS, Peer
from paretune.native_build import cache_folder

MARK = "peer.json"
INSTALL_TIMEOUT_SEC = 3600.0
MAIN = Path(__file__).parent / "workers" / "main.py"

Say = Callable[[str], None]


def home() -> Path:
    """Where environments and converted models lie. It may not exist yet."""
    return cache_folder().expanduser().absolute() / "peers"


def folder_of(peer: Peer) -> Path:
    return home() / "envs" / peer.name


def _python_in(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def installed(peer: Peer) -> dict[str, Any] | None:
    """What the mark of a finished environment says; None without one."""
    folder = folder_of(peer)
    try:
        mark = json.loads((folder / MARK).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) and _python_in(folder).exists() else None


def is_current(peer: Peer) -> bool:
    """There is an environment, and it holds what the catalogue asks for now."""
    mark = installed(peer)
    return mark is not None and mark.get("requirements") == list(peer.requirements)


def shares(peer: Peer) -> bool:
    """It can run in this interpreter."""
    return peer.shares_interpreter and all(importlib.util.find_spec(name) for name in peer.modules)


def state(peer: Peer) -> str:
    """In words for a table: whether it can be measured, and from where."""
    if is_current(peer):
        return "installed"
    if shares(peer):
        return "in Paretune's own environment"
    return "outdated" if installed(peer) else "not installed"


def command(peer: Peer) -> list[str]:
    """How the peer's worker is started: its own environment, else this interpreter where the peer may share it.

    Raises:
        ParetuneError: it is not installed, or for another version of Paretune.
    """
    arguments = [str(MAIN), peer.worker]
    if is_current(peer):
        # -I: nothing of our own environment or of the user's site-packages is seen.
        return [str(_python_in(folder_of(peer))), "-I", "-u", *arguments]
    if shares(peer):
        return [sys.executable, "-u", *arguments]
    cause = f"{peer.name} is not installed"
    if installed(peer) is not None:
        cause = f"{peer.name} is installed in another version than the one this Paretune was made with"
    raise ParetuneError(cause, f"Run `paretune peers install {peer.name}`")


def install(peer: Peer, say: Say, python: str = sys.executable) -> Path:
    """Builds the environment, replacing an older one.

    Args:
        say: called with a line of progress.
        python: the interpreter that the environment is made from.

    Raises:
        ParetuneError: it could not be built; nothing is left but the log of pip.
    """
    target = folder_of(peer)
    log = home() / "logs" / f"{peer.name}.log"
    files.ensure_folder(target.parent)
    files.ensure_folder(log.parent)
    files.remove_leftovers(target)
    started = clock.now()
    with files.whole_folder(target, overwrite=True) as folder, open(log, "wb") as output:
        say(f"{peer.name}: making an environment ({peer.effort})")
        _run(peer, [python, "-m", "venv", str(folder)], output, log)
        inner = str(_python_in(folder))
        say(f"{peer.name}: installing {', '.join(peer.requirements)}")
        pip = [inner, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *peer.pip_arguments]
        _run(peer, [*pip, *peer.requirements], output, log)
        _run(peer, [inner, "-I", "-c", f"import {', '.join(peer.modules)}"], output, log)
        mark = {
            "schema_version": 1,
            "peer": peer.name,
            "requirements": list(peer.requirements),
            "install_sec": clock.now() - started,
        }
        files.write_json(folder / MARK, mark)
    return target


def remove(peer: Peer) -> bool:
    """Removes the environment; False where there was none."""
    folder = folder_of(peer)
    files.remove_leftovers(folder)
    if not folder.exists():
        return False
    try:
        # The mark goes first: half of an environment is none.
        (folder / MARK).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:
        raise files.write_error(folder, error) from None
    return True


def listing() -> list[dict[str, Any]]:
    """A row a peer: its state and versions, its formats, the bytes it takes."""
    rows = []
    for peer in PEERS.values():
        mark = installed(peer)
        rows.append(
            {
                "peer": peer.name,
                "state": state(peer),
                "formats": list(peer.formats),
                "default": list(peer.default),
                "requirements": list(peer.requirements),
                "env_bytes": bytes_below(folder_of(peer)),
                "install_sec": (mark or {}).get("install_sec"),
            }
        )
    return rows


def bytes_below(folder: Path) -> int:
    """Bytes of the files below a folder, links not followed; 0 where there is none."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # it went away meanwhile
                continue
    return total


def _run(peer: Peer, arguments: list[str], output: Any, log: Path) -> None:
    """Runs one command of an installation, its words into the log.

    Raises:
        ParetuneError: it failed; the message ends with its last error.
    """
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CMAKE_ARGS")
    env = {key: value for key, value in os.environ.items() if key not in hidden} | dict(peer.pip_environment)
    output.write(f"$ {' '.join(arguments)}\n".encode())
    output.flush()
    start = output.tell()
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            timeout=INSTALL_TIMEOUT_SEC,
            check=False,
        )
        code, why = done.returncode, ""
    except subprocess.TimeoutExpired:
        code, why = 1, f"it took more than {INSTALL_TIMEOUT_SEC / 60:.0f} minutes"
    except OSError as error:
        code, why = 1, f"{arguments[0]}: {error.strerror}"
    if code != 0:
        text = log.read_bytes()[start:].decode("utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        # pip says what went wrong in its first line of this kind, and what follows from it later.
        worst = next((line for line in lines if line.lower().startswith(("error:", "fatal"))), "")
        why = why or worst or (lines[-1] if lines else f"exit code {code}")
        raise ParetuneError(f"{peer.name} could not be installed: {why[:300]}", f"The whole of it is in {log}")
