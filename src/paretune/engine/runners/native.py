"""Native CPU code: the whole step in one call, without Python or a dispatcher between two products.

The weights are packed once, in place of the model's own (one stored copy); activations and sums are fp32. Prefill and
decode run the same kernels, so a prompt gives the same bits whole, in pieces, alone and in a batch.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paretune import native_build
from paretune.engine.cache import KVCache
from paretune.engine.cache_formats import position_bytes
from paretune.engine.runners.base import Logits, Runner
from paretune.errors import NoEffectError
from paretune.model import families
from paretune.model.base import CannotLower, LanguageModel
from paretune.model.config import ModelConfig
from paretune.model.layers import Embedding, Linear
from paretune.ops.attention.pattern import Pattern, prefix_and_window, work
from paretune.ops.native import packed
from paretune.ops.native import program as native
from paretune.ops.native.packed import PackedWeight
from paretune.registry import FORMATS

MAX_ROWS = 512  # tokens that go through at once; longer steps go in pieces, which bounds the working memory


def pack_(model: LanguageModel) -> None:
    """Puts packed weights in the place of all others; tied layers stay tied.

    Raises:
        CannotLower: a weight has no native format; then nothing is changed.
    """
    holders = [m for m in model.modules() if isinstance(m, Linear | Embedding)]
    weights = {id(m.weight): m.weight for m in holders if not isinstance(m.weight, PackedWeight)}
    for weight in weights.values():
        if weight.native() is None:
            raise CannotLower(f"native code has no weight format {weight.format}", "Use the eager runner")
    for old, new in zip(list(weights), packed.pack(list(weights.values())), strict=True):
        for module in holders:
            if id(module.weight) == old:
                module.weight = new
        del weights[old]  # the original is free before the next one is packed


@dataclass
class _Counted:
    """What the counted steps did, for bytes and FLOP."""

    calls: int = 0
    rows: int = 0  # tokens
    head_rows: int = 0  # tokens that went through the head
    kv_positions: int = 0  # positions that any query of the step sees, a sequence's once a step
    pairs: int = 0  # of a query and a key it sees

    def add(self, lengths: Sequence[int], K: int, head_rows: int, pattern: Pattern) -> None:
        self.calls += 1
        self.rows += len(lengths) * K
        self.head_rows += head_rows
        for n in lengths:
            done = work(pattern, n, K)
            self.kv_positions += done.n_keys
            self.pairs += done.n_pairs


class NativeRunner(Runner):
    """Raises `CannotLower` with the first module that has no native form."""

    name = "native"
    own_kernels = True
    packs_weights = True
    needs_compiler = True
    chooses = True
    same_bits_at_any_width = True

    def __init__(self, model: LanguageModel, mode: str = "default") -> None:
        super().__init__(model, mode)
        self.n_threads = torch.get_num_threads()
        self._lower()
        self._pointers: weakref.WeakKeyDictionary[KVCache, tuple[Any, ...]] = weakref.WeakKeyDictionary()
        self.n_native_steps = 0
        self._op_ns: Any = None
        self._counted = _Counted()

    def _lower(self) -> None:
        program = native.Program()
        pack_(self.model)
        self.model.lower(program)
        self._program = program.build(self.n_threads)
        self._weights_at = self._weight_pointers()

    def _weight_pointers(self) -> list[int]:
        return [id(m.weight) for m in self.model.modules() if isinstance(m, Linear | Embedding)]

    @classmethod
    def modes_on(cls, device: str) -> Sequence[str]:
        return cls.modes if device == "cpu" else ()

    @staticmethod
    def requires(device: str) -> str | None:
        if device != "cpu":
            return "the native runner is for CPUs"
        try:
            native.library()
        except native_build.NativeUnavailable as error:
            return error.cause
        return None

    @classmethod
    def fits(cls, config: ModelConfig, formats: Collection[str] = (), cache_dtype: str | None = None) -> str | None:
        if not families.of(config).has_native_form:
            return f"native code has no {config.family} models"
        if prefix_and_window(config.attention_pattern) is None:
            return f"native code has no {config.attention_pattern} attention"
        if missing := sorted(name for name in formats if not FORMATS.get(name).is_native):
            return f"native code has no weight format {missing[0]}"
        return super().fits(config, formats, cache_dtype)

    @property
    def kernels(self) -> dict[str, int]:
        """What a native step runs, for the proof of effect; empty before the first one."""
        return dict(self._program.kernels) if self.n_native_steps else {}

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: KVCache, logits: Logits = "last") -> Tensor:
        return self._forward(tokens, cache, logits, None)

    @torch.inference_mode()
    def greedy(self, tokens: Tensor, cache: KVCache) -> list[int]:
        best = torch.empty(cache.batch_size, dtype=torch.int64)
        self._forward(tokens, cache, "last", best)
        return best.tolist()

    def _forward(self, tokens: Tensor, cache: KVCache, logits: Logits, best: Tensor | None) -> Tensor:
        B, K = tokens.shape
        assert cache.batch_size == B and K >= 1, f"{B} x {K} tokens on a cache of {cache.batch_size} rows"
        assert len(cache.layers) == self.config.n_layer and cache.device.type == "cpu"
        tokens = tokens.to("cpu", torch.int64)
        # A forked child has no team; a model that was given other weights since has others.
        if not self._program.is_usable or (K > 1 and self._weight_pointers() != self._weights_at):
            self._lower()
        if K > 1 and (cache.count_rows() * K > MAX_ROWS or (cache.ring and cache.max_step < K)):
            return self._in_pieces(tokens, cache, logits, best)
        cache.begin_(K)
        out = self._step(tokens, cache, logits, best)
        cache.commit_()
        return out

    def _in_pieces(self, tokens: Tensor, cache: KVCache, logits: Logits, best: Tensor | None) -> Tensor:
        """A long step as several short ones; the same bits, since sums do not depend on the rows of a step."""
        B, K = tokens.shape
        size = min(max(1, MAX_ROWS // cache.count_rows()), cache.max_step)
        n_new = cache.take_staged_(K)
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self._program.n_vocab:
            raise IndexError("a token is not in the vocabulary")  # before any piece is held
        parts = []
        last = torch.empty(B, 1, self._program.n_vocab)
        part_best = None if best is None else torch.empty_like(best)
        for start in range(0, K, size):
            part = tokens[:, start : start + size]
            held = [min(max(n - start, 0), part.size(1)) for n in n_new]
            cache.stage_(held)
            cache.begin_(part.size(1))
            out = self._step(part, cache, logits, part_best)
            cache.commit_()
            if logits == "all":
                parts.append(out)
                continue
            ends_here = torch.tensor([start < max(n, 1) <= start + part.size(1) for n in n_new])
            last[ends_here] = out[ends_here]
            if best is not None and part_best is not None:
                best[ends_here] = part_best[ends_here]
        return torch.cat(parts, dim=1) if logits == "all" else last

    def _step(self, tokens: Tensor, cache: KVCache, logits: Logits, best: Tensor | None = None) -> Tensor:
        is_whole = cache.n_rows == cache.batch_size
        tokens, lengths = cache.of_step(tokens).contiguous(), cache.step_lengths
        rows = None if is_whole else cache.row_index.contiguous()
        B, K = tokens.shape
        is_all = logits == "all"
        out = torch.empty(B, K if is_all else 1, self._program.n_vocab)
        chosen = best if best is None or is_whole else torch.empty(B, dtype=torch.int64)
        k, v, k_scale, v_scale = (ctypes.addressof(p) for p in self._cache_pointers(cache))
        step = native.Step(
            tokens=tokens.data_ptr(),
            lengths=lengths.data_ptr(),
            last=cache.last.data_ptr(),
            rows=None if rows is None else rows.data_ptr(),
            k=k,
            v=v,
            k_scale=k_scale,
            v_scale=v_scale,
            logits=out.data_ptr(),
            best=None if chosen is None else chosen.data_ptr(),
            op_ns=None if self._op_ns is None else ctypes.addressof(self._op_ns),
            B=B,
            K=K,
            capacity=cache.n_slots,
            cache_format=native.CACHE_FORMATS[cache.dtype],
            all_logits=is_all,
            prefix=cache.prefix,
            ring=cache.ring,
        )
        self._program.step(step)
        self.n_native_steps += 1
        if self._op_ns is not None:
            self._counted.add(lengths.tolist(), K, B * K if is_all else B, self.config.attention_pattern)
        if is_whole:
            return out
        if best is not None and chosen is not None:
            best.copy_(cache.of_cache(chosen))
        return cache.of_cache(out)

    def _cache_pointers(self, cache: KVCache) -> tuple[Any, ...]:
        if cache not in self._pointers:
            kind = ctypes.c_void_p * len(cache.layers)
            names = ("k", "v", "k_scale", "v_scale")
            tensors = [[getattr(layer, name) for layer in cache.layers] for name in names]
            self._pointers[cache] = tuple(kind(*(None if t is None else t.data_ptr() for t in ts)) for ts in tensors)
        return self._pointers[cache]

    @property
    def buffer_bytes(self) -> int:
        return self._program.buffer_bytes

    # -- counters, off by default and free when off

    def count_(self, is_on: bool) -> None:
        """Starts counting from zero, or stops."""
        n = len(self._program.infos)
        self._op_ns = (ctypes.c_int64 * n)() if is_on else None
        self._counted = _Counted()

    @property
    def counters(self) -> list[tuple[str, int, int, float, int, int]] | None:
        """As `Runner.counters`; None while it is off."""
        if self._op_ns is None:
            return None
        c = self._counted
        out = []
        for info, ns in zip(self._program.infos, self._op_ns, strict=True):
            n_bytes = flops = 0
            if info.weight is not None:
                n_bytes = info.weight.stored_bytes * c.calls
                n_rows = c.head_rows if info.parts.endswith("head") else c.rows
                flops = 2 * info.weight.out_features * info.weight.in_features * n_rows
            elif info.q_width:
                each = position_bytes(self.cache_dtype, info.kv_width // self.config.head_dim, self.config.head_dim)
                n_bytes = 2 * each * c.kv_positions
                flops = 4 * info.q_width * c.pairs
            out.append((info.parts, info.layer, c.calls, ns / 1e9, n_bytes, flops))
        return out

    def prove(self, graph_breaks: int) -> list[str]:
        if not self.kernels:
            raise NoEffectError("no step ran in native code", "Use the eager runner")
        return [f"whole steps run in native code ({packed.isa()})"]

    def describe(self) -> dict[str, object]:
        return {"runner": self.name, "isa": packed.isa(), "threads": self.n_threads}
