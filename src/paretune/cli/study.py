"""`paretune study`: a published experiment again, on this machine, beside the published numbers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from paretune.cli.model_help import MODEL
from paretune.registry import STUDIES


def study(
    name: Annotated[
        str,
        typer.Argument(
            help="kernels, precision, quantization, attention, or one that another package brings (`paretune ls`)."
        ),
    ],
    model: Annotated[str, typer.Option(help=MODEL)] = "pocket",
    quick: Annotated[
        bool, typer.Option("--quick", help="A shorter study; with `pocket` minutes on two cores.")
    ] = False,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Folder of the results. [default: runs/study-NAME]")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="attention: .jsonl or .csv of articles and summaries. [default: the project's own]"),
    ] = None,
    article_column: Annotated[str | None, typer.Option(help="Of --pairs.")] = None,
    summary_column: Annotated[str | None, typer.Option(help="Of --pairs.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: physical cores]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of prompts and block order.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 5 where the machine was too noisy to judge speed.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Runs a published study again: report.html, results.csv, results.json, pictures (and traces)."""
    import inspect
    import json

    from paretune import hardware
    from paretune.errors import TooNoisyError, UsageError
    from paretune.files import ensure_folder

    run = STUDIES.get(name)
    if threads is not None and threads < 1:
        raise UsageError(f"--threads is {threads}", "It has to be 1 or more")
    hardware.check_device(device)
    given = {"pairs": pairs, "article_column": article_column, "summary_column": summary_column}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if missing := [key for key in options if key not in inspect.signature(run).parameters]:
        takers = [n for n, other in STUDIES.working() if missing[0] in inspect.signature(other).parameters]
        flag = missing[0].replace("_", "-")
        raise UsageError(f"the {name} study has no --{flag}", f"It belongs to: {', '.join(takers)}")
    out = ensure_folder((output_dir or Path("runs") / f"study-{name}").expanduser())

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    with _blame(STUDIES.package_of(name), name):
        result = run(model, out, quick=quick, seed=seed, device=device, threads=threads, say=say, **options)
        shown = json.dumps(result, indent=2, allow_nan=False) if json_output else _lines(result)
        is_noisy = result["is_noisy"]
    print(shown)
    say(f"written: {out}")
    if strict and is_noisy:
        raise TooNoisyError(
            "this machine is too noisy for --strict: some speeds are undecided because of it",
            "Close other programs and run it again, or leave out --strict",
        )


def _lines(result: dict[str, Any]) -> str:
    return "\n".join([*result["summary"], *result["noise"]])


@contextlib.contextmanager
def _blame(package: str | None, name: str) -> Iterator[None]:
    """What goes wrong inside another package's study is that package's, and the message says so.

    Raises:
        ParetuneError: something that is no error of ours and that no user's file, disk or memory caused.
    """
    from paretune.errors import ParetuneError

    try:
        yield
    except (ParetuneError, OSError, MemoryError):
        raise
    except Exception as error:
        if package is None:
            raise
        raise ParetuneError(
            f"the study {name!r} of the package {package} failed ({type(error).__name__}: {error})",
            "Report it to that package; PARETUNE_DEBUG=1 shows the traceback",
        ) from error
