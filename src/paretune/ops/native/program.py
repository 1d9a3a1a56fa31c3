"""The list of operations that a model lowers itself to, and the native code that walks it (`step.cpp`).

A model's `lower(program)` reads like its `forward`: it names buffers (rows of fp32, one row a token) and says what goes
from which into which. Its weights have to be packed (`packed.py`).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import Counter
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paretune.errors import ParetuneError
from paretune.ops.attention.pattern import prefix_and_window
from paretune.ops.attention.spec import AttentionSpec
from paretune.ops.native import packed
from paretune.ops.native.packed import Matrix, PackedWeight
from paretune.ops.weights.base import Weight
from paretune.registry import ATTENTION

CACHE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}
ACTIVATIONS = {"gelu_tanh": 1, "gelu": 2, "quick_gelu": 3, "relu": 4, "silu": 5}
EXACT_ATTENTION = ("eager", "sdpa", "native", "flex", "flash_attn")  # the native form computes the same sums
LOGITS = "logits"

_EMBED, _LINEAR, _ATTENTION = 1, 2, 3
_NO_NORM, _LAYER_NORM, _RMS_NORM, _SAME_INPUT = 0, 1, 2, 3
_STORE, _ADD, _ACTIVATE, _GATE = 0, 1, 2, 3


class OpInfo(NamedTuple):
    """What a profile says of an operation: its parts, its layer (-1: none), and what it reads."""

    parts: str
    layer: int
    weight: Weight | None = None
    q_width: int = 0  # of attention
    kv_width: int = 0


class CannotLower(ParetuneError):
    """A module that native code cannot run; the message names it."""


def _fields(names: str, kind: Any = c_int32) -> list[Any]:
    return [(name, kind) for name in names.split()]


class _Op(ctypes.Structure):
    _fields_ = [
        *_fields("code in_ out out_offset matrix matrix2 norm epilogue activation other last_only has_barrier"),
        *_fields("layer n_head n_kv_head head_dim window prefix"),
        *_fields("eps scale", c_float),
        *_fields("gamma beta bias rope slopes", c_void_p),
    ]


class Step(ctypes.Structure):
    """One step: `B` sequences of `K` tokens on a cache; pointers as in `step.cpp`."""

    _fields_ = _fields("tokens lengths last rows k v k_scale v_scale logits best op_ns", c_void_p) + _fields(
        "B K capacity cache_format all_logits prefix ring"
    )


def library() -> Any:
    """`packed.library`, with the functions of programs declared."""
    lib = packed.library()
    if not hasattr(lib, "programs_are_declared"):
        lib.paretune_program.restype = c_void_p
        counts = [c_int32, POINTER(Matrix), c_int32, POINTER(c_int32), c_int32, c_int32]
        lib.paretune_program.argtypes = [POINTER(_Op), *counts]
        lib.paretune_program_free.argtypes, lib.paretune_program_free.restype = [c_void_p], None
        lib.paretune_program_bytes.argtypes, lib.paretune_program_bytes.restype = [c_void_p], ctypes.c_int64
        lib.paretune_step.argtypes = [c_void_p, POINTER(Step)]
        lib.paretune_keep.argtypes = [c_int32, c_void_p, ctypes.c_int64, c_int32, c_void_p, c_void_p]
        lib.paretune_keep.restype = None
        for which, ours in ((0, _Op), (2, Step)):
            assert lib.paretune_sizes(which) == ctypes.sizeof(ours), f"{ours.__name__} differs from step.cpp"
        lib.programs_are_declared = True
    return lib


class Program:
    """Operations in order. `x` is the residual stream by custom; any other name is a buffer too."""

    def __init__(self) -> None:
        self._ops: list[_Op] = []
        self._matrices: list[Matrix] = []
        self._matrix_index: dict[int, int] = {}
        self._widths: list[int] = []
        self._buffers: dict[str, int] = {}
        self._kept: list[Any] = []  # what native code points into
        self.kernels: Counter[str] = Counter()  # what a step runs, for the proof of effect
        self.n_vocab = 0
        self._infos: list[OpInfo] = []  # of the operations, for profiles

    # -- what models call

    def embed(
        self, target: str, table: Weight, positions: Weight | None = None, rope: Tensor | None = None, head_dim: int = 0
    ) -> None:
        """Looks tokens up, adds learned positions, or prepares rotary angles (`rope`: `[head_dim / 2]` frequencies)."""
        op = self._op(
            _EMBED,
            OpInfo("token_embedding", -1),
            out=self._buffer(target, table.in_features),
            matrix=self._matrix(table),
        )
        op.matrix2 = -1 if positions is None else self._matrix(positions)
        if rope is not None:
            op.rope, op.head_dim = self._floats(rope), head_dim

    def linear(
        self,
        layer: Any,
        source: str,
        target: str,
        *,
        norm: nn.Module | None = None,
        same_input: bool = False,
        add: bool = False,
        activation: str | None = None,
        gate: str | None = None,
        columns: tuple[int, int] | None = None,
        last_only: bool = False,
        barrier: bool = True,
        part: str = "linear",
        block: int = -1,
    ) -> None:
        """`target = layer(norm(source))`.

        Args:
            layer: a `Linear`.
            norm: layer or RMS norm of the source.
            same_input: take what the operation before read (and normalised).
            add: to the target, instead of replacing it.
            activation: a key of `ACTIVATIONS`, after the bias.
            gate: multiply with this buffer, which has the target's shape and was written without a barrier in between.
            columns: (first, all): write a part of a wider buffer.
            last_only: only each row's last valid token, unless all logits are wanted.
            barrier: False where no other thread's part is read next.
            part, block: what it is called in a profile (`measure.profile_parts`), and the layer it belongs to.
        """
        weight: Weight = layer.weight
        first, width = columns or (0, weight.out_features)
        assert not same_input or self._ops[-1].norm != _NO_NORM, "the operation before has normalised nothing"
        of_profile = OpInfo(part, block, weight)
        op = self._op(_LINEAR, of_profile, in_=self._buffers[source], matrix=self._matrix(weight), barrier=barrier)
        op.out_offset, op.last_only = first, last_only
        if target == LOGITS:
            op.out, self.n_vocab = -1, weight.out_features
        else:
            op.out = self._buffer(target, width)
        op.bias = None if layer.bias is None else self._floats(layer.bias)
        assert sum((add, activation is not None, gate is not None)) <= 1
        op.epilogue = _ADD if add else _ACTIVATE if activation else _GATE if gate else _STORE
        if activation:
            if activation not in ACTIVATIONS:
                raise CannotLower(f"native code has no activation {activation}", "Use the eager runner")
            op.activation = ACTIVATIONS[activation]
        if gate:
            op.other = self._buffers[gate]
        if same_input:
            op.norm = _SAME_INPUT
        elif norm is not None:
            op.norm = _LAYER_NORM if isinstance(norm, nn.LayerNorm) else _RMS_NORM
            op.eps = float(norm.eps)  # type: ignore[arg-type]
            op.gamma = self._floats(norm.weight)  # type: ignore[arg-type]
            bias = getattr(norm, "bias", None)
            op.beta = None if bias is None else self._floats(bias)

    def attention(
        self,
        source: str,
        target: str,
        layer: int,
        function: Any,
        spec: AttentionSpec,
        n_head: int,
        n_kv_head: int,
        head_dim: int,
        rope: Tensor | None = None,
    ) -> None:
        """Stores the keys and values of `source` (columns: queries, keys, values) and attends to all that is visible.

        Raises:
            CannotLower: `function` is not exact attention.
        """
        if function not in [ATTENTION.get(name) for name in EXACT_ATTENTION]:
            name = next((n for n in ATTENTION.names() if ATTENTION.get(n) is function), "?")
            raise CannotLower(f"layer {layer}: native code has no attention form {name!r}", "Use the eager runner")
        of_profile = OpInfo("cache_append+fused_attention", layer, None, n_head * head_dim, n_kv_head * head_dim)
        out = self._buffer(target, n_head * head_dim)
        op = self._op(_ATTENTION, of_profile, in_=self._buffers[source], out=out)
        op.layer, op.n_head, op.n_kv_head, op.head_dim = layer, n_head, n_kv_head, head_dim
        limits = prefix_and_window(spec.pattern)
        if limits is None:
            raise CannotLower(f"layer {layer}: native code has no {spec.pattern} attention", "Use the eager runner")
        op.scale, (op.prefix, op.window) = spec.scale, limits
        if spec.slopes is not None:
            op.slopes = self._floats(torch.tensor(spec.slopes))
        op.rope = None if rope is None else self._floats(rope)
        self.kernels["native::attention"] += 1

    # -- building

    def build(self, n_threads: int) -> CompiledProgram:
        """Makes the team and the buffers, which grow with the rows of a step."""
        lib = library()
        ops = (_Op * len(self._ops))(*self._ops)
        matrices = (Matrix * len(self._matrices))(*self._matrices)
        widths = (c_int32 * len(self._widths))(*self._widths)
        counts = (len(ops), matrices, len(matrices), widths, len(widths), n_threads)
        handle = lib.paretune_program(ops, *counts)
        if not handle:
            raise ParetuneError("no memory or threads for the native program", "Free memory, or use the eager runner")
        return CompiledProgram(handle, self._kept, self.kernels, self.n_vocab, self._infos)

    def _op(self, code: int, info: OpInfo, *, barrier: bool = True, **fields: int) -> _Op:
        op = _Op(code=code, has_barrier=barrier, **fields)
        self._ops.append(op)
        self._infos.append(info)
        return op

    def _buffer(self, name: str, width: int) -> int:
        if name not in self._buffers:
            self._buffers[name] = len(self._widths)
            self._widths.append(width)
        assert self._widths[self._buffers[name]] == width, f"buffer {name} has two widths"
        return self._buffers[name]

    def _matrix(self, weight: Weight) -> int:
        assert isinstance(weight, PackedWeight), "pack the weights first"
        if id(weight) not in self._matrix_index:
            self._kept.append(weight)
            self._matrices.append(weight.matrix())
            self._matrix_index[id(weight)] = len(self._matrices) - 1
        self.kernels[weight.kernel] += 1
        return self._matrix_index[id(weight)]

    def _floats(self, tensor: Tensor) -> int:
        values = tensor.detach().float().contiguous()
        self._kept.append(values)
        return values.data_ptr()


class CompiledProgram:
    """A program with its threads and buffers; they go when it goes."""

    def __init__(
        self, handle: int, kept: Sequence[Any], kernels: Counter[str], n_vocab: int, infos: Sequence[OpInfo]
    ) -> None:
        self._handle: int | None = handle
        self._kept, self.kernels, self.n_vocab, self.infos = kept, kernels, n_vocab, infos
        self._library = library()
        self._lock = threading.Lock()  # ctypes lets other Python threads run meanwhile; there is one team
        self._process = os.getpid()

    @property
    def is_usable(self) -> bool:
        """Whether its threads are in this process: a forked child has none of them."""
        return self._process == os.getpid()

    @property
    def buffer_bytes(self) -> int:
        return self._library.paretune_program_bytes(self._handle)

    def step(self, step: Step) -> None:
        """Runs one step.

        Raises:
            IndexError: a token is not in the vocabulary.
            ParetuneError: no memory.
        """
        with self._lock:
            status = self._library.paretune_step(self._handle, ctypes.byref(step))
        if status == 2:
            raise IndexError("a token is not in the vocabulary")
        if status:
            raise ParetuneError("the native step ran out of memory", "Free memory")

    def __del__(self) -> None:
        if getattr(self, "_handle", None) and self.is_usable:
            self._library.paretune_program_free(self._handle)
            self._handle = None
