"""A Hugging Face checkpoint as NumPy arrays, under names that all families share.

Every matrix is fp32 `[out, in]`, read from the memory-mapped safetensors when it is asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}

Linear = tuple[np.ndarray, np.ndarray | None]  # weight [out, in] (of a norm: [C]), bias [out]


@dataclass(frozen=True)
class Layer:
    """One block. `gate` is None where the MLP has none."""

    norm_1: Linear
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    norm_2: Linear
    gate: Linear | None
    up: Linear
    down: Linear

    @property
    def qkv(self) -> Linear:
        """Queries, keys and values below each other."""
        parts = (self.q, self.k, self.v)
        biases = [bias for _, bias in parts if bias is not None]
        return np.concatenate([weight for weight, _ in parts]), np.concatenate(biases) if biases else None


class Checkpoint:
    """Args:
    config: the fields of `paretune.model.config.ModelConfig`, and under `facts` what its family declares.
    files: the safetensors files.
    """

    def __init__(self, config: dict[str, Any], files: list[str]) -> None:
        self.config = config
        self._where: dict[str, tuple[np.memmap, str, list[int], int, int]] = {}
        for file in files:
            data = np.memmap(file, dtype=np.uint8, mode="r")
            start = 8 + int(data[:8].view("<u8")[0])
            header = json.loads(bytes(data[8:start]))
            for name, entry in header.items():
                if name != "__metadata__":
                    low, high = (start + offset for offset in entry["data_offsets"])
                    self._where[name] = (data, entry["dtype"], entry["shape"], low, high)
        self._facts: dict[str, Any] = config["facts"]
        prefix = self._facts["stored_prefix"]
        self._prefix = prefix if any(name.startswith(prefix) for name in self._where) else ""

    @property
    def has_learned_positions(self) -> bool:
        return self._facts["positions"] == "learned"

    @property
    def is_rotary(self) -> bool:
        return self._facts["positions"] == "rotary"

    @property
    def is_gated(self) -> bool:
        return self._facts["is_gated"]

    @property
    def has_rms_norm(self) -> bool:
        return self._facts["norm"] == "rms"

    @property
    def has_fused_qkv(self) -> bool:
        return "qkv" in self._facts["modules"]

    @property
    def gguf(self) -> dict[str, Any]:
        """What llama.cpp calls the family."""
        assert self._facts["gguf"] is not None, "the catalogue names families that the peer can express"
        return self._facts["gguf"]

    @property
    def embedding(self) -> np.ndarray:
        """[V, C]."""
        name = f"{self._name('embedding')}.weight"
        # A tied matrix may be stored under the head's name alone.
        return self._read(name if name in self._where else self._head_name)

    @property
    def positions(self) -> np.ndarray:
        """[n_positions, C], learned ones only."""
        return self._read(f"{self._name('positions')}.weight")

    @property
    def head(self) -> np.ndarray | None:
        """[V, C]; None where it is the embedding."""
        return None if self.config["tied_head"] else self._read(self._head_name)

    @property
    def norm(self) -> Linear:
        return self._linear("norm")

    def layer(self, i: int) -> Layer:
        if self.has_fused_qkv:
            q, k, v = self._split(*self._linear("qkv", i))
        else:
            q, k, v = (self._linear(role, i) for role in ("q", "k", "v"))
        return Layer(
            norm_1=self._linear("norm_1", i),
            q=q,
            k=k,
            v=v,
            o=self._linear("o", i),
            norm_2=self._linear("norm_2", i),
            gate=self._linear("gate", i) if self.is_gated else None,
            up=self._linear("up", i),
            down=self._linear("down", i),
        )

    def _split(self, weight: np.ndarray, bias: np.ndarray | None) -> list[Linear]:
        """Queries, keys and values of one matrix."""
        c = self.config
        ends = np.cumsum([c["n_head"] * c["head_dim"], c["n_kv_head"] * c["head_dim"]])
        biases = [None] * 3 if bias is None else np.split(bias, ends)
        return list(zip(np.split(weight, ends), biases, strict=True))

    def rope_frequencies(self) -> np.ndarray:
        """Angular frequency of each pair of dimensions, fp32 [D / 2], scaled as ours."""
        c = self.config
        size, scaling = c["head_dim"], c["rope_scaling"]
        frequency = 1.0 / c["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)
        if scaling and scaling["kind"] == "linear":
            frequency /= scaling["factor"]
        elif scaling:
            frequency /= self.rope_factors()
        return frequency.astype(np.float32)

    def rope_factors(self) -> np.ndarray:
        """What `llama3` scaling divides each frequency by, fp32 [D / 2]."""
        c, scaling = self.config, self.config["rope_scaling"]
        size = c["head_dim"]
        frequency = 1.0 / c["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)
        turns = scaling["original_n_positions"] * frequency / (2 * np.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return (1 / ((1 - kept) / scaling["factor"] + kept)).astype(np.float32)

    @property
    def _head_name(self) -> str:
        return f"{self._facts['modules']['head']}.weight"  # it has no prefix

    def _name(self, role: str, i: int = 0) -> str:
        return self._prefix + self._facts["modules"][role].format(i=i)

    def _linear(self, role: str, i: int = 0) -> Linear:
        name = self._name(role, i)
        weight = self._read(f"{name}.weight")
        if weight.ndim == 2 and f"{name}.weight".endswith(tuple(self._facts["stored_transposed"])):
            weight = np.ascontiguousarray(weight.T)
        return weight, self._read(f"{name}.bias") if f"{name}.bias" in self._where else None

    def _read(self, name: str) -> np.ndarray:
        data, dtype, shape, low, high = self._where[name]
        values = np.array(data[low:high]).view(_DTYPES[dtype]).reshape(shape)  # a copy: libraries write into it
        if dtype == "BF16":  # the upper half of an fp32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(values, dtype=np.float32)


def open_checkpoint(request: dict[str, Any]) -> Checkpoint:
    """The checkpoint that a `convert` request names."""
    assert all(Path(file).is_file() for file in request["weight_files"])
    return Checkpoint(request["config"], request["weight_files"])
