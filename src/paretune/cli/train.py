"""`paretune train`: on text files or on article/summary pairs, from a checkpoint or from random weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.pair_options import ArticleColumn, PairFlags, Pairs, SummaryColumn

if TYPE_CHECKING:
    from torch import nn

    from paretune.model.config import ModelConfig

NEW = "new"
TASKS = ("language-model", "summarization")


def train(
    model: Annotated[
        str,
        typer.Argument(help="Folder, hub id, `pocket`, or random weights: `new` with --n-layer .., `new:gpt2`."),
    ] = "pocket",
    text: Annotated[
        list[Path] | None, typer.Option(help="Text file, or folder of *.txt; may be given several times.")
    ] = None,
    task: Annotated[str, typer.Option(help="language-model (--text), or summarization (--pairs).")] = "language-model",
    pairs: Pairs = None,
    article_column: ArticleColumn = None,
    summary_column: SummaryColumn = None,
    heldout_pairs: Annotated[
        int | None, typer.Option(help="Pairs to hold out, drawn by --seed. [default: a fifth, at most 200]")
    ] = None,
    train_pairs: Annotated[int | None, typer.Option(help="Train on at most so many pairs. [default: all]")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the pairs, in place of --steps. [default: 1]")
    ] = None,
    max_len: Annotated[
        int | None, typer.Option(help="Tokens of article and summary; longer articles are cut. [default: 512]")
    ] = None,
    prompt_prefix: Annotated[str | None, typer.Option(help="Text before the article.")] = None,
    prompt_suffix: Annotated[
        str | None, typer.Option(help="Text after it; \\n is a new line. [default: TL;DR:]")
    ] = None,
    eos: Annotated[str, typer.Option(help="End token after each `summary`, or each `sentence` of it.")] = "summary",
    config: Annotated[
        str | None, typer.Option(help="Preset or recipe file whose attention the model is converted to first.")
    ] = None,
    distill: Annotated[str | None, typer.Option(help="Teacher: a model folder or `pocket`.")] = None,
    distill_weight: Annotated[float, typer.Option(help="Share of the teacher in the loss.")] = 0.5,
    distill_temperature: Annotated[float, typer.Option(help="Softens both distributions.")] = 2.0,
    seeds: Annotated[int, typer.Option(help="Runs, of --seed and the following, each in a folder seed-N.")] = 1,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Where the model, train.json and loss.png go.")
    ] = Path("paretune-train"),
    steps: Annotated[int | None, typer.Option(help="Updates. [default: 1000; of pairs, --epochs]")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows or pairs in one forward pass.")] = 8,
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
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16 or fp16 (autocast, fp16 on a GPU), auto: bf16 where it is faster here.")
    ] = "auto",
    save_dtype: Annotated[str, typer.Option(help="Of the finished model: fp32, fp16 or bf16.")] = "fp16",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    heldout_fraction: Annotated[
        float, typer.Option(help="Fraction of the texts to hold out, chosen by name; 0: none.")
    ] = 0.05,
    heldout: Annotated[
        list[str] | None, typer.Option(help="Hold out the text of this name instead; may be repeated.")
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Score held-out text every so many updates; 0: first and last.")] = 0,
    eval_windows: Annotated[int, typer.Option(help="Held-out windows or pairs to score; 0: all.")] = 64,
    patience: Annotated[
        int, typer.Option(help="Keep the best weights, and stop after so many evaluations without a gain; 0: neither.")
    ] = 0,
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
    """Trains a language model on text, or on summaries, and writes a model folder."""
    from paretune import hardware, native_build
    from paretune.cli import train_source
    from paretune.errors import UsageError
    from paretune.model import checkpoint
    from paretune.train import data, loop

    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}", f"Known: {', '.join(TASKS)}")
    of_pairs = task == "summarization"
    pair_flags: dict[str, Any] = {"pairs": pairs, "epochs": epochs, "max-len": max_len, "heldout-pairs": heldout_pairs}
    pair_flags |= {"train-pairs": train_pairs, "prompt-prefix": prompt_prefix, "prompt-suffix": prompt_suffix}
    _refuse_flags(of_pairs, {"text": text, "block-size": block_size, "heldout": heldout}, pair_flags)
    if not text and not of_pairs:
        raise UsageError("there is no text to train on", "Pass --text FILE or --text FOLDER")
    if seeds < 1:
        raise UsageError(f"--seeds is {seeds}", "Give 1 or more")
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_positions": n_positions}
    fresh = model == NEW or model.startswith(f"{NEW}:")
    given = [name for name, value in shape.items() if value is not None]
    if given and not fresh:
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for random weights, and MODEL is {model!r}", "Use MODEL `new`"
        )
    hardware.set_threads(threads)
    tokenizer_folder = checkpoint.resolve(vocab_from if fresh else model)
    config_ = _new_config(model, shape, tokenizer_folder) if fresh else checkpoint.read_config(tokenizer_folder)
    device = ("cuda" if hardware.has_cuda() else "cpu") if device == "auto" else device
    if device.startswith("cuda") and not hardware.has_cuda():
        raise UsageError(f"--device {device}, but there is no usable GPU", "Use --device cpu")
    if device == "cpu" and checkpoint.DTYPE_ALIASES.get(dtype, dtype) == "fp16":
        raise UsageError("fp16 training with loss scaling needs a GPU", "Use --dtype bf16 or fp32")
    attention = train_source.attention_of(config, device, config_)
    say = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr))
    # Wrong flags fail here, before the data is read.
    n_steps = 1000 if steps is None else steps
    options = loop.TrainOptions(
        learning_rate=learning_rate,
        min_learning_rate=min_learning_rate,
        weight_decay=weight_decay,
        clip=clip,
        steps=n_steps,
        warmup_steps=min(100, n_steps // 10) if warmup_steps is None else warmup_steps,
        batch_size=batch_size,
        block_size=min(512, config_.n_positions) if block_size is None else block_size,
        grad_accumulation=grad_accumulation,
        dtype=checkpoint.DTYPE_ALIASES.get(dtype, dtype),
        seed=seed,
        eval_every=eval_every,
        eval_windows=eval_windows,
        patience=patience,
        checkpoint_every=checkpoint_every,
        compile=compile,
        device=device,
    )
    folders = [output_dir] if seeds == 1 else [output_dir / f"seed-{seed + i}" for i in range(seeds)]
    for folder in folders:
        # A folder in use fails now, not after the data has been encoded; a finished seed is left as it is.
        if not (resume and seeds > 1):
            data.find_checkpoint(folder, resume)
    source: Any
    if of_pairs:
        source = train_source.pairs(
            train_source.SummaryFlags(
                PairFlags(pairs, article_column, summary_column),
                heldout_pairs,
                train_pairs,
                prompt_prefix,
                prompt_suffix,
                max_len,
                eos,
            ),
            tokenizer_folder,
            config_,
            seed,
            say,
        )
        if steps is None:
            n_steps = train_source.steps_of(len(source.examples), 1.0 if epochs is None else epochs, options)
            warm = min(100, n_steps // 10) if warmup_steps is None else warmup_steps
            options = replace(options, steps=n_steps, warmup_steps=warm)
    else:
        cache = cache_dir or native_build.cache_folder() / "tokens"
        source = train_source.text(text or [], heldout_fraction, heldout or (), tokenizer_folder, cache, say)
    teacher = train_source.teacher(distill, distill_weight, distill_temperature, device)
    results = []
    for i, folder in enumerate(folders):
        if seeds > 1 and resume and (folder / "config.json").is_file():
            say(f"{folder} is finished")
            continue
        net = checkpoint.new(config_, seed + i) if fresh else checkpoint.load(tokenizer_folder)
        net = train_source.converted(net, attention, device, say)
        results.append(
            _fit(
                net,
                tokenizer_folder,
                source,
                replace(options, seed=seed + i),
                folder,
                resume and bool(data.has_checkpoint(folder) or seeds == 1),
                None if quiet else _Progress(),
                say,
                save_dtype=save_dtype,
                teacher=teacher,
            )
        )
    if seeds > 1 and len(results) > 1:
        print(_spread(results))


def _fit(
    net: Any,
    tokenizer_folder: Path,
    source: Any,
    options: Any,
    folder: Path,
    resume: bool,
    progress: _Progress | None,
    say: Callable[[str], None],
    **more: Any,
) -> Any:
    from paretune.train import loop

    try:
        result = loop.fit(net, tokenizer_folder, source, options, folder, resume, progress, command=sys.argv, **more)
    except KeyboardInterrupt:
        say(f"\ninterrupted; go on with the same command and --resume ({folder} holds the checkpoint)")
        raise
    finally:
        if progress:
            progress.end()
    _write_picture(folder, result.points)
    print(_summary(result, net))
    return result


def _refuse_flags(of_pairs: bool, of_text: dict[str, Any], pair_flags: dict[str, Any]) -> None:
    """Flags of the other task are errors, never dropped."""
    from paretune.errors import UsageError

    wrong = [name for name, value in (of_text if of_pairs else pair_flags).items() if value]
    if wrong:
        other = TASKS[0] if of_pairs else TASKS[1]
        raise UsageError(f"--{wrong[0]} belongs to --task {other}", "Leave it out, or choose that task")


def _spread(results: list[Any]) -> str:
    """The held-out loss over seeds: a difference smaller than their spread is not a finding."""
    losses = [r.heldout_loss for r in results if r.heldout_loss is not None]
    if len(losses) < 2:
        return f"{len(results)} seeds"
    mean = sum(losses) / len(losses)
    return f"{len(losses)} seeds: held-out loss {mean:.4f}, from {min(losses):.4f} to {max(losses):.4f} nats per token"


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
    hf: dict[str, Any] = dict(checkpoint.published(size or "gpt2").to_hf())
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
        bits, held = p["heldout_bits_per_byte"], p["heldout_loss"]
        line = (
            f"step {p['step']}/{p['steps']}  loss {p['loss']:.3f}  lr {p['lr']:.2e}"
            + ("" if bits is None else f"  held-out {bits:.3f} bits/byte")
            + ("" if held is None or bits is not None else f"  held-out {held:.3f}")
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
    elif result.heldout_loss is not None:
        first = result.first_heldout_loss
        lines.append(f"held-out summaries: {first:.4f} -> {result.heldout_loss:.4f} nats per token")
    if result.kept_step != result.steps:
        why = "stopped early" if result.stopped_early else "the last update was not the best"
        lines.append(f"{why}: the weights of step {result.kept_step} are kept")
    return "\n".join(lines)


def _duration(sec: float) -> str:
    minutes, seconds = divmod(round(sec), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"
