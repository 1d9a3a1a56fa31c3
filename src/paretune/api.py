"""The Python API: `load`, `generate`, `evaluate`, `bench`, `tune` (and `Recipe`), reached as `paretune.NAME`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from paretune import clock, native_build
from paretune.engine import session, speculation
from paretune.engine.dispatch import Dispatcher
from paretune.engine.generate import generate as run_generate
from paretune.engine.plan import is_plan
from paretune.engine.runners.base import Runner
from paretune.engine.sampling import SamplingOptions
from paretune.engine.speculation import Speculator
from paretune.errors import UsageError
from paretune.evaluate import texts
from paretune.evaluate.perplexity import Perplexity, perplexity
from paretune.model.tokenizer import Tokenizer
from paretune.recipe import Recipe
from paretune.records.bench import BenchResult
from paretune.records.tune import TuneResult

DEFAULT_BENCH = ("baseline", "bf16", "int8")
DEFAULT_CONTEXT = 1024  # tokens; GPT-2's published protocol


@dataclass(frozen=True)
class Generated:
    """What became of one prompt. `str()` of it is the new text.

    Args:
        text: new text, cut before a stop string.
        tokens: new ids, an end token included.
        finish_reason: length, eos or stop.
        prompt: ids of the prompt.
        ttft_sec: start of the call to the first token, of the whole batch.
        chosen: form of a plan with a table that ran it, and why; None where there was no choice.
        tpot_sec: per step after the first, of the whole batch; None for fewer than two tokens.
        tokenize_sec: of the whole batch, apart from the others.
        speculation: what proposed tokens and how often it was right, of all calls so far; None: plain decoding.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt: list[int]
    ttft_sec: float
    tpot_sec: float | None
    tokenize_sec: float
    chosen: dict[str, str] | None = None
    speculation: dict[str, Any] | None = None

    def __str__(self) -> str:
        return self.text


class Model:
    """A model under a recipe, ready to run.

    Args:
        runner: what executes it.
        tokenizer: the folder's; None where it has none (`model(tokens)` works without).
        recipe: what was applied.
        folder: the checkpoint that was loaded.
        forms: of a plan with a table: they stand in for `runner` where a request asks for it or is faster so.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        recipe: Recipe,
        folder: Path,
        forms: Dispatcher | None = None,
    ) -> None:
        self.runner, self.tokenizer, self.recipe, self.folder, self.forms = runner, tokenizer, recipe, folder, forms
        self._speculators: dict[tuple[Any, ...], Speculator | None] = {}

    def __repr__(self) -> str:
        return f"<paretune.Model {self.folder.name}: {self.recipe.name}>"

    def model(self, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Logits `[B, T, V]` of `tokens[B, T]`, through the recipe's runner with a fresh cache.

        Raises:
            UsageError: no tokens, more than the context, or ids that the model does not have.
        """
        config: Any = self.runner.config
        tokens = torch.as_tensor(tokens, dtype=torch.int64)
        if tokens.dim() != 2 or not tokens.numel():
            raise UsageError(f"tokens have the shape {list(tokens.shape)}", "Pass ids of the shape [batch, time]")
        if tokens.size(1) > config.longest:
            raise UsageError(f"{tokens.size(1)} tokens exceed the context of {config.n_positions}", "Pass fewer")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= config.vocab_size:
            bad = low if low < 0 else high
            raise UsageError(f"token {bad} is not in the vocabulary of {config.vocab_size}", "Check the tokenizer")
        cache = self.runner.new_cache(*tokens.shape)
        return self.runner.forward(tokens.to(self.runner.device), cache, "all")

    @overload
    def generate(self, prompt: str, max_new_tokens: int = ..., **options: Any) -> Generated: ...
    @overload
    def generate(self, prompt: Sequence[str], max_new_tokens: int = ..., **options: Any) -> list[Generated]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 50,
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        on_text: Callable[[int, str], None] | None = None,
        quality: str = "plan",
        speculate: str | None = None,
        draft_tokens: int | None = None,
        **sampling: Any,
    ) -> Generated | list[Generated]:
        """Continues one prompt, or several in one batch; each gets what it would get alone.

        Args:
            on_text: called with (row, piece) as text becomes certain.
            quality: of a plan with a table of forms, which may run: plan, lossless or bounded.
            speculate: what proposes tokens: auto, off, lookup, suffix, draft=MODEL, self=int4, exit=N; None: as the
                recipe has it. The text is the same.
            draft_tokens: proposed at most in a step.
            sampling: fields of `SamplingOptions`: temperature, top_k, top_p, min_p, repetition_penalty, seed.

        Raises:
            UsageError: an empty prompt, one that does not fit, or an unknown option.
        """
        known = [f.name for f in dataclasses.fields(SamplingOptions)]
        unknown = sorted(set(sampling) - set(known))
        if unknown:
            raise UsageError(f"generate has no option {unknown[0]!r}", f"Known: {', '.join(known)}")
        tokenizer = self._need_tokenizer()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not all(prompts):
            raise UsageError("the prompt is empty", "Pass at least one word")
        started = clock.now()
        ids = [tokenizer.encode(p) for p in prompts]
        tokenize_sec = clock.now() - started
        runner, choice = self.runner, None
        if self.forms is not None:
            length = max(map(len, ids)) + max_new_tokens
            runner, choice = self.forms.runner_for(len(ids), length, quality)
        elif quality != "plan":
            raise UsageError(f"quality is {quality!r}, and there is no choice of forms here", "Leave it out")
        speculator = self.speculator(runner, speculate, draft_tokens)
        result = run_generate(
            runner,
            ids,
            max_new_tokens,
            SamplingOptions(**sampling),
            tokenizer=tokenizer,
            stop=[stop] if isinstance(stop, str) else stop,
            ignore_eos=ignore_eos,
            on_text=on_text,
            speculator=speculator,
        )
        times = (result.timing.ttft_sec, result.tpot_sec, tokenize_sec)
        chosen = None if choice is None else choice.to_json()
        about = None if speculator is None else speculator.report()
        out = [
            Generated(g.text, g.tokens, g.finish_reason, g.prompt, *times, chosen, about) for g in result.generations
        ]
        return out[0] if isinstance(prompt, str) else out

    def speculator(self, runner: Runner, text: str | None, most: int | None = None) -> Speculator | None:
        """What proposes tokens to a runner of this model; made once, so that it goes on with what it has learned."""
        key = (id(runner), text, most)
        if key not in self._speculators:
            self._speculators[key] = speculation.for_recipe(self.recipe, runner, self.folder, text, most)
        return self._speculators[key]

    def _need_tokenizer(self) -> Tokenizer:
        return self.tokenizer or Tokenizer(self.folder)  # the second says what is missing


def load(name: str | Path, recipe: Recipe | str | None = None, device: str = "cpu", *, spare_bytes: int = 0) -> Model:
    """Loads a model folder, hub id, plan or `pocket`.

    PyTorch's thread count is left as it is, unless the recipe sets one.

    Args:
        recipe: a `Recipe`, a preset's name or a recipe file; default the plan's own, else the baseline.
        spare_bytes: for second copies of a plan's weights, where its table has forms that need one.

    Raises:
        UsageError: an unknown model or recipe, a recipe beside a plan, or one that cannot run here.
        CheckpointError: the folder cannot be loaded as it is.
    """
    opened = session.open(name, recipe, device, is_alone=True)
    loaded = opened.load()
    for note in opened.notes():
        native_build.say(note)
    tokenizer = opened.tokenizer() if opened.has_tokenizer else None
    return Model(loaded.runner, tokenizer, opened.recipe, opened.folder, opened.forms(loaded, spare_bytes))


@overload
def generate(name: str | Path, prompt: str, **options: Any) -> Generated: ...
@overload
def generate(name: str | Path, prompt: Sequence[str], **options: Any) -> list[Generated]: ...


def generate(
    name: str | Path,
    prompt: str | Sequence[str],
    *,
    recipe: Recipe | str | None = None,
    device: str = "cpu",
    **options: Any,
) -> Generated | list[Generated]:
    """`load(name, recipe, device).generate(prompt, **options)`; load once yourself to generate more than once."""
    return load(name, recipe, device).generate(prompt, **options)


def evaluate(
    name: str | Path,
    text_file: str | Path | None = None,
    *,
    recipe: Recipe | str | None = None,
    device: str = "cpu",
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
) -> Perplexity:
    """Perplexity of a model on a text in rolling windows.

    Args:
        text_file: UTF-8; default the embedded articles and stories that the search uses.
        context: tokens a window shows; default 1024, or what the model has.
        stride: tokens a window advances; default half of `context`, `context` itself means no overlap.
    """
    text = texts.text_of("search") if text_file is None else texts.read_text(text_file)
    model = load(name, recipe, device)
    shape: Any = model.runner.config
    longest: int = shape.n_positions
    context = min(DEFAULT_CONTEXT, longest) if context is None else context
    if context > longest:
        raise UsageError(f"context {context} exceeds the model's {longest}", "Use less")
    return perplexity(
        model.runner,
        model._need_tokenizer().encode(text),
        context=context,
        stride=max(1, context // 2) if stride is None else stride,
        n_bytes=len(text.encode("utf-8")),
        text_name="paretune-search" if text_file is None else Path(text_file).name,
        batch_size=batch_size,
    )


def bench(name: str | Path = "pocket", configs: Sequence[str | Recipe] = DEFAULT_BENCH, **options: Any) -> BenchResult:
    """Measures configurations against each other in interleaved blocks.

    Args:
        name: a model; of a plan, its own recipe is measured too, as `plan`.
        configs: presets, recipe files or recipes; the first, or `baseline`, is what the others are compared with.
        options: of `paretune.measure.bench.bench`: input_lens, output_lens, batch_sizes, budget_sec, ...

    Returns:
        what `paretune bench --json` prints, as a record (`records.to_json` makes it plain data).
    """
    from paretune.measure import bench as measure

    names = [*configs, *([session.PLAN] if is_plan(name) else [])]
    sides = session.compare(name, names, options.get("device", "cpu"))
    if sides.folders:
        options = {"folders": sides.folders, "tables": sides.tables, **options}
    return measure.bench(sides.folder, sides.configs, **options)


def tune(
    name: str | Path,
    output_dir: str | Path,
    *,
    text: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
    **goal: Any,
) -> TuneResult:
    """Finds the fastest recipe within a quality bound and writes a plan into `output_dir`.

    Args:
        text: a UTF-8 file for quality; default the embedded pieces.
        resume: continue a run that was cut off.
        force: replace an earlier run in the folder.
        goal: fields of `tune.goal.Goal`: objective, max_ppl_increase, budget_sec, ...

    Returns:
        what `paretune tune --json` prints, as a record (`records.record.to_json` makes it plain data).

    Raises:
        UsageError: an unknown field, or a folder that holds an earlier run.
    """
    from paretune.tune.goal import Goal
    from paretune.tune.run import run

    known = [f.name for f in dataclasses.fields(Goal)]
    unknown = sorted(set(goal) - set(known))
    if unknown:
        raise UsageError(f"tune has no option {unknown[0]!r}", f"Known: {', '.join(known)}")
    return run(
        str(name),
        Goal(**goal),
        Path(output_dir),
        text=None if text is None else Path(text),
        resume=resume,
        force=force,
        say=(lambda line: None) if quiet else native_build.say,
    )
