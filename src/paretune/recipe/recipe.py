"""How a model is changed and run: transforms in legal order and engine options, as plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from paretune.errors import UsageError
from paretune.recipe import speculate
from paretune.registry import RUNNERS, TRANSFORMS

if TYPE_CHECKING:
    from paretune.engine.runners.base import Runner
    from paretune.model.base import LanguageModel
    from paretune.model.config import ModelConfig
    from paretune.transforms.base import Context, Transform

SCHEMA_VERSION = 1
CACHE_DTYPES = ("fp32", "bf16", "fp16", "int8", "int4")


@dataclass(frozen=True)
class EngineOptions:
    """How the transformed model is executed.

    Args:
        runner: a name in `registry.RUNNERS`.
        compile_mode: of the `compile` runner.
        threads: intra-op threads; None takes the machine's default.
        cache_dtype: of keys and values, a key of `CACHE_DTYPES`; None follows the model.
        speculate: what proposes tokens (`recipe.speculate`); None: nothing, plain decoding.
    """

    runner: str = "eager"
    compile_mode: str = "default"
    threads: int | None = None
    cache_dtype: str | None = None
    speculate: str | None = None

    def __post_init__(self) -> None:
        RUNNERS.check(self.runner)
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            raise UsageError(f"cache_dtype is {self.cache_dtype!r}", f"Known: {', '.join(CACHE_DTYPES)}")
        if self.speculate is not None:
            speculate.check(self.speculate)
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads is {self.threads}", "It has to be 1 or more")

    @property
    def title(self) -> str:
        is_default = self.runner == type(self).runner  # known without importing it, and PyTorch with it
        has_modes = not is_default and len(RUNNERS.get(self.runner).modes) > 1
        name = f"{self.runner}({self.compile_mode})" if has_modes else self.runner
        cache = f", {self.cache_dtype} cache" if self.cache_dtype else ""
        drafts = f", {self.speculate} drafts" if self.speculate else ""
        return (name if self.threads is None else f"{name} x{self.threads}") + cache + drafts


@dataclass(frozen=True)
class Recipe:
    """An ordered tuple of transforms and the engine's options.

    Raises:
        UsageError: the order is illegal, or one stage stands twice (a mix of formats aside).
    """

    transforms: tuple[Transform, ...] = ()
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        for first, second in zip(self.transforms, self.transforms[1:], strict=False):
            # A mix of formats: each but the last says which layers are its own.
            is_mix = second.stage == first.stage and first.is_partial and second != first
            if second.stage <= first.stage and not is_mix:
                raise UsageError(
                    f"{first.title} ({first.stage.name}) cannot come before {second.title} ({second.stage.name})",
                    "The order is PRUNE < MECHANISM < ATTENTION < PRECISION < QUANTIZE < FUSE, one transform a stage "
                    "(several formats where all but the last have `include` or `exclude`)",
                )

    @property
    def name(self) -> str:
        """A short title for tables, for example `sdpa + bf16 + int8, eager`."""
        return f"{' + '.join(t.title for t in self.transforms) or 'as loaded'}, {self.engine.title}"

    @property
    def complexity(self) -> int:
        """Ties go to the recipe with the smaller number."""
        engine, default = self.engine, EngineOptions()
        options = (
            engine.runner != default.runner,
            engine.compile_mode != default.compile_mode,
            engine.cache_dtype is not None,
            engine.speculate is not None,
        )
        return len(self.transforms) + sum(options)

    @property
    def changes_numbers(self) -> bool:
        """Whether results differ from the reference by more than the order of additions."""
        return any(not t.exact for t in self.transforms) or self.engine.cache_dtype is not None

    @property
    def changes_weights(self) -> bool:
        """Whether something prunes the model or trains it further."""
        return any(t.changes_weights for t in self.transforms)

    @property
    def runner_class(self) -> type[Runner]:
        """What executes it, for what it declares."""
        return RUNNERS.get(self.engine.runner)

    @property
    def dtype(self) -> str | None:
        """What dense weights are stored in, and the cache where the engine does not say otherwise; None: as loaded."""
        return next((t.dtype_of_model for t in self.transforms if t.dtype_of_model), None)

    @property
    def changes_mechanism(self) -> bool:
        """Whether something changes what attention computes, so that quality depends on the length."""
        return any(t.changes_mechanism for t in self.transforms)

    @property
    def keeps_scores(self) -> bool:
        """Whether attention holds `[T, T]` numbers for the backward pass: all but a plain fused form."""
        return self.changes_mechanism or not any(t.keeps_scores is False for t in self.transforms)

    @property
    def has_score_matrix(self) -> bool:
        """Whether attention writes its scores to memory: without a transform of its own it is the formula."""
        return all(t.has_score_matrix is not False for t in self.transforms)

    def with_threads(self, threads: int | None) -> Recipe:
        """The same on so many threads; None: as many as the process has."""
        return replace(self, engine=replace(self.engine, threads=threads))

    def with_speculation(self, text: str | None) -> Recipe:
        """The same with what proposes tokens; None: plain decoding."""
        return replace(self, engine=replace(self.engine, speculate=text))

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            # An empty filter is none: recipes keep the hash that they had before there were filters.
            "transforms": [
                {"name": t.name, **{k: v for k, v in dataclasses.asdict(t).items() if v != ""}} for t in self.transforms
            ],
            "engine": {k: v for k, v in dataclasses.asdict(self.engine).items() if v is not None},
        }

    @property
    def hash(self) -> str:
        """Stable over processes and versions of Python: of the sorted JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """The opposite of `to_dict`; unknown keys are errors, never dropped."""
        if not isinstance(data, Mapping):
            raise UsageError("a recipe is a table of `transforms` and `engine`", "Correct the file")
        _only(data, {"schema_version", "transforms", "engine"}, "a recipe")
        if data.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            raise UsageError(
                f"the recipe has schema version {data['schema_version']}", f"This version reads {SCHEMA_VERSION}"
            )
        transforms = []
        entries = data.get("transforms", ())
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise UsageError("`transforms` in the recipe is not a list", "Write one table a transform")
        for entry in entries:
            if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
                raise UsageError("a transform in the recipe has no name", f"Known: {', '.join(TRANSFORMS.names())}")
            kind = TRANSFORMS.get(entry["name"])
            transforms.append(build(kind, {k: v for k, v in entry.items() if k != "name"}, entry["name"]))
        return Recipe(tuple(transforms), build(EngineOptions, data.get("engine", {}), "engine"))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_toml(self) -> str:
        """TOML with one table a transform."""
        return tomli_w.dumps(self.to_dict())

    @staticmethod
    def read(path: str | Path) -> Recipe:
        """Loads a recipe file, TOML or JSON by its ending."""
        path = Path(path)
        try:
            text = path.read_text("utf-8")
            data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except FileNotFoundError:
            raise UsageError(f"there is no recipe file {path}", "Check the path") from None
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror or error}", "Check the path") from None
        except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not a valid recipe ({error})", "Correct the file") from None
        return Recipe.from_dict(data)

    def requires(self, device: str) -> str | None:
        """The first reason why this recipe cannot run on `device`, or None."""
        reasons = [t.requires(device) for t in self.transforms]
        runner, cache_dtype = self.runner_class, self.engine.cache_dtype
        if cache_dtype is not None and cache_dtype not in runner.cache_dtypes:
            reasons.append(f"the {runner.name} runner has no {cache_dtype} cache")
        reasons.append(runner.requires(device))
        return next((r for r in reasons if r), None)

    def fits(self, config: ModelConfig) -> str | None:
        """The first reason why this recipe cannot be applied to a model of this config, or None; no weight is read."""
        from paretune.model import checkpoint  # PyTorch with it, which recipes as plain data need not

        formats = {*checkpoint.stored_formats(config).values(), *(t.format for t in self.transforms if t.format)}
        for transform in self.transforms:
            if reason := transform.fits(config):
                return reason
            if transform.replaces_attention and self.runner_class.own_kernels:
                return f"the {self.engine.runner} runner computes attention itself, and has no {transform.title}"
            if transform.replaces_attention and config.alibi and not transform.has_alibi:
                return f"{transform.title} has no ALiBi: its attention does not declare `has_alibi`"
            config = transform.changed(config)
        reason = self.runner_class.fits(config, formats, self.engine.cache_dtype)
        if reason is None and self.engine.speculate is not None:
            kind, argument = speculate.draft_of(self.engine.speculate)
            reason = kind.fits(argument, config)
        return reason

    def why_not(self, device: str, config: ModelConfig) -> str | None:
        """The first reason why this recipe cannot run such a model on `device`, or None.

        The model is asked first, whose answer costs nothing: devices are asked by trying.
        """
        return self.fits(config) or self.requires(device)

    def check(self, device: str, config: ModelConfig) -> None:
        """Refuses a recipe that cannot run such a model on `device`, before anything is loaded.

        Raises:
            UsageError: with the recipe's name and the reason.
        """
        if reason := self.why_not(device, config):
            raise UsageError(f"{self.name} cannot run here: {reason}", "Choose another --config (`paretune ls`)")

    def notes(self, device: str) -> list[str]:
        """What the user should know before it runs here."""
        return [note for t in self.transforms for note in t.notes(device)]

    def apply(self, model: LanguageModel, ctx: Context) -> LanguageModel:
        for transform in self.transforms:
            ctx.progress(f"applying {transform.title}")
            model = transform.apply(model, ctx)
        return model

    def runner(self, model: LanguageModel) -> Runner:
        """The runner that executes the transformed model."""
        runner = self.runner_class(model, self.engine.compile_mode)
        if self.engine.cache_dtype is not None:
            runner.set_cache_dtype_(self.engine.cache_dtype)
        return runner

    def without_exact(self) -> Recipe:
        """The reference twin: the same numbers, through reference forms and the eager runner."""
        engine = EngineOptions(threads=self.engine.threads, cache_dtype=self.engine.cache_dtype)
        return Recipe(tuple(t for t in self.transforms if not t.exact), engine)


def build(kind: type, values: Any, what: str) -> Any:
    if not isinstance(values, Mapping):
        raise UsageError(f"{what} in the recipe is not a table", "Write KEY = VALUE entries")
    _only(values, {f.name for f in dataclasses.fields(kind)}, what)
    for f in dataclasses.fields(kind):
        if f.name not in values:
            continue
        value = values[f.name]
        if value is None and str(f.type).endswith(" | None"):
            continue
        expected = {"str": str, "bool": bool, "int": int, "float": float}.get(str(f.type).removesuffix(" | None"))
        if expected is not None and type(value) is not expected:
            raise UsageError(f"{what}: {f.name} is {value!r}", f"It has to be of type {f.type}")
    return kind(**values)


def _only(values: Mapping[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(f"{what} has no option {unknown[0]!r}", f"Known: {', '.join(sorted(known))}")
