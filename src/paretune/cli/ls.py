"""`paretune ls`: what there is to choose from, and what of it works on a device."""

from __future__ import annotations

from typing import Annotated, Any

import typer

SCHEMA_VERSION = 1
# section of the listing: its key in the JSON, the registry it comes from
_SECTIONS = {
    "transforms": "TRANSFORMS",
    "runners": "RUNNERS",
    "attention functions": "ATTENTION",
    "weight formats": "FORMATS",
    "drafts": "DRAFTS",
    "model families": "FAMILIES",
    "studies": "STUDIES",
}
_OTHERS = ("quantize formats", "axes", "configs", "embedded models", "models to get")


def ls(
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda: also try what works there. [default: list only]")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Lists what a --config can name by axis, and all transforms, runners, formats, studies and models."""
    import json

    found = collect(device)
    print(json.dumps(found, indent=2, allow_nan=False) if json_output else page(found))


def collect(device: str | None = None) -> dict[str, Any]:
    """Everything that `ls` shows, as plain data. Without a device nothing is tried."""
    from paretune import registry
    from paretune.recipe import ALIASES, OLD_NAMES

    found: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "device": device}
    for section, name in _SECTIONS.items():
        table = getattr(registry, name)
        rows = [*((n, _what(table, n)) for n in table.names()), *table.refused]
        found[section.replace(" ", "_")] = [{"name": n, "what": what} for n, what in rows]
    found["unknown_groups"] = [{"name": group, "what": what} for group, what in registry.unknown_groups()]
    found["quantize_formats"] = [{"name": name, "what": what} for name, what in _quantize_formats()]
    for name, kind in registry.TRANSFORMS.working():
        entry = next(e for e in found["transforms"] if e["name"] == name)
        entry["settings"] = list(kind.defaults())
    found["axes"] = _axes(device or "cpu")
    found["configs"] = [{"name": name, "what": expression} for name, expression in ALIASES.items()]
    found["old_names"] = OLD_NAMES
    found["embedded_models"] = _embedded_models()
    found["models_to_get"] = _models_to_get()
    if device is not None:
        _try(found, device)
    return found


def page(found: dict[str, Any]) -> str:
    """The listing as plain text."""
    sections = [*_SECTIONS, *(["unknown groups"] if found["unknown_groups"] else []), *_OTHERS]
    width = max(len(entry["name"]) for s in sections for entry in found[s.replace(" ", "_")])
    lines: list[str] = []
    for section in sections:
        lines += ["", _HEADINGS.get(section, section)] if lines else [section]
        for entry in found[section.replace(" ", "_")]:
            lines.append(f"  {entry['name']:<{width}}  {entry['what']}")
            if entry.get("settings"):
                lines.append(f"  {'':<{width}}    settings: {', '.join(entry['settings'])}")
            for verdict in entry.get("verdicts", []):
                about = f"{verdict['name']}: " if verdict["name"] != entry["name"] else ""
                # Why a number format is emulated stands once, at the transform, not at each config with it.
                said = verdict["reason"] and (section != "configs" or verdict["state"] == "cannot")
                reason = f" ({verdict['reason']})" if said else ""
                lines.append(f"  {'':<{width}}    {about}{verdict['state']} on {found['device']}{reason}")
    return "\n".join(lines + mechanism_lines(found.get("mechanisms", []), found["device"]))


def mechanism_lines(found: list[dict[str, str]], device: str | None) -> list[str]:
    """What works, is emulated or cannot work, why, and what is used instead, as found by running it."""
    if not found:
        return []
    width = max(len(entry["name"]) for entry in found)
    lines = ["", f"mechanisms on {device}, tried by running them"]
    for entry in found:
        lines.append(f"  {entry['name']:<{width}}  {entry['state']}: {entry['why']}")
        if entry["instead"]:
            lines.append(f"  {'':<{width}}    instead: {entry['instead']}")
    return lines


_HEADINGS = {
    "unknown groups": "entry points of other packages that are in no group of ours",
    "axes": "axes of a --config: one option of each, joined by +, such as native+int4(group=64)+kv8 (* default); "
    "of quantize several, where each but the last takes some layers only",
    "configs": "configs with a name of their own",
}


def _what(table: Any, name: str) -> str:
    """The first sentence of the entry's module, or of the entry itself where the module has none, read from the source:
    importing it could take seconds."""
    import ast
    import importlib.util
    import re
    from pathlib import Path

    from paretune.errors import UsageError

    target = table.targets[name]
    if name in table.others:
        try:
            table.get(name)
        except UsageError:
            return table.broken[name]
    module, _, attribute = target.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text("utf-8"))
    own = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == attribute]
    text = next((said for node in (tree, *own) if (said := ast.get_docstring(node))), "")
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<!et al)\. (?=[A-Z`])", paragraph)[0].rstrip(".")


def _axes(device: str) -> list[dict[str, Any]]:
    """Each axis with the terms that a config may name, and which of them `tune` tries by itself on `device`."""
    from paretune.recipe import CACHE_DTYPES
    from paretune.recipe.axes import axes
    from paretune.recipe.expression import CACHE_TERMS
    from paretune.registry import DRAFTS, RUNNERS, TRANSFORMS

    terms: dict[str, list[str]] = {}
    for name, kind in sorted(TRANSFORMS.working(), key=lambda pair: pair[1].stage):
        own = name if kind.bare else f"{name}({(kind.main or 'setting=value').upper()})"
        terms.setdefault(kind.axis, []).extend([*kind.terms, own])
    terms["runner"] = []
    for name, kind in RUNNERS.working():
        terms["runner"] += [name if m == kind.modes[0] else f"{name}({m})" for m in kind.modes]
    terms["cache"] = [*CACHE_TERMS, *(f"kv({d})" for d in CACHE_DTYPES if d not in CACHE_TERMS.values())]
    drafts = [
        f"{name}={argument}" if argument else name
        for name, kind in DRAFTS.working()
        for argument in ([kind.argument] if kind.argument else ["", *kind.choices])
    ]
    terms["speculate"] = [f"speculate({text})" for text in drafts]
    terms["threads"] = ["threads(N)"]
    rows = []
    for axis, options in axes(device).items():
        default = next((o.name for o in options if o.is_default), None)
        words = [f"{t}*" if t == default else t for t in dict.fromkeys([*(o.name for o in options), *terms[axis]])]
        tried = [{"name": o.name, "reason": o.reason} for o in options]
        rows.append({"name": axis, "what": ", ".join(words), "default": default, "tried": tried})
    return rows


def _quantize_formats() -> list[tuple[str, str]]:
    """Names and lines of `paretune quantize --format`."""
    from paretune.transforms.formats import formats

    return [(name, chosen.what) for name, (_, chosen) in formats().items()]


def _embedded_models() -> list[dict[str, str]]:
    import json
    from pathlib import Path

    from paretune import registry

    models = []
    for path in sorted((Path(registry.__file__).parent / "assets").glob("*/config.json")):
        c = json.loads(path.read_text("utf-8"))
        n_bytes = sum(f.stat().st_size for f in path.parent.glob("*.safetensors"))
        what = (
            f"{c['model_type']}, {c['n_layer']} layers of width {c['n_embd']}, vocabulary {c['vocab_size']:,}, "
            f"context {c['n_positions']:,}, {n_bytes / 1e6:.1f} MB"
        )
        models.append({"name": path.parent.name, "what": what})
    return models


def _models_to_get() -> list[dict[str, str | None]]:
    """What `paretune get` fetches, and whether it is here."""
    from paretune.cli.get import row
    from paretune.model.downloads import DOWNLOADS

    rows = [row(download) for download in DOWNLOADS.values()]
    state = [f"here: {r['folder']}" if r["folder"] else f"not here: `paretune get {r['name']}`" for r in rows]
    return [
        {"name": r["name"], "what": f"{r['what']}; {s}", "folder": r["folder"]}
        for r, s in zip(rows, state, strict=True)
    ]


def _try(found: dict[str, Any], device: str) -> None:
    """Adds verdicts to transforms (one a variant that a preset uses, else as it is by default), attention functions,
    runners, presets, and the mechanisms.

    Raises:
        UsageError: there is no such device.
    """
    from paretune import hardware
    from paretune.hardware.abilities import abilities
    from paretune.recipe import ALIASES, preset
    from paretune.registry import ATTENTION, RUNNERS, TRANSFORMS

    hardware.check_device(device)
    hardware.set_threads()
    recipes = {name: preset(name) for name in ALIASES}
    variants: dict[str, Any] = {}
    for name, kind in TRANSFORMS.working():
        settings = [{}, *(s for s in kind.terms.values() if s)] if kind.bare else [s for s in kind.terms.values() if s]
        made = [kind(**s) for s in settings]
        made += [t for recipe in recipes.values() for t in recipe.transforms if type(t) is kind]
        variants |= {f"{name} {t.title}": t for t in made}
    forms = dict(ATTENTION.working())
    for entry in found["attention_functions"]:
        entry["verdicts"] = []
        if entry["name"] not in forms:  # why it is broken stands beside its name
            continue
        form = TRANSFORMS.get("attention")(form=entry["name"])
        entry["verdicts"] = [_verdict(entry["name"], form.requires(device), form.notes(device))]
    working = dict(TRANSFORMS.working())
    for entry in found["transforms"]:
        name = entry["name"]
        made = [_verdict(t.title, t.requires(device), t.notes(device)) for t in variants.values() if t.name == name]
        entry["verdicts"] = made or ([_verdict(name, None, [])] if name in working else [])
    runners = dict(RUNNERS.working())
    for entry in found["runners"]:
        name = entry["name"]
        entry["verdicts"] = [_verdict(name, runners[name].requires(device), [])] if name in runners else []
    for entry in found["configs"]:
        recipe = recipes[entry["name"]]
        notes = [note for t in recipe.transforms for note in t.notes(device)]
        entry["verdicts"] = [_verdict(entry["name"], recipe.requires(device), notes)]
    found["mechanisms"] = [a.to_json() for a in abilities(device)]


def _verdict(name: str, reason: str | None, notes: list[str]) -> dict[str, str]:
    """`works`, `emulated` (it runs, and something has to be known about it) or `cannot`, with the reason."""
    if reason:
        return {"name": name, "state": "cannot", "reason": reason}
    return {"name": name, "state": "emulated" if notes else "works", "reason": "; ".join(notes)}
