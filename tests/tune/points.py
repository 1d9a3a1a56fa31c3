"""Points of the space as the tests write them: (attention or mechanism, precision, quantize, runner, cache)."""

from __future__ import annotations

import functools

from paretune.model import checkpoint
from paretune.option import Option
from paretune.recipe import Recipe
from paretune.recipe.axes import axes
from paretune.tune import space as spaces

Choice = tuple[str, str | None, str | None, str, str | None]
AXES = ("attention", "precision", "quantize", "runner", "cache")
BASE: Choice = ("sdpa", None, None, "eager", None)
# What an expression says otherwise than the tests do.
NAMES = {
    ("attention", "eager"): "attention(eager)",
    ("quantize", "int8-linear"): "int8(embeddings=false)",
    ("quantize", "nf4"): "nf4+int8",
    ("runner", "compile:default"): "compile",
    ("runner", "compile:freeze"): "compile(freeze)",
    ("runner", "compile:max-autotune"): "compile(max-autotune)",
    ("runner", "compile:reduce-overhead"): "compile(reduce-overhead)",
    ("cache", "bf16"): "kv(bf16)",
    ("cache", "int8"): "kv8",
    ("cache", "int4"): "kv4",
}
MECHANISMS = ("window:256", "prefix:16+window:256", "alibi")
WORDS = {(axis, name): word for (axis, word), name in NAMES.items()}


@functools.cache
def _offered() -> dict[tuple[str, str], Option]:
    """Every option of a CPU, and those that a GPU alone has."""
    config = checkpoint.published("gpt2")
    found: dict[tuple[str, str], Option] = {}
    for device in ("cuda", "cpu"):  # a CPU's last: what it needs there is what the tests are about
        for axis, options in axes(device, config, 640).items():
            found |= {(axis, o.name): o for o in options}
    return found


def candidate(*choice: str | None) -> spaces.Candidate:
    offered = _offered()
    options = {}
    for axis, word, base in zip(AXES, choice, BASE, strict=True):
        if word == base or word is None:
            continue
        name = NAMES.get((axis, word), word)
        if word in MECHANISMS:
            axis, name = "mechanism", word if word == "alibi" else f"mechanism({word})"
        options[axis] = offered[axis, name]
    order = ["mechanism", *AXES]
    return spaces.candidate(
        dict(sorted(options.items(), key=lambda pair: order.index(pair[0]))), offered["runner", "eager"]
    )


def choice_of(point: spaces.Candidate) -> Choice:
    """The point as the tests write it."""
    changes = dict(point.changes)
    mechanism = changes.pop("mechanism", None)
    made = [
        WORDS.get((axis, changes[axis]), changes[axis]) if axis in changes else base
        for axis, base in zip(AXES, BASE, strict=True)
    ]
    if mechanism:
        made[0] = mechanism.removeprefix("mechanism(").removesuffix(")")
    return tuple(made)


def recipe_of(choice: Choice) -> Recipe:
    return candidate(*choice).recipe
