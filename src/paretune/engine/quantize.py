"""A model folder in a smaller number format: converted while it is read, written, and held against what was meant."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paretune import files
from paretune.engine.probe import observe
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import NoEffectError, UsageError
from paretune.model import checkpoint
from paretune.model.base import LanguageModel
from paretune.model.layers import Embedding, Linear
from paretune.model.stored import StoredTensors
from paretune.ops.weights.base import Weight
from paretune.ops.weights.dense import Dense
from paretune.transforms.base import Context, Transform, config_of, weight_holders


@dataclass(frozen=True)
class Names:
    """Which layers: shell patterns over their fully qualified names (`h.*.attn.*`, `lm_head`).

    Args:
        include: only these; empty: all.
        exclude: not these.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def is_all(self) -> bool:
        return not self.include and not self.exclude

    def keep(self, names: Sequence[str]) -> bool:
        """Whether a weight is wanted that goes by these names (a tied one has several)."""

        def match(patterns: tuple[str, ...]) -> bool:
            return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)

        return (not self.include or match(self.include)) and not match(self.exclude)

    def check(self, model: LanguageModel) -> None:
        """Raises `UsageError` where a pattern names no layer."""
        known = [name for name, _ in weight_holders(model, lambda m, n: True)]
        for pattern in (*self.include, *self.exclude):
            if not fnmatch.filter(known, pattern):
                shown = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in known))
                raise UsageError(f"no layer is called {pattern!r}", f"The layers: {shown}")


@dataclass(frozen=True)
class Layer:
    """One stored weight. Tied layers are one.

    Args:
        names: of the layers that hold it.
        reason: why it was left as it was; "" where it was not.
    """

    names: tuple[str, ...]
    format: str
    n_parameters: int
    n_bytes: int
    reason: str = ""


@dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote.

    Args:
        source_bytes, n_bytes: of the weight files, before and after.
        vector_bytes: of norms and biases, which stay as they are.
        proof: what was checked.
    """

    folder: Path
    transform: Transform
    n_parameters: int
    source_bytes: int
    n_bytes: int
    fp32_bytes: int
    n_vectors: int
    vector_bytes: int
    layers: tuple[Layer, ...]
    proof: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "transform": config_of(self.transform),
            "n_parameters": self.n_parameters,
            "source_bytes": self.source_bytes,
            "weights_bytes": self.n_bytes,
            "fp32_bytes": self.fp32_bytes,
            "bytes_per_parameter": self.n_bytes / self.n_parameters,
            "share_of_fp32": self.n_bytes / self.fp32_bytes,
            "n_vectors": self.n_vectors,
            "vector_bytes": self.vector_bytes,
            "layers": [{**vars(layer), "names": list(layer.names)} for layer in self.layers],
            "proof": list(self.proof),
        }


def refuse_quantized(folder: Path) -> None:
    """Raises `UsageError` where the folder is quantised already."""
    quantization = checkpoint.read_config(folder).hf.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UsageError(
            f"{folder} is quantised already (by {method!r}): its numbers would be rounded twice",
            "Start from the original weights",
        )


def quantize(
    folder: Path,
    transform: Transform,
    output_dir: Path,
    *,
    names: Names | None = None,
    calibration: Tensor | None = None,
    cache_folder: Path | None = None,
    overwrite: bool = False,
    say=lambda line: None,
) -> Quantized:
    """Writes the folder's model with `transform`'s weights into `output_dir`, whole or not at all.

    One weight at a time is there twice where the transform allows it. The numbers of layers that are left alone keep
    their dtype.

    Args:
        names: which layers; None: all that the transform takes.
        calibration: token windows `[N, T]` for transforms that need them.

    Raises:
        UsageError: quantised already, a pattern that names nothing, or a format that cannot be had here.
        NoEffectError: nothing was quantised, or what was written is not what was made.
    """
    refuse_quantized(folder)
    names = names or Names()
    reason = transform.requires("cpu")
    if reason:
        raise UsageError(f"{transform.title} cannot be made here: {reason}", "Choose another --format")
    names.check(checkpoint.build(checkpoint.read_config(folder)))
    if not names.is_all and not transform.per_weight:
        raise UsageError(
            f"{transform.title} converts the model as a whole: --include and --exclude do not apply",
            "Leave them out, or choose a format that rounds each layer by itself",
        )
    context = Context(calibration=calibration, cache_folder=cache_folder, progress=say)
    excluded: set[int] = set()

    def convert(model: LanguageModel, name: str, weight: Weight) -> Weight:
        if not names.keep(_names_of(model, weight)):
            excluded.add(id(weight))
            return weight
        return transform.convert(model, name, weight)

    settings = {k: v for k, v in config_of(transform).items() if k != "name"}
    with files.whole_folder(output_dir, overwrite=overwrite) as out, torch.no_grad():
        say(f"reading {folder.name}")
        model = checkpoint.load(folder, None, convert if transform.per_weight else None)
        if names.is_all:
            model = transform.apply(model, context)
        layers = tuple(_layers(model, excluded))
        if all(layer.format == Dense.format for layer in layers):
            raise NoEffectError("no layer was quantised", "Check --include and --exclude")
        inside = {id(t) for layer in _holders(model) for t in layer.weight.to_tensors().values()}
        vectors = [p for p in model.parameters() if id(p) not in inside]
        n_vectors, vector_bytes = len(vectors), sum(p.nbytes for p in vectors)
        n_parameters = sum(layer.n_parameters for layer in layers) + sum(p.numel() for p in vectors)
        say("writing")
        named = {"transform": transform.name, "settings": settings}
        checkpoint.save(model, out, tokenizer_from=folder, quantization=named)
        proof = [_proof_of_bits(model, out)]
        n_bytes = sum(path.stat().st_size for path in checkpoint.weight_files(out))
        if names.is_all:
            # The proof runs a step, in fp32 as the folder is run on a CPU.
            proof += transform.verify(model, observe(EagerRunner(model.float())))
    return Quantized(
        folder=output_dir,
        transform=transform,
        n_parameters=n_parameters,
        source_bytes=sum(path.stat().st_size for path in checkpoint.weight_files(folder)),
        n_bytes=n_bytes,
        fp32_bytes=4 * n_parameters,
        n_vectors=n_vectors,
        vector_bytes=vector_bytes,
        layers=layers,
        proof=tuple(proof),
    )


def _holders(model: LanguageModel) -> list[Linear | Embedding]:
    return [module for _, module in weight_holders(model, lambda m, n: True)]


def _names_of(model: LanguageModel, weight: Weight) -> list[str]:
    return [name for name, module in weight_holders(model, lambda m, n: True) if module.weight is weight]


def _layers(model: LanguageModel, excluded: set[int]) -> list[Layer]:
    by_weight: dict[int, tuple[Weight, list[str]]] = {}
    for name, module in weight_holders(model, lambda m, n: True):
        by_weight.setdefault(id(module.weight), (module.weight, []))[1].append(name)
    out = []
    for key, (weight, found) in by_weight.items():
        reason = ""
        if isinstance(weight, Dense):
            reason = "excluded by name" if key in excluded else "the format leaves it as it is"
        n = weight.out_features * weight.in_features
        out.append(Layer(tuple(found), weight.format, n, weight.stored_bytes, reason))
    return out


def _proof_of_bits(model: LanguageModel, folder: Path) -> str:
    """Reads every tensor again and compares it bit by bit with the model in memory, one at a time."""
    stored = StoredTensors(checkpoint.weight_files(folder))
    n_bytes = 0
    for name, value in checkpoint.tensors_of(model):
        again = stored.pop(name)
        same = again.dtype == value.dtype and again.shape == value.shape
        if not same or not torch.equal(_bits(again), _bits(value)):
            raise NoEffectError(f"{name} was not written as it is in memory", "Check the disk")
        n_bytes += again.nbytes
    if len(stored):
        raise NoEffectError(f"{next(iter(stored))} was written and is in no layer", "Report it as a bug")
    return f"all tensors were read again, bit-equal: {n_bytes:,} bytes"


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)
