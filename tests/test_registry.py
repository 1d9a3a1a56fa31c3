"""Names are imported when asked for, and an unknown one helps."""

from __future__ import annotations

import subprocess
import sys

import pytest

from paretune import registry
from paretune.cli.ls import _what
from paretune.errors import EXIT_USAGE, UsageError
from paretune.model.families.base import Family
from paretune.ops.weights.base import Weight
from paretune.registry import EntryPoint, Registry
from paretune.transforms.base import Stage, Transform
from paretune.transforms.quantize import Quantize

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


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_our_own_entries_keep_the_contract_of_others(kind, name):
    table = REGISTRIES[kind]
    assert table.contract is not None and table.contract.why_not(name, table.get(name)) is None


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


# -- what other packages bring


class Plain:
    pass


class Titled(Transform):
    name = "titled"
    title = "titled"


class Whole(Transform):
    name, stage, axis, title = "whole", Stage.ATTENTION, "attention", "whole"

    def apply(self, model, ctx):
        return model

    def verify(self, model, probe):
        return []


class NoBytes(Quantize):
    name, axis, title, format, format_title = "no_bytes", "quantize", "no bytes", "int8_rows", "8-bit rows"


class Numbers(Weight):
    format = "numbers"


class HalfFamily(Family):
    name = "half"

    def read(self, hf, where):
        raise AssertionError


def half_study(model, output_dir):
    return {}


@pytest.fixture
def installed(monkeypatch):
    """Puts entry points `(group, name, class or function here, package)` where those of other packages are."""

    def install(*points):
        found = [
            EntryPoint(f"paretune.{g}", name, f"{__name__}:{thing}", package) for g, name, thing, package in points
        ]
        monkeypatch.setattr(registry, "_entry_points", lambda: found)
        tables = {}
        for table in REGISTRIES.values():
            tables[table.group] = fresh = Registry(table.kind, table.group, table.contract)
            for name in table.names():
                fresh.register(name, table.targets[name])
        return {group.removeprefix("paretune."): table for group, table in tables.items()}

    return install


WRONG = {
    ("transforms", "plain", "Plain"): "Plain is no subclass of paretune.transforms.base.Transform",
    ("transforms", "study", "half_study"): "half_study is no subclass of paretune.transforms.base.Transform",
    ("transforms", "titled", "Titled"): "Titled does not declare stage, axis, apply, verify",
    ("transforms", "other", "Whole"): "the `name` of Whole is 'whole', not 'other' as its entry point says",
    ("transforms", "no_bytes", "NoBytes"): "NoBytes does not declare quantize, expected_bytes",
    ("formats", "plain", "Plain"): "Plain is no subclass of paretune.ops.weights.base.Weight",
    ("formats", "numbers", "Numbers"): (
        "Numbers does not declare matmul, rows, dequantize, compute_dtype, from_tensors"
    ),
    ("runners", "plain", "Plain"): "Plain is no subclass of paretune.engine.runners.base.Runner",
    ("drafts", "plain", "Plain"): "Plain is no subclass of paretune.engine.decode.drafts.base.Draft",
    ("families", "half", "HalfFamily"): (
        "HalfFamily does not declare write, architecture, n_positions_key, model, positions, norm, modules, stack, "
        "attention, operators"
    ),
    ("attention", "half", "half_study"): "half_study cannot be called as (q, k_new, v_new, layer_cache, spec)",
    ("studies", "half", "half_study"): (
        "half_study cannot be called as (model, output_dir, *, quick, seed, device, threads, say)"
    ),
}


@pytest.mark.parametrize(("group", "name", "thing"), WRONG)
def test_what_is_no_such_thing_is_broken_and_says_why(installed, group, name, thing):
    table = installed((group, name, thing, "my-toys"), ("transforms", "whole", "Whole", "my-toys"))[group]
    working = dict(table.working())
    assert name not in working and (group != "transforms" or working["whole"] is Whole)
    assert table.broken == {name: f"cannot be used: {WRONG[group, name, thing]} (package my-toys)"}
    with pytest.raises(UsageError, match="package my-toys"):
        table.get(name)


def test_a_name_belongs_to_one_package(installed):
    points = (("transforms", "int8", "Whole", "my-toys"), ("transforms", "whole", "Whole", "a-toys"))
    table = installed(*points, ("transforms", "whole", "Whole", "b-toys"))["transforms"]
    assert table.refused == [("int8 (my-toys)", "cannot be used: the name 'int8' is Paretune's own")]
    assert table.get("int8") is registry.TRANSFORMS.get("int8")
    assert "whole" in table.names() and "whole" not in dict(table.working())
    with pytest.raises(UsageError, match="the packages a-toys and b-toys bring something of this name"):
        table.get("whole")
    assert table.package_of("whole") == "a-toys and b-toys" and table.package_of("int8") is None


def test_a_group_that_there_is_not(installed):
    installed(("transform", "whole", "Whole", "my-toys"), ("runners", "whole", "Whole", "my-toys"))
    ((group, what),) = registry.unknown_groups()
    assert group == "paretune.transform" and "package my-toys" in what and "did you mean paretune.transforms?" in what


def test_the_line_of_an_entry_is_of_its_module_or_its_own(tmp_path, monkeypatch):
    (tmp_path / "bare_toys.py").write_text('def run():\n    """Counts bytes. Slowly."""\n\n\nclass Mute:\n    pass\n')
    monkeypatch.syspath_prepend(tmp_path)
    table = Registry("thing")
    for name in ("run", "Mute"):
        table.register(name, f"bare_toys:{name}")
    assert (_what(table, "run"), _what(table, "Mute")) == ("Counts bytes", "")
