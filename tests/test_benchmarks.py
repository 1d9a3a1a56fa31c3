"""Benchmarks run seldom: what they take from the package is there."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parent.parent / "benchmarks").glob("*.py"))


def missing(source: str) -> list[str]:
    """Names of the package that a script imports, or takes from a module of it, and that do not exist."""
    tree, modules, out = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "paretune":
            home = importlib.import_module(str(node.module))
            for alias in node.names:
                try:
                    modules[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    if not hasattr(home, alias.name):
                        out.append(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and not hasattr(module, node.attr):
                out.append(f"{node.value.id}.{node.attr}")
    return out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_benchmark_uses_exists(script):
    assert missing(script.read_text("utf-8")) == []


def test_what_does_not_exist_is_found():
    assert missing("from paretune import files\nfrom paretune.files import nothing\nfiles.gone()") == [
        "paretune.files.nothing",
        "files.gone",
    ]
