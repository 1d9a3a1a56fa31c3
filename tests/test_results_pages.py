"""The tables of README.md and docs/results/ are those that the records give."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = importlib.util.spec_from_file_location("tables", REPOSITORY / "benchmarks" / "tables.py")
assert SCRIPT and SCRIPT.loader
tables = importlib.util.module_from_spec(SCRIPT)
SCRIPT.loader.exec_module(tables)


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_a_page_equals_its_records(page):
    text = page.read_text("utf-8")
    assert tables.filled(text) == text, "run `python benchmarks/tables.py`"


def test_every_table_is_on_a_page():
    used = {name.split()[0] for page in tables.pages() for _, name, _ in tables.PLACE.findall(page.read_text("utf-8"))}
    assert used == set(tables.TABLES)


def test_a_changed_number_is_noticed():
    page = REPOSITORY / "docs" / "results" / "engines.md"
    text = page.read_text("utf-8")
    changed, n = re.subn(r"\d\.\d\dx \[", "7.77x [", text, count=1)
    assert n == 1 and changed != text
    assert tables.filled(changed) == text
