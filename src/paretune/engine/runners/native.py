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
from paretune.model.layers import Embedding, Linear
from paretune.ops.native import program as native

MAX_ROWS = 32


class NativeRunner(Runner):
    """Raises `CannotLower` with the first module that has no native form."""

    name = "native"

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        self.n_threads = torch.get_num_threads()
        self._lower()
        is_fast_in_pytorch = self.dtype == torch.float32 or hardware.has_instruction(self.dtype)
        self.prefill = "PyTorch" if is_fast_in_pytorch else "native"
        self._pointers: weakref.WeakKeyDictionary[KVCache, tuple[Any, Any]] = weakref.WeakKeyDictionary()
        self.n_native_steps = 0

    def _lower(self) -> None:
        program = native.Program()
        self.model.lower(program)
        self._program = program.build(MAX_ROWS, self.n_threads)
        self._weights_at = self._weight_pointers()

    def _weight_pointers(self) -> list[int]:
        weights = [m.weight.native() for m in self.model.modules() if isinstance(m, Linear | Embedding)]
        return [w[1].data_ptr() for w in weights if w is not None]

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
        assert cache.batch_size == B and K >= 1, f"{B} x {K} tokens on a cache of {cache.batch_size} rows"
        assert len(cache.layers) == self.config.n_layer and cache.device.type == "cpu"
        tokens = tokens.to("cpu", torch.int64)
        # A forked child has no team; a model that was moved or given other weights since has others.
        if not self._program.is_usable or (K > 1 and self._weight_pointers() != self._weights_at):
            self._lower()
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
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self._program.n_vocab:
            raise IndexError("a token is not in the vocabulary")  # before any chunk is held
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

    @property
    def buffer_bytes(self) -> int:
        return self._program.buffer_bytes

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
