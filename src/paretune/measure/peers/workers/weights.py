"""A Hugging Face checkpoint as NumPy arrays, under names that GPT-2 and Llama share.

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
    """One block. `gate` is None for GPT-2."""

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
    config: the fields of `paretune.model.config.ModelConfig`.
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
        stem = "transformer." if config["family"] == "gpt2" else "model."
        self._stem = stem if any(name.startswith(stem) for name in self._where) else ""

    @property
    def is_gpt2(self) -> bool:
        return self.config["family"] == "gpt2"

    @property
    def embedding(self) -> np.ndarray:
        """[V, C]."""
        name = self._stem + ("wte.weight" if self.is_gpt2 else "embed_tokens.weight")
        # A tied matrix may be stored under the head's name alone.
        return self._read(name if name in self._where else "lm_head.weight")

    @property
    def positions(self) -> np.ndarray:
        """[n_positions, C], GPT-2 only."""
        return self._read(self._stem + "wpe.weight")

    @property
    def head(self) -> np.ndarray | None:
        """[V, C]; None where it is the embedding."""
        return None if self.config["tied_head"] else self._read("lm_head.weight")

    @property
    def norm(self) -> Linear:
        return self._linear("ln_f" if self.is_gpt2 else "norm")

    def layer(self, i: int) -> Layer:
        if not self.is_gpt2:
            h, attn, mlp = f"layers.{i}.", f"layers.{i}.self_attn.", f"layers.{i}.mlp."
            return Layer(
                norm_1=self._linear(h + "input_layernorm"),
                q=self._linear(attn + "q_proj"),
                k=self._linear(attn + "k_proj"),
                v=self._linear(attn + "v_proj"),
                o=self._linear(attn + "o_proj"),
                norm_2=self._linear(h + "post_attention_layernorm"),
                gate=self._linear(mlp + "gate_proj"),
                up=self._linear(mlp + "up_proj"),
                down=self._linear(mlp + "down_proj"),
            )
        h, c = f"h.{i}.", self.config["n_embd"]
        weight, bias = self._conv1d(h + "attn.c_attn")
        assert bias is not None
        q, k, v = ((weight[j * c : (j + 1) * c], bias[j * c : (j + 1) * c]) for j in range(3))
        return Layer(
            norm_1=self._linear(h + "ln_1"),
            q=q,
            k=k,
            v=v,
            o=self._conv1d(h + "attn.c_proj"),
            norm_2=self._linear(h + "ln_2"),
            gate=None,
            up=self._conv1d(h + "mlp.c_fc"),
            down=self._conv1d(h + "mlp.c_proj"),
        )

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

    def _linear(self, name: str) -> Linear:
        name = self._stem + name
        bias = self._read(f"{name}.bias") if f"{name}.bias" in self._where else None
        return self._read(f"{name}.weight"), bias

    def _conv1d(self, name: str) -> Linear:
        weight, bias = self._linear(name)
        return np.ascontiguousarray(weight.T), bias

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
