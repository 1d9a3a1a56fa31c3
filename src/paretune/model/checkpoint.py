"""Models in and out of Hugging Face folders: `config.json` and safetensors, strict in both directions.

Every tensor that the model needs must be there with the right shape, and nothing else may be: a checkpoint that
half fits is an error that names the tensor. Pickle files are refused (they run code when loaded).

A converted model saves to the same layout. Layers that are no longer dense write `NAME.FORMAT.PART` tensors, and
`quantization_config` in `config.json` lists them, so that the folder loads again as it was.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from paretune.errors import CheckpointError, UsageError, WriteError
from paretune.files import write_json
from paretune.model import downloads, families
from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.model.families.base import Family
from paretune.model.layers import Embedding, Linear
from paretune.model.stored import StoredTensors
from paretune.ops.weights.base import Weight
from paretune.ops.weights.dense import Dense
from paretune.registry import FORMATS

EMBEDDED = ("pocket", "pocket-draft")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPE_ALIASES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "half": "fp16", "float": "fp32"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "prompt.json",  # ours: how a fine-tuned model wants its input (`model/prompt.py`)
)
METHOD = "paretune"  # `quant_method` of our own folders


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name such as `bf16` or `bfloat16`."""
    short = DTYPE_ALIASES.get(name, name)
    if short not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", f"Known: {', '.join([*DTYPES, *DTYPE_ALIASES])}")
    return DTYPES[short]


def is_named(name: str) -> bool:
    """Whether it is a model of ours: embedded, or one that `paretune get` fetches."""
    return name in EMBEDDED or name in downloads.DOWNLOADS


def resolve(name: str) -> Path:
    """The folder of a model: a name of ours, a local path, a GGUF file, or a hub id (downloaded once into its cache).

    A name comes first: a folder that is called like it is `./NAME`.

    Raises:
        UsageError: a model that has to be fetched first, or no such folder, and the hub does not have it or cannot be
            reached.
    """
    if name in EMBEDDED:
        return Path(__file__).parent.parent / "assets" / name
    if name in downloads.DOWNLOADS:
        return downloads.require(name)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if name and folder.is_file() and folder.suffix.lower() == ".gguf":
        from paretune.model.gguf.load import folder_of

        return folder_of(folder)
    if name and folder.exists():
        raise UsageError(f"{name} is a file, not a model folder", "Pass the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise UsageError(f"there is no folder {name!r}", "Pass a model folder, a hub id, a plan or `pocket`")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a family of its own, requests' and ours to be one line
        reason = type(error).__name__
        near = difflib.get_close_matches(name, (*EMBEDDED, *downloads.DOWNLOADS), n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"there is no folder or plan {name!r} here, and the hub has no model of that name ({reason})",
            f"{hint}Check the path, or for a hub id the spelling and the network; offline, `pocket` is always there",
        ) from None


def read_config(folder: Path) -> ModelConfig:
    """Reads and narrows `config.json`.

    Raises:
        CheckpointError: it is missing, is not JSON, or describes a model that is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "events.jsonl").is_file():
            raise CheckpointError(f"{folder} holds an unfinished run", "Finish it with `paretune tune ... --resume`")
        raise CheckpointError(f"{folder} has no config.json", "Pass a Hugging Face model folder")
    try:
        hf = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})", "Download the model again") from None
    if not isinstance(hf, dict):
        raise CheckpointError(f"{path} is not a JSON object", "Download the model again")
    return ModelConfig.from_hf(hf, str(path))


def build(config: ModelConfig) -> LanguageModel:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return families.of(config).model(config)


def new(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A model with random weights, fp32."""
    model = build(config).to_empty(device="cpu")
    _retie_(model)
    model.initialize_(torch.Generator().manual_seed(seed))
    return model.eval()


def published(size: str, n_positions: int | None = None) -> ModelConfig:
    """The config of a published model's size, such as `gpt2-medium`.

    Args:
        n_positions: the longest sequence; None: the published one.
    """
    sizes = published_sizes()
    if size not in sizes:
        raise UsageError(f"unknown model size {size!r}", f"Known: {', '.join(sizes)}")
    config = ModelConfig.from_hf(sizes[size])
    return config if n_positions is None else config.with_positions(n_positions)


def published_sizes() -> dict[str, Mapping[str, Any]]:
    """Entries of `config.json` of the sizes that have a name, of every family."""
    return {size: hf for family in families.every() for size, hf in family.sizes.items()}


OnWeight = Callable[[LanguageModel, str, Weight], Weight]


def load(folder: Path, dtype: torch.dtype | None = None, on_weight: OnWeight | None = None) -> LanguageModel:
    """Loads a model for inference, each tensor as it is stored or cast to `dtype`.

    Args:
        on_weight: called with the model, a layer's name and its weight as soon as that is read; what it gives takes the
            weight's place. So a model can be converted while no more than one of its weights is there twice.

    Raises:
        CheckpointError: names the first missing, extra or mis-shaped tensor, or the damaged file.
    """
    config = read_config(folder)
    model = build(config)
    formats = stored_formats(config)
    tensors = StoredTensors(weight_files(folder))
    rename = _renamer(model, tensors)
    _swap_formats_(model, formats, tensors, rename, dtype, on_weight)
    expected, holders = dict(_dense_slots(model)), _holders(model)
    _drop_redundant_(model, tensors, rename, expected)
    # The largest first: while it is there twice, little else is.
    for name in sorted(expected, key=lambda n: -getattr(*expected[n]).numel()):
        owner, attribute = expected.pop(name)
        stored = rename(name)
        if stored not in tensors:
            raise CheckpointError(f"{folder}: tensor {stored} is missing", "Download or save the model again")
        value = tensors.pop(stored)
        if name.endswith(model.family.stored_transposed) and value.dim() == 2:
            value = value.t()
        shape = getattr(owner, attribute).shape
        if value.shape != shape:
            raise CheckpointError(
                f"{folder}: tensor {stored} has shape {list(value.shape)}, config.json asks for {list(shape)}",
                "The weights belong to another config.json",
            )
        if not value.is_floating_point():
            raise CheckpointError(
                f"{folder}: tensor {stored} is {value.dtype}, not a floating-point type",
                "Quantised checkpoints of other tools are not read; take the original weights",
            )
        value = value.to(dtype or value.dtype).contiguous()
        setattr(owner, attribute, nn.Parameter(value, requires_grad=False))
        if on_weight is not None and isinstance(owner, Dense):
            _replace_(holders, owner, on_weight(model, name.removesuffix(".weight"), owner))
        del value, owner
    if len(tensors):
        extra = sorted(tensors)
        raise CheckpointError(
            f"{folder}: tensor {extra[0]} does not belong to this model (and {len(extra) - 1} more)",
            "The weights belong to another config.json",
        )
    _retie_(model)
    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left, f"never filled: {left}"
    return model.eval()


def tensors_of(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """What `save` writes, one tensor at a time under its stored name.

    Dense layers come in the stock layout (`transformers` reads them), others as their stored tensors.
    """
    family = model.family
    for name, (owner, attribute) in _dense_slots(model):
        value = getattr(owner, attribute).detach()
        transposed = name.endswith(family.stored_transposed) and value.dim() == 2
        yield _hf_name(family, name), (value.t() if transposed else value).contiguous()
    for name, module in _weight_holders(model):
        weight = module.weight
        if isinstance(weight, Dense):
            continue
        for part, value in weight.to_tensors().items():
            yield f"{_hf_name(family, name)}.weight.{weight.format}.{part}", value.detach().contiguous()


def check_formats(names: Iterable[str]) -> None:
    """Refuses weight formats in which a folder could be written and not read again.

    Raises:
        UsageError: one is not registered, or what is registered cannot be used.
    """
    for name in names:
        try:
            FORMATS.get(name)
        except UsageError as error:
            raise UsageError(
                f"weights of the format {name!r} could be written and not read again: {error.cause}",
                f"Register their class as {name} in the group {FORMATS.group}",
            ) from None


def save(
    model: LanguageModel,
    folder: Path,
    tokenizer_from: Path | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Writes `config.json`, `model.safetensors` and the tokenizer's files into `folder` (which exists).

    Args:
        quantization: more entries for `quantization_config`, for people to read.

    Raises:
        UsageError: a weight has a format that could not be read again.
        WriteError: a file cannot be written.
    """
    config: ModelConfig = model.config
    tensors = dict(tensors_of(model))
    holders = _weight_holders(model)
    formats = {f"{name}.weight": m.weight.format for name, m in holders if not isinstance(m.weight, Dense)}
    check_formats(dict.fromkeys(formats.values()))
    hf: dict[str, Any] = config.to_hf()
    hf.pop("torch_dtype", None)
    hf["dtype"] = str(next(p for p in model.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
    hf.pop("quantization_config", None)
    if formats:
        hf["quantization_config"] = {"quant_method": METHOD, **(quantization or {}), "formats": formats}
    try:
        if tokenizer_from is not None and not _same_folder(tokenizer_from, folder):
            for file in TOKENIZER_FILES:
                if (tokenizer_from / file).is_file():
                    shutil.copyfile(tokenizer_from / file, folder / file)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise WriteError(
            f"cannot write {folder / 'model.safetensors'}: {error}",
            "Free some space or choose another folder with -o",
        ) from None
    write_json(folder / "config.json", hf)


def _same_folder(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, single or sharded.

    Raises:
        CheckpointError: there are none, or a shard is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            if not names or any(Path(name).name != name for name in names):  # shards lie beside their index
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(f"{index} is damaged", "Download the model again") from None
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: shard {name} is missing", "Download the model again")
        return [folder / name for name in names]
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickle weights ({sorted(pickles)[0]}), which can run code when loaded",
            "Convert them to safetensors first, for example with transformers' save_pretrained",
        )
    raise CheckpointError(f"{folder} has no model.safetensors", "Pass a folder with safetensors weights")


def _hf_name(family: Family, name: str) -> str:
    return name if name.startswith(f"{family.modules['head']}.") else family.stored_prefix + name


def _renamer(model: LanguageModel, tensors: StoredTensors) -> Callable[[str], str]:
    """Our name -> the stored name; checkpoints of the bare model lack the prefix."""
    family = model.family
    is_bare = not any(name.startswith(family.stored_prefix) for name in tensors)
    return lambda name: name if is_bare else _hf_name(family, name)


def _weight_holders(model: LanguageModel) -> Iterator[tuple[str, Linear | Embedding]]:
    """Layers with a `Weight`, each shared `Weight` once, under its first name (the embedding's)."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Linear | Embedding) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield name, module


def _dense_slots(model: LanguageModel) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Stock name -> the module and attribute that hold the tensor, for everything that is stored dense."""
    for name, module in _weight_holders(model):
        if isinstance(module.weight, Dense):
            yield f"{name}.weight", (module.weight, "values")
    inside = {id(m) for w in model.modules() if isinstance(w, Linear | Embedding) for m in w.weight.modules()}
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter is not None:
                yield f"{name}.{attribute}", (module, attribute)


def stored_formats(config: ModelConfig) -> dict[str, str]:
    """The formats of the weights that a folder keeps in another form than dense, by name.

    Raises:
        CheckpointError: another tool has quantised it, or the table is damaged.
    """
    quantization = config.hf.get("quantization_config")
    if not quantization:
        return {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != METHOD:
        raise CheckpointError(
            f"the model is already quantised by {method!r}, which is not read here",
            "Start from the original weights",
        )
    formats = quantization.get("formats") if isinstance(quantization, dict) else None
    if not isinstance(formats, dict):
        raise CheckpointError("config.json: quantization_config has no table of formats", "Save the model again")
    for name, format_name in formats.items():
        if format_name not in FORMATS.names():
            raise CheckpointError(
                f"config.json: quantization_config says {name} is {format_name!r}, which is not read here",
                f"Known: {', '.join(FORMATS.names())}",
            )
    return dict(formats)


Holders = dict[int, list[Linear | Embedding]]


def _holders(model: LanguageModel) -> Holders:
    """The layers that hold a weight, by its id. One walk: a walk for each weight costs seconds in a deep model."""
    holders: Holders = {}
    for module in model.modules():
        if isinstance(module, Linear | Embedding):
            holders.setdefault(id(module.weight), []).append(module)
    return holders


def _replace_(holders: Holders, old: Weight, new: Weight) -> None:
    modules = holders.pop(id(old))
    for module in modules:  # tied layers stay tied
        module.weight = new
    holders[id(new)] = modules


def _swap_formats_(
    model: LanguageModel,
    formats: dict[str, str],
    tensors: StoredTensors,
    rename: Callable[[str], str],
    dtype: torch.dtype | None,
    on_weight: OnWeight | None,
) -> None:
    """Puts weights that are stored in another format into the tree, taking their tensors out of `tensors`."""
    for full_name, format_name in formats.items():
        module_name = full_name.removesuffix(".weight")
        try:
            holder = model.get_submodule(module_name)
            assert isinstance(holder, Linear | Embedding)
        except (AttributeError, AssertionError):
            raise CheckpointError(
                f"quantization_config names {module_name}, which this model does not have",
                "The config.json belongs to another model",
            ) from None
        stem = f"{rename(module_name)}.weight.{format_name}."
        parts = {name.removeprefix(stem): tensors.pop(name) for name in list(tensors) if name.startswith(stem)}
        if not parts:
            raise CheckpointError(f"tensor {stem}* is missing", "Save the model again")
        old = holder.weight
        try:
            weight = FORMATS.get(format_name).from_tensors(parts)
        except CheckpointError as error:
            raise CheckpointError(f"{stem}*: {error.cause}", error.cure) from None
        if (weight.out_features, weight.in_features) != (old.out_features, old.in_features):
            raise CheckpointError(
                f"{stem}* is {weight.out_features}x{weight.in_features}, config.json asks for "
                f"{old.out_features}x{old.in_features}",
                "The weights belong to another config.json",
            )
        if dtype is not None:  # what the rows are computed in; the stored numbers stay
            weight = weight.to(dtype)
        _replace_(_holders(model), old, weight if on_weight is None else on_weight(model, module_name, weight))


def _drop_redundant_(
    model: LanguageModel, tensors: StoredTensors, rename: Callable[[str], str], expected: dict[str, Any]
) -> None:
    """Removes what old exporters add: mask buffers, and one of two names for a tied matrix.

    Raises:
        CheckpointError: the config ties head and embedding but the file holds two different matrices.
    """
    for name in [n for n in tensors if n.endswith(model.family.stored_ignored)]:
        del tensors[name]
    if not model.config.tied_head:
        return
    embedding, head = rename(f"{model.embedding_name}.weight"), f"{model.head_name}.weight"
    if head not in tensors:
        return
    if embedding not in tensors and f"{model.embedding_name}.weight" in expected:
        tensors.rename_(head, embedding)  # safetensors keeps one of two shared names
        return
    if embedding in tensors:
        first, second = tensors[head], tensors[embedding]
        is_same = first.dtype == second.dtype and torch.equal(first, second)
    else:
        is_same = True
    if not is_same:
        raise CheckpointError(
            f"config.json ties the head to the embedding, but {head} and {embedding} differ",
            'Set "tie_word_embeddings": false in config.json',
        )
    del tensors[head]


def _retie_(model: LanguageModel) -> None:
    if model.config.tied_head:
        embedding = model.embedding
        model.head.weight = embedding.weight
