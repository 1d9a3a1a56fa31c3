"""Names are imported when asked for, and an unknown one helps."""

from __future__ import annotations

import subprocess
import sys

import pytest

from paretune import registry
from paretune.errors import EXIT_USAGE, UsageError
from paretune.registry import Registry

REGISTRIES = {name: value for name, value in vars(registry).items() if isinstance(value, Registry)}
ENTRIES = [(kind, name) for kind, table in REGISTRIES.items() for name in table.names()]


def test_all_five_are_looked_at():
    assert set(REGISTRIES) >= {"TRANSFORMS", "RUNNERS", "ATTENTION", "FORMATS", "FAMILIES"}
    assert all(table.names() for table in REGISTRIES.values())


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_target_imports(kind, name):
    thing = REGISTRIES[kind].get(name)
    assert callable(thing)
    assert REGISTRIES[kind].get(name) is thing


def test_formats_carry_their_own_name():
    """A checkpoint written under `format` is read back through the registry's name."""
    for name in registry.FORMATS.names():
        assert registry.FORMATS.get(name).format == name


@pytest.mark.parametrize("method", ["get", "check"])
@pytest.mark.parametrize("kind", REGISTRIES)
def test_unknown_name_lists_the_known_ones(kind, method):
    table = REGISTRIES[kind]
    with pytest.raises(UsageError) as caught:
        getattr(table, method)("zzz-nothing-like-it")
    text = str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE and "\n" not in text
    assert table.kind in text and "'zzz-nothing-like-it'" in text and "Did you mean" not in text
    for name in table.names():
        assert name in text


@pytest.mark.parametrize(
    ("kind", "typed", "meant"),
    [
        ("TRANSFORMS", "precison", "precision"),
        ("TRANSFORMS", "int-8", "int8"),
        ("ATTENTION", "spda", "sdpa"),
        ("RUNNERS", "compiled", "compile"),
        ("FAMILIES", "GPT2", None),
        ("FAMILIES", "lama", "llama"),
    ],
)
def test_did_you_mean(kind, typed, meant):
    with pytest.raises(UsageError) as caught:
        REGISTRIES[kind].get(typed)
    assert (f"Did you mean '{meant}'?" in str(caught.value)) == (meant is not None)


def test_check_returns_the_name():
    assert registry.FAMILIES.check("llama") == "llama"


def test_registering_twice_or_without_an_attribute_is_a_bug():
    table = Registry("thing")
    table.register("a", "json:loads")
    assert table.get("a")("[1]") == [1]
    with pytest.raises(AssertionError, match="twice"):
        table.register("a", "json:dumps")
    with pytest.raises(AssertionError, match="module:attribute"):
        table.register("b", "json")
    assert table.names() == ["a"]


def test_nothing_is_imported_until_it_is_asked_for():
    """`paretune --help` lists every name and must not wait for torch."""
    code = (
        "import sys, paretune.registry as r\n"
        "assert r.TRANSFORMS.names() and r.FAMILIES.check('gpt2')\n"
        "assert 'torch' not in sys.modules and 'paretune.model.families.gpt2.family' not in sys.modules\n"
        "r.ATTENTION.get('sdpa')\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
