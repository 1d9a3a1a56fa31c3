"""Names to things, imported only when they are asked for.

An entry is a target string `module:attribute`; nothing is imported until `get`. An unknown name is a usage error that
lists the known ones and the nearest. Other packages add entries by Python entry points (`paretune.transforms`, ...).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from paretune.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of lazily imported entries.

    Args:
        kind: what an entry is, in the singular, for error messages.
        group: of entry points, in which other packages name theirs; "": none can.
    """

    def __init__(self, kind: str, group: str = "") -> None:
        self.kind, self.group = kind, group
        self._own: dict[str, str] = {}
        self._others: dict[str, str] | None = None  # by entry points, once they have been looked for
        self._broken: dict[str, str] = {}

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
            self._others = _entry_points(self.group) if self.group else {}
        return {**self._others, **self._own} if self._others else self._own

    def names(self) -> list[str]:
        return [*self._own, *(name for name in self.targets if name not in self._own)]

    def working(self) -> Iterator[tuple[str, T]]:
        """Every entry that can be imported, imported; why another cannot is in `broken`."""
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

    @property
    def broken(self) -> dict[str, str]:
        """Entries of other packages that could not be imported, of those that were asked for, and why."""
        return dict(self._broken)

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
            UsageError: there is none of that name, or the package that brings it cannot be imported.
        """
        self.check(name)
        if name in self._own:
            return _imported(self._own[name])
        try:
            return _imported(self.targets[name])
        except Exception as error:  # somebody else's module: whatever it raises is the answer
            lines = str(error).strip().splitlines() or [""]
            self._broken[name] = f"{type(error).__name__}: {lines[0]}"
            raise UsageError(
                f"the {self.kind} {name!r} cannot be imported ({self._broken[name]})",
                f"Repair or remove the package that brings {self.targets[name]}",
            ) from None


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _entry_points(group: str) -> dict[str, str]:
    """What other packages have put into a group: name -> `module:attribute`."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=group)}


TRANSFORMS: Registry[Any] = Registry("transform", "paretune.transforms")
RUNNERS: Registry[Any] = Registry("runner", "paretune.runners")
ATTENTION: Registry[Any] = Registry("attention function", "paretune.attention")
FORMATS: Registry[Any] = Registry("weight format", "paretune.formats")
FAMILIES: Registry[Any] = Registry("model family", "paretune.families")
DRAFTS: Registry[Any] = Registry("draft", "paretune.drafts")
STUDIES: Registry[Any] = Registry("study", "paretune.studies")

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
