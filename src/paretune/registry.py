"""Names to things, imported only when they are asked for.

An entry is a target string `module:attribute`; nothing is imported until `get`. An unknown name is a usage error that
lists the known ones and the nearest.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any, Generic, TypeVar

from paretune.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of lazily imported entries.

    Args:
        kind: what an entry is, in the singular, for error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._targets: dict[str, str] = {}

    def register(self, name: str, target: str) -> None:
        assert name not in self._targets, f"{self.kind} {name!r} is registered twice"
        assert ":" in target, f"{target!r} is not module:attribute"
        self._targets[name] = target

    def names(self) -> list[str]:
        return list(self._targets)

    def check(self, name: str) -> str:
        """Returns `name` if it is known.

        Raises:
            UsageError: it is not.
        """
        if name not in self._targets:
            near = difflib.get_close_matches(name, self._targets, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"unknown {self.kind} {name!r}", f"{hint}Known: {', '.join(self._targets)}")
        return name

    def get(self, name: str) -> T:
        module, _, attribute = self._targets[self.check(name)].partition(":")
        return getattr(importlib.import_module(module), attribute)


TRANSFORMS: Registry[Any] = Registry("transform")
RUNNERS: Registry[Any] = Registry("runner")
ATTENTION: Registry[Any] = Registry("attention function")
FORMATS: Registry[Any] = Registry("weight format")
FAMILIES: Registry[Any] = Registry("model family")

# An optimisation is one new file and one line here.
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
FORMATS.register("fp8", "paretune.ops.weights.fp8:Fp8")

FAMILIES.register("gpt2", "paretune.model.families.gpt2.family:GPT2Family")
FAMILIES.register("llama", "paretune.model.families.llama.family:LlamaFamily")
FAMILIES.register("mistral", "paretune.model.families.llama.mistral:MistralFamily")
