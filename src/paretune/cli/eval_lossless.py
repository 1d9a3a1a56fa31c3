"""`paretune eval --task lossless`: whether batching, speculation and other configs give the text of plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paretune.engine.session import Session
    from paretune.records.lossless import LosslessResult, Way

N_PROMPTS, NEW_TOKENS, ROWS = 8, 64, 4
SHORTEST, LONGEST = 8, 64  # prompt tokens
DRAFTS = ("lookup", "suffix")
TEMPERATURE, SEED = 0.8, 1


@dataclass(frozen=True)
class LosslessFlags:
    """The flags that say what is decoded. `batch_size`: rows of the ways that decode several at once."""

    path: Path | None
    n_prompts: int = N_PROMPTS
    max_new_tokens: int = NEW_TOKENS
    batch_size: int = ROWS


def eval_lossless(
    model: str,
    sides: Sequence[Session],
    flags: LosslessFlags,
    output_dir: Path | None,
    *,
    json_output: bool,
    threads: int | None,
    quiet: bool,
) -> None:
    """Decodes, compares, prints, and writes eval.json and eval.md.

    Args:
        sides: the configuration alone, or the baseline, which is then the reference, and it.

    Raises:
        ParetuneError: the text is too short for the prompts, or a difference is a bug; all is written then.
    """
    import json
    import sys

    from paretune.engine import speculation
    from paretune.engine.sampling import SamplingOptions
    from paretune.errors import ParetuneError
    from paretune.evaluate import lossless
    from paretune.files import ensure_folder, write_text
    from paretune.measure import environment
    from paretune.model import checkpoint
    from paretune.records import record
    from paretune.records.lossless import LosslessResult

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    first, last = sides[0], sides[-1]
    room = min(one.model_config.longest for one in sides) - flags.max_new_tokens
    prompts, text_name = _prompts(last, flags, room)
    out = None if output_dir is None else ensure_folder(output_dir.expanduser())
    first.set_threads(threads)
    plain = loaded = first.load()
    if last is not first:
        last.set_threads(threads)
        loaded = last.load()
    runner = loaded.runner
    ways: list[Way] = []
    for sampling in (SamplingOptions(), SamplingOptions(temperature=TEMPERATURE, seed=SEED)):
        how = lossless.in_words(sampling)
        first.set_threads(threads)
        say(f"{first.config}, {how}: {len(prompts)} prompts, one at a time")
        known = lossless.reference(plain.runner, prompts, flags.max_new_tokens, sampling)
        last.set_threads(threads)
        changes = last is not first and last.recipe.changes_numbers and not first.recipe.changes_numbers
        same_bits = runner.same_bits_at_any_width and last is first
        plan: list[tuple[str, int, str | None]] = [(last.config, 1, None)] if last is not first else []
        plan += [(f"{last.config}, {flags.batch_size} at once", flags.batch_size, None)]
        plan += [(f"{last.config}+speculate({draft})", 1, draft) for draft in DRAFTS]
        plan += [(f"{last.config}+speculate({DRAFTS[-1]}), {flags.batch_size} at once", flags.batch_size, DRAFTS[-1])]
        for name, rows, draft in plan:
            say(f"{name}, {how}")
            maker = None if draft is None else speculation.for_recipe(loaded.recipe, runner, loaded.folder, draft)
            found = lossless.texts(runner, prompts, flags.max_new_tokens, sampling, rows, maker)
            notes = [] if maker is None else [maker.summary()]
            ways.append(lossless.way(name, known, found, same_bits=same_bits, changes_numbers=changes, notes=notes))
    result = LosslessResult(
        **vars(environment.head(seed=SEED)),
        model={"name": model if checkpoint.is_named(model) else last.folder.name},
        task="lossless",
        config=last.config,
        reference=first.config,
        text=text_name,
        max_new_tokens=flags.max_new_tokens,
        batch_size=flags.batch_size,
        ways=ways,
    )
    page = page_of(result)
    if out is not None:
        record.write(result, out / "eval.json")
        write_text(out / "eval.md", page)
    print(json.dumps(record.to_json(result), indent=2) if json_output else page, end="\n" * json_output)
    if wrong := [w for w in ways if w.verdict == "bug"]:
        raise ParetuneError(
            f"{wrong[0].name} ({wrong[0].sampling}) gives other text than plain decoding, and nothing explains it",
            "Please report it with the lines above",
        )


def _prompts(side: Session, flags: LosslessFlags, room: int) -> tuple[list[list[int]], str]:
    """Prompts of different lengths, from all over the text, and the text's name."""
    from paretune.errors import ParetuneError, UsageError
    from paretune.evaluate import texts

    if room < SHORTEST:
        raise UsageError(
            f"--max-new-tokens is {flags.max_new_tokens}, which leaves no room for prompts in this model's context",
            "Ask for fewer",
        )
    text = texts.text_of("confirm") if flags.path is None else texts.read_text(flags.path)
    name = "paretune-pieces/confirm" if flags.path is None else flags.path.stem
    ids = side.tokenizer().encode(text)
    stride = len(ids) // flags.n_prompts
    longest = min(LONGEST, room)
    if stride < longest:
        raise ParetuneError(
            f"the text {name} has {len(ids)} tokens, too few for {flags.n_prompts} prompts of {longest}",
            "Use a longer text, or fewer prompts with --limit",
        )
    lengths = [SHORTEST + i * (longest - SHORTEST) // max(1, flags.n_prompts - 1) for i in range(flags.n_prompts)]
    return [ids[i * stride : i * stride + n] for i, n in enumerate(lengths)], name


def page_of(result: LosslessResult) -> str:
    """The result as text."""
    from paretune.report.tables import to_text

    rows = [
        {
            "Way": w.name,
            "Tokens are": w.sampling,
            "Identical": f"{w.n_identical} of {w.n_prompts}",
            "Verdict": w.verdict,
            "First difference": _difference(w),
        }
        for w in result.ways
    ]
    lines = [
        f"{result.model['name']}: every way to run beside {result.reference}, plain and one prompt at a time "
        f"({result.max_new_tokens} new tokens, prompts from {result.text}).",
        "",
        to_text(rows, definitions=False),
        "",
    ]
    lines += [note for w in result.ways for note in w.notes if w.sampling == "greedy"]
    lines += [
        "",
        "numerics: the runner adds in another order, and the two likeliest tokens were within 0.0001 of each other, or",
        "  the text was drawn. other numbers: the config changes them; perplexity says what that costs.",
        "  bug: a difference that nothing explains.",
        "",
    ]
    return "\n".join(lines)


def _difference(w: Way) -> str:
    if not w.divergences:
        return "-"
    d = max(w.divergences, key=lambda d: abs(d.margin or 0.0))
    margin = "" if d.margin is None else f", margin {d.margin:.2g}"
    return f"prompt {d.prompt}, token {d.position}: {d.got} for {d.expected}{margin}"
