"""The tensors of a checkpoint, read from the disk one at a time.

Not through a memory map: its pages would count as memory of the process beside the tensors made from them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paretune.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensors:
    """Names to tensors. `[name]` reads, `pop` reads and forgets the name, `del` forgets it.

    Args:
        paths: safetensors files; no name may stand in two of them.

    Raises:
        CheckpointError: a file is damaged or holds a type that PyTorch does not have.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._at: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt"):  # checks the header and the size of the file
                    pass
                with open(path, "rb") as f:
                    size = int.from_bytes(f.read(8), "little")
                    header = json.loads(f.read(size))
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                raise _damaged(path, error) from None
            header.pop("__metadata__", None)
            for name, entry in header.items():
                self._at[name] = (path, 8 + size + entry["data_offsets"][0], entry)

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def __delitem__(self, name: str) -> None:
        del self._at[name]

    def __getitem__(self, name: str) -> Tensor:
        path, start, entry = self._at[name]
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} is of type {entry['dtype']}, which is not read here", "Take other weights"
            )
        first, last = entry["data_offsets"]
        memory = torch.empty(last - first, dtype=torch.uint8)
        try:
            with open(path, "rb") as f:
                f.seek(start)
                n_read = f.readinto(memoryview(memory.numpy()))  # type: ignore[arg-type]
        except OSError as error:
            raise _damaged(path, error) from None
        if n_read != last - first:
            raise _damaged(path, ValueError(f"{n_read} of {last - first} bytes of {name}"))
        return memory.view(_DTYPES[entry["dtype"]]).view(entry["shape"])

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a tensor, without reading it."""
        return _DTYPES.get(self._at[name][2]["dtype"], torch.uint8)

    def pop(self, name: str) -> Tensor:
        tensor = self[name]
        del self._at[name]
        return tensor

    def rename_(self, old: str, new: str) -> None:
        self._at[new] = self._at.pop(old)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged ({error})", "Download the model again")
