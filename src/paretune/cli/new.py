"""`paretune new`: a model folder with random weights, for measuring speed where no trained weights are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from paretune.model.config import ModelConfig

DEFAULT_TOKENIZER = "pocket"
SLACK_BYTES = 16 << 20  # tokenizer, config, directory entries


def new(
    source: Annotated[
        str,
        typer.Argument(
            help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, a config.json (any supported family), or a model folder."
        ),
    ],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="The folder to make.")],
    random: Annotated[bool, typer.Option("--random", help="Draw the weights; there is no other source.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the weights.")] = 0,
    n_positions: Annotated[
        int | None, typer.Option(min=1, max=1 << 24, help="Longest sequence. [default: the config's]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the stored weights: fp32, fp16 or bf16.")] = "fp32",
    tokenizer_from: Annotated[
        str | None,
        typer.Option(help="Model whose tokenizer is taken. [default: the source's own, else pocket's]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder of that name.")] = False,
) -> None:
    """Makes a model folder with random weights, whole or not at all."""
    from paretune.errors import UsageError
    from paretune.files import whole_folder
    from paretune.model import checkpoint

    if not random:
        raise UsageError(
            "`new` makes random weights only, and --random was not given",
            "Pass --random; trained weights come from a model folder or a hub id",
        )
    target = output_dir.expanduser().resolve()
    stored = checkpoint.dtype_of(dtype)
    config = _config(source, n_positions)
    tokenizer, own, tokenizer_name = _tokenizer(source, tokenizer_from, config.vocab_size)
    n_parameters = _count_parameters(config, source)
    n_bytes = n_parameters * stored.itemsize
    if force and target.exists() and not (target / "config.json").is_file():
        raise UsageError(
            f"{target} is not a model folder: --force does not replace it", "Choose another folder with -o"
        )
    _check_room(target, n_parameters, n_bytes)

    with whole_folder(target, overwrite=force) as folder:
        model = checkpoint.new(config, seed).to(stored)
        checkpoint.save(model, folder, tokenizer)
        if tokenizer is not None and not own:  # its end tokens are those of another model
            (folder / "generation_config.json").unlink(missing_ok=True)
    print(
        f"{output_dir}: {config.family}, {n_parameters:,} random parameters (seed {seed}), {dtype}, "
        f"{n_bytes / 1e6:,.1f} MB, context {config.n_positions}, {tokenizer_name}"
    )


def _config(source: str, n_positions: int | None) -> ModelConfig:
    """The shapes that `source` names.

    Raises:
        UsageError: it names nothing.
        CheckpointError: the config is damaged or not supported.
    """
    import json

    from paretune.errors import CheckpointError, UsageError
    from paretune.model import checkpoint
    from paretune.model.config import ModelConfig

    path = Path(source).expanduser()
    if source in checkpoint.published_sizes():
        config = checkpoint.published(source)
    elif checkpoint.is_named(source) or path.is_dir():
        config = checkpoint.read_config(checkpoint.resolve(source))
    elif path.is_file():
        try:
            hf: Any = json.loads(path.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not valid JSON ({error})", "Correct the file") from None
        if not isinstance(hf, dict):
            raise CheckpointError(f"{path} is not a JSON object", "Pass a model's config.json")
        config = ModelConfig.from_hf(hf, str(path))
    else:
        sizes = ", ".join(checkpoint.published_sizes())
        raise UsageError(
            f"{source!r} is neither a size, a file nor a folder",
            f"Pass one of {sizes}, a config.json or a model folder",
        )
    return config if n_positions is None else config.with_positions(n_positions)


def _tokenizer(source: str, wanted: str | None, vocab_size: int) -> tuple[Path | None, bool, str]:
    """The folder to copy the tokenizer from, whether it is the source's own, and its description.

    Raises:
        UsageError: the wanted one gives ids that the model does not have.
    """
    from paretune.errors import CheckpointError, UsageError
    from paretune.model import checkpoint
    from paretune.model.tokenizer import Tokenizer

    if wanted is not None:
        folder = checkpoint.resolve(wanted)
        size = Tokenizer(folder).vocab_size
        if size > vocab_size:
            raise UsageError(
                f"the tokenizer of {wanted} has {size:,} tokens, the model's vocabulary {vocab_size:,}",
                "Choose another --tokenizer-from",
            )
        return folder, False, f"tokenizer of {wanted}"
    candidates = [(checkpoint.resolve(DEFAULT_TOKENIZER), False, f"tokenizer of {DEFAULT_TOKENIZER}")]
    path = Path(source).expanduser()
    if checkpoint.is_named(source):
        candidates.insert(0, (checkpoint.resolve(source), True, "its own tokenizer"))
    elif source not in checkpoint.published_sizes():  # a folder, or a config.json beside its tokenizer
        candidates.insert(0, (path if path.is_dir() else path.parent, True, "its own tokenizer"))
    for folder, own, description in candidates:
        try:
            if Tokenizer(folder).vocab_size <= vocab_size:
                return folder, own, description
        except CheckpointError:
            continue
    return None, False, "no tokenizer (none fits the vocabulary; see --tokenizer-from)"


def _count_parameters(config: ModelConfig, source: str) -> int:
    from paretune.errors import UsageError
    from paretune.model import checkpoint

    try:
        model: nn.Module = checkpoint.build(config)
    except (RuntimeError, OverflowError):  # sizes beyond 64 bits
        raise UsageError(f"{source} describes a model too large to address", "Correct its sizes") from None
    return sum(p.numel() for p in model.parameters())


def _check_room(target: Path, n_parameters: int, n_bytes: int) -> None:
    """Refuses before the work what cannot be finished.

    Raises:
        ParetuneError: too little memory or disk.
    """
    import shutil

    from paretune import hardware
    from paretune.errors import ParetuneError

    # The weights are drawn in fp32, and saving transposes some of them into a copy.
    needed, free = 4 * n_parameters + n_bytes, hardware.available_memory_bytes()
    if needed > free:
        raise ParetuneError(
            f"the model needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free", "Make a smaller one"
        )
    place = next(p for p in [target, *target.parents] if p.exists())
    room = shutil.disk_usage(place).free
    if n_bytes + SLACK_BYTES > room:
        raise ParetuneError(
            f"the model needs {n_bytes / 1e9:.2f} GB of disk, {place} has {room / 1e9:.2f} GB free",
            "Free some space, choose another folder with -o, or --dtype fp16",
        )
