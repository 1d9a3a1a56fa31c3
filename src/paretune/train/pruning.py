"""A model folder with fewer weights: pruned to a share of its parameters, recovered, written whole.

The run can be cut off: what was pruned, and each block that was recovered, lies in `OUT.work` until the folder is
whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paretune import files
from paretune.engine import calibration
from paretune.engine.probe import observe
from paretune.engine.quantize import refuse_quantized, stored_dtype
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import ParetuneError, UsageError
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.registry import TRANSFORMS
from paretune.train.recover import Half, RecoverOptions, recover_blocks_
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context, config_of
from paretune.transforms.calibrate import blocks_of
from paretune.transforms.prune.base import Prune, percent
from paretune.transforms.prune.weights import PruneWeights
from paretune.transforms.quantize import matrices

SCHEMA_VERSION = 1
WHAT = ("weights", "columns", "neurons", "heads", "layers")
TRIES = 64  # shares between nothing and all that are looked at


@dataclass(frozen=True)
class Pruned:
    """What `prune` wrote.

    Args:
        remaining: parameters that are left (not zero, or still there), in parts of all, embeddings and head included.
        loss_before, loss_after: nats a token on the calibration windows, dense, and as it was written.
        halves: of the blocks that were recovered.
        proof: what was checked.
    """

    folder: Path
    transform: Prune
    n_parameters: int
    remaining: float
    source_bytes: int
    n_bytes: int
    loss_before: float
    loss_pruned: float
    loss_after: float
    halves: tuple[Half, ...]
    proof: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        out = {**self.__dict__, "folder": str(self.folder), "transform": config_of(self.transform)}
        return out | {"halves": [h.__dict__ for h in self.halves], "proof": list(self.proof), "notes": list(self.notes)}


def n_parameters(config: ModelConfig) -> int:
    """All stored numbers of a model, tied ones once."""
    return sum(p.numel() for p in checkpoint.build(config).parameters())


def transform_for(config: ModelConfig, what: str, by: str | None, remaining: float, **settings: Any) -> Prune:
    """The transform that leaves `remaining` of all parameters, embeddings and head included.

    Args:
        what: a name in `WHAT`.
        by: a criterion; None: the structure's own, SparseGPT for single weights.
        settings: of the transform, `ends` or `scope`.

    Raises:
        UsageError: an unknown name, a share outside (0, 1), or one that cannot be reached.
    """
    if what not in WHAT:
        raise UsageError(f"--what is {what!r}", f"Known: {', '.join(WHAT)}")
    if not 0 < remaining <= 1:
        raise UsageError(f"--remaining is {remaining:g}", "It has to be above 0 and at most 100%")
    total = n_parameters(config)
    if what == "weights":
        known = [name for name, kind in TRANSFORMS.working() if issubclass(kind, PruneWeights)]
        name = by or known[-1]
        if name not in known:
            raise UsageError(f"--by is {name!r}", f"Known for weights: {', '.join(known)}")
        kind = TRANSFORMS.get(name)
        chosen = kind(**settings).chosen(checkpoint.build(config))
        n = sum(c.weight.out_features * c.weight.in_features for c in chosen)
        keep = 1 - (1 - remaining) * total / n
        if keep <= 0:
            raise UsageError(
                f"{percent(remaining)} cannot be reached: what is not pruned is {percent(1 - n / total)} of the model",
                "Ask for more, or prune the ends too (--ends)",
            )
        return kind(keep=keep, **settings)
    kind = TRANSFORMS.get(what)
    if settings.get("ends"):
        raise UsageError("--ends is about single weights", "Leave it out")
    if by is not None:
        settings["by"] = by
    best: tuple[float, Prune] | None = None
    least = 1.0
    for i in range(1, TRIES + 1):
        transform = kind(keep=i / TRIES, **{k: v for k, v in settings.items() if k != "ends"})
        try:
            share = n_parameters(transform.smaller(config)) / total
        except UsageError:
            continue
        least = min(least, share)
        if best is None or abs(share - remaining) < abs(best[0] - remaining):
            best = share, transform
    if best is None or best[0] > remaining + 0.1:
        raise UsageError(
            f"{percent(remaining)} cannot be reached: without {what} at least {percent(least)} of the model are left",
            "Ask for more, or prune something else",
        )
    return best[1]


def prune(
    folder: Path,
    transform: Prune,
    output_dir: Path,
    *,
    recover: RecoverOptions | None = None,
    calibration_text: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Pruned:
    """Writes the folder's model pruned, and recovered block by block where that is asked for, whole or not at all.

    Args:
        recover: None: pruned only.
        calibration_text: None: the model writes it.
        resume: go on where a run of the same settings was cut off.

    Raises:
        UsageError: quantised already, text that is too short, a share that empties something, nothing to resume.
        ParetuneError: weights that are NaN, or an error that becomes NaN.
    """
    refuse_quantized(folder)
    config = checkpoint.read_config(folder)
    if transform.is_done(config):
        raise UsageError(f"{folder} was pruned like this already", "Ask for less, or start from the dense model")
    if reason := transform.fits(config):
        raise UsageError(f"{transform.title} cannot be made here: {reason}", "Choose another --what or --remaining")
    if recover is not None and transform.changed(config).n_embd != config.n_embd:
        raise UsageError(
            "blocks cannot be held against the dense ones where the residual stream is narrower",
            "Leave --recover out, and train the result",
        )
    if output_dir.exists() and not overwrite:
        raise UsageError(f"{output_dir} is there already", "Choose another folder with -o, or pass --force")
    notes: list[str] = []
    work = _Work(output_dir, folder, transform, recover, calibration_text, resume)
    attention = Attention("sdpa")
    dense = attention.apply(checkpoint.load(folder, torch.float32), Context())
    window_len = min(calibration.WINDOW_LEN, config.n_positions)
    if calibration_text is not None:
        windows = calibration.from_text(folder, calibration_text, window_len=window_len)
    else:
        say("the model writes its calibration text")
        windows = calibration.from_model(dense, window_len=window_len, say=notes.append)
    loss_before = _loss(dense, windows)
    _check_loss(loss_before, "the dense model")
    state = work.state
    if state is None:
        model = checkpoint.load(folder, torch.float32)
        before = [id(block) for _, block in blocks_of(model)]
        model = transform.apply(attention.apply(model, Context()), Context(calibration=windows, progress=say))
        kept = [before.index(id(block)) for _, block in blocks_of(model)]
        loss_pruned = _loss(model, windows)
        _check_loss(loss_pruned, "the pruned model")
        state = {"kept": kept, "loss_pruned": loss_pruned, "halves": [], "first": 0}
        work.save(model, state)
    else:
        say(f"going on at block {state['first']}")
        model = attention.apply(checkpoint.load(work.folder, torch.float32), Context())
    if recover is not None:
        known = dict(state)

        def done(i: int, halves: list[Half]) -> None:
            said = ", ".join(f"{h.name.rpartition(': ')[2]} {h.before:.2%} to {h.after:.2%}" for h in halves)
            say(f"block {i + 1} of {len(known['kept'])}: error of {said}")
            known["halves"] = [*known["halves"], *(h.__dict__ for h in halves)]
            known["first"] = i + 1
            work.save(model, known)

        recover_blocks_(model, dense, state["kept"], windows, recover, first=state["first"], done=done)
        state = known
    loss_after = _loss(model, windows)
    _check_loss(loss_after, "the recovered model")
    proof = tuple(transform.verify(model, observe(EagerRunner(model))))
    if (dtype := stored_dtype(folder)) is not None:
        model = model.to(dtype)  # as it came
    remaining = _left(model) / n_parameters(config)
    with files.whole_folder(output_dir, overwrite=overwrite) as out:
        checkpoint.save(model, out, tokenizer_from=folder)
        halves = tuple(Half(**h) for h in state["halves"])
        n_bytes = sum(path.stat().st_size for path in checkpoint.weight_files(out))
        made = Pruned(
            folder=output_dir,
            transform=transform,
            n_parameters=n_parameters(config),
            remaining=remaining,
            source_bytes=sum(path.stat().st_size for path in checkpoint.weight_files(folder)),
            n_bytes=n_bytes,
            loss_before=loss_before,
            loss_pruned=state["loss_pruned"],
            loss_after=loss_after,
            halves=halves,
            proof=proof,
            notes=tuple(notes),
        )
        files.write_json(out / "prune.json", {"schema_version": SCHEMA_VERSION, **made.to_json()})
    work.remove()
    return made


class _Work:
    """What a run that is cut off goes on from: the model as it is, and how far it came."""

    def __init__(
        self,
        output_dir: Path,
        source: Path,
        transform: Prune,
        recover: RecoverOptions | None,
        text: str | None,
        resume: bool,
    ) -> None:
        self.folder = output_dir.with_name(f"{output_dir.name}.work")
        self.key = {
            "schema_version": SCHEMA_VERSION,
            "source": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in checkpoint.weight_files(source)],
            "transform": transform.spelled,
            "recover": None if recover is None else recover.__dict__,
            "text": None if text is None else len(text),
        }
        self.source = source
        path = self.folder / "state.json"
        self.state: dict[str, Any] | None = None
        if not resume:
            if path.is_file():
                raise UsageError(f"{self.folder} holds an unfinished run", "Go on with --resume, or remove it")
            return
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            raise UsageError(f"nothing to resume in {self.folder}", "Leave --resume out") from None
        if found["key"] != json.loads(json.dumps(self.key)):
            raise UsageError(f"{self.folder} was begun with other settings", "Pass those, or remove it")
        self.state = found["state"]

    def save(self, model: Any, state: dict[str, Any]) -> None:
        with files.whole_folder(self.folder, overwrite=True) as out:
            checkpoint.save(model, out, tokenizer_from=self.source)
            files.write_json(out / "state.json", {"key": self.key, "state": state})

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@torch.no_grad()
def _loss(model: Any, windows: torch.Tensor) -> float:
    total = 0.0
    for batch in windows.split(4):
        logits = model(batch[:, :-1], None, "all").float().flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
    return total / windows[:, 1:].numel()


def _check_loss(loss: float, what: str) -> None:
    if not loss < float("inf"):
        raise ParetuneError(f"the loss of {what} is {loss:g} nats a token", "Prune less, or check the weights")


def _left(model: Any) -> int:
    """Parameters that are there and not zero."""
    inside = [c.weight for c in matrices(model)]
    held = {id(p) for w in inside for p in w.parameters()}
    vectors = sum(p.numel() for p in model.parameters() if id(p) not in held)
    return vectors + sum(int(w.dequantize().count_nonzero()) for w in inside)
