"""Configs as expressions: what they mean, and errors that name what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from paretune.errors import UsageError
from paretune.recipe import EngineOptions, Recipe, preset, split_list
from paretune.recipe.expression import spell
from paretune.registry import TRANSFORMS
from paretune.transforms.attention import Attention
from paretune.transforms.base import Stage, Transform
from paretune.transforms.formats import transforms_of
from paretune.transforms.groups import Groups
from paretune.transforms.int8 import Int8
from paretune.transforms.mechanism import Mechanism
from paretune.transforms.nf4 import NormalFloat4
from paretune.transforms.precision import Precision
from recipe_names import HASHES

SDPA = Attention("sdpa")


@pytest.mark.parametrize("name", HASHES)
def test_old_names_keep_their_meaning(name):
    assert preset(name).hash == HASHES[name]


@pytest.mark.parametrize("name", HASHES)
def test_what_is_spelled_reads_back(name):
    assert preset(spell(preset(name))) == preset(name)


MEANINGS = {
    "native+int4(group=64)+kv8": Recipe((SDPA, Groups(4, 64)), EngineOptions("native", cache_dtype="int8")),
    "kv8 + int4( group = 64 ) + native": Recipe((SDPA, Groups(4, 64)), EngineOptions("native", cache_dtype="int8")),
    "bf16": Recipe((SDPA, Precision("bf16"))),
    "precision(dtype=bf16)": Recipe((SDPA, Precision("bf16"))),
    "precision(bf16)": Recipe((SDPA, Precision("bf16"))),
    "attention(eager)": Recipe((Attention("eager"),)),
    "as_loaded+int8": Recipe((Int8(),)),
    "int8+fp16+compile(freeze)+threads(3)": Recipe(
        (SDPA, Precision("fp16"), Int8()), EngineOptions("compile", "freeze", threads=3)
    ),
    "kv(bf16)": Recipe((SDPA,), EngineOptions(cache_dtype="bf16")),
    "window256+native": Recipe((Mechanism(pattern="window:256"), SDPA), EngineOptions("native")),
    "mechanism(prefix:16+window:256, alibi=true)": Recipe((Mechanism(True, pattern="prefix:16+window:256"), SDPA)),
    "nf4+int8": Recipe((SDPA, NormalFloat4(), Int8())),
    "groups(bits=8, group=32, minimum=true)": Recipe((SDPA, Groups(8, 32, True))),
}


@pytest.mark.parametrize("text", MEANINGS)
def test_what_an_expression_means(text):
    assert preset(text) == MEANINGS[text]
    assert preset(spell(MEANINGS[text])) == MEANINGS[text]


WRONG = {
    "natve+int8": r"unknown config 'natve'.*Did you mean 'native'\?",
    "native+int4(grup=64)": r"int4 has no setting 'grup'.*Did you mean 'group'\?",
    "int4(group=big)": r"int4: group is 'big'.*of type int",
    "int4(group=48)": r"group is 48.*one of 32, 64, 128",
    "int8(embeddings=maybe)": r"embeddings is 'maybe'.*true or false",
    "int4(64)": r"'64' stands without its field.*FIELD=VALUE, where FIELD is one of include, exclude, bits",
    "int4(group=64": r"a bracket is not closed in the config 'int4\(group=64'",
    "int4)": r"a bracket is closed that was not opened",
    "int8+int4": r"int8 and int4 are both of the axis quantize",
    "int8+nf4": r"int8 leaves no layer to what follows.*comes first: nf4\+int8",
    "nf4+nf4": r"nf4 stands twice",
    "native+compile": r"native and compile are both of the axis runner",
    "kv8+kv4": r"kv8 and kv4 are both of the axis cache",
    "sdpa+attention(flex)": r"both of the axis attention",
    "compile(fast)": r"compile has no mode 'fast'.*freeze",
    "native(2)": r"native has no mode '2'\. It has default",
    "kv(int3)": r"unknown cache dtype 'int3'.*Did you mean 'int8'|unknown cache dtype 'int3'",
    "kv8(4)": r"kv8 takes nothing in brackets",
    "threads(0)": r"threads\(0\) is not a number of threads",
    "threads": r"not a number of threads",
    "native++int8": r"a term is missing in the config 'native\+\+int8'",
    "": r"a term is missing",
    "int4(group=32, group=64)": r"group is set twice",
    "native int8": r"`native int8` is not a term",
    "mechanism": r"changes nothing",
    "attention(flax)": r"unknown attention function 'flax'.*Did you mean 'flex'",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named(text):
    with pytest.raises(UsageError, match=WRONG[text]) as refused:
        preset(text)
    assert "\n" not in str(refused.value)


def test_commas_inside_brackets_belong_to_a_term():
    assert split_list("baseline, int4(group=64, head_bits=4) ,native") == [
        "baseline",
        "int4(group=64, head_bits=4)",
        "native",
    ]
    with pytest.raises(UsageError, match="not closed"):
        split_list("baseline,int4(group=64")


@pytest.mark.parametrize("text", ["suffix", "lookup", "suffix=earlier", "self=int4", "draft=pocket", "exit=3", "auto"])
def test_speculation_is_a_term(text):
    recipe = preset(f"native+int8+speculate({text})")
    assert recipe.engine.speculate == text and preset(spell(recipe)) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.name.endswith(f", {text} drafts")
    assert recipe.with_speculation(None).hash == preset("native+int8").hash != recipe.hash
    assert recipe.without_exact().engine.speculate is None and not preset(f"speculate({text})").changes_numbers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speculate", "names 0 drafts"),
        ("speculate(suffix, lookup)", "names 2 drafts"),
        ("speculate(sufix)", "unknown draft 'sufix'. Did you mean 'suffix'"),
        ("speculate(draft)", "needs MODEL"),
        ("speculate(suffix)+speculate(lookup)", "both of the axis speculate"),
    ],
)
def test_bad_speculation(text, said):
    with pytest.raises(UsageError, match=said):
        preset(text)


def test_a_package_that_is_broken_is_named(monkeypatch):
    """The reason, as `ls` knows it, and not that there is no such name."""
    monkeypatch.setattr(TRANSFORMS, "_others", {"gone": "nowhere_at_all:Gone"})
    monkeypatch.setattr(TRANSFORMS, "_broken", {})
    for ask in (preset, transforms_of):
        with pytest.raises(UsageError, match=r"'gone' cannot be imported: ModuleNotFoundError.*nowhere_at_all:Gone"):
            ask("gone")


def test_a_transform_without_settings_takes_none(monkeypatch):
    @dataclass(frozen=True)
    class Plain(Transform):
        name, stage, axis = "plain", Stage.ATTENTION, "attention"

    monkeypatch.setattr(TRANSFORMS, "_others", {"plain": "nowhere:Plain"})
    monkeypatch.setattr(TRANSFORMS, "get", lambda name: Plain)
    with pytest.raises(UsageError, match="plain takes nothing in brackets"):
        preset("plain(3)")
    with pytest.raises(UsageError, match=r"plain has no setting 'bits'\. It has none"):
        preset("plain(bits=3)")
