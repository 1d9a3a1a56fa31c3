"""A GGUF file as a model folder: integers that a weight format holds stay the integers they are.

The folder lies in the cache, named by what it was made from, and every verb reads it like any other.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from paretune import files, native_build
from paretune.errors import CheckpointError
from paretune.model import checkpoint
from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.model.gguf import blocks, layout, vocabulary
from paretune.model.gguf.container import Entry, Reader
from paretune.model.layers import Embedding, Linear
from paretune.ops.weights.base import Weight
from paretune.ops.weights.dense import Dense

SCHEMA = 2  # of the folders: a higher number makes all anew


def folder_of(path: Path) -> Path:
    """The model folder of a GGUF file, made now if the cache does not have it.

    Raises:
        CheckpointError: a damaged file, or something in it that is not read here.
    """
    info = path.stat()
    key = f"{SCHEMA} {path.resolve()} {info.st_size} {info.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", path.stem)[:60]
    target = native_build.cache_folder() / "gguf" / f"{stem}-{digest}"
    if not (target / "config.json").is_file():
        reader = Reader(path)
        with files.into_cache(), files.whole_folder(target, overwrite=True) as out:
            notes = convert(reader, out)
        native_build.say(f"{path.name} was read into {target}")
        for note in notes:
            native_build.say(f"{path.name}: {note}")
    return target


def convert(reader: Reader, out: Path, *, dense: bool = False) -> list[str]:
    """Writes the model of a file into the folder `out` and gives what the user should know.

    Args:
        dense: every matrix as the fp32 numbers that its blocks stand for, exactly, so that any recipe can start from
            it; else integers stay integers.

    Raises:
        CheckpointError: an architecture, a type or a tensor that is not read here, or one that is missing.
    """
    where = str(reader.path)
    vocabulary.check(reader.metadata, where)
    shapes = {name: entry.shape for name, entry in reader.tensors.items()}
    for name, entry in reader.tensors.items():
        if not blocks.is_read(entry.type_name):
            raise CheckpointError(
                f"{where}: {name} is stored as {entry.type_name}, which is not read here",
                "Take the model in another type, such as Q8_0, Q4_K_M or F16",
            )
    factors = _vector(reader, layout.ROPE_FACTORS) if layout.ROPE_FACTORS in shapes else None
    hf = layout.to_hf(reader.metadata, shapes, factors, where)
    if not hf["tie_word_embeddings"] and _same(reader, "output.weight", "token_embd.weight"):
        hf["tie_word_embeddings"] = True  # GPT-2's files often hold the tied matrix twice
    config = ModelConfig.from_hf(hf, where)
    model, notes = _build(reader, config, dense)
    checkpoint.save(model, out)
    reason = vocabulary.write_tokenizer(reader.metadata, out)
    if reason:
        notes.append(f"{reason}: put tokenizer files into the folder to give it text")
    return notes


def _same(reader: Reader, a: str, b: str) -> bool:
    first, second = reader.tensors[a], reader.tensors[b]
    is_alike = (first.shape, first.type_name) == (second.shape, second.type_name)
    return is_alike and torch.equal(reader.raw(a), reader.raw(b))


def _build(reader: Reader, config: ModelConfig, dense: bool) -> tuple[LanguageModel, list[str]]:
    model, where = checkpoint.build(config), reader.path
    left = set(reader.tensors) - {layout.ROPE_FACTORS}
    if config.tied_head:
        left.discard("output.weight")
    dtype = torch.float32 if dense else _dtype(reader)
    widened: Counter[str] = Counter()

    def take(name: str, shape: tuple[int, ...]) -> tuple[str, Entry, Tensor | None]:
        theirs = layout.name_of(config, name)
        if theirs not in left:
            raise CheckpointError(f"{where}: tensor {theirs} is missing", "Download the file again")
        left.discard(theirs)
        entry = reader.tensors[theirs]
        if entry.shape != shape:
            raise CheckpointError(
                f"{where}: tensor {theirs} has shape {list(entry.shape)}, its entries ask for {list(shape)}",
                "Download the file again",
            )
        order = layout.rows_of(config, name)
        return theirs, entry, None if order is None else torch.argsort(order)

    done: dict[int, Weight] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear | Embedding):
            continue
        old = module.weight
        if id(old) not in done:
            theirs, entry, order = take(f"{name}.weight", (old.out_features, old.in_features))
            raw = reader.raw(theirs)
            raw = raw if order is None else raw[order]
            weight = Dense(blocks.values(raw, entry.type_name)) if dense else blocks.decode(raw, entry.type_name, dtype)
            if not all(bool(torch.isfinite(t).all()) for t in weight.to_tensors().values() if t.is_floating_point()):
                raise CheckpointError(f"{where}: tensor {theirs} holds NaN or infinity", "Download the file again")
            if isinstance(weight, Dense) and entry.type_name not in blocks.DENSE:
                widened[entry.type_name] += 1
            done[id(old)] = weight
        module.weight = done[id(old)]
    inside = {id(p) for weight in done.values() for p in weight.parameters()}
    for name, p in list(model.named_parameters()):
        if id(p) in inside:
            continue
        theirs, _, order = take(name, tuple(p.shape))
        value = _vector(reader, theirs)
        owner = model.get_submodule(name.rpartition(".")[0])
        ordered = value if order is None else value[order]
        setattr(owner, name.rpartition(".")[2], nn.Parameter(ordered.to(dtype), requires_grad=False))
    if left:
        raise CheckpointError(f"{where}: tensor {min(left)} does not belong to this model", "Take another file")
    if dtype == torch.float32:  # one dtype beside the integers, the one that loses nothing
        for module in model.modules():
            if isinstance(module, Dense):
                module.float()
    notes = (
        []
        if dense
        else [
            f"matrices of {kind} were read as the fp32 numbers that the blocks stand for: {n} of them"
            for kind, n in widened.items()
        ]
    )
    return model.eval(), notes


def _dtype(reader: Reader) -> torch.dtype:
    """That of the matrices where all vectors are exact in it, else fp32; fp32 also where blocks become dense."""
    kinds = {e.type_name for e in reader.tensors.values() if len(e.shape) > 1 and e.type_name not in blocks.BITS}
    if len(kinds) != 1 or not kinds <= set(blocks.DENSE):
        return torch.float32
    dtype = blocks.DENSE[kinds.pop()]
    vectors = (_vector(reader, n) for n, e in reader.tensors.items() if len(e.shape) == 1)
    return dtype if all(torch.equal(v.to(dtype).float(), v) for v in vectors) else torch.float32


def _vector(reader: Reader, name: str) -> Tensor:
    """fp32 `[n]`."""
    return blocks.values(reader.raw(name), reader.tensors[name].type_name).flatten()
