"""`paretune eval`: perplexity of a model on a text, and how far a configuration is from the baseline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.model_help import MODEL_OR_PLAN
from paretune.cli.pair_options import ArticleColumn, Pairs, SummaryColumn

if TYPE_CHECKING:
    from paretune.engine.load import Loaded
    from paretune.recipe import Recipe

TASKS = ("perplexity", "fidelity", "summarization")
WINDOW = 257  # two halves of exactly 128 scored tokens
EAGER_ROWS = 8  # windows at once: the same kernels as one row; a compiled decode graph gets one
SUMMARY_ROWS = 16  # articles at once
OWN_TEXT = "paretune-pieces/confirm"

# What each figure of the output means, printed with it.
DEFINITIONS = {
    "Perplexity": "exp of the mean negative log-likelihood of a scored token; lower is better. In brackets the 95 % "
    "interval, bootstrapped over blocks of 128 scored tokens.",
    "Bits per byte": "negative log-likelihood of the scored tokens in bits / UTF-8 bytes of the text: compares "
    "across tokenizers.",
    "Quality loss": "increase of perplexity over the baseline on the same tokens, paired; 'at most' is the one-sided "
    "95 % upper bound. Half of each window is prefilled, the rest fed token by token; the worse half counts.",
    "KL": "mean divergence of the configuration's next-token distribution from the baseline's, in nats.",
    "Top-1": "share of positions at which both name the same most likely token.",
}


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_OR_PLAN)] = "pocket",
    task: Annotated[str, typer.Option(help="perplexity, fidelity or summarization.")] = "perplexity",
    pairs: Pairs = None,
    article_column: ArticleColumn = None,
    summary_column: SummaryColumn = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest summary, tokens. [default: as recorded with the model]")
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
    baseline: Annotated[str, typer.Option(help="What --config is compared with.")] = "baseline",
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="Bound on the increase of perplexity, 1% or 0.01: exit 3 above it.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows at once. [default: 8; 1 where compiled]")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Score only the first so many tokens of the text; of pairs, so many at random.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Folder for eval.json and eval.md.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: physical cores]")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measures quality: perplexity by rolling windows, and fidelity to the baseline where --config differs."""
    import json

    from paretune import hardware
    from paretune.errors import NoRecipeError, ParetuneError, UsageError
    from paretune.files import ensure_folder, write_json, write_text
    from paretune.measure import environment
    from paretune.model import checkpoint
    from paretune.model.tokenizer import Tokenizer
    from paretune.tune.goal import parse_percent

    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}", f"Known: {', '.join(TASKS)}")
    of_pairs = {"--pairs": pairs, "--article-column": article_column, "--summary-column": summary_column}
    of_text = {"--text": text, "--text-name": text_name, "--context": context, "--stride": stride}
    of_text |= {"--join-rows": join_rows, "--max-ppl-increase": max_ppl_increase}
    wrong = of_text if task == "summarization" else of_pairs | {"--max-new-tokens": max_new_tokens}
    if given := [flag for flag, value in wrong.items() if value]:
        raise UsageError(f"{given[0]} has no meaning for --task {task}", "Leave it out, or choose the other task")
    for flag, value in (("--batch-size", batch_size), ("--limit", limit), ("--threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} is {value}", "It has to be 1 or more")
    if not (device == "cpu" or (device.partition(":")[0] == "cuda" and hardware.has_cuda())):
        raise UsageError(f"there is no device {device!r} here", "Use --device cpu")
    bound = None if max_ppl_increase is None else parse_percent(max_ppl_increase)
    sides, name = _sides(model, config, baseline)
    if task == "summarization":
        from paretune.cli.eval_summaries import PairFlags, eval_summaries

        eval_summaries(
            model,
            sides,
            [baseline, name][-len(sides) :],
            PairFlags(pairs, article_column, summary_column, max_new_tokens, limit, batch_size or SUMMARY_ROWS),
            None if output_dir is None else ensure_folder(output_dir.expanduser()),
            json_output=json_output,
            device=device,
            threads=threads,
            quiet=quiet,
        )
        return
    if len(sides) == 1 and (task == "fidelity" or bound is not None):
        raise UsageError(f"config {name!r} is the baseline: there is nothing to compare", "Pass --config, such as int8")
    folder, recipe = sides[-1]
    for side_folder, side_recipe in sides:  # minutes before the last one is loaded
        side_recipe.check(device, checkpoint.read_config(side_folder))
    n_positions = checkpoint.read_config(folder).n_positions
    context = min(1024, n_positions) if context is None else context
    if context > checkpoint.read_config(folder).longest:
        raise UsageError(f"--context {context} exceeds the model's {n_positions} positions", "Choose a smaller one")
    if context < 2:
        raise UsageError(f"--context {context} leaves no token to score", "Use 2 or more")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise UsageError(f"--stride {stride} is not in 1..{context}", "A stride over --context skips tokens")
    ids, n_bytes, protocol_name = _tokens(Tokenizer(folder), text, text_name, join_rows, limit)
    if len(ids) < context:  # before anything is loaded
        raise ParetuneError(
            f"the text {protocol_name} has {len(ids)} tokens, fewer than one window of {context}",
            f"Use a longer text, or --context {len(ids)} or smaller" if len(ids) >= 4 else "Use a longer text",
        )
    out = None if output_dir is None else ensure_folder(output_dir.expanduser())
    rows = batch_size or (EAGER_ROWS if recipe.engine.runner in ("eager", "native") else 1)

    result: dict[str, Any] = {
        **environment.header(),
        "model": {"name": model if checkpoint.is_named(model) else folder.name},
        "task": task,
        "config": name,
        "recipe": recipe.to_dict(),
        "baseline": baseline if len(sides) > 1 else name,
        "device": device,
        "threads": hardware.set_threads(threads),
        "batch_size": rows,
        "text": {"name": protocol_name, "n_tokens": len(ids), "bytes": n_bytes},
        "perplexity": None,
        "fidelity": None,
        "definitions": DEFINITIONS,
    }
    progress = _progress(quiet)
    scores = []
    for i, (side_folder, side_recipe) in enumerate(sides):
        loaded = _load(side_folder, side_recipe, device, threads, quiet)
        runner = loaded[0].runner
        if side_folder == folder and side_recipe is recipe and i == len(sides) - 1:
            result["proof"], result["notes"] = loaded[1], loaded[2]
            if task == "perplexity":
                from paretune.evaluate.perplexity import perplexity

                shape = {"context": context, "stride": stride, "batch_size": rows, "n_bytes": n_bytes}
                measured = perplexity(runner, ids, text_name=protocol_name, progress=progress("perplexity"), **shape)
                result["perplexity"] = measured.to_json()
        if len(sides) > 1:
            from paretune.evaluate import fidelity

            windows = fidelity.windows_of(ids, min(WINDOW, context))
            say = progress("baseline" if i == 0 else "fidelity")
            scores.append(fidelity.score(runner, windows, batch_size=rows, text_name=protocol_name, progress=say))
        del loaded, runner  # one model in memory at a time
    verdict = None
    if len(scores) == 2:
        from paretune.evaluate import fidelity

        verdict = fidelity.compare(scores[0], scores[1], bound)
        result["fidelity"] = verdict.to_json()
    if out is not None:
        write_json(out / "eval.json", result)
        write_text(out / "eval.md", _page(result))
    print(json.dumps(result, indent=2, allow_nan=False) if json_output else _page(result), end="\n" * json_output)
    if verdict is not None and not verdict.within_bound:
        raise NoRecipeError(
            f"{name} does not meet the bound: {verdict.reason}",
            "Use a longer text" if verdict.too_little_text else "Choose another config or a larger bound",
        )


def _sides(model: str, config: str | None, baseline: str) -> tuple[list[tuple[Path, Recipe]], str]:
    """(folder, recipe) of the baseline, where one is compared with, and of the configuration; its name."""
    from paretune.model import checkpoint
    from paretune.recipe import preset
    from paretune.tune.plan import is_plan, read_plan

    plan = read_plan(model) if is_plan(model) else None
    name = config or ("plan" if plan else baseline)
    reference = preset(baseline)
    if plan is None:
        folder = checkpoint.resolve(model)
        own = (folder, preset(name))
        return ([own] if name == baseline else [(folder, reference), own]), name
    # The baseline is the model as it was before `tune` converted it.
    source = checkpoint.resolve(str(plan.data["model"]["source"]))
    if name == "plan":
        return [(source, reference), (plan.model_folder, plan.recipe)], name
    own = (source, preset(name))
    return ([own] if name == baseline else [(source, reference), own]), name


def _tokens(
    tokenizer: Any, path: Path | None, name: str | None, join_rows: bool, limit: int | None
) -> tuple[list[int], int, str]:
    """Token ids, bytes of the same text, and the text's name in the protocol."""
    from paretune.evaluate import texts

    content = texts.text_of("confirm") if path is None else texts.read_text(path)
    name = name or (OWN_TEXT if path is None else path.stem)
    if join_rows:
        # As the hub's data set has them: an empty line is an empty row, the others keep their line break.
        content = "\n\n".join("" if not line.strip() else f"{line}\n" for line in content.split("\n")[:-1])
    ids = tokenizer.encode(content)
    if limit is None or limit >= len(ids):
        return ids, len(content.encode("utf-8")), name
    ids = ids[:limit]
    return ids, max(1, len(tokenizer.decode(ids).encode("utf-8"))), f"{name}[:{limit}]"


def _load(
    folder: Path, recipe: Recipe, device: str, threads: int | None, quiet: bool
) -> tuple[Loaded, list[str], list[str]]:
    from paretune import hardware
    from paretune.engine.load import load_recipe, prove

    if not quiet:
        print(f"loading {recipe.name}", file=sys.stderr, flush=True)
    hardware.set_threads(recipe.engine.threads or threads)
    loaded = load_recipe(folder, recipe, device)
    proof, _ = prove(loaded)
    return loaded, proof, [note for t in recipe.transforms for note in t.notes(device)]


def _progress(quiet: bool) -> Any:
    """A reporter a phase: a line on stderr about every ten seconds."""
    from paretune import clock

    def of(phase: str) -> Any:
        last = [clock.now()]

        def progress(done: int, total: int) -> None:
            if not quiet and clock.now() - last[0] >= 10:
                last[0] = clock.now()
                print(f"{phase}: window {done} of {total}", file=sys.stderr, flush=True)

        return progress

    return of


def _page(result: dict[str, Any]) -> str:
    """The result for people, as Markdown that reads well as plain text."""
    from paretune.report.units import format_number, format_percent, format_ratio

    lines = [f"# {result['model']['name']}, {result['config']}: quality", ""]
    used = []
    if (value := result["perplexity"]) is not None:
        interval = value["interval"]
        spread = f" [{format_number(interval[0])}, {format_number(interval[1])}]" if interval else ""
        lines += [
            f"- Protocol: `{value['protocol']}`",
            f"- Perplexity: {format_number(value['perplexity'])}{spread}",
            f"- Bits per byte: {format_number(value['bits_per_byte'])}",
            f"- Negative log-likelihood: {format_number(value['nll_per_token'])} nats per token",
            f"- Scored: {value['n_tokens_scored']:,} tokens in {value['n_windows']:,} windows",
        ]
        lines += [f"- Note: {value['note']}"] if value["note"] else []
        used += ["Perplexity", "Bits per byte"]
    if (value := result["fidelity"]) is not None:
        upper = format_percent(value["ppl_increase_upper"], signed=True)
        lines += [
            "",
            f"Against {result['baseline']} (`{value['protocol']}`):",
            "",
            f"- Quality loss: {format_percent(value['ppl_increase'], signed=True)}, at most {upper} "
            f"({value['phase']}, the worse phase)",
            f"- Perplexity: {format_number(value['perplexity'])}, baseline "
            f"{format_number(value['baseline_perplexity'])}, ratio "
            f"{format_ratio((value['perplexity'] or 0) / value['baseline_perplexity'] or None)}",
            f"- KL: {format_number(value['kl_mean'])} nats per token",
            f"- Top-1: {format_percent(value['top1_agreement'])} of tokens agree",
            f"- Same losses bit for bit: {'yes' if value['identical'] else 'no'}",
            f"- Bound: {value['reason']}",
        ]
        lines += ["- Note: too little text for a bound"] if value["too_little_text"] else []
        used += ["Perplexity"] * ("Perplexity" not in used) + ["Quality loss", "KL", "Top-1"]
    lines += ["", *(f"- Checked: {sentence}" for sentence in result["proof"])]
    lines += [f"- Note: {note}" for note in result["notes"]]
    lines += ["", *(f"- **{term}**: {text}" for term, text in DEFINITIONS.items() if term in used)]
    return "\n".join(lines) + "\n"
