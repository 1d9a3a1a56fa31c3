"""GGUF files as they are: metadata and raw tensors, read and written one tensor at a time.

The format is described in ggml's `docs/gguf.md` (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from paretune import files
from paretune.errors import CheckpointError, ParetuneError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MAX_COUNT = 1 << 24  # entries, tensors, elements of an array: more is a damaged file
MAX_DEPTH = 4  # arrays within arrays

# Number of the type: its name, numbers in a block, bytes of a block. The list is the package's, which llama.cpp keeps.
TYPES = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES}
NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class F32:
    """A number that is written as fp32 (a plain int is a uint32, a plain bool a bool)."""

    value: float


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Args:
        shape: rows first, as PyTorch has it.
        type_name: of `TYPES`.
        start: of its bytes in the file.
    """

    shape: tuple[int, ...]
    type_name: str
    start: int

    @property
    def row_bytes(self) -> int:
        return bytes_of_row(self.type_name, self.shape[-1])

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])


def bytes_of_row(type_name: str, width: int) -> int:
    _, block, size = TYPES[NUMBERS[type_name]]
    assert width % block == 0
    return width // block * size


class Reader:
    """Metadata and tensors of a GGUF file; tensors are read when they are asked for.

    Args:
        path: a file of version 2 or 3, little endian.

    Raises:
        CheckpointError: it is not such a file, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as f:
                self._size = f.seek(0, 2)
                f.seek(0)
                self.metadata, self.tensors = self._header(f)
        except (struct.error, UnicodeDecodeError, ValueError, KeyError, OverflowError, MemoryError) as error:
            raise self._damaged(error) from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}", "Check its permissions") from None

    def _header(self, f: IO[bytes]) -> tuple[dict[str, Any], dict[str, Entry]]:
        if f.read(4) != MAGIC:
            raise CheckpointError(f"{self.path} is not a GGUF file", "Pass a model folder or a GGUF file")
        (version,) = struct.unpack("<I", f.read(4))
        if version not in (2, 3):
            raise CheckpointError(f"{self.path} is GGUF version {version}", "Versions 2 and 3 are read")
        n_tensors, n_entries = struct.unpack("<QQ", f.read(16))
        if max(n_tensors, n_entries) > MAX_COUNT:
            raise ValueError(f"{n_tensors} tensors, {n_entries} entries")
        metadata: dict[str, Any] = {}
        for _ in range(n_entries):
            key = _read_string(f)
            metadata[key] = _read_value(f, struct.unpack("<I", f.read(4))[0])
        found = []
        for _ in range(n_tensors):
            name, n_dims = _read_string(f), struct.unpack("<I", f.read(4))[0]
            if not 1 <= n_dims <= 4:
                raise ValueError(f"{name} has {n_dims} dimensions")
            shape = tuple(reversed(struct.unpack(f"<{n_dims}Q", f.read(8 * n_dims))))
            number, offset = struct.unpack("<IQ", f.read(12))
            found.append((name, shape, number, offset))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        data = -(-f.tell() // alignment) * alignment
        tensors = {}
        for name, shape, number, offset in found:
            if number not in TYPES:
                cause = f"{self.path}: {name} is of type {number}, which is not known here"
                raise CheckpointError(cause, "Take the model in another type, such as Q8_0, Q4_K_M or F16")
            type_name, block, size = TYPES[number]
            if shape[-1] % block or not all(shape):
                raise ValueError(f"{name} has shape {list(shape)} in blocks of {block}")
            if data + offset + math.prod(shape) // block * size > self._size:
                raise ValueError(f"{name} ends after the file")
            tensors[name] = Entry(shape, type_name, data + offset)
        return metadata, tensors

    def raw(self, name: str) -> Tensor:
        """The bytes of a tensor, uint8 `[rows, bytes of a row]`."""
        entry = self.tensors[name]
        memory = torch.empty(entry.n_rows, entry.row_bytes, dtype=torch.uint8)
        with open(self.path, "rb") as f:
            f.seek(entry.start)
            if f.readinto(memoryview(memory.numpy()).cast("B")) != memory.numel():  # type: ignore[arg-type, attr-defined]
                raise self._damaged(ValueError(f"{name} is cut off"))
        return memory

    def _damaged(self, error: Exception) -> CheckpointError:
        what = str(error) or type(error).__name__
        return CheckpointError(f"{self.path} is truncated or damaged ({what})", "Download the file again")


def _read_string(f: IO[bytes]) -> str:
    (n,) = struct.unpack("<Q", f.read(8))
    if n > MAX_COUNT * 8:
        raise ValueError(f"a string of {n} bytes")
    data = f.read(n)
    if len(data) < n:
        raise ValueError("the file ends within a string")
    return data.decode("utf-8", errors="replace")


def _read_value(f: IO[bytes], kind: int, depth: int = 0) -> Any:
    if kind == _STRING:
        return _read_string(f)
    if kind != _ARRAY:
        code = f"<{_SCALARS[kind]}"
        return struct.unpack(code, f.read(struct.calcsize(code)))[0]
    inner, n = struct.unpack("<IQ", f.read(12))
    if n > MAX_COUNT or depth == MAX_DEPTH:
        raise ValueError(f"an array of {n}")
    if inner in _SCALARS:
        code = f"<{n}{_SCALARS[inner]}"
        return list(struct.unpack(code, f.read(struct.calcsize(code))))
    return [_read_value(f, inner, depth + 1) for _ in range(n)]


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written.

    Args:
        shape: rows first.
        make: gives its bytes, uint8, when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    make: Callable[[], Tensor]


def write(path: Path, metadata: Mapping[str, Any], tensors: Sequence[Planned]) -> int:
    """Writes a file, whole or not at all, and gives its bytes. One tensor at a time is in memory.

    Raises:
        ParetuneError: it cannot be written.
    """
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _string(key) + _value(value)
    offset = 0
    for t in tensors:
        dims = tuple(reversed(t.shape))
        head += _string(t.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", NUMBERS[t.type_name], offset)
        offset += _aligned(math.prod(t.shape[:-1]) * bytes_of_row(t.type_name, t.shape[-1]))
    with files.whole_file(path) as f:
        f.write(head + bytes(_aligned(len(head)) - len(head)))
        for t in tensors:
            data = t.make().contiguous().view(-1)
            expected = math.prod(t.shape[:-1]) * bytes_of_row(t.type_name, t.shape[-1])
            assert data.dtype == torch.uint8 and data.numel() == expected, t.name
            f.write(memoryview(data.numpy()))  # type: ignore[arg-type]
            f.write(bytes(_aligned(expected) - expected))
        return f.tell()


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A value behind its type: str, bool, int (uint32), F32, and lists of one of them (ints as int32)."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        if not 0 <= value < 1 << 32:
            raise ParetuneError(f"{value} does not fit a GGUF entry", "Correct config.json")
        return struct.pack("<II", 4, value)
    if isinstance(value, F32):
        return struct.pack("<If", 6, value.value)
    assert isinstance(value, list) and value
    head = struct.pack("<I", _ARRAY)
    if isinstance(value[0], str):
        return head + struct.pack("<IQ", _STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value[0], F32):
        return head + struct.pack(f"<IQ{len(value)}f", 6, len(value), *(v.value for v in value))
    return head + struct.pack(f"<IQ{len(value)}i", 5, len(value), *value)
