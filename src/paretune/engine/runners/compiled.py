"""`torch.compile`, prefill and decode apart.

Decode is one graph of fixed shapes over a static cache; prefill one graph with a dynamic length. A graph break is an
error (`fullgraph=True`), never a silent return to eager. Inductor's options are passed to the call and restored by it:
no global compiler state changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paretune import native_build
from paretune.engine.cache import KVCache
from paretune.engine.runners.base import Logits, Runner
from paretune.errors import NoEffectError
from paretune.model.base import LanguageModel

# `freeze` folds the weights into the graph as constants (and may repack them: counted in the memory report).
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "freeze": {"freezing": True},
    "max-autotune": {"freezing": True, "max_autotune": True},
    "reduce-overhead": {"triton.cudagraphs": True},
}
CAPACITY_STEP = 128  # cache lengths are rounded up to it, so that few shapes are ever compiled


class CompileRunner(Runner):
    name = "compile"
    modes = tuple(MODES)
    start_sec: ClassVar[Mapping[str, float]] = {
        "default": 45.0,
        "freeze": 50.0,
        "max-autotune": 90.0,
        "reduce-overhead": 60.0,
    }
    compiled = True
    fixed_batch = True
    needs_compiler = True

    def __init__(self, model: LanguageModel, mode: str = "default") -> None:
        super().__init__(model, mode)
        options = dict(MODES[mode])
        # A decode graph of its own per batch size and capacity; both are few (capacity is rounded).
        self._decode = torch.compile(_Step(model), fullgraph=True, dynamic=False, options=options)
        self._prefill = torch.compile(_Step(model), fullgraph=True, options=options)

    @classmethod
    def modes_on(cls, device: str) -> Sequence[str]:
        # On a GPU the way to a kernel costs more than a short kernel: graphs of them are a choice of their own.
        return ("default", "freeze", "max-autotune") if device == "cpu" else ("default", "reduce-overhead")

    @staticmethod
    def requires(device: str) -> str | None:
        if device == "cpu" and native_build.compiler() is None:
            return "torch.compile on a CPU needs a C++ compiler, and none was found"
        return None

    @torch.inference_mode(False)
    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        rounded = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        cache = super().new_cache(batch_size, rounded)
        cache.static = True
        return cache

    # Frozen graphs need grad mode off. Inference tensors would be compiled for once more, so that a caller in
    # inference mode and one outside it share no graph: there are none in here.
    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, tokens: Tensor, cache: KVCache, logits: Logits = "last") -> Tensor:
        assert cache.static, "this cache was made by another runner"
        K = tokens.size(1)
        if cache.ring and cache.max_step < K:
            return self.in_pieces(tokens, cache, logits)
        # Own memory with plain strides: a slice of a longer prompt would be compiled for once more.
        tokens = tokens.clone(memory_format=torch.contiguous_format)
        cache.begin_(K)
        if K == 1:
            out = self._decode(tokens, cache, logits)
        else:
            # Only the length is symbolic: with `dynamic=True` the weights' sizes would be too.
            for tensor in (tokens, cache.positions, cache.slot_index):
                torch._dynamo.mark_dynamic(tensor, 1)
            out = self._prefill(tokens, cache, logits)
        cache.commit_()
        return out

    def prove(self, graph_breaks: int) -> list[str]:
        if graph_breaks:
            raise NoEffectError(f"the compiled graph has {graph_breaks} breaks", "Use the eager runner")
        return ["prefill and decode each run as one compiled graph, 0 graph breaks"]

    def describe(self) -> dict[str, object]:
        return {"runner": self.name, "mode": self.mode}


class _Step(nn.Module):
    """A wrapper of its own per phase: `torch.compile` of one module twice would share its compiled code."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, cache: KVCache, logits: Logits) -> Tensor:
        return self.model(tokens, cache, logits)
