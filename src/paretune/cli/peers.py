"""`paretune peers`: the engines that `bench --engine` compares with, each in an environment of its own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from paretune.measure.peers.catalogue import Peer

SCHEMA_VERSION = 1
ACTIONS = ("install", "ls", "remove")


def peers(
    action: Annotated[str, typer.Argument(help="install, ls or remove.")] = "ls",
    names: Annotated[list[str] | None, typer.Argument(help="Peers, or `all`.")] = None,
    force: Annotated[bool, typer.Option("--force", help="install: build it again.")] = False,
    converted: Annotated[
        bool, typer.Option("--converted", help="remove: the converted models only, not the environments.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="ls: print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Installs, lists and removes the engines that bench compares with; each has its own environment in the cache."""
    from paretune.errors import UsageError

    if action not in ACTIONS:
        raise UsageError(f"unknown action {action!r}", f"Known: {', '.join(ACTIONS)}")
    if action == "ls":
        if names:
            raise UsageError(f"`ls` takes no names, {names[0]!r} was given", "It lists all peers")
        _ls(json_output)
        return
    chosen = _chosen(names or [], action)
    if action == "install":
        _install(chosen, force, quiet)
    else:
        _remove(chosen, converted)


def _chosen(names: list[str], action: str) -> list[Peer]:
    from paretune.errors import UsageError
    from paretune.measure.peers.catalogue import OURS, PEERS, peer_of

    parts = [part.strip() for name in names for part in name.split(",") if part.strip()]
    if not parts:
        raise UsageError(f"`{action}` needs names", f"Known: {', '.join(PEERS)}, or all")
    if "all" in parts:
        return list(PEERS.values())
    if OURS in parts:
        raise UsageError(f"{OURS} is not a peer of itself", f"Known: {', '.join(PEERS)}, or all")
    return list(dict.fromkeys(peer_of(part.partition(":")[0]) for part in parts))


def _install(chosen: list[Peer], force: bool, quiet: bool) -> None:
    """One after the other; one that fails does not keep the others from being installed.

    Raises:
        ParetuneError: the first failure, when all were tried.
    """
    from paretune.errors import ParetuneError
    from paretune.measure.peers import envs
    from paretune.report.units import format_bytes, format_sec

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    failures: list[ParetuneError] = []
    for peer in chosen:
        if envs.is_current(peer) and not force:
            print(f"{peer.name}: installed already")
            continue
        if not force and envs.shares(peer):
            print(f"{peer.name}: Paretune's own environment has it already; --force makes one of its own")
            continue
        try:
            folder = envs.install(peer, say)
        except ParetuneError as error:
            failures.append(error)
            if peer is not chosen[-1]:
                say(f"paretune: {error}")
            continue
        mark = envs.installed(peer) or {}
        size = format_bytes(envs.bytes_below(folder))
        print(f"{peer.name}: installed in {format_sec(round(mark['install_sec'], 1))}, {size}")
    if failures:
        raise failures[-1]


def _remove(chosen: list[Peer], converted_only: bool) -> None:
    from paretune.measure.peers import convert, envs
    from paretune.report.units import format_bytes

    for peer in chosen:
        freed = 0 if converted_only else envs.bytes_below(envs.folder_of(peer))
        if not converted_only:
            envs.remove(peer)
        freed += convert.remove_models(peer)
        print(f"{peer.name}: {f'removed, {format_bytes(freed)} are free again' if freed else 'nothing to remove'}")


def _ls(json_output: bool) -> None:
    import json

    from paretune.measure.peers import convert, envs
    from paretune.report.tables import Column, to_text

    rows: list[Any] = envs.listing()
    for row in rows:
        row["converted_bytes"] = convert.bytes_for(row["peer"])
    if json_output:
        print(json.dumps({"schema_version": SCHEMA_VERSION, "folder": str(envs.home()), "peers": rows}, indent=2))
        return
    columns = [
        Column("peer", "Peer", numeric=False),
        Column("state", "State", numeric=False),
        Column("formats", "Formats", _formats, numeric=False),
        Column("env_bytes", "Environment"),
        Column("converted_bytes", "Converted models"),
    ]
    print(to_text(rows, columns), end="")
    print(f"\n* of a name without a format. Folder: {envs.home()}")


def _formats(row: dict[str, Any]) -> str:
    return ", ".join(name + ("*" if name in row["default"] else "") for name in row["formats"])
