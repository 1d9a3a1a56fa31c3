"""`paretune prune`: a model folder with fewer weights, which every verb loads again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretune.cli.model_help import MODEL

if TYPE_CHECKING:
    from paretune.train.pruning import Pruned


def prune(
    model: Annotated[str, typer.Argument(help=MODEL)],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="The folder to make.")],
    what: Annotated[str, typer.Option(help="weights, columns, neurons, heads or layers.")] = "neurons",
    by: Annotated[
        str | None,
        typer.Option(
            help="weights: magnitude, wanda, sparsegpt; others: magnitude, activation, taylor; layers also residual. "
            "[default: sparsegpt, activation, residual]"
        ),
    ] = None,
    remaining: Annotated[str, typer.Option(help="Share of all parameters that stays, head included: 50%.")] = "75%",
    ends: Annotated[bool, typer.Option("--ends", help="weights: prune embedding and head too.")] = False,
    scope: Annotated[
        str | None, typer.Option(help="Rank in each layer (layer) or all together (global). [default: layer]")
    ] = None,
    recover: Annotated[str, typer.Option(help="none, or blocks: each block against the dense one.")] = "none",
    recover_epochs: Annotated[int, typer.Option(help="Passes over the calibration windows, for each half.")] = 4,
    calibration: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to calibrate and recover on, not an evaluation's. [default: the model's]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder of that name.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Writes a folder with fewer weights, and says what it costs: whole or not at all."""
    import json

    from paretune.engine.plan import is_plan
    from paretune.errors import UsageError
    from paretune.evaluate import texts
    from paretune.measure import environment
    from paretune.model import checkpoint
    from paretune.train import pruning

    if recover not in ("none", "blocks"):
        raise UsageError(f"--recover is {recover!r}", "Known: none, blocks; `paretune train` trains the result further")
    if is_plan(model):
        raise UsageError(f"{model} is a plan", "Pass the model that it was made for")
    target = output_dir.expanduser().resolve()
    folder = checkpoint.resolve(model)
    if target == folder.resolve():
        raise UsageError("the output is the model itself", "Choose another folder with -o")
    if force and target.exists() and not (target / "config.json").is_file():
        raise UsageError(f"{target} is no model folder: --force does not replace it", "Choose another folder with -o")
    settings = ({"ends": True} if ends else {}) | ({} if scope is None else {"scope": scope})
    transform = pruning.transform_for(checkpoint.read_config(folder), what, by, _share(remaining), **settings)

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    say(f"{transform.title} of {folder.name}")
    made = pruning.prune(
        folder,
        transform,
        target,
        recover=pruning.RecoverOptions(epochs=recover_epochs) if recover == "blocks" else None,
        calibration_text=None if calibration is None else texts.read_text(calibration),
        overwrite=force,
        resume=resume,
        say=say,
    )
    result = {**environment.header(), **made.to_json(), "folder": str(output_dir)}
    print(json.dumps(result, indent=2, allow_nan=False) if json_output else _page(made, output_dir))


def _share(text: str) -> float:
    """`50%` or `0.5` -> 0.5."""
    from paretune.errors import UsageError

    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise UsageError(f"--remaining is {text!r}", "Write it as 50% or 0.5") from None


def _page(made: Pruned, shown: Path) -> str:
    """The result for people."""
    import math

    cost = math.exp(made.loss_after - made.loss_before) - 1
    lines = [
        f"{shown}: {made.transform.title}, {made.remaining:.1%} of {made.n_parameters:,} parameters remain",
        f"  weight file {made.n_bytes / 1e6:,.2f} MB, before {made.source_bytes / 1e6:,.2f} MB",
        f"  perplexity on the calibration text {cost:+.1%} (loss {made.loss_before:.3f}, pruned "
        f"{made.loss_pruned:.3f}, now {made.loss_after:.3f}); `paretune eval` says what it is on other text",
        "",
    ]
    return "\n".join([*lines, *(f"  Checked: {sentence}" for sentence in made.proof)])
