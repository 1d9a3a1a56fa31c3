"""A model folder as a GGUF file for llama.cpp."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.model.base import LanguageModel
from paretune.model.gguf import blocks, container, layout, vocabulary
from paretune.model.layers import Embedding, Linear
from paretune.ops.weights.base import Weight

FORMATS = (*blocks.BITS, *blocks.DENSE)
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
# Beside a 4-bit body the embedding and the head keep 8 bits, as in our own int4.
_ENDS = {"Q4_0": "Q8_0", "Q4_1": "Q8_0"}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        by_type: tensors and bytes by type.
        how: matrices by what became of their numbers.
        notes: what the user should know.
    """

    path: Path
    n_bytes: int
    by_type: dict[str, tuple[int, int]]
    how: dict[str, int]
    notes: tuple[str, ...]


def save(folder: Path, path: Path, wanted: str | None = None, name: str = "") -> Exported:
    """Writes the folder's model and tokenizer into one file, whole or not at all.

    Args:
        wanted: a name in `FORMATS` for what is not in blocks yet; None: each weight as it is stored.
        name: of the model in the file; the folder's where it is empty.

    Raises:
        UsageError: an unknown format, or widths that its blocks do not divide.
        ParetuneError: llama.cpp cannot express the model, or the file cannot be written.
    """
    if wanted is not None and wanted not in FORMATS:
        raise UsageError(f"unknown GGUF format {wanted!r}", f"Known: {', '.join(FORMATS)}")
    config = checkpoint.read_config(folder)
    metadata, notes = layout.to_metadata(config, name or folder.name)  # before the weights are read
    tokens, more = vocabulary.to_metadata(folder, config)
    model = checkpoint.load(folder)
    planned: list[container.Planned] = []
    how: Counter[str] = Counter()
    largest: Counter[str] = Counter()
    for full_name, weight in _matrices(model):
        type_name = wanted
        if full_name.startswith(model.embedding_name) or full_name.startswith(model.head_name):
            type_name = _ENDS.get(wanted or "", wanted)
        if wanted in blocks.BITS and model.family.role_of(full_name) == "positions" and weight.is_plain:
            type_name = "F32"  # a row a token: nothing to win, and llama.cpp keeps it so
        encoded = blocks.plan(weight, type_name, full_name)
        how[encoded.how] += 1
        shape = (weight.out_features, weight.in_features)
        order = layout.rows_of(config, full_name)
        their_name = layout.name_of(config, full_name)
        planned.append(container.Planned(their_name, shape, encoded.type_name, _permuted(encoded.make, order)))
        largest[encoded.type_name] += weight.out_features * weight.in_features
    for full_name, value in _vectors(model):
        order = layout.rows_of(config, full_name)
        their_name = layout.name_of(config, full_name)
        planned.append(container.Planned(their_name, tuple(value.shape), "F32", _vector(value, order)))
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        factors = layout.rope_factors(config, config.rope_scaling)
        planned.append(container.Planned(layout.ROPE_FACTORS, tuple(factors.shape), "F32", _vector(factors, None)))
    metadata |= {"general.file_type": _FILE_TYPES[largest.most_common(1)[0][0]]}
    n_bytes = container.write(path, metadata | tokens | vocabulary.ids_of(config), planned)
    by_type: dict[str, tuple[int, int]] = {}
    for t in planned:
        n, size = by_type.get(t.type_name, (0, 0))
        rows = 1 if len(t.shape) == 1 else t.shape[0]
        by_type[t.type_name] = (n + 1, size + rows * container.bytes_of_row(t.type_name, t.shape[-1]))
    return Exported(path, n_bytes, by_type, dict(how), (*notes, *more))


def _matrices(model: LanguageModel) -> list[tuple[str, Weight]]:
    """Each weight once, under the name of the first layer that holds it: a tied head is the embedding."""
    seen: dict[int, tuple[str, Weight]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | Embedding):
            seen.setdefault(id(module.weight), (f"{name}.weight", module.weight))
    return list(seen.values())


def _vectors(model: LanguageModel) -> list[tuple[str, Tensor]]:
    inside = {id(p) for _, weight in _matrices(model) for p in weight.parameters()}
    return [(name, p.detach()) for name, p in model.named_parameters() if id(p) not in inside]


def _permuted(make: Callable[[], Tensor], order: Tensor | None) -> Callable[[], Tensor]:
    return make if order is None else lambda: make()[order]


def _vector(value: Tensor, order: Tensor | None) -> Callable[[], Tensor]:
    def make() -> Tensor:
        ordered = value if order is None else value[order]
        return ordered.to(torch.float32).contiguous().view(torch.uint8)

    return make
