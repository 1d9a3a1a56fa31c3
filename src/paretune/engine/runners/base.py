"""How a model is executed. One protocol for all runners; a runner is one file beside this one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from paretune.engine import cache_formats
from paretune.engine.cache import KVCache
from paretune.engine.cache_formats import INT4
from paretune.engine.sampling import argmax
from paretune.errors import UsageError
from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.option import OWN_KERNELS, Option

Logits = Literal["last", "all"]
CACHE_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "int4": INT4,
}


def no_cache(runner: str, dtype: str, known: tuple[str, ...]) -> tuple[str, str]:
    """Cause and cure where a runner cannot read a cache."""
    return f"the {runner} runner has no {dtype} cache", f"It has {', '.join(known)}; the eager runner has all"


class Runner:
    """Executes a model step by step on a cache. What others need to know of a runner it declares here.

    Args:
        model: built and transformed.
        mode: one of `modes`.

    Raises:
        UsageError: there is no such mode.
    """

    must_declare: ClassVar[tuple[str, ...]] = ("name", "forward")
    name: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = ("default",)  # of `EngineOptions.compile_mode`; more than one: titles name it
    # Seconds until the first step can be timed, by mode, before anything was measured here.
    start_sec: ClassVar[Mapping[str, float]] = {"default": 4.0}
    is_reference: ClassVar[bool] = False  # PyTorch, operator by operator: what the others are held against
    trainable: ClassVar[bool] = False  # gradients flow through its steps
    compiled: ClassVar[bool] = False  # steps are graphs that a compiler made: nothing inside can be wrapped or timed
    own_kernels: ClassVar[bool] = False  # products and attention are its own code: PyTorch's forms make no difference
    packs_weights: ClassVar[bool] = False  # puts weights into a layout of its own, in place of the model's
    needs_compiler: ClassVar[bool] = False  # a C++ compiler, on a CPU
    chooses: ClassVar[bool] = False  # finds the most likely token itself, as part of the step
    cache_dtypes: ClassVar[tuple[str, ...]] = tuple(CACHE_DTYPES)  # that it can read
    same_bits_at_any_width: ClassVar[bool] = False  # a token's logits depend on neither batch nor width of its step
    fixed_batch: ClassVar[bool] = False  # has a graph for each batch size: another one costs a compilation
    exact: ClassVar[bool] = True  # claims the reference's results, so it is checked before it is timed

    @classmethod
    def options(cls, device: str) -> Sequence[Option]:
        """Its settings that are worth trying on `device`."""
        tags = frozenset({OWN_KERNELS}) if cls.own_kernels else frozenset()
        default = cls.modes[0]
        return [
            Option(
                cls.name if mode == default else f"{cls.name}({mode})",
                tags=tags,
                is_default=cls.is_reference,
                changes_numbers=False,
                log_gain=0.6,
                start_sec=cls.start_sec[mode],
            )
            for mode in cls.modes_on(device)
        ]

    @classmethod
    def modes_on(cls, device: str) -> Sequence[str]:
        """Its modes that are worth trying on `device`; none where it is not for such devices."""
        return cls.modes

    def __init__(self, model: LanguageModel, mode: str = "default") -> None:
        if mode not in self.modes:
            raise UsageError(f"the {self.name} runner has no mode {mode!r}", f"Known: {', '.join(self.modes)}")
        self.model = model
        self.mode = mode
        self.config = model.config
        embedding = model.embedding
        self.dtype: torch.dtype = embedding.weight.compute_dtype
        self.device = embedding.weight.device
        self.cache_dtype: torch.dtype = self.dtype

    @staticmethod
    def requires(device: str) -> str | None:
        """Why this runner cannot run on `device`, or None."""
        return None

    @classmethod
    def fits(cls, config: ModelConfig, formats: Collection[str] = (), cache_dtype: str | None = None) -> str | None:
        """Why this runner cannot execute a model of this config, or None: known before any weight is read.

        Args:
            config: as the transforms leave it.
            formats: of weights, in `registry.FORMATS`.
            cache_dtype: that keys and values are to be kept in.
        """
        if cache_dtype is not None and cache_dtype not in cls.cache_dtypes:
            return no_cache(cls.name, cache_dtype, cls.cache_dtypes)[0]
        return cache_formats.int4_reason(config.head_dim) if cache_dtype == "int4" else None

    def set_cache_dtype_(self, name: str) -> None:
        """Keeps keys and values in another dtype than the model's.

        Raises:
            UsageError: the runner, or the size of a head, does not have it.
        """
        if name not in self.cache_dtypes:
            raise UsageError(*no_cache(self.name, name, self.cache_dtypes))
        if CACHE_DTYPES[name] == INT4:
            cache_formats.check_int4(self.config.head_dim)
        self.cache_dtype = CACHE_DTYPES[name]

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        c = self.config
        return KVCache(
            n_layer=c.n_layer,
            batch_size=batch_size,
            n_kv_head=[c.layer(i).n_kv_head for i in range(c.n_layer)],
            capacity=min(capacity, c.longest),
            head_dim=c.head_dim,
            dtype=self.cache_dtype,
            device=self.device,
            static=False,
            kept=c.attention_pattern.kept,
        )

    def in_pieces(self, tokens: Tensor, cache: KVCache, logits: Logits) -> Tensor:
        """A step that is too long for the cache's ring as several short ones."""
        K = tokens.size(1)
        n_new = cache.take_staged_(K)
        parts: list[Tensor] = []
        last: Tensor | None = None
        for start in range(0, K, cache.max_step):
            part = tokens[:, start : start + cache.max_step]
            cache.stage_([min(max(n - start, 0), part.size(1)) for n in n_new])
            out = self.forward(part, cache, logits)
            if logits == "all":
                parts.append(out)
                continue
            ends_here = torch.tensor([start < max(n, 1) <= start + part.size(1) for n in n_new], device=out.device)
            last = out if last is None else torch.where(ends_here[:, None, None], out, last)
        return torch.cat(parts, dim=1) if last is None else last

    def forward(self, tokens: Tensor, cache: KVCache, logits: Logits = "last") -> Tensor:
        """One step: `tokens[B, K] -> [B, 1, V]` ("last") or `[B, K, V]` ("all"); the cache holds K more after it."""
        raise NotImplementedError

    def greedy(self, tokens: Tensor, cache: KVCache) -> list[int]:
        """One step as `forward`, and each row's most likely next token (the first of equals; NaN is the largest)."""
        return argmax(self.forward(tokens, cache, "last")[:, 0])

    @property
    def kernels(self) -> dict[str, int]:
        """Kernels of a step that no profiler sees, with counts."""
        return {}

    @property
    def buffer_bytes(self) -> int:
        """Bytes of working memory that the runner keeps between steps."""
        return 0

    def count_(self, is_on: bool) -> None:
        """Starts counting operations from zero, or stops; a runner that does not count them does nothing."""

    @property
    def counters(self) -> list[tuple[str, int, int, float, int, int]] | None:
        """Every operation of a step in order since `count_(True)`: parts, layer or -1, calls, seconds (barriers
        included), bytes read of weights and cache, FLOP (a multiply-add counts 2); None where none are counted."""
        return None

    def prove(self, graph_breaks: int) -> list[str]:
        """Proof that steps really ran as this runner says, after some have: sentences for the report.

        Raises:
            NoEffectError: they did not.
        """
        return []

    def describe(self) -> dict[str, object]:
        """What really runs, for the report."""
        return {"runner": self.name}
