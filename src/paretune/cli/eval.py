"""`paretune eval`: perplexity of a model on a text, how far a configuration is from another one, summaries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paretune.cli.model_help import MODEL_OR_PLAN
from paretune.cli.pair_options import ArticleColumn, Pairs, SummaryColumn

TASKS = ("perplexity", "fidelity", "summarization", "lossless")
SUMMARY_ROWS = 16  # articles at once


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_OR_PLAN)] = "pocket",
    task: Annotated[
        str, typer.Option(help="perplexity, fidelity, summarization, or lossless (same text?).")
    ] = "perplexity",
    pairs: Pairs = None,
    article_column: ArticleColumn = None,
    summary_column: SummaryColumn = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest summary or text, tokens. [default: as recorded with the model; 64]")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file. [default: the project's own confirmation text]")
    ] = None,
    text_name: Annotated[
        str | None,
        typer.Option(help="Name of the text in the protocol, e.g. wikitext2-raw/test. [default: the file's stem]"),
    ] = None,
    join_rows: Annotated[
        bool, typer.Option("--join-rows", help="Join the file's lines by a blank line, as WikiText's rows are.")
    ] = False,
    context: Annotated[
        int | None, typer.Option(help="Tokens that a window shows. [default: 1024, or what the model allows]")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens that a window advances; --context: non-overlapping. [default: half]")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Name or recipe file. [default: baseline; of a plan: plan]")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Also compare --config with this one: fidelity. [default: none; baseline with --task fidelity, "
            "--task summarization or --max-ppl-increase]"
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="Bound on the increase of perplexity, 1% or 0.01: exit 3 above it.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows at once. [default: what suits the runner]")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Score only the first so many tokens of the text; of pairs, so many at random; of lossless, so many "
            "prompts."
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Folder for eval.json and eval.md.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: physical cores]")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measures quality: perplexity by rolling windows, and fidelity to a baseline where it is asked for."""
    from paretune import hardware
    from paretune.engine import session
    from paretune.errors import UsageError
    from paretune.tune.goal import parse_percent

    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}", f"Known: {', '.join(TASKS)}")
    of_pairs = {"--pairs": pairs, "--article-column": article_column, "--summary-column": summary_column}
    of_text = {"--text": text, "--text-name": text_name, "--context": context, "--stride": stride}
    of_text |= {"--join-rows": join_rows, "--max-ppl-increase": max_ppl_increase}
    wrong: dict[str, Any] = of_text if task == "summarization" else of_pairs | {"--max-new-tokens": max_new_tokens}
    if task == "lossless":
        wrong = of_pairs | {flag: value for flag, value in of_text.items() if flag != "--text"}
    if given := [flag for flag, value in wrong.items() if value]:
        raise UsageError(f"{given[0]} does not apply to --task {task}", "Leave it out, or choose the other task")
    counts = {"--batch-size": batch_size, "--limit": limit, "--threads": threads, "--max-new-tokens": max_new_tokens}
    for flag, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"{flag} is {value}", "It has to be 1 or more")
    hardware.check_device(device)
    bound = None if max_ppl_increase is None else parse_percent(max_ppl_increase)
    if baseline is None and (task in ("fidelity", "summarization") or bound is not None):
        baseline = session.DEFAULT_CONFIG
    opened = [session.open(model, config, device)]
    if baseline is not None and baseline != opened[0].config:
        opened.insert(0, session.open(model, baseline, device))
    for one in opened:  # minutes before the last one is loaded
        one.check()
    sides, names = [(one.folder, one.recipe) for one in opened], [one.config for one in opened]
    how: dict[str, Any] = {"json_output": json_output, "device": device, "threads": threads, "quiet": quiet}
    if task == "summarization":
        from paretune.cli.eval_summaries import SummaryFlags, eval_summaries
        from paretune.cli.pair_options import PairFlags

        of_texts = SummaryFlags(
            PairFlags(pairs, article_column, summary_column), max_new_tokens, limit, batch_size or SUMMARY_ROWS
        )
        eval_summaries(model, sides, names, of_texts, output_dir, **how)
        return
    if task == "lossless":
        from paretune.cli.eval_lossless import N_PROMPTS, NEW_TOKENS, ROWS, LosslessFlags, eval_lossless

        of_ways = LosslessFlags(text, limit or N_PROMPTS, max_new_tokens or NEW_TOKENS, batch_size or ROWS)
        eval_lossless(model, opened, of_ways, output_dir, json_output=json_output, threads=threads, quiet=quiet)
        return
    if baseline is not None and len(sides) == 1:
        raise UsageError(
            f"config {names[0]!r} is the baseline: there is nothing to compare", "Pass --config, such as int8"
        )
    from paretune.cli.eval_text import TextFlags, eval_text

    flags = TextFlags(text, text_name, join_rows, context, stride, limit, bound, batch_size)
    eval_text(model, sides, names, task, flags, output_dir, **how)
