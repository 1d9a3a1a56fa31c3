"""Results as dataclasses: written and read by one function each way, every field checked on the way in.

The fields of a class are the keys of its JSON, with units in their names. A field with a default may be missing in a
file, which then is an older one; a key that no field has is refused. Names say what a number may be: seconds, bytes,
rates and counts (`n_...`) are not negative, shares lie between 0 and 1.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union

from paretune.errors import UsageError
from paretune.files import write_json

Json = Any  # a value that others give a meaning: a recipe, the settings of a transform

_NOT_NEGATIVE = ("_sec", "_bytes", "_len", "_tokens")


class Record:
    """The base of every result.

    Attributes:
        SCHEMA: the schema version of a file; 0: a part of one.
        CURE: what to do about a file that cannot be read.
        DERIVED: properties that are written for readers, and not read.
    """

    SCHEMA: ClassVar[int] = 0
    CURE: ClassVar[str] = "Make the file again with the command that wrote it"
    DERIVED: ClassVar[tuple[str, ...]] = ()


T = TypeVar("T", bound=Record)


# Metadata of fields, for `dataclasses.field(metadata=...)`.
LEFT_OUT = {"left_out": True}  # None where it is not known, and then without a key
SIGNED = {"signed": True}  # seconds or bytes that may be negative: a difference


def null_is(value: float | None) -> dict[str, Any]:
    """Metadata of a number that need not be finite: it is then written as a null, which is read as `value`."""
    return {"null": value}


def flat(prefix: str, nulls: bool = False) -> dict[str, Any]:
    """Metadata of a record whose keys stand among those of its owner, each behind `prefix`; None: it is not known.

    Args:
        nulls: None is written as a null for each of its keys; else there are no keys.
    """
    return {"prefix": prefix, "nulls": nulls}


class _Wrong(ValueError):
    """What is wrong with a field, and where."""


# -- writing


def to_json(record: Record) -> dict[str, Any]:
    """The record as plain data for JSON."""
    out: dict[str, Any] = {}
    hints = _hints(type(record))
    for f in dataclasses.fields(record):  # type: ignore[arg-type]
        value, prefix = getattr(record, f.name), f.metadata.get("prefix")
        if prefix is not None:
            inner = {} if value is None else to_json(value)
            if value is None and f.metadata["nulls"]:
                inner = dict.fromkeys(_keys(_record_of(hints[f.name])))
            out |= {f"{prefix}{key}": part for key, part in inner.items()}
        elif "null" in f.metadata:
            out[f.name] = value if value is not None and math.isfinite(value) else None
        elif not (value is None and f.metadata.get("left_out")):
            out[f.name] = _plain(value)
    return out | {name: getattr(record, name) for name in record.DERIVED}


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return to_json(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def write(record: Record, path: Path | str) -> None:
    """Writes a record as strict JSON, whole or not at all.

    Raises:
        ParetuneError: the file cannot be written.
    """
    write_json(path, to_json(record))


# -- reading


def read(kind: type[T], path: Path | str) -> T:
    """Reads a file that `write` or an earlier version wrote.

    Raises:
        UsageError: it is missing, no JSON, of another schema version, or a field is missing, unknown or mistyped.
    """
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", kind.CURE) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error})", kind.CURE) from None
    return from_json(kind, data, str(path))


def from_json(kind: type[T], data: Any, path: str = "the result") -> T:
    """A record from what `to_json` gave.

    Args:
        path: what the data is called where something is wrong with it.

    Raises:
        UsageError: as of `read`.
    """
    try:
        if kind.SCHEMA and isinstance(data, Mapping) and data.get("schema_version") != kind.SCHEMA:
            raise UsageError(f"{path} {_writer(data)}; this version reads schema version {kind.SCHEMA}", kind.CURE)
        return _record(kind, data, "")
    except _Wrong as wrong:
        raise UsageError(f"{path} is damaged ({wrong})", kind.CURE) from None


def _writer(data: Mapping[str, Any]) -> str:
    """Which version wrote a file of another schema."""
    versions = data.get("versions")
    name = versions.get("paretune") if isinstance(versions, Mapping) else None
    by = f"paretune {name}" if isinstance(name, str) else "another version of paretune"
    return f"was written by {by}, with schema version {_short(data.get('schema_version'))}"


def _record(kind: type[T], data: Any, where: str, before: str = "") -> T:
    """`before`: what the keys begin with in a file, of a record that stands among the keys of its owner."""
    if not isinstance(data, Mapping):
        raise _Wrong(f"{where or 'the whole'} is {_short(data)}, not an object")
    left, values, hints = dict(data), {}, _hints(kind)
    dot = f"{where}." if where else ""
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        prefix = f.metadata.get("prefix")
        if prefix is not None:
            inner = _record_of(hints[f.name])
            part = {key: left.pop(f"{prefix}{key}") for key in _keys(inner) if f"{prefix}{key}" in left}
            is_known = any(value is not None for value in part.values())
            values[f.name] = _record(inner, part, where, f"{before}{prefix}") if is_known else None
        elif f.name in left:
            values[f.name] = _value(hints[f.name], left.pop(f.name), f"{dot}{before}{f.name}", f)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise _Wrong(f"{dot}{before}{f.name} is missing")
    left = {name: part for name, part in left.items() if name not in kind.DERIVED}
    if left:
        raise _Wrong(f"{dot}{before}{next(iter(left))} is not a field that this version knows")
    return kind(**values)


def _value(hint: Any, value: Any, where: str, f: dataclasses.Field[Any]) -> Any:
    """`value` as `hint` says, checked."""
    if hint is Any:
        return value
    if value is None and "null" in f.metadata:
        return f.metadata["null"]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        if all(typing.get_origin(a) is Literal for a in kinds):
            return _word(tuple(word for a in kinds for word in typing.get_args(a)), value, where)
        (hint,) = kinds
        return _value(hint, value, where, f)
    if origin is Literal:
        return _word(args, value, where)
    if origin in (list, Sequence):
        _must(isinstance(value, list), where, value, "a list")
        return [_value(args[0], part, f"{where}[{i}]", f) for i, part in enumerate(value)]
    if origin is tuple:
        _must(isinstance(value, list), where, value, "a list")
        return tuple(_value(args[0], part, f"{where}[{i}]", f) for i, part in enumerate(value))
    if origin in (dict, Mapping):
        _must(isinstance(value, Mapping), where, value, "an object")
        return {key: _value(args[1], part, f"{where}.{key}", f) for key, part in value.items()}
    if isinstance(hint, type) and issubclass(hint, Record):
        return _record(hint, value, where)
    if hint is float or hint is int:
        _must(isinstance(value, (int, float) if hint is float else int), where, value, _NAMES[hint])
        _must(not isinstance(value, bool) and math.isfinite(value), where, value, _NAMES[hint])
        _check_range(value, where, f)
        return value
    _must(isinstance(value, hint), where, value, _NAMES[hint])
    return value


def _word(words: tuple[str, ...], value: Any, where: str) -> str:
    if value not in words:
        raise _Wrong(f"{where} is {_short(value)}, not one of {', '.join(map(repr, words))}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _check_range(value: float, where: str, f: dataclasses.Field[Any]) -> None:
    name = f.name
    if name.endswith("_share"):
        _must(0 <= value <= 1, where, value, "between 0 and 1")
    elif not f.metadata.get("signed") and (name.endswith(_NOT_NEGATIVE) or name.startswith("n_")):
        _must(value >= 0, where, value, "0 or more")


def _must(holds: bool, where: str, value: Any, what: str) -> None:
    if not holds:
        raise _Wrong(f"{where} is {_short(value)}, not {what}")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


# -- classes


_HINTS: dict[Any, dict[str, Any]] = {}  # resolving names takes long


def _hints(kind: type[Record]) -> dict[str, Any]:
    if kind not in _HINTS:
        _HINTS[kind] = typing.get_type_hints(kind)
    return _HINTS[kind]


def _record_of(hint: Any) -> type[Record]:
    """The record class of `X | None`."""
    return next(a for a in (hint, *typing.get_args(hint)) if isinstance(a, type) and issubclass(a, Record))


def _keys(kind: type[Record]) -> tuple[str, ...]:
    """The keys of a record in its JSON."""
    hints, out = _hints(kind), []
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        prefix = f.metadata.get("prefix")
        out += [f.name] if prefix is None else [f"{prefix}{key}" for key in _keys(_record_of(hints[f.name]))]
    return tuple(out)
