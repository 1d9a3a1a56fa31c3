"""`paretune get`: a real model from the package index, fetched and converted once; then its name is a MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from paretune.model.downloads import Download

SCHEMA_VERSION = 1


def get(
    name: Annotated[str | None, typer.Argument(help="Model to fetch. [default: list the models]")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Wheel or GGUF file placed by hand, where the package index cannot be reached."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Fetches a model with pip, checks it, and converts it once; called again, it mends what is damaged."""
    import json

    from paretune.errors import UsageError
    from paretune.model import downloads
    from paretune.native_build import say

    if name is None:
        if source is not None:
            raise UsageError(f"--from {source} has no name", f"Known: {', '.join(downloads.DOWNLOADS)}")
        rows = [row(d) for d in downloads.DOWNLOADS.values()]
        listing = {"schema_version": SCHEMA_VERSION, "models": rows}
        print(json.dumps(listing, indent=2) if json_output else "\n".join(map(line, rows)))
        return
    downloads.get(name, source and source.expanduser(), (lambda text: None) if quiet else say)
    made = row(downloads.find(name))
    print(json.dumps({"schema_version": SCHEMA_VERSION, **made}, indent=2) if json_output else line(made))


def row(download: Download) -> dict[str, Any]:
    """A model that can be had, as plain data."""
    from paretune.model import downloads

    here = downloads.is_here(download)
    return {
        "name": download.name,
        "what": download.what,
        "licence": download.licence,
        "package": f"{download.package}=={download.version}",
        "download_bytes": download.wheel_bytes,
        "folder": str(download.folder) if here else None,
        "gguf": str(download.gguf) if download.gguf.is_file() else None,
    }


def line(entry: dict[str, Any]) -> str:
    """The same for people."""
    what = f"{entry['name']}: {entry['what']} ({entry['licence']})"
    if entry["folder"] is None:
        return f"{what}; {entry['download_bytes'] / 1e6:,.0f} MB, `paretune get {entry['name']}`"
    return f"{what}; here: {entry['folder']}"
