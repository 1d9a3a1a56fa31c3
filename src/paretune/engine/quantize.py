"""A model folder in a smaller number format: converted while it is read, written, and held against what was meant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paretune import files
from paretune.engine import calibration
from paretune.engine.probe import observe
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import NoEffectError, UsageError
from paretune.model import checkpoint
from paretune.model.base import LanguageModel
from paretune.model.layers import Embedding, Linear
from paretune.model.stored import StoredTensors
from paretune.ops.weights.base import Weight
from paretune.ops.weights.dense import Dense
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context, Transform, config_of, weight_holders
from paretune.transforms.quantize import Quantize, matrices


@dataclass(frozen=True)
class Layer:
    """One stored weight. Tied layers are one.

    Args:
        names: of the layers that hold it.
        reason: why it was left as it was; "" where it was not.
        part: linear, ends (embedding and head) or positions.
        scale_bytes: of `n_bytes`, what is not the numbers themselves.
    """

    names: tuple[str, ...]
    format: str
    n_parameters: int
    n_bytes: int
    reason: str = ""
    part: str = "linear"
    scale_bytes: int = 0


_PART_TITLES = {
    "linear": "linear layers",
    "ends": "embedding and head",
    "positions": "positions",
    "scales": "scales",
    "vectors": "norms and biases",
    "header": "file header",
}


@dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote.

    Args:
        source_bytes, n_bytes: of the weight files, before and after.
        vector_bytes: of norms and biases, which stay as they are.
        proof: what was checked.
        notes: what the user has to know of how it was made.
    """

    folder: Path
    transforms: tuple[Transform, ...]
    n_parameters: int
    source_bytes: int
    n_bytes: int
    fp32_bytes: int
    n_vectors: int
    vector_bytes: int
    layers: tuple[Layer, ...]
    proof: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def parts_bytes(self) -> dict[str, int]:
        """Where the bytes of the weight files are; they add up to `n_bytes`."""
        parts = dict.fromkeys(("linear", "ends", "positions"), 0)
        for layer in self.layers:
            parts[layer.part] += layer.n_bytes - layer.scale_bytes
        parts["scales"] = sum(layer.scale_bytes for layer in self.layers)
        parts["vectors"] = self.vector_bytes
        return {**parts, "header": self.n_bytes - sum(parts.values())}

    @property
    def why_this_share(self) -> str:
        """The parts in per cent of the fp32 model: why 8 bits are not exactly 25 %."""
        shares = {k: n / self.fp32_bytes for k, n in self.parts_bytes.items() if n}
        return ", ".join(f"{_PART_TITLES[k]} {x:.2%}" for k, x in shares.items())

    def to_json(self) -> dict[str, Any]:
        return {
            "parts_bytes": self.parts_bytes,
            "folder": str(self.folder),
            "transforms": [config_of(t) for t in self.transforms],
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
            "notes": list(self.notes),
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
    transforms: Sequence[Transform],
    output_dir: Path,
    *,
    calibration_text: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Quantized:
    """Writes the folder's model with the transforms' weights into `output_dir`, whole or not at all.

    One weight at a time is there twice where the transforms allow it. The numbers of layers that are left alone keep
    their dtype.

    Args:
        transforms: applied in order; each leaves alone what is quantised already.
        calibration_text: for transforms that need some; None: the model writes it.

    Raises:
        UsageError: quantised already, calibration text that is too short or not asked for, a pattern that names
            nothing, or a format that cannot be had here or read again.
        NoEffectError: nothing was quantised, or what was written is not what was made.
    """
    refuse_quantized(folder)
    config = checkpoint.read_config(folder)
    checkpoint.check_formats(transform.format for transform in transforms if transform.format)
    for transform in transforms:
        if reason := transform.fits(config) or transform.requires("cpu"):
            raise UsageError(
                f"{transform.title} cannot be made here: {reason}", "Choose another --format, --include or --exclude"
            )
        config = transform.changed(config)
    calibrated = [transform for transform in transforms if transform.needs_calibration]
    if calibration_text is not None and not calibrated:
        raise UsageError(f"{transforms[0].title} needs no calibration text", "Leave out --calibration")
    window_len = min(calibration.WINDOW_LEN, config.n_positions)
    windows = None
    if calibration_text is not None:
        windows = calibration.from_text(folder, calibration_text, window_len=window_len)

    def convert(model: LanguageModel, name: str, weight: Weight) -> Weight:
        for transform in transforms:
            weight = transform.convert(model, name, weight)
        return weight

    notes: list[str] = []

    def note(line: str) -> None:
        say(line)
        notes.append(line)

    streams = all(transform.per_weight for transform in transforms)
    with files.whole_folder(output_dir, overwrite=overwrite) as out, torch.no_grad():
        say(f"reading {folder.name}")
        stored = stored_dtype(folder)
        # What runs the model to calibrate it runs it in fp32.
        model = checkpoint.load(folder, torch.float32 if calibrated else None, convert if streams else None)
        if calibrated:  # as recipes run it; what a folder says of attention does not change
            model = Attention("sdpa").apply(model, Context())
        if calibrated and windows is None:
            say("the model writes its calibration text")
            windows = calibration.from_model(model, say=note)
        for transform in transforms:
            model = transform.apply(model, Context(calibration=windows, progress=say))
        if calibrated and stored is not None:
            model = model.to(stored)  # what was left alone goes back as it came
        layers = tuple(_layers(model, transforms))
        if all(layer.format == Dense.format for layer in layers):
            raise NoEffectError("no layer was quantised", "Check --include and --exclude")
        inside = {id(t) for layer in _holders(model) for t in layer.weight.to_tensors().values()}
        vectors = [p for p in model.parameters() if id(p) not in inside]
        n_vectors, vector_bytes = len(vectors), sum(p.nbytes for p in vectors)
        n_parameters = sum(layer.n_parameters for layer in layers) + sum(p.numel() for p in vectors)
        say("writing")
        named = {"transforms": [config_of(t) for t in transforms]}
        checkpoint.save(model, out, tokenizer_from=folder, quantization=named)
        proof = [_proof_of_bits(model, out)]
        n_bytes = sum(path.stat().st_size for path in checkpoint.weight_files(out))
        # The proof runs a step, in fp32 as the folder is run on a CPU.
        probe = observe(EagerRunner(model.float()))
        proof += [
            s for i, t in enumerate(transforms) if not i or _did_anything(t, model) for s in t.verify(model, probe)
        ]
    return Quantized(
        folder=output_dir,
        transforms=tuple(transforms),
        n_parameters=n_parameters,
        source_bytes=sum(path.stat().st_size for path in checkpoint.weight_files(folder)),
        n_bytes=n_bytes,
        fp32_bytes=4 * n_parameters,
        n_vectors=n_vectors,
        vector_bytes=vector_bytes,
        layers=layers,
        proof=tuple(proof),
        notes=tuple(notes),
    )


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The floating-point type of a checkpoint where it has one."""
    stored = StoredTensors(checkpoint.weight_files(folder))
    found = {dtype for dtype in map(stored.dtype_of, stored) if dtype.is_floating_point}
    return found.pop() if len(found) == 1 else None


def _did_anything(transform: Transform, model: LanguageModel) -> bool:
    """A transform for the rest finds nothing left where a filter left nothing."""
    return not isinstance(transform, Quantize) or any(map(transform.is_mine, transform.chosen(model)))


def _holders(model: LanguageModel) -> list[Linear | Embedding]:
    return [module for _, module in weight_holders(model, lambda m, n: True)]


def _layers(model: LanguageModel, transforms: Sequence[Transform]) -> list[Layer]:
    passed = {n for t in transforms if isinstance(t, Quantize) for n in t.passed(model)}
    out = []
    for chosen in matrices(model):
        weight, reason = chosen.weight, ""
        if isinstance(weight, Dense):
            reason = "the format leaves it as it is" if passed & set(chosen.names) else "excluded by name"
        n = weight.out_features * weight.in_features
        part = "positions" if chosen.is_positions else "ends" if chosen.is_end else "linear"
        scales = max(0, weight.stored_bytes - n * weight.bits // 8)
        out.append(Layer(chosen.names, weight.format, n, weight.stored_bytes, reason, part, scales))
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
