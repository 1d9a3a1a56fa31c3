"""`paretune quantize`: a model folder in a smaller number format, which every verb loads again bit by bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.model_help import MODEL

if TYPE_CHECKING:
    from paretune.engine.quantize import Layer, Quantized


def quantize(
    model: Annotated[str, typer.Argument(help=MODEL)],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="The folder to make.")],
    format_name: Annotated[
        str, typer.Option("--format", help="Number format; int8, int4, q8_0, q4_0, ... (`paretune ls` names all).")
    ],
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale, where the format has groups. [default: the format's]")
    ] = None,
    head: Annotated[
        int | None, typer.Option(help="Bits of embeddings and head; 0 leaves them. [default: the format's]")
    ] = None,
    embeddings: Annotated[
        bool | None,
        typer.Option("--embeddings/--no-embeddings", help="Whether embeddings and head are quantised too (--head 0)."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Only layers of this name (`h.*.mlp.*`); may be repeated.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not layers of this name; may be repeated.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text for formats that calibrate, not the text of an evaluation. [default: the model's]"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder of that name.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Writes a quantised folder: the small numbers themselves in safetensors, whole or not at all."""
    import json

    from paretune.engine.plan import is_plan
    from paretune.engine.quantize import quantize as run
    from paretune.errors import UsageError
    from paretune.evaluate import texts
    from paretune.measure import environment
    from paretune.model import checkpoint
    from paretune.transforms.formats import transforms_of

    if embeddings is not None and head is not None and embeddings != bool(head):
        raise UsageError("--head and --embeddings contradict each other", "Give one of them")
    head = 0 if embeddings is False else head
    transforms = transforms_of(format_name, group_size, head, include or (), exclude or ())
    if is_plan(model):
        raise UsageError(f"{model} is a plan", "Pass the model that it was made for")
    target = output_dir.expanduser().resolve()
    folder = checkpoint.resolve(model)
    if target == folder.resolve():
        raise UsageError("the output is the model itself", "Choose another folder with -o")
    if force and target.exists() and not (target / "config.json").is_file():
        raise UsageError(
            f"{target} is not a model folder: --force does not replace it", "Choose another folder with -o"
        )

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    text = None if calibration is None else texts.read_text(calibration)
    made = run(folder, transforms, target, calibration_text=text, overwrite=force, say=say)
    result = {**environment.header(), "format": format_name, **made.to_json(), "folder": str(output_dir)}
    print(json.dumps(result, indent=2, allow_nan=False) if json_output else _page(made, output_dir))


def _page(made: Quantized, shown: Path) -> str:
    """The result for people."""
    lines = [
        f"{shown}: {' + '.join(t.title for t in made.transforms)}, {made.n_parameters:,} parameters",
        f"  weight file {_mb(made.n_bytes)}, before {_mb(made.source_bytes)}; {made.n_bytes / made.fp32_bytes:.1%} of "
        f"fp32, {made.n_bytes / made.n_parameters:.3f} bytes a parameter",
        "",
    ]
    rows: list[tuple[str, ...]] = [("Layers", "Number", "Format", "Parameters", "Bytes", "Bytes/parameter", "")]
    rows += [_row(*group) for group in _kinds(made.layers)]
    rows.append(("norms and biases", str(made.n_vectors), "dense", "", _mb(made.vector_bytes), "", "vectors stay"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", f"  Of fp32: {made.why_this_share}"]
    return "\n".join([*lines, "", *(f"  Checked: {sentence}" for sentence in made.proof)])


def _kinds(layers: tuple[Layer, ...]) -> list[tuple[str, list[Layer]]]:
    """Layers of one kind together: the same name but for the number of the block, the same format and reason."""
    import re

    kinds: dict[Any, list[Layer]] = {}
    for layer in layers:
        name = " = ".join(re.sub(r"\.\d+\.", ".*.", n) for n in layer.names)
        kinds.setdefault((name, layer.format, layer.reason), []).append(layer)
    return [(key[0], found) for key, found in kinds.items()]


def _row(name: str, layers: list[Layer]) -> tuple[str, ...]:
    n_parameters, n_bytes = sum(x.n_parameters for x in layers), sum(x.n_bytes for x in layers)
    first = layers[0]
    why = f"not quantised: {first.reason}" if first.reason else ""
    each = f"{n_bytes / n_parameters:.3f}"
    return name, str(len(layers)), first.format, f"{n_parameters:,}", _mb(n_bytes), each, why


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.2f} MB"
