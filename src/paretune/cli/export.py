"""`paretune export`: a model as one GGUF file, which llama.cpp and its relatives read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paretune.cli.model_help import MODEL

TARGETS = ("gguf",)


def export(
    model: Annotated[str, typer.Argument(help=MODEL)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, NAME.gguf.")],
    to: Annotated[str, typer.Option("--to", help="gguf.")] = "gguf",
    format_name: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Q8_0, Q4_0, Q4_1, F16, BF16 or F32 for what is not in blocks yet. [default: the stored numbers]",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file of that name.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Writes GPT-2 and Llama models as GGUF; int8 and int4 groups keep their stored bits."""
    import json

    from paretune.engine.plan import is_plan
    from paretune.errors import UsageError
    from paretune.measure import environment
    from paretune.model import checkpoint
    from paretune.model.gguf.save import save

    if to not in TARGETS:
        raise UsageError(f"unknown target {to!r}", f"Known: {', '.join(TARGETS)}")
    if is_plan(model):
        raise UsageError(f"{model} is a plan", "Pass the model that it was made for")
    path = output.expanduser()
    if path.suffix.lower() != ".gguf":
        raise UsageError(f"{output} does not end in .gguf", "Call it NAME.gguf")
    if path.is_dir():
        raise UsageError(f"{output} is a folder", "Pass the name of a file")
    if path.exists() and not force:
        raise UsageError(f"{output} exists already", "Choose another name with -o, or pass --force")
    made = save(checkpoint.resolve(model), path, format_name.upper() if format_name else None, Path(model).name)
    if json_output:
        types = {name: {"tensors": n, "bytes": size} for name, (n, size) in made.by_type.items()}
        result = {"file": str(output), "bytes": made.n_bytes, "types": types, "matrices": made.how}
        print(json.dumps({**environment.header(), **result, "notes": list(made.notes)}, indent=2, allow_nan=False))
        return
    shown = ", ".join(f"{name} {n} tensors {size / 1e6:,.2f} MB" for name, (n, size) in made.by_type.items())
    print(f"{output}: {made.n_bytes / 1e6:,.2f} MB; {shown}")
    for how, n in made.how.items():
        print(f"  {n} matrices: {how}")
    for note in made.notes:
        print(f"  Note: {note}")
