"""Entries of a `config.json`, read one at a time: of the right type and in range, or an error that names the entry.

They raise `KeyError` for an entry that is missing and `TypeError` or `ValueError` for a wrong one, of which
`ModelConfig.from_hf` makes one clear line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretune.errors import CheckpointError

# The several names of one function, as published GPT-2 and Llama configs spell them.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def count(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of 1 or more; null is the default, where there is one."""
    value = hf[key] if default is None else hf.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} is {value!r}, not a whole number")
    if value < 1:
        raise ValueError(f"{key} is {value}, not 1 or more")
    return value


def number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number above 0."""
    value = hf[key] if default is None else hf.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{key} is {value!r}, not a number")
    if not 0 < value < float("inf"):
        raise ValueError(f"{key} is {value}, not a finite number above 0")
    return float(value)


def flag(hf: Mapping[str, Any], key: str, default: bool) -> bool:
    value = hf.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise TypeError(f"{key} is {value!r}, not true or false")
    return value


def table(hf: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = hf.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError(f"{key} is {value!r}, not an object")
    return value


def activation(name: str, where: str) -> str:
    """Our name of an activation; `CheckpointError` where it is not known."""
    if name not in ACTIVATIONS:
        raise CheckpointError(f"{where}: activation {name!r} is not supported", f"Supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def hf_activation(activation: str) -> str:
    """What `transformers` calls an activation of ours."""
    return "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation


def ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Token ids of an entry that holds none, one or a list."""
    found = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    for i in found:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"token id {i!r} is not a whole number")
    return found


def one_id(value: int | None) -> int | None:
    """The first token id of an entry."""
    return next(iter(ids(value)), None)


def one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)
