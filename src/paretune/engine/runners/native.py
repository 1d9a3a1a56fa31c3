"""Native CPU code: the whole step in one call, without Python or a dispatcher between two products.

Steps of up to `MAX_ROWS` tokens (decode, verification, short chunks) run natively on the weights as they are stored,
with fp32 activations and sums. A longer prompt goes through in such chunks, or through PyTorch on the same weights and
the same cache where its matrix products are the faster ones: in fp32, and in 16 bits on a processor that has them.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor

from paretune import hardware, native_build
from paretune.engine.cache import KVCache
from paretune.engine.runners.base import Logits, Runner
from paretune.model.base import LanguageModel
from paretune.ops.native import program as native

MAX_ROWS = 32


class NativeRunner(Runner):
    """Raises `CannotLower` with the first module that has no native form."""

    name = "native"

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        program = native.Program()
        model.lower(program)
        self.n_threads = torch.get_num_threads()
        self._program = program.build(MAX_ROWS, self.n_threads)
        is_fast_in_pytorch = self.dtype == torch.float32 or hardware.has_instruction(self.dtype)
        self.prefill = "PyTorch" if is_fast_in_pytorch else "native"
        self._pointers: weakref.WeakKeyDictionary[KVCache, tuple[Any, Any]] = weakref.WeakKeyDictionary()
        self.n_native_steps = 0

    @staticmethod
    def requires(device: str) -> str | None:
        if device != "cpu":
            return "the native runner is for CPUs"
        try:
            native.library()
        except native_build.NativeUnavailable as error:
            return error.cause
        return None

    @property
    def kernels(self) -> dict[str, int]:
        """What a native step runs, for the proof of effect; empty before the first one."""
        return dict(self._program.kernels) if self.n_native_steps else {}

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: KVCache, logits: Logits = "last") -> Tensor:
        B, K = tokens.shape
        is_long = B * K > MAX_ROWS
        if is_long and self.prefill == "native" and B <= MAX_ROWS:
            return self._in_chunks(tokens, cache, logits)
        cache.begin_(K)
        out = self.model(tokens, cache, logits) if is_long else self._step(tokens, cache, logits)
        cache.commit_()
        return out

    def _in_chunks(self, tokens: Tensor, cache: KVCache, logits: Logits) -> Tensor:
        """A long step as several short ones; the same bits, since sums do not depend on the rows of a step."""
        B, K = tokens.shape
        n_new = cache.take_staged_(K)
        chunk = MAX_ROWS // B
        parts = []
        last = torch.empty(B, 1, self._program.n_vocab)
        for start in range(0, K, chunk):
            part = tokens[:, start : start + chunk]
            held = [min(max(n - start, 0), part.size(1)) for n in n_new]
            cache.stage_(held)
            cache.begin_(part.size(1))
            out = self._step(part, cache, logits)
            cache.commit_()
            if logits == "all":
                parts.append(out)
                continue
            ends_here = torch.tensor([start < max(n, 1) <= start + part.size(1) for n in n_new])
            last[ends_here] = out[ends_here]
        return torch.cat(parts, dim=1) if logits == "all" else last

    def _step(self, tokens: Tensor, cache: KVCache, logits: Logits) -> Tensor:
        B, K = tokens.shape
        tokens = tokens.contiguous()
        is_all = logits == "all"
        out = torch.empty(B, K if is_all else 1, self._program.n_vocab)
        keys, values = self._cache_pointers(cache)
        step = native.Step(
            tokens=tokens.data_ptr(),
            lengths=cache.lengths.data_ptr(),
            last=cache.last.data_ptr(),
            k=ctypes.addressof(keys),
            v=ctypes.addressof(values),
            logits=out.data_ptr(),
            B=B,
            K=K,
            capacity=cache.capacity,
            cache_format=native.CACHE_FORMATS[cache.dtype],
            all_logits=is_all,
        )
        self._program.step(step)
        self.n_native_steps += 1
        return out

    def _cache_pointers(self, cache: KVCache) -> tuple[Any, Any]:
        if cache not in self._pointers:
            kind = ctypes.c_void_p * len(cache.layers)
            self._pointers[cache] = (
                kind(*(layer.k.data_ptr() for layer in cache.layers)),
                kind(*(layer.v.data_ptr() for layer in cache.layers)),
            )
        return self._pointers[cache]

    def describe(self) -> dict[str, object]:
        return {
            "runner": self.name,
            "isa": native.isa(),
            "threads": self.n_threads,
            "native_up_to_rows": MAX_ROWS,
            "longer_steps": self.prefill,
        }
