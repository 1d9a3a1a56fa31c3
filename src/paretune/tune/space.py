"""Every legal combination of the transforms and runners, and why the others are not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from paretune.model.config import ModelConfig
from paretune.ops.quantized_linear import op
from paretune.recipe import Recipe, preset

ATTENTION = ("sdpa", "eager")
PRECISION = (None, "bf16", "fp16")
QUANTIZE = (None, "int8", "int8-linear", "int4", "w8a8", "w7a7")
RUNNERS = ("eager", "native", "compile:default", "compile:freeze", "compile:max-autotune")
# On a GPU the way to a kernel costs more than a short kernel: graphs of them are a choice of their own.
GPU_QUANTIZE = (*QUANTIZE[:4], "nf4", "w8a8", "w7a7")
GPU_RUNNERS = ("eager", "compile:default", "compile:reduce-overhead")
CACHE = (None, "bf16", "int8", "int4")  # what the native runner keeps keys and values in; None follows the model
FAMILIES = ("attention", "precision", "quantize", "runner", "cache")
Choice = tuple[str, str | None, str | None, str, str | None]
# What has a fast form in native code alone: elsewhere every call would dequantise, or convert the cache.
NATIVE_ONLY = {*(("quantize", q) for q in ("int4", "w8a8", "w7a7")), *(("cache", c) for c in CACHE if c)}
GROUPS = {
    "int4": {"name": "groups", "bits": 4, "group": 32, "head_bits": 8},
    "w8a8": {"name": "groups", "bits": 8, "group": 128, "head_bits": 8, "activation_bits": 8},
    "w7a7": {"name": "groups", "bits": 7, "group": 128, "head_bits": 8, "activation_bits": 7},
}
# What attention computes, in place of a form of it; quality is measured at the length of the request.
WINDOW = 256
MECHANISMS: dict[str, dict[str, object]] = {
    f"window:{WINDOW}": {"name": "mechanism", "pattern": f"window:{WINDOW}"},
    f"prefix:16+window:{WINDOW}": {"name": "mechanism", "pattern": f"prefix:16+window:{WINDOW}"},
    "alibi": {"name": "mechanism", "alibi": True},
}
# What rounds inputs to gain nothing on a GPU, whose kernels multiply in 16 bits.
NOT_ON_GPU = {
    "w8a8": "inputs of 8 bits are multiplied in 16 on a GPU: they save nothing over int8",
    "w7a7": "inputs of 7 bits are multiplied in 16 on a GPU: they save nothing over int8",
}
ALL_QUANTISED = (
    "every weight is quantised: the number format would change the cache alone, which is a choice of its own"
)
SAME_ATTENTION = "native code runs the same attention whatever the form: a duplicate"
BASELINE: Choice = ("sdpa", None, None, "eager", None)


@dataclass(frozen=True)
class Candidate:
    """One point of the space."""

    choice: Choice
    recipe: Recipe

    @property
    def id(self) -> str:
        return self.recipe.hash

    @property
    def changes(self) -> dict[str, str | None]:
        """What differs from the baseline, by family."""
        return {f: c for f, c, b in zip(FAMILIES, self.choice, BASELINE, strict=True) if c != b}

    @property
    def single(self) -> tuple[str, str | None] | None:
        """The one change that this candidate tells something about: it is alone, or needs the native runner."""
        changes = list(self.changes.items())
        if len(changes) == 2 and ("runner", "native") in changes:
            changes.remove(("runner", "native"))
            return changes[0] if changes[0] in NATIVE_ONLY or changes[0][1] in MECHANISMS else None
        return changes[0] if len(changes) == 1 else None

    @property
    def kind(self) -> str:
        """The runner, its mode aside."""
        return self.choice[3].partition(":")[0]

    @property
    def is_native(self) -> bool:
        return self.kind == "native"

    @property
    def is_plain(self) -> bool:
        """Whether the baseline's own runner executes it: it starts at once."""
        return self.choice[3] == BASELINE[3]

    @property
    def native_alone(self) -> Candidate:
        """The native runner with nothing else changed."""
        choice = (*BASELINE[:3], "native", None)
        return Candidate(choice, recipe_of(choice))

    @property
    def weights(self) -> tuple[str, str | None, str | None]:
        """What is computed, with which numbers: candidates that share it differ in the runner and the cache alone."""
        mechanism = self.choice[0] if self.choice[0] in MECHANISMS else ""
        return mechanism, self.choice[1], self.choice[2]

    @property
    def numbers(self) -> frozenset[tuple[str, str | None]]:
        """The changes that change numbers: all but the runner and exact forms of attention."""
        return frozenset(
            (family, change)
            for family, change in self.changes.items()
            if family != "runner" and (family != "attention" or change in MECHANISMS)
        )


@dataclass
class Space:
    """The candidates; the baseline is not among them."""

    legal: list[Candidate] = field(default_factory=list)
    illegal: list[tuple[str, str]] = field(default_factory=list)  # name, reason


def recipe_of(choice: Choice) -> Recipe:
    attention, precision, quantize, runner, cache = choice
    transforms: list[dict[str, object]] = [{"name": "attention", "form": attention}]
    if attention in MECHANISMS:
        transforms = [MECHANISMS[attention], {"name": "attention", "form": BASELINE[0]}]
    if precision:
        transforms.append({"name": "precision", "dtype": precision})
    if quantize in GROUPS:
        transforms.append(GROUPS[quantize])
    elif quantize == "nf4":  # it leaves the ends to int8
        transforms += [{"name": "nf4"}, {"name": "int8"}]
    elif quantize:
        transforms.append({"name": "int8", "embeddings": quantize == "int8"})
    name, _, mode = runner.partition(":")
    engine = {"runner": name} | ({"compile_mode": mode} if mode else {}) | ({"cache_dtype": cache} if cache else {})
    return Recipe.from_dict({"transforms": transforms, "engine": engine})


def baseline() -> Recipe:
    """The reasonable default that everything is compared with."""
    recipe = preset("baseline")
    assert recipe == recipe_of(BASELINE)
    return recipe


def build(device: str, config: ModelConfig | None = None, n_tokens: int = 0) -> Space:
    """All combinations; those that cannot run on `device`, or cannot win there, go aside with the reason.

    Args:
        config, n_tokens: the model and the longest sequence of the request, for mechanisms and caches that it may not
            have; None: without mechanisms.
    """
    space = Space()
    reasons: dict[tuple[str, str | None], str | None] = {}
    is_gpu = device.startswith("cuda")
    fused = op.unavailable_reason(device) if is_gpu else None
    families = (
        (ATTENTION, PRECISION, GPU_QUANTIZE, GPU_RUNNERS, (None,))
        if is_gpu
        else (ATTENTION, PRECISION, QUANTIZE, RUNNERS, CACHE)
    )
    for family, options in zip(FAMILIES, families, strict=True):
        at = FAMILIES.index(family)
        for option in options:
            alone = (*BASELINE[:at], option, *BASELINE[at + 1 :])
            reasons[family, option] = recipe_of(alone).requires(device)  # type: ignore[arg-type]
            if is_gpu and family == "quantize" and option:
                cannot_win = NOT_ON_GPU.get(option) or (fused and f"dequantised at every call: {fused}")
                reasons[family, option] = reasons[family, option] or cannot_win
    for choice in itertools.product(*families):
        a, p, q, r, cache = choice
        if choice == BASELINE or (r != "native" and cache):
            continue
        candidate = Candidate(choice, recipe_of(choice))
        if r != "native" and ("quantize", q) in NATIVE_ONLY and not is_gpu:
            continue
        reason = next((reasons[f, c] for f, c in zip(FAMILIES, choice, strict=True) if reasons[f, c]), None)
        if config is not None:
            reason = reason or candidate.recipe.fits(config)
        if r == "native" and a != BASELINE[0]:
            reason = reason or SAME_ATTENTION
        if r == "native" and p and q in ("int8", *GROUPS):
            reason = reason or ALL_QUANTISED
        if reason:
            space.illegal.append((candidate.recipe.name, reason))
        else:
            space.legal.append(candidate)
    if config is not None:
        _add_mechanisms(space, config, n_tokens, reasons)
    return space


def mechanism_reason(config: ModelConfig, n_tokens: int) -> str | None:
    """Why no other mechanism is tried on a model for requests of `n_tokens`, or None."""
    if config.alibi or not config.attention_pattern.is_dense:
        return "the model has a mechanism of its own"
    if n_tokens <= WINDOW:
        return f"a window of {WINDOW} skips nothing in a request of {n_tokens} tokens, and ALiBi is for long ones"
    return None


def _add_mechanisms(
    space: Space, config: ModelConfig, n_tokens: int, reasons: Mapping[tuple[str, str | None], str | None]
) -> None:
    """Alone, and in native code (of a CPU) with each quantisation: a few, for they multiply the space."""
    native = QUANTIZE if ("runner", "native") in reasons else ()
    for name in MECHANISMS:
        for quantize, runner in [(None, "eager"), *((q, "native") for q in native)]:
            candidate = Candidate((name, None, quantize, runner, None), recipe_of((name, None, quantize, runner, None)))
            reason = mechanism_reason(config, n_tokens) or reasons["runner", runner] or reasons["quantize", quantize]
            reason = reason or candidate.recipe.fits(config)
            if reason:
                space.illegal.append((candidate.recipe.name, reason))
            else:
                space.legal.append(candidate)
