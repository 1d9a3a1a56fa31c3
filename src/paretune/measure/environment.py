"""What a result depends on beside the code under test, for the head of every result file."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paretune import clock, hardware
from paretune.records.header import Header
from paretune.records.record import from_json, to_json

PACKAGES = [
    "paretune",
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "triton",
    "transformers",
    "torchao",
    "llama-cpp-python",
    "ctranslate2",
    "openvino",
    "onnxruntime",
]
# Variables that change how fast the same code runs. Only these: others may hold secrets.
VARIABLES = [
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "OMP_WAIT_POLICY",
    "OMP_DYNAMIC",
    "GOMP_CPU_AFFINITY",
    "GOMP_SPINCOUNT",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "MKL_NUM_THREADS",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "PARETUNE_NO_COMPILER",
]


def versions() -> dict[str, str]:
    """Versions of Python, Paretune and the installed packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional one that is absent
    return found


def git_commit(package: Path | None = None) -> str | None:
    """The commit of the checkout that Paretune runs from (`<checkout>/src/paretune`), else None.

    Reads git's files itself: a repository that merely contains the installed package must not count.
    """
    package = package or Path(__file__).resolve().parents[1]
    git = package.parents[1] / ".git"
    try:
        if package.parent.name != "src":
            return None
        if git.is_file():  # a work tree beside its repository
            git = (git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return head
        name = head.removeprefix("ref:").strip()
        shared = git / "commondir"
        folders = [git, (git / shared.read_text(encoding="utf-8").strip()).resolve()] if shared.is_file() else [git]
        for folder in folders:
            if (folder / name).is_file():
                return (folder / name).read_text(encoding="utf-8").strip()
            if (folder / "packed-refs").is_file():
                for line in (folder / "packed-refs").read_text(encoding="utf-8").splitlines():
                    if line.endswith(" " + name):
                        return line.split(" ")[0]
    except (OSError, UnicodeDecodeError):
        pass
    return None


def _governor() -> str | None:
    try:
        path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None  # virtual machines have none


def _state() -> dict[str, Any]:
    import torch

    return {
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
        "git_commit": git_commit(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "governor": _governor(),
    }


def _machine() -> dict[str, Any]:
    fingerprint = hardware.fingerprint()
    return {"id": hardware.fingerprint_id(fingerprint), **fingerprint}


def environment() -> dict[str, Any]:
    """Versions, hardware and the state of the machine: threads read back from PyTorch, commit, OpenMP's
    variables, load average (processes, over 1, 5 and 15 minutes) and CPU governor (None: not readable).
    """
    return {"versions": versions(), "hardware": _machine(), **_state()}


def hide_paths(text: str) -> str:
    """`text` with the working folder as `.` and the home folder as `~`: published files name no one's."""
    places = [(str(Path.cwd()), "."), (str(Path.home()), "~")]
    # The longer first: a home inside the working folder, or the other way round.
    for path, short in sorted(places, key=lambda place: -len(place[0])):
        if len(path) > 1:
            text = re.sub(re.escape(path) + r"(?![\w.-])", short, text)
    return text


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as a user types it, arguments quoted, private folders shortened: `paretune`, or `python` and a script
    with the folder that it lies in."""
    program, *words = list(sys.argv if argv is None else argv) or [""]
    path = Path(program)
    is_script = path.suffix == ".py" and path.name != "__main__.py"
    start = ["python", f"{path.resolve().parent.name}/{path.name}"] if is_script else ["paretune"]
    return hide_paths(shlex.join([*start, *words]))


def header(command: Sequence[str] | str | None = None, seed: int | None = None) -> dict[str, Any]:
    """The first keys of every result file: `head` as plain data."""
    return to_json(head(command, seed))


def head(command: Sequence[str] | str | None = None, seed: int | None = None) -> Header:
    """What every result file begins with.

    Args:
        command: the program and its arguments, or a finished line; default `sys.argv`.
        seed: the seed of the run; None where nothing is random.
    """
    line = hide_paths(command) if isinstance(command, str) else command_line(command)
    created = datetime.datetime.fromtimestamp(clock.wall_time(), datetime.UTC)
    state = {"versions": versions(), "hardware": _machine(), "environment": _state()}
    about = {"created": created.isoformat(timespec="seconds"), "command": line, "seed": seed}
    return from_json(Header, {"schema_version": Header.SCHEMA, **about, **state})
