"""Checkpoints in the peers' own forms, kept in the cache folder by what they were made from.

The conversion runs in the peer's environment, in the process that is measured afterwards or in one of its own. A
folder is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paretune import files
from paretune.errors import ParetuneError
from paretune.measure.peers import envs
from paretune.measure.peers.catalogue import Engine, Peer
from paretune.model import checkpoint, families
from paretune.model.config import ModelConfig

SCHEMA = 2  # of what the workers write: a higher number converts all anew
MARK = "converted.json"

Ask = Callable[..., dict[str, Any]]  # `ask("convert", **request)` of a worker


def models_folder() -> Path:
    return envs.home() / "models"


def identity(folder: Path) -> dict[str, Any]:
    """What tells one checkpoint from another without reading all of it: the config, and of each weight file its name,
    size, time of change and header."""
    out: dict[str, Any] = {"config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()}
    for path in checkpoint.weight_files(folder):
        info = path.stat()
        with open(path, "rb") as f:
            head = f.read(8)
            head += f.read(min(int.from_bytes(head, "little"), 16 << 20))
        out[path.name] = [info.st_size, info.st_mtime_ns, hashlib.sha256(head).hexdigest()]
    return out


def target_of(folder: Path, engine: Engine) -> Path:
    """Where the converted checkpoint lies or would lie."""
    peer = engine.peer
    stored = peer.formats[engine.format].stored_as or engine.format
    key = {
        "schema": SCHEMA,
        "peer": peer.name,
        "requirements": list(peer.requirements),
        "format": stored,
        "checkpoint": identity(folder),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name)[:40]
    return models_folder() / f"{peer.name}-{stored}-{name}-{digest}"


def existing(folder: Path, engine: Engine) -> Path | None:
    """The finished conversion in the cache, None where there is none."""
    target = target_of(folder, engine)
    return target if (target / MARK).is_file() else None


def converted(folder: Path, config: ModelConfig, engine: Engine, threads: int, ask: Ask, say: envs.Say) -> Path:
    """The converted checkpoint, made now if the cache does not have it.

    Args:
        ask: a running worker of the peer.
        say: called with a line before a conversion.

    Raises:
        ParetuneError: the conversion failed (from `ask`), or the cache cannot be written.
    """
    if not config.is_regular:
        raise ParetuneError(
            f"{engine.name} has no form of a model whose layers were pruned to widths of their own",
            "Leave the engine out, or prune with scope=layer",
        )
    found = existing(folder, engine)
    if found is not None:
        return found
    target = target_of(folder, engine)
    format = engine.peer.formats[engine.format]
    base = None
    if format.base is not None:
        base = converted(folder, config, Engine(engine.peer, format.base), threads, ask, say)
    if format.stored_as is not None:
        return converted(folder, config, Engine(engine.peer, format.stored_as), threads, ask, say)
    say(f"converting {folder.name} for {engine.name}")
    with files.whole_folder(target, overwrite=True) as out:
        ask(
            "convert",
            config=request_config(config),
            weight_files=[str(path.resolve()) for path in checkpoint.weight_files(folder)],
            format=engine.format,
            base=None if base is None else str(base),
            out=str(out),
            threads=threads,
        )
        files.write_json(out / MARK, {"schema_version": SCHEMA, "engine": engine.name, "source": str(folder.resolve())})
    return target


def request_config(config: ModelConfig) -> dict[str, Any]:
    """The narrowed config as plain data, and under `facts` what the family declares: workers never read `config.json`,
    import nothing of ours and ask for no family's name."""
    family = families.of(config)
    facts: dict[str, Any] = {
        "positions": family.positions,
        "norm": family.norm,
        "is_gated": family.is_gated,
        "modules": dict(family.modules),
        "stored_prefix": family.stored_prefix,
        "stored_transposed": list(family.stored_transposed),
        "gguf": None,
    }
    if family.gguf is not None:
        names = ("architecture", "title", "activation", "interleaved")
        facts["gguf"] = {name: getattr(family.gguf, name) for name in names}
    return {key: value for key, value in asdict(config).items() if key not in ("hf", "family")} | {"facts": facts}


def bytes_for(name: str) -> int:
    """What the conversions for a peer take."""
    return sum(envs.bytes_below(folder) for folder in _folders(name))


def remove_models(peer: Peer) -> int:
    """Removes what was converted for a peer, unfinished conversions too, and gives the bytes that are free again."""
    freed = 0
    for folder in _folders(peer.name):
        freed += envs.bytes_below(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return freed


def _folders(name: str) -> list[Path]:
    folder = models_folder()
    # A leading dot: the temporary folder of a conversion that was killed.
    return [path for stem in ("", ".") for path in sorted(folder.glob(f"{stem}{name}-*")) if path.is_dir()]
