"""Toys of another package: each is one file, registered by an entry point, as `docs/extending.md` tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ENTRY_POINTS = """
[paretune.transforms]
relu_attention = toys.relu_attention:ReluAttention
three_bits = toys.three_bits:Bits3
[paretune.formats]
three_bits = toys.three_bits:ThreeBits
[paretune.runners]
halves = toys.halves:HalvesRunner
[paretune.families]
toy = toys.toy_family:Toy
[paretune.studies]
sizes = toys.sizes_study:run
"""
BROKEN = """
[paretune.transforms]
broken = toys.nowhere:Nothing
int8 = toys.three_bits:Bits3
nothing = toys.not_a_transform:NotATransform
[paretune.transform]
misspelt = toys.three_bits:Bits3
[paretune.runners]
broken_runner = toys.raises:Runner
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Runs `paretune ARGUMENTS` in a process in which the toys' package is installed."""
    site = tmp_path_factory.mktemp("site")

    def distribution(name: str, entry_points: str) -> None:
        folder = site / f"{name}-0.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (folder / "entry_points.txt").write_text(entry_points)

    distribution("paretune_toys", ENTRY_POINTS)
    broken = tmp_path_factory.mktemp("broken")
    site_of_toys, site = site, broken
    distribution("paretune_broken", BROKEN)

    def run(*arguments, ok: bool = True, with_broken: bool = False, timeout: float = 300):
        paths = [str(HERE), str(site_of_toys), *([str(broken)] if with_broken else [])]
        before = os.environ.get("PYTHONPATH")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])])}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
        assert (done.returncode == 0) == ok, done.stderr[-3000:]
        return done

    def paretune(*arguments, **options):
        return run("-m", "paretune", *arguments, **options)

    paretune.python = run
    return paretune


@pytest.fixture(scope="session")
def listed(installed):
    return json.loads(installed("ls", "--json").stdout)
