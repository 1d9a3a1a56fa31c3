"""Recipes as expressions, for the command line: `native+int4(group=64)+kv8`.

    expression = term ("+" term)*
    term       = NAME [ "(" argument ("," argument)* ")" ]
    argument   = [FIELD "="] VALUE

A term is a transform, or a name that one gives to some of its settings (`int4`, `bf16`); a runner and its mode
(`compile(freeze)`); what keys and values are kept in (`kv8`, `kv(bf16)`); what proposes tokens (`speculate(suffix)`,
`speculate(self=int4)`); or `threads(2)`. A value alone sets the field that the transform names its main one. Order
matters for formats that share an axis alone, where each but the last takes only some layers. What is left out is as in
the baseline: fused attention, PyTorch operator by operator.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paretune.errors import UsageError
from paretune.recipe import speculate
from paretune.recipe.recipe import CACHE_DTYPES, EngineOptions, Recipe, build
from paretune.registry import RUNNERS, TRANSFORMS

if TYPE_CHECKING:
    from paretune.transforms.base import Transform

CACHE_TERMS = {"kv8": "int8", "kv4": "int4"}
DEFAULTS = {"attention": "sdpa"}  # terms of axes that an expression does not name
CURE = "`paretune ls` has the names"

# Expressions with a name of their own. The baseline is the reasonable default, not a straw man.
ALIASES: dict[str, str] = {
    "baseline": "sdpa",
    "eager_attn": "as_loaded",
    "flex_attn": "attention(flex)",
    "native_attn": "attention(native)",
    "nf4_head8": "nf4(positions=true)+int8",
    "window256": "mechanism(window:256)",
    "longformer": "mechanism(prefix:16+window:256)",
    "bigbird": "attention(native)+mechanism(prefix:64+window:192+random:3x64@0)",
    "strided": "attention(native)+mechanism(window:128+strided:64)",
    "blocks": "attention(native)+mechanism(blocks:128+strided:64)",
    "native_w7a7": "native+w7a7+kv8",
}
# Names from before there were expressions.
OLD_NAMES: dict[str, str] = {
    "fp32": "sdpa",
    "flash_attn": "sdpa",
    "int8_linear": "int8(embeddings=false)",
    "bf16_int8": "bf16+int8",
    "native_bf16": "native+bf16",
    "native_int8": "native+int8",
    "native_int8_kv8": "native+int8+kv8",
    "native_int8_kv4": "native+int8+kv4",
    "native_q8_0": "native+q8_0",
    "native_w8a8": "native+w8a8",
    "native_w8a7": "native+w8a7",
    "native_int4": "native+int4",
    "native_int4_kv8": "native+int4+kv8",
    "native_int4_kv4": "native+int4+kv4",
    "native_int4_a8": "native+int4(activation_bits=8)+kv8",
    "native_q4_0": "native+q4_0",
    "native_q4_0_a8": "native+q4_0(activation_bits=8)+kv8",
    "alibi_window256": "mechanism(window:256, alibi=true)",
    "native_alibi": "native+alibi",
    "native_window256": "native+mechanism(window:256)",
    "native_alibi_window256": "native+mechanism(window:256, alibi=true)",
    "native_nf4": "native+nf4(positions=true)+int8",
    "native_llm_int8": "native+llm_int8",
    "compile_freeze": "compile(freeze)",
    "compile_max": "compile(max-autotune)",
    "compile_bf16": "compile+bf16",
    "compile_int8": "compile+int8",
}


def preset(text: str) -> Recipe:
    """The recipe of a `--config`: an expression, a name of one, or a recipe file.

    Raises:
        UsageError: an unknown name, field or value, two options of one axis, a bracket too many or too few.
    """
    if text.endswith((".toml", ".json")):
        return Recipe.read(text)
    made = _Made()
    for term in _terms(_expanded(text), text):
        made.add(term)
    return made.recipe()


def split_list(text: str) -> list[str]:
    """The expressions of a list with commas; those inside brackets belong to a term.

    Raises:
        UsageError: a bracket too many or too few.
    """
    return [part for part in (part.strip() for part in _split(text, ",", text)) if part]


def spell(recipe: Recipe) -> str:
    """An expression of a recipe: `preset` of it gives the recipe back."""
    words = []
    engine, default = recipe.engine, EngineOptions()
    if engine.runner != default.runner or engine.compile_mode != default.compile_mode:
        mode = engine.compile_mode
        words.append(engine.runner if mode == default.compile_mode else f"{engine.runner}({mode})")
    named = {axis: preset(term) for axis, term in DEFAULTS.items()}
    for transform in recipe.transforms:
        if transform not in named.get(transform.axis, Recipe()).transforms:
            words.append(_spelled(transform))
    for axis in DEFAULTS:
        if not any(t.axis == axis for t in recipe.transforms):
            words.append(next(name for name, (kind, made) in _names().items() if made is None and kind.axis == axis))
    if engine.cache_dtype is not None:
        term = next((t for t, dtype in CACHE_TERMS.items() if dtype == engine.cache_dtype), None)
        words.append(term or f"kv({engine.cache_dtype})")
    if engine.threads is not None:
        words.append(f"threads({engine.threads})")
    if engine.speculate is not None:
        words.append(f"speculate({engine.speculate})")
    return "+".join(words) or "baseline"


# --- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Term:
    name: str
    values: tuple[str, ...]  # without a field
    fields: Mapping[str, str]
    text: str


class _Made:
    """A recipe as far as its terms have been read."""

    def __init__(self) -> None:
        self.transforms: list[Transform] = []
        self.engine: dict[str, Any] = {}
        self.taken: dict[str, str] = {}  # axis -> the term that named it

    def add(self, term: _Term) -> None:
        if term.name in RUNNERS.names():
            self._take("runner", term)
            modes = RUNNERS.get(term.name).modes
            (mode,) = _values(term, 1, "a mode") or (modes[0],)
            if mode not in modes:
                raise _has_no(term.name, "mode", mode, modes)
            self.engine |= {"runner": term.name} | ({"compile_mode": mode} if mode != modes[0] else {})
        elif term.name in CACHE_TERMS or term.name == "kv":
            self._take("cache", term)
            dtype = CACHE_TERMS.get(term.name)
            if dtype is None:
                (dtype,) = _values(term, 1, "a dtype") or ("",)
            else:
                _values(term, 0, "")
            if dtype not in CACHE_DTYPES:
                raise _unknown("cache dtype", dtype, CACHE_DTYPES)
            self.engine["cache_dtype"] = dtype
        elif term.name == "threads":
            self._take("threads", term)
            (n,) = _values(term, 1, "a number") or ("",)
            if not n.isdecimal() or int(n) < 1:
                raise UsageError(f"threads({n}) is not a number of threads", "Write threads(2), say")
            self.engine["threads"] = int(n)
        elif term.name == "speculate":
            self._take("speculate", term)
            # `self=int4` reads as a field here.
            given = [*term.values, *(f"{field}={value}" for field, value in term.fields.items())]
            if len(given) != 1:
                raise UsageError(f"{term.text} names {len(given)} drafts", "Write speculate(suffix), say")
            speculate.draft_of(given[0])
            self.engine["speculate"] = given[0]
        else:
            self._transform(term)

    def _transform(self, term: _Term) -> None:
        names = _names()
        if term.name in TRANSFORMS.broken:
            TRANSFORMS.get(term.name)  # says why it cannot be used
        if term.name not in names:
            known = [*names, *RUNNERS.names(), *CACHE_TERMS, "kv", "threads", "speculate", *ALIASES, "a recipe file"]
            raise _unknown("config", term.name, known)
        kind, settings = names[term.name]
        if settings is None:  # the axis as the model has it
            _values(term, 0, "")
            self._take(kind.axis, term)
            return
        transform = build(kind, {**settings, **_fields(kind, term)}, term.name)
        before = [t for t in self.transforms if t.axis == kind.axis]
        if transform in before:
            raise UsageError(f"{term.text} stands twice in the config", "Name it once")
        if not before or not all(t.is_partial for t in before):
            self._take(kind.axis, term, is_partial=transform.is_partial)
        self.transforms.append(transform)

    def _take(self, axis: str, term: _Term, is_partial: bool = False) -> None:
        """Refuses a second term of an axis.

        Args:
            is_partial: the term takes some layers only: in front of the other it would be legal.
        """
        if axis in self.taken:
            first = self.taken[axis]
            if is_partial:
                raise UsageError(
                    f"{first} and {term.text} are both of the axis {axis}, and {first} leaves no layer to what follows",
                    f"What takes some layers only comes first: {term.text}+{first}; or name one of them",
                )
            raise UsageError(f"{first} and {term.text} are both of the axis {axis}", "Name one of them; " + CURE)
        self.taken[axis] = term.text

    def recipe(self) -> Recipe:
        for axis, default in DEFAULTS.items():
            if axis not in self.taken:
                self.add(_Term(default, (), {}, default))
        return Recipe(tuple(sorted(self.transforms, key=lambda t: t.stage)), EngineOptions(**self.engine))


def _expanded(text: str) -> str:
    """The expression with names of whole expressions replaced by these."""
    known = {**OLD_NAMES, **ALIASES}
    words = (word.strip() for word in _split(text, "+", text))
    return "+".join(known.get(word, word) for word in words)


def _terms(text: str, whole: str) -> list[_Term]:
    terms = []
    for part in _split(text, "+", whole):
        word = part.strip()
        found = re.fullmatch(r"([A-Za-z0-9_.\-]+)\s*(?:\((.*)\))?", word, re.DOTALL)
        if not found:
            problem = f"`{word}` is not a term" if word else "a term is missing"
            raise UsageError(f"{problem} in the config {whole!r}", "Write NAME or NAME(FIELD=VALUE), joined by +")
        values, fields = [], {}
        for argument in _split(found[2], ",", whole) if found[2] and found[2].strip() else []:
            field, is_named, value = argument.partition("=")
            if not is_named:
                values.append(field.strip())
            elif field.strip() in fields:
                raise UsageError(f"{found[1]}: {field.strip()} is set twice in {whole!r}", "Set it once")
            else:
                fields[field.strip()] = value.strip()
        terms.append(_Term(found[1], tuple(values), fields, word))
    return terms


def _split(text: str, separator: str, whole: str) -> list[str]:
    """The parts between separators that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth < 0:
            raise UsageError(f"a bracket is closed that was not opened in the config {whole!r}", "Leave it out")
        if char == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if depth:
        raise UsageError(f"a bracket is not closed in the config {whole!r}", "Close it")
    return [*parts, text[start:]]


def _names() -> dict[str, tuple[type[Transform], Mapping[str, Any] | None]]:
    """Every name of a transform and of its settings; None where it stands for no transform."""
    found: dict[str, tuple[type[Transform], Mapping[str, Any] | None]] = {}
    for name, kind in TRANSFORMS.working():
        found[name] = kind, {}
        found |= {term: (kind, settings) for term, settings in kind.terms.items()}
    return found


def _values(term: _Term, most: int, what: str) -> tuple[str, ...]:
    """The values of a term that has no fields."""
    if term.fields:
        raise UsageError(f"{term.name} has no setting {next(iter(term.fields))!r}", CURE)
    if len(term.values) > most:
        takes = f"takes {what}" if most else "takes nothing in brackets"
        raise UsageError(f"{term.text}: {term.name} {takes}", CURE)
    return term.values


def _fields(kind: type[Transform], term: _Term) -> dict[str, Any]:
    """The settings that a term gives to its transform."""
    given = dict(term.fields)
    types = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    for value in term.values:
        if not types:
            raise UsageError(f"{term.text}: {term.name} takes nothing in brackets", CURE)
        if kind.main is None or kind.main in given:
            cure = f"Write FIELD=VALUE, where FIELD is one of {', '.join(types)}"
            raise UsageError(f"{term.text}: {value!r} stands without its field", cure)
        given[kind.main] = value
    for field in given:
        if field not in types:
            raise _has_no(term.name, "setting", field, list(types))
    return {field: _value(text, types[field], f"{term.name}: {field}") for field, text in given.items()}


def _value(text: str, kind: str, where: str) -> Any:
    kind = kind.removesuffix(" | None")
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        return {"int": int, "float": float}.get(kind, str)(text)
    except (KeyError, ValueError):
        known = " (true or false)" if kind == "bool" else ""
        raise UsageError(f"{where} is {text!r}", f"It has to be of type {kind}{known}") from None


def _unknown(what: str, name: str, known: Sequence[str]) -> UsageError:
    return UsageError(f"unknown {what} {name!r}", f"{_near(name, known)}Known: {', '.join(known)}")


def _has_no(term: str, what: str, name: str, known: Sequence[str]) -> UsageError:
    """A setting or a mode that a term does not have."""
    return UsageError(f"{term} has no {what} {name!r}", f"{_near(name, known)}It has {', '.join(known) or 'none'}")


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}? " if near else ""


# --- writing ---------------------------------------------------------------------------------------


def _spelled(transform: Transform) -> str:
    """The term of a transform with the fewest settings beside a name."""
    values = {f.name: getattr(transform, f.name) for f in dataclasses.fields(transform)}
    own = [(name, made) for name, (kind, made) in _names().items() if kind is type(transform) and made is not None]
    found = []
    for name, settings in own:
        as_named = type(transform).defaults() | dict(settings)
        left = {k: v for k, v in values.items() if as_named.get(k) != v}
        words = [str(v).lower() if isinstance(v, bool) else str(v) for v in left.values()]
        words = [w if k == transform.main else f"{k}={w}" for k, w in zip(left, words, strict=True)]
        found.append((len(left), f"{name}({', '.join(words)})" if words else name))
    return min(found, key=lambda pair: (pair[0], len(pair[1])))[1]
