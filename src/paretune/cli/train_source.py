"""What `paretune train` learns from: the flags of a task made into a source, a teacher, a converted model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretune.cli.pair_options import PairFlags
    from paretune.evaluate.pairs import PairSet
    from paretune.model.base import LanguageModel
    from paretune.model.config import ModelConfig
    from paretune.recipe import Recipe
    from paretune.train.objective import Teacher
    from paretune.train.pairs import PairSource
    from paretune.train.schedule import TrainOptions
    from paretune.train.source import TextSource

Say = Callable[[str], None]
MAX_HELDOUT_PAIRS = 200  # as many as the published attention study held out


@dataclass(frozen=True)
class SummaryFlags:
    """The flags of `--task summarization` that say what is learnt."""

    pairs: PairFlags
    n_heldout: int | None
    n_train: int | None
    prefix: str | None
    suffix: str | None
    max_len: int | None
    eos: str


def text(
    paths: Sequence[Path], fraction: float, explicit: Sequence[str], tokenizer: Path, cache: Path, say: Say
) -> TextSource:
    """The token streams of training and held-out texts."""
    from paretune.train import data
    from paretune.train.source import TextSource

    kept, held = data.split_heldout(data.find_documents(paths), fraction, explicit)
    stream = data.load_stream(kept, tokenizer, cache)
    heldout = data.load_stream(held, tokenizer, cache) if held else None
    say(f"training on {len(kept)} texts, {len(stream.tokens):,} tokens; held out: {_names([d.name for d in held])}")
    return TextSource(stream, heldout)


def pairs(flags: SummaryFlags, tokenizer: Path, config: Any, seed: int, say: Say) -> PairSource:
    """The pairs as tokens, a part of them held out; what was cut or skipped is said."""
    from paretune.model.prompt import MAX_LEN, PromptFormat
    from paretune.train.pairs import pair_source

    limit = min(MAX_LEN, config.n_positions) if flags.max_len is None else flags.max_len
    texts = {"prefix": flags.prefix, "suffix": flags.suffix}
    given = {k: v.replace("\\n", "\n") for k, v in texts.items() if v is not None}
    form = PromptFormat(max_len=limit, eos=flags.eos, max_new_tokens=max(1, min(64, limit // 4)), **given)
    train, heldout = split(flags, seed)
    source = pair_source(train, heldout, tokenizer, form)
    say("; ".join(source.said))
    return source


def split(flags: SummaryFlags, seed: int) -> tuple[PairSet, PairSet]:
    """Training and held-out pairs of a file, or of the project's own pieces (52 of each)."""
    from paretune.errors import UsageError
    from paretune.evaluate.pairs import own_pairs

    for flag, n in (("--heldout-pairs", flags.n_heldout), ("--train-pairs", flags.n_train)):
        if n is not None and n < (flag == "--train-pairs"):
            raise UsageError(f"{flag} is {n}", "Give more")
    found = flags.pairs.read()
    if found is None:
        train, heldout = own_pairs("search"), own_pairs("confirm")
        heldout = heldout if flags.n_heldout is None else heldout.take(flags.n_heldout, seed)
    else:
        n = min(MAX_HELDOUT_PAIRS, len(found) // 5) if flags.n_heldout is None else flags.n_heldout
        train, heldout = found.split(n, seed)
    return train if flags.n_train is None else train.take(flags.n_train, seed), heldout


def steps_of(n_examples: int, epochs: float, options: TrainOptions) -> int:
    """Updates in so many passes over the pairs."""
    from paretune.errors import UsageError

    if not epochs > 0:
        raise UsageError(f"--epochs is {epochs:g}", "Give more than 0")
    return max(1, round(epochs * n_examples / (options.batch_size * options.grad_accumulation)))


def teacher(name: str | None, weight: float, temperature: float, device: str) -> Teacher | None:
    """The model that is distilled, loaded in fp32."""
    if name is None:
        return None
    import torch

    from paretune.model import checkpoint
    from paretune.train import data
    from paretune.train.objective import Teacher

    folder = checkpoint.resolve(name)
    key = "-".join(data.sha256(f)[:16] for f in checkpoint.weight_files(folder))
    net = checkpoint.load(folder, torch.float32).to(device)
    return Teacher(net.eval().requires_grad_(False), key, weight, temperature)


def attention_of(config: str | None, device: str, shape: ModelConfig) -> Recipe | None:
    """The recipe whose attention a model is trained with; None where none is named.

    Raises:
        UsageError: it does more than change attention, or cannot be trained or had with this model here.
    """
    if config is None:
        return None
    from paretune.errors import UsageError
    from paretune.recipe import preset
    from paretune.transforms.base import Stage

    recipe = preset(config)
    other = [t.title for t in recipe.transforms if t.stage > Stage.ATTENTION]
    if other or not recipe.runner_class.trainable:
        what = other[0] if other else f"the {recipe.engine.runner} runner"
        raise UsageError(f"--config {config}: {what} cannot be trained", "Name a recipe that changes attention alone")
    if reason := next((reason for t in recipe.transforms if (reason := t.trains(device))), None):
        raise UsageError(
            f"--config {config}: {reason}", "Name one with another attention function, or use --device cuda"
        )
    recipe.check(device, shape)
    return recipe


def converted(net: LanguageModel, recipe: Recipe | None, device: str, say: Say) -> LanguageModel:
    """The model with the attention of a recipe; unchanged where there is none."""
    if recipe is None:
        return net
    from paretune.transforms.base import Context

    say(f"attention: {recipe.name}")
    return recipe.apply(net, Context(device=device))


def _names(names: Sequence[str]) -> str:
    if not names:
        return "none (one text alone; pass several, or --heldout)"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
