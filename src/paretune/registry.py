"""Names to things, imported only when they are asked for.

An entry is a target string `module:attribute`; nothing is imported until `get`. An unknown name is a usage error that
lists the known ones and the nearest. Other packages add entries by Python entry points (`paretune.transforms`, ...);
theirs are checked when they are imported.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from paretune.errors import UsageError

T = TypeVar("T")


class EntryPoint(NamedTuple):
    """One line of another package's registration."""

    group: str
    name: str
    target: str
    package: str


@dataclass(frozen=True)
class Contract:
    """What an entry of a registry has to be.

    Args:
        base: `module:Class` that it is a subclass of; each class above it names in `must_declare` what the classes
            below have to declare. "": the entry is a function.
        name: the attribute that has to be the entry's name.
        positional, keywords: that a function is called with.
    """

    base: str = ""
    name: str = "name"
    positional: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()

    def why_not(self, name: str, entry: Any) -> str | None:
        """Why something cannot be the entry `name`, or None."""
        title = getattr(entry, "__qualname__", repr(entry))
        if not self.base:
            return None if self._takes(entry) else f"{title} cannot be called as {self._call}"
        if not isinstance(entry, type) or not issubclass(entry, _imported(self.base)):
            return f"{title} is no subclass of {self.base.replace(':', '.')}"
        if missing := _undeclared(entry):
            return f"{title} does not declare {', '.join(missing)}"
        own = getattr(entry, self.name)
        return None if own == name else f"the `{self.name}` of {title} is {own!r}, not {name!r} as its entry point says"

    @property
    def _call(self) -> str:
        star = ["*"] if self.keywords else []
        return f"({', '.join([*self.positional, *star, *self.keywords])})"

    def _takes(self, entry: Any) -> bool:
        try:
            inspect.signature(entry).bind(*self.positional, **dict.fromkeys(self.keywords))
        except TypeError:  # not callable, or not so
            return False
        except ValueError:  # a function in C, whose signature nobody knows
            return True
        return True


class Registry(Generic[T]):
    """A table of lazily imported entries.

    Args:
        kind: what an entry is, in the singular, for error messages.
        group: of entry points, in which other packages name theirs; "": none can.
        contract: what such an entry has to be.
    """

    def __init__(self, kind: str, group: str = "", contract: Contract | None = None) -> None:
        self.kind, self.group, self.contract = kind, group, contract
        self._own: dict[str, str] = {}
        self._others: dict[str, str] | None = None  # by entry points, once they have been looked for
        self._packages: dict[str, str] = {}
        self._broken: dict[str, str] = {}
        self._refused: list[tuple[str, str]] = []

    def register(self, name: str, target: str) -> None:
        assert name not in self._own, f"{self.kind} {name!r} is registered twice"
        assert ":" in target, f"{target!r} is not module:attribute"
        self._own[name] = target

    def unregister(self, name: str) -> None:
        del self._own[name]

    @property
    def targets(self) -> dict[str, str]:
        """Name -> `module:attribute`; an entry of another package never takes the name of one of ours."""
        if self._others is None:
            self._others = {}
            self._look()
        return {**self._others, **self._own} if self._others else self._own

    def _look(self) -> None:
        """Reads the entry points of the group; a name that two want belongs to neither of them, or to us."""
        assert self._others is not None
        for point in _entry_points() if self.group else ():
            if point.group != self.group:
                continue
            first = self._packages.get(point.name)
            if point.name in self._own:
                why = f"cannot be used: the name {point.name!r} is Paretune's own"
                self._refused.append((f"{point.name} ({point.package})", why))
            elif first is not None:
                both = f"{first} and {point.package}"
                self._broken[point.name] = f"cannot be used: the packages {both} bring something of this name"
                self._packages[point.name] = both
            else:
                self._others[point.name], self._packages[point.name] = point.target, point.package

    def names(self) -> list[str]:
        return [*self._own, *(name for name in self.targets if name not in self._own)]

    def working(self) -> Iterator[tuple[str, T]]:
        """Every entry that can be used, imported; why another cannot is in `broken`."""
        for name in self.names():
            if name not in self._broken:
                try:
                    entry = self.get(name)
                except UsageError:
                    continue
                yield name, entry

    @property
    def others(self) -> list[str]:
        """Names of entries that other packages brought."""
        return [name for name in self.names() if name not in self._own]

    def package_of(self, name: str) -> str | None:
        """The package that brought an entry; None: it is one of ours."""
        return self._packages.get(name) if name not in self._own and name in self.targets else None

    @property
    def broken(self) -> dict[str, str]:
        """Entries of other packages that cannot be used, of those that were asked for, and why: the end of a sentence
        that begins with the name."""
        return dict(self._broken)

    @property
    def refused(self) -> list[tuple[str, str]]:
        """Entries of other packages that want the name of one of ours: `NAME (PACKAGE)` and why not."""
        return list(self._refused) if self.targets else []

    def check(self, name: str) -> str:
        """Returns `name` if it is known.

        Raises:
            UsageError: it is not.
        """
        if name not in self._own and name not in self.targets:
            near = difflib.get_close_matches(name, self.targets, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"unknown {self.kind} {name!r}", f"{hint}Known: {', '.join(self.names())}")
        return name

    def get(self, name: str) -> T:
        """The entry.

        Raises:
            UsageError: there is none of that name, or the package that brings it cannot be imported, or what it brings
                is not what an entry has to be.
        """
        self.check(name)
        if name in self._own:
            return _imported(self._own[name])
        target, package = self.targets[name], self._packages.get(name, "")
        if name not in self._broken:
            try:
                entry = _imported(target)
                reason = self.contract.why_not(name, entry) if self.contract else None
            except Exception as error:  # somebody else's module: whatever it raises is the answer
                lines = str(error).strip().splitlines() or [""]
                self._broken[name] = f"cannot be imported: {type(error).__name__}: {lines[0]}"
            else:
                if reason is None:
                    return entry
                self._broken[name] = f"cannot be used: {reason}"
            if package:
                self._broken[name] += f" (package {package})"
        raise UsageError(
            f"the {self.kind} {name!r} {self._broken[name]}", f"Repair or remove what brings it ({target})"
        )


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _undeclared(entry: type) -> list[str]:
    """What the classes above an entry leave to it, and it leaves too."""
    missing = sorted(getattr(entry, "__abstractmethods__", ()))
    for kind in entry.__mro__:
        for member in vars(kind).get("must_declare", ()):
            giver = next((k for k in entry.__mro__ if member in vars(k)), None)
            if giver is None or giver in kind.__mro__:
                missing.append(member)
    return list(dict.fromkeys(missing))


@functools.cache
def _entry_points() -> list[EntryPoint]:
    """What other packages have put into groups whose names begin with `paretune.`, by package and name."""
    from importlib.metadata import entry_points

    every = entry_points()
    found = {
        EntryPoint(group, p.name, f"{p.module}:{p.attr}", p.dist.name if p.dist else "unknown")
        for group in every.groups
        if group.startswith("paretune.")
        for p in every.select(group=group)
    }
    return sorted(found, key=lambda p: (p.package, p.name))


def unknown_groups() -> list[tuple[str, str]]:
    """Groups of entry points that look like ours and are not, and what is wrong, in a sentence."""
    known = [table.group for table in (TRANSFORMS, RUNNERS, ATTENTION, FORMATS, FAMILIES, DRAFTS, STUDIES)]
    rows = []
    for group, package in dict.fromkeys((p.group, p.package) for p in _entry_points()):
        if group not in known:
            near = difflib.get_close_matches(group, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            rows.append((group, f"no such group of entry points (package {package}); {hint}"))
    return rows


TRANSFORMS: Registry[Any] = Registry("transform", "paretune.transforms", Contract("paretune.transforms.base:Transform"))
RUNNERS: Registry[Any] = Registry("runner", "paretune.runners", Contract("paretune.engine.runners.base:Runner"))
ATTENTION: Registry[Any] = Registry(
    "attention function", "paretune.attention", Contract(positional=("q", "k_new", "v_new", "layer_cache", "spec"))
)
FORMATS: Registry[Any] = Registry(
    "weight format", "paretune.formats", Contract("paretune.ops.weights.base:Weight", name="format")
)
FAMILIES: Registry[Any] = Registry("model family", "paretune.families", Contract("paretune.model.families.base:Family"))
DRAFTS: Registry[Any] = Registry("draft", "paretune.drafts", Contract("paretune.engine.decode.drafts.base:Draft"))
STUDIES: Registry[Any] = Registry(
    "study",
    "paretune.studies",
    Contract(positional=("model", "output_dir"), keywords=("quick", "seed", "device", "threads", "say")),
)

# An optimisation is one new file and one line here.
TRANSFORMS.register("magnitude", "paretune.transforms.prune.magnitude:Magnitude")
TRANSFORMS.register("wanda", "paretune.transforms.prune.wanda:Wanda")
TRANSFORMS.register("sparsegpt", "paretune.transforms.prune.sparsegpt:SparseGPT")
TRANSFORMS.register("neurons", "paretune.transforms.prune.neurons:Neurons")
TRANSFORMS.register("heads", "paretune.transforms.prune.heads:Heads")
TRANSFORMS.register("layers", "paretune.transforms.prune.layers:Layers")
TRANSFORMS.register("columns", "paretune.transforms.prune.columns:Columns")
TRANSFORMS.register("attention", "paretune.transforms.attention:Attention")
TRANSFORMS.register("mechanism", "paretune.transforms.mechanism:Mechanism")
TRANSFORMS.register("precision", "paretune.transforms.precision:Precision")
TRANSFORMS.register("int8", "paretune.transforms.int8:Int8")
TRANSFORMS.register("groups", "paretune.transforms.groups:Groups")
TRANSFORMS.register("llm_int8", "paretune.transforms.llm_int8:LLMInt8")
TRANSFORMS.register("nf4", "paretune.transforms.nf4:NormalFloat4")
TRANSFORMS.register("gptq", "paretune.transforms.gptq:GPTQ")
TRANSFORMS.register("awq", "paretune.transforms.awq:AWQ")
TRANSFORMS.register("hqq", "paretune.transforms.hqq:HQQ")
TRANSFORMS.register("sparse8", "paretune.transforms.sparse:Sparse")
TRANSFORMS.register("fp8", "paretune.transforms.fp8:Float8")

RUNNERS.register("eager", "paretune.engine.runners.eager:EagerRunner")
RUNNERS.register("compile", "paretune.engine.runners.compiled:CompileRunner")
RUNNERS.register("native", "paretune.engine.runners.native:NativeRunner")

ATTENTION.register("eager", "paretune.ops.attention.reference:attention")
ATTENTION.register("sdpa", "paretune.ops.attention.sdpa:attention")
ATTENTION.register("native", "paretune.ops.attention.native:attention")
ATTENTION.register("flex", "paretune.ops.attention.flex:attention")
ATTENTION.register("flash_attn", "paretune.ops.attention.flash:attention")

FORMATS.register("dense", "paretune.ops.weights.dense:Dense")
FORMATS.register("int8_rows", "paretune.ops.weights.int8_rows:Int8Rows")
FORMATS.register("int_groups", "paretune.ops.weights.int_groups:IntGroups")
FORMATS.register("mixed_int8", "paretune.ops.weights.mixed_int8:MixedInt8")
FORMATS.register("nf4", "paretune.ops.weights.nf4:NF4")
FORMATS.register("sparse8", "paretune.ops.weights.sparse8:Sparse8")
FORMATS.register("fp8", "paretune.ops.weights.fp8:Fp8")

DRAFTS.register("lookup", "paretune.engine.decode.drafts.lookup:Lookup")
DRAFTS.register("suffix", "paretune.engine.decode.drafts.suffix:Suffix")
DRAFTS.register("draft", "paretune.engine.decode.drafts.model:SmallModel")
DRAFTS.register("self", "paretune.engine.decode.drafts.self_quantised:SelfQuantised")
DRAFTS.register("exit", "paretune.engine.decode.drafts.early_exit:EarlyExit")

STUDIES.register("kernels", "paretune.studies.kernels:run")
STUDIES.register("precision", "paretune.studies.precision:run")
STUDIES.register("quantization", "paretune.studies.quantization:run")
STUDIES.register("attention", "paretune.studies.attention:run")

FAMILIES.register("gpt2", "paretune.model.families.gpt2.family:GPT2Family")
FAMILIES.register("llama", "paretune.model.families.llama.family:LlamaFamily")
FAMILIES.register("mistral", "paretune.model.families.llama.mistral:MistralFamily")
