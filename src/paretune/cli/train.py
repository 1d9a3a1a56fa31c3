"""`paretune train`: language-model training from text files, from a checkpoint or from random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from paretune.model.config import ModelConfig

NEW = "new"
SHAPE_FLAGS = ("n_layer", "n_head", "n_embd", "n_positions")


def train(
    model: Annotated[
        str,
        typer.Argument(help="Folder, hub id, `pocket`, or random weights: `new` with --n-layer .., `new:gpt2`."),
    ] = "pocket",
    text: Annotated[
        list[Path] | None, typer.Option(help="Text file, or folder of *.txt; may be given several times.")
    ] = None,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Where the model, train.json and loss.png go.")
    ] = Path("paretune-train"),
    steps: Annotated[int, typer.Option(help="Updates.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.")] = 8,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens in a window. [default: 512, or what the model allows]")
    ] = None,
    grad_accumulation: Annotated[int, typer.Option(help="Forward passes in one update.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    min_learning_rate: Annotated[float, typer.Option(help="Last rate, as a fraction of the peak.")] = 0.05,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Updates of linear warm-up. [default: a tenth, at most 100]")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="AdamW's decay, on matrices alone.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Longest gradient (L2 norm).")] = 1.0,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 (autocast) or auto: bf16 where it is faster here.")] = "auto",
    save_dtype: Annotated[str, typer.Option(help="Of the finished model: fp32, fp16 or bf16.")] = "fp16",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    heldout_fraction: Annotated[
        float, typer.Option(help="Part of the texts that is held out, chosen by name; 0: none.")
    ] = 0.05,
    heldout: Annotated[
        list[str] | None, typer.Option(help="Hold out the text of this name instead; may be repeated.")
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Score held-out text every so many updates; 0: first and last.")] = 0,
    eval_windows: Annotated[int, typer.Option(help="Held-out windows to score; 0: all.")] = 64,
    checkpoint_every: Annotated[int, typer.Option(help="Checkpoint every so many updates; 0: on Ctrl-C only.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in -o.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the model.")] = False,
    seed: Annotated[int, typer.Option(help="Of the batches and of random weights.")] = 0,
    n_layer: Annotated[int | None, typer.Option(help="new: layers.")] = None,
    n_head: Annotated[int | None, typer.Option(help="new: heads.")] = None,
    n_embd: Annotated[int | None, typer.Option(help="new: width.")] = None,
    n_positions: Annotated[int | None, typer.Option(help="new: longest sequence. [default: 1024]")] = None,
    vocab_from: Annotated[str, typer.Option(help="new: model whose tokenizer is taken.")] = "pocket",
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where token streams are kept. [default: the user's cache]")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: physical cores]")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Trains a language model on text and writes a model folder."""
    import sys

    from paretune import hardware, native_build
    from paretune.errors import UsageError
    from paretune.model import checkpoint
    from paretune.train import data, loop

    if not text:
        raise UsageError("there is no text to train on", "Pass --text FILE or --text FOLDER")
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_positions": n_positions}
    fresh = model == NEW or model.startswith(f"{NEW}:")
    given = [name for name, value in shape.items() if value is not None]
    if given and not fresh:
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for random weights, and MODEL is {model!r}", "Use MODEL `new`"
        )
    hardware.set_threads(threads)
    tokenizer_folder = checkpoint.resolve(vocab_from if fresh else model)
    config = _new_config(model, shape, tokenizer_folder) if fresh else checkpoint.read_config(tokenizer_folder)
    options = loop.TrainOptions(  # wrong flags fail here, before the text is read
        learning_rate=learning_rate,
        min_learning_rate=min_learning_rate,
        weight_decay=weight_decay,
        clip=clip,
        steps=steps,
        warmup_steps=min(100, steps // 10) if warmup_steps is None else warmup_steps,
        batch_size=batch_size,
        block_size=min(512, config.n_positions) if block_size is None else block_size,
        grad_accumulation=grad_accumulation,
        dtype=checkpoint.DTYPE_ALIASES.get(dtype, dtype),
        seed=seed,
        eval_every=eval_every,
        eval_windows=eval_windows,
        checkpoint_every=checkpoint_every,
        compile=compile,
        device=("cuda" if hardware.has_cuda() else "cpu") if device == "auto" else device,
    )
    if options.device.startswith("cuda") and not hardware.has_cuda():
        raise UsageError(f"--device {device}, and there is no usable GPU", "Use --device cpu")
    data.find_checkpoint(output_dir, resume)  # a folder in use fails now, not after the text has been encoded

    kept, held = data.split_heldout(data.find_documents(text), heldout_fraction, heldout or ())
    cache = cache_dir or native_build.cache_folder() / "tokens"
    say = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr))
    stream = data.load_stream(kept, tokenizer_folder, cache)
    heldout_stream = data.load_stream(held, tokenizer_folder, cache) if held else None
    say(f"training on {len(kept)} texts, {len(stream.tokens):,} tokens; held out: {_names(held)}")
    net = checkpoint.new(config, seed) if fresh else checkpoint.load(tokenizer_folder)
    progress = None if quiet else _Progress()
    try:
        result = loop.train(
            net,
            tokenizer_folder,
            stream,
            heldout_stream,
            options,
            output_dir,
            resume,
            progress,
            save_dtype=save_dtype,
            command=sys.argv,
        )
    except KeyboardInterrupt:
        say(f"\ninterrupted; go on with the same command and --resume ({output_dir} holds the checkpoint)")
        raise
    finally:
        if progress:
            progress.end()
    _write_picture(output_dir, result.points)
    print(_summary(result, net))


def _new_config(name: str, shape: dict[str, int | None], tokenizer_folder: Path) -> ModelConfig:
    """The GPT-2 config of `new` or `new:SIZE` with the flags' shapes and the tokenizer's vocabulary.

    Raises:
        UsageError: an unknown size, or a shape that is missing.
        CheckpointError: shapes that do not go together.
    """
    from paretune.errors import UsageError
    from paretune.model import checkpoint
    from paretune.model.config import ModelConfig
    from paretune.model.tokenizer import Tokenizer
    from paretune.train.data import end_of_text_id

    size = name.partition(":")[2]
    hf: dict[str, Any] = dict(checkpoint.gpt2_config(size or "gpt2").to_hf())
    missing = [flag for flag in ("n_layer", "n_head", "n_embd") if shape[flag] is None]
    if not size and missing:
        flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in missing)
        raise UsageError(f"MODEL {name!r} needs {flags}", "Or name a size, such as new:gpt2")
    tokenizer = Tokenizer(tokenizer_folder)
    end = end_of_text_id(tokenizer)
    hf |= {key: value for key, value in shape.items() if value is not None}
    hf |= {"vocab_size": tokenizer.vocab_size, "bos_token_id": end, "eos_token_id": end}
    return ModelConfig.from_hf(hf, "the new model")


class _Progress:
    """A line on stderr: rewritten in place on a terminal, else a new one every 10 seconds."""

    def __init__(self) -> None:
        import sys

        self._stream = sys.stderr
        self._in_place = self._stream.isatty()
        self._last_sec = float("-inf")
        self._open = False

    def __call__(self, p: dict[str, Any]) -> None:
        from paretune import clock

        every = 0.2 if self._in_place else 10.0
        if clock.now() - self._last_sec < every and p["step"] != p["steps"]:
            return
        self._last_sec = clock.now()
        bits = p["heldout_bits_per_byte"]
        line = (
            f"step {p['step']}/{p['steps']}  loss {p['loss']:.3f}  lr {p['lr']:.2e}"
            + ("" if bits is None else f"  held-out {bits:.3f} bits/byte")
            + ("" if p["tokens_per_sec"] is None else f"  {p['tokens_per_sec']:,.0f} tok/s")
            + f"  ETA {_duration(p['eta_sec'])}"
        )
        if self._in_place:
            print(f"\r\x1b[K{line}", end="", file=self._stream, flush=True)
            self._open = True
        else:
            print(line, file=self._stream, flush=True)

    def end(self) -> None:
        """Leaves the line, so that what is printed next starts on its own."""
        if self._open:
            print(file=self._stream)
            self._open = False


def _write_picture(folder: Path, points: Any) -> None:
    from paretune.files import write_bytes
    from paretune.report import plots

    write_bytes(folder / "loss.png", plots.loss_curve(points, fmt="png"))


def _summary(result: Any, net: nn.Module) -> str:
    n = sum(p.numel() for p in net.parameters())
    before, after = result.first_heldout_bits_per_byte, result.heldout_bits_per_byte
    lines = [
        f"{result.folder}: {n:,} parameters, {result.steps} updates in {_duration(result.elapsed_sec)} "
        f"({result.dtype}, {result.tokens_per_sec:,.0f} tokens/s)",
        f"loss of the last batch: {result.loss:.4f} nats per token",
    ]
    if before is not None and after is not None:
        lines.append(f"held-out text: {before:.4f} -> {after:.4f} bits per byte")
    return "\n".join(lines)


def _names(documents: Any) -> str:
    names = [d.name for d in documents]
    if not names:
        return "none (one text alone; pass several, or --heldout)"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _duration(sec: float) -> str:
    minutes, seconds = divmod(round(sec), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"
