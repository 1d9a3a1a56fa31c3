"""Every flag that a text of Paretune names exists: a cure that cannot be typed is none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer

from paretune.cli.app import VERBS, app

SOURCE = Path(__file__).resolve().parents[2] / "src" / "paretune"
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")


def flags_of_verbs() -> set[str]:
    command = typer.main.get_command(app)
    context = command.make_context("paretune", ["ls"], resilient_parsing=True)
    commands = [command, *(command.get_command(context, name) for name in VERBS.names())]
    known = {"--help"}
    for one in commands:
        for parameter in one.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    return {name for name in known if name.startswith("--")}


def flags_in_texts(source: str) -> list[tuple[int, str]]:
    """Line and flag of each text of more than one word; arguments of other programs are single words."""
    nodes = list(ast.walk(ast.parse(source)))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    found = []
    for node in nodes:
        if id(node) in parts:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "0" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if len(text.split()) > 1:
            found += [(node.lineno, flag) for flag in FLAG.findall(text)]
    return found


@pytest.fixture(scope="module")
def known():
    return flags_of_verbs()


def test_every_flag_in_a_text_belongs_to_a_verb(known):
    unknown = [
        f"{path.relative_to(SOURCE)}:{line}: {flag}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line, flag in flags_in_texts(path.read_text("utf-8"))
        if flag.replace("_", "-").rstrip("-") not in known
    ]
    assert unknown == []


def test_verbs_and_texts_are_seen(known):
    assert {"--max-ppl-increase", "--max-new-tokens", "--no-stream", "--version", "--group-size"} <= known
    assert "--attention" not in known and "--group" not in known
    cure = 'raise UsageError("no", f"Use --attention sdpa, or --{name} and --group {size}")'
    assert [flag for _, flag in flags_in_texts(cure)] == ["--attention", "--group"]
    assert flags_in_texts('run(["pip", "--no-deps"])') == []
