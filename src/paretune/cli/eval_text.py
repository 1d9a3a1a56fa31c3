"""`paretune eval` on a text: perplexity by rolling windows, and fidelity to a baseline where it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.cli.eval_side import load_side, progress_of

if TYPE_CHECKING:
    from paretune.engine.runners.base import Runner
    from paretune.recipe import Recipe

WINDOW = 257  # two halves of exactly 128 scored tokens
ROWS = 8  # windows at once: the same kernels as one row
STEP_ROWS = 512  # tokens at once, where a window alone makes a step that is large enough
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


@dataclass(frozen=True)
class TextFlags:
    """The flags that say what is scored, and how.

    Args:
        context, stride: tokens; None: 1024 or what the model allows, and half of it.
        max_ppl_increase: the bound as a fraction, or None.
        batch_size: windows at once; None: what suits the runner.
    """

    path: Path | None
    name: str | None
    join_rows: bool
    context: int | None
    stride: int | None
    limit: int | None
    max_ppl_increase: float | None
    batch_size: int | None


def eval_text(
    model: str,
    sides: Sequence[tuple[Path, Recipe]],
    names: Sequence[str],
    task: str,
    flags: TextFlags,
    output_dir: Path | None,
    *,
    json_output: bool,
    device: str,
    threads: int | None,
    quiet: bool,
) -> None:
    """Scores the last side, prints, and writes eval.json and eval.md.

    Args:
        sides: folder and recipe: of the configuration alone, or of the baseline and then of it.
        names: of the sides.
        task: perplexity is of the configuration alone; fidelity and a bound need both sides.

    Raises:
        UsageError: a context or stride that the model does not have.
        ParetuneError: the text is shorter than one window.
        NoRecipeError: over the bound; all is written.
    """
    import json

    from paretune import hardware
    from paretune.errors import NoRecipeError, ParetuneError
    from paretune.evaluate import fidelity
    from paretune.evaluate.perplexity import perplexity
    from paretune.files import ensure_folder, write_json, write_text
    from paretune.measure import environment
    from paretune.model import checkpoint
    from paretune.model.tokenizer import Tokenizer
    from paretune.records.record import to_json

    folder, recipe = sides[-1]
    context, stride = _shape(folder, flags)
    ids, n_bytes, protocol_name = tokens_of(Tokenizer(folder), flags)
    if len(ids) < context:  # before anything is loaded
        raise ParetuneError(
            f"the text {protocol_name} has {len(ids)} tokens, fewer than one window of {context}",
            f"Use a longer text, or --context {len(ids)} or smaller" if len(ids) >= 4 else "Use a longer text",
        )
    out = None if output_dir is None else ensure_folder(output_dir.expanduser())
    result: dict[str, Any] = {
        **environment.header(),
        "model": {"name": model if checkpoint.is_named(model) else folder.name},
        "task": task,
        "config": names[-1],
        "recipe": recipe.to_dict(),
        "baseline": names[0] if len(sides) > 1 else None,
        "device": device,
        "threads": hardware.set_threads(threads),
        "batch_size": flags.batch_size,
        "text": {"name": protocol_name, "n_tokens": len(ids), "bytes": n_bytes},
        "perplexity": None,
        "fidelity": None,
        "definitions": DEFINITIONS,
    }
    scores = []
    for i, (side_folder, side_recipe) in enumerate(sides):
        loaded, proof, notes = load_side(side_folder, side_recipe, device, threads, quiet)
        runner = loaded.runner
        is_last = i == len(sides) - 1
        if is_last:
            result["proof"], result["notes"] = proof, notes
        if is_last and task == "perplexity":
            rows = flags.batch_size or _windows_at_once(runner, context)
            shape = {"context": context, "stride": stride, "batch_size": rows, "n_bytes": n_bytes}
            say = progress_of("perplexity", "window", quiet)
            measured = perplexity(runner, ids, text_name=protocol_name, progress=say, **shape)
            result |= {"perplexity": measured.to_json(), "batch_size": rows}
        if len(sides) > 1:
            windows = fidelity.windows_of(ids, min(WINDOW, context))
            rows = flags.batch_size or (1 if runner.fixed_batch else ROWS)
            say = progress_of("fidelity" if is_last else "baseline", "window", quiet)
            scores.append(fidelity.score(runner, windows, batch_size=rows, text_name=protocol_name, progress=say))
            result["batch_size"] = result["batch_size"] or rows
        del loaded, runner  # one model in memory at a time
    verdict = None
    if len(scores) == 2:
        verdict = fidelity.compare(scores[0], scores[1], flags.max_ppl_increase)
        result["fidelity"] = to_json(verdict)
    if out is not None:
        write_json(out / "eval.json", result)
        write_text(out / "eval.md", _page(result))
    print(json.dumps(result, indent=2, allow_nan=False) if json_output else _page(result), end="\n" * json_output)
    if verdict is not None and not verdict.within_bound:
        raise NoRecipeError(
            f"{names[-1]} does not meet the bound: {verdict.reason}",
            "Use a longer text" if verdict.too_little_text else "Choose another config or a larger bound",
        )


def _shape(folder: Path, flags: TextFlags) -> tuple[int, int]:
    """Tokens that a window shows, and that it advances.

    Raises:
        UsageError: the model does not have so many, or they leave nothing to score.
    """
    from paretune.errors import UsageError
    from paretune.model import checkpoint

    config = checkpoint.read_config(folder)
    context = min(1024, config.n_positions) if flags.context is None else flags.context
    if context > config.longest:
        raise UsageError(
            f"--context {context} exceeds the model's {config.n_positions} positions", "Choose a smaller one"
        )
    if context < 2:
        raise UsageError(f"--context {context} leaves no token to score", "Use 2 or more")
    stride = max(1, context // 2) if flags.stride is None else flags.stride
    if not 1 <= stride <= context:
        raise UsageError(f"--stride {stride} is not in 1..{context}", "A stride above --context skips tokens")
    return context, stride


def _windows_at_once(runner: Runner, context: int) -> int:
    """As many as are fast: more cost memory, for logits and cache."""
    if runner.fixed_batch:
        return 1
    return max(1, STEP_ROWS // context) if runner.same_bits_at_any_width else ROWS


def tokens_of(tokenizer: Any, flags: TextFlags) -> tuple[list[int], int, str]:
    """Token ids, bytes of the same text, and the text's name in the protocol."""
    from paretune.evaluate import texts

    content = texts.text_of("confirm") if flags.path is None else texts.read_text(flags.path)
    name = flags.name or (OWN_TEXT if flags.path is None else flags.path.stem)
    if flags.join_rows:
        # As the hub's data set has them: an empty line is an empty row, the others keep their line break.
        content = "\n\n".join("" if not line.strip() else f"{line}\n" for line in content.split("\n")[:-1])
    ids = tokenizer.encode(content)
    if flags.limit is None or flags.limit >= len(ids):
        return ids, len(content.encode("utf-8")), name
    ids = ids[: flags.limit]
    return ids, max(1, len(tokenizer.decode(ids).encode("utf-8"))), f"{name}[:{flags.limit}]"


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
