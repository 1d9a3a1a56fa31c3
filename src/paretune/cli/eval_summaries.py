"""`paretune eval --task summarization`: summaries of a configuration, beside lead-3 and copying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretune.cli.pair_options import PairFlags
    from paretune.recipe import Recipe


@dataclass(frozen=True)
class SummaryFlags:
    """The flags that say what is summarised."""

    pairs: PairFlags
    max_new_tokens: int | None
    limit: int | None
    batch_size: int


def eval_summaries(
    model: str,
    sides: Sequence[tuple[Path, Recipe]],
    names: Sequence[str],
    flags: SummaryFlags,
    output_dir: Path | None,
    *,
    json_output: bool,
    device: str,
    threads: int | None,
    quiet: bool,
) -> None:
    """Generates with each side, scores, prints, and writes eval.json, eval.md and results.csv."""
    import json
    import sys

    from paretune import hardware
    from paretune.cli.eval_side import load_side, progress_of
    from paretune.evaluate import summaries
    from paretune.evaluate.pairs import own_pairs
    from paretune.files import ensure_folder, write_json, write_text
    from paretune.measure import environment
    from paretune.model import checkpoint
    from paretune.model.prompt import PromptFormat
    from paretune.model.tokenizer import Tokenizer
    from paretune.report.tables import to_csv

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    out = None if output_dir is None else ensure_folder(output_dir.expanduser())
    found = flags.pairs.read()
    pairs = own_pairs("confirm") if found is None else found
    if flags.limit is not None:
        pairs = pairs.take(flags.limit)
    folder = sides[-1][0]
    tokenizer, recorded = Tokenizer(folder), PromptFormat.read(folder)
    form, notes = recorded or _default(checkpoint.read_config(folder).n_positions), []
    if recorded is None:
        notes.append(f"the model records no prompt format: articles are followed by {form.suffix.strip()!r}, zero-shot")
    limit = form.max_new_tokens if flags.max_new_tokens is None else flags.max_new_tokens
    n_cut = sum(form.prompt(tokenizer, p.article, room=limit)[1] for p in pairs.pairs)
    if n_cut:
        notes.append(f"{n_cut} of {len(pairs)} articles cut to the limit of {form.max_len} tokens")
    say(pairs.said)
    scores: list[summaries.SummaryScores] = []
    proof: list[str] = []
    for (side, recipe), name in zip(sides, names, strict=True):
        loaded, proof, said = load_side(side, recipe, device, threads, quiet)
        notes += [note for note in said if note not in notes]
        articles = [p.article for p in pairs.pairs]
        shape: dict[str, Any] = {"batch_size": flags.batch_size, "max_new_tokens": limit}
        made = summaries.summarize(
            loaded.runner, tokenizer, form, articles, **shape, progress=progress_of("summaries", "article", quiet)
        )
        scores.append(summaries.score(name, made, pairs.pairs))
        del loaded
    gaps = summaries.difference(scores[-1], scores[0]) if len(scores) > 1 else {}
    for name, made in summaries.baselines(pairs.pairs, tokenizer, form, limit).items():
        scores.append(summaries.score(name, made, pairs.pairs, by_model=False))
    rows = [summaries.summary_row(s) for s in scores]
    result: dict[str, Any] = {
        **environment.header(),
        "model": {"name": model if checkpoint.is_named(model) else folder.name},
        "task": "summarization",
        "config": names[-1],
        "baseline": names[0],
        "recipe": sides[-1][1].to_dict(),
        "device": device,
        "threads": hardware.set_threads(threads),
        "pairs": {"name": pairs.name, "n": len(pairs), "skipped": dict(pairs.skipped), "key": pairs.key},
        "prompt": form.to_json(),
        "max_new_tokens": limit,
        "n_cut": n_cut,
        "batch_size": flags.batch_size,
        "rows": rows,
        "scores": [s.to_json() for s in scores],
        "difference": {key: value.to_json() for key, value in gaps.items()},
        "proof": proof,
        "notes": notes,
        "definitions": summaries.DEFINITIONS,
    }
    page = _page(result, result["scores"][len(sides) - 1])
    if out is not None:
        write_json(out / "eval.json", result)
        write_text(out / "eval.md", page)
        write_text(out / "results.csv", to_csv(rows))
    print(json.dumps(result, indent=2, allow_nan=False) if json_output else page, end="\n" * json_output)


def _default(n_positions: int) -> Any:
    """The format of a model that was never trained on summaries."""
    from paretune.model.prompt import MAX_LEN, PromptFormat

    limit = min(MAX_LEN, n_positions)
    return PromptFormat(max_len=limit, max_new_tokens=max(1, min(64, limit // 4)))


def _page(result: dict[str, Any], ours: dict[str, Any]) -> str:
    """The result for people, as Markdown that reads well as plain text.

    Args:
        ours: scores of the configuration; those of the baseline, lead-3 and copying stand beside them in the table.
    """
    from paretune.report.summaries import COLUMNS, TITLES
    from paretune.report.tables import to_markdown
    from paretune.report.units import format_number, plain

    lines = [
        f"# {result['model']['name']}, {result['config']}: summaries of {result['pairs']['n']} articles",
        "",
        to_markdown(result["rows"], COLUMNS).rstrip(),
        "",
        f"- BLEU signature: `{ours['bleu_signature']}`",
        f"- At most {result['max_new_tokens']} new tokens, greedy; pairs: {result['pairs']['name']}",
    ]
    lines += [f"- Skipped: {n} {reason}" for reason, n in result["pairs"]["skipped"].items()]
    for key, gap in result["difference"].items():
        ends = f"{format_number(gap['low'])}, {format_number(gap['high'])}"
        against = f"{result['config']} minus {result['baseline']}"
        lines.append(f"- {TITLES[key]}, {against}, paired: {format_number(gap['value'])} [{ends}]")
    lines += [f"- Checked: {sentence}" for sentence in result["proof"]]
    lines += [f"- Note: {note}" for note in result["notes"]]
    lines += ["", f"Worst by ROUGE-L, {result['config']}:", ""]
    for entry in ours["worst"]:
        lines.append(f"- {entry['id']} ({entry['rougeL']:.3f}): {plain(entry['summary'])[:300] or '(nothing)'}")
        lines.append(f"  reference: {plain(entry['reference'])[:300]}")
    lines += ["", *(f"- **{term}**: {text}" for term, text in result["definitions"].items())]
    return "\n".join(lines) + "\n"
