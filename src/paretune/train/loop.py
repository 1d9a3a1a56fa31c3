"""Language-model training: AdamW, warm-up and cosine, gradient accumulation, autocast, exact resume.

A checkpoint holds all that decides the next update, as safetensors and JSON, never pickle: a run that was
interrupted and resumed has bit for bit the weights of one that was not (same machine and number of threads).
Reference: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paretune import clock
from paretune.errors import ParetuneError, UsageError
from paretune.files import ensure_folder, whole_folder, write_json
from paretune.model import checkpoint
from paretune.model.base import LanguageModel
from paretune.train import data
from paretune.train.data import TokenStream
from paretune.train.objective import Teacher, counted, summed_loss
from paretune.train.saving import Interrupts, rng_state, save_model
from paretune.train.schedule import (
    TrainOptions,
    TrainResult,
    auto_dtype,
    check_same,
    check_same_model,
    learning_rate,
    parameter_groups,
    plain_options,
)
from paretune.train.source import BITS, Source, TextSource, heldout_loss

__all__ = ["TextSource", "TrainOptions", "TrainResult", "fit", "heldout_loss", "parameter_groups", "train"]

OPTIMIZER_PARTS = ("step", "exp_avg", "exp_avg_sq")

Progress = Callable[[dict[str, Any]], None]


def train(
    model: LanguageModel,
    tokenizer: Path | None,
    train_tokens: TokenStream,
    heldout_tokens: TokenStream | None,
    options: TrainOptions,
    out_dir: Path,
    resume: bool = False,
    progress: Progress | None = None,
    **more: Any,
) -> TrainResult:
    """Trains `model` on a text: `fit` with a `TextSource`."""
    source = TextSource(train_tokens, heldout_tokens)
    return fit(model, tokenizer, source, options, out_dir, resume, progress, **more)


def fit(
    model: LanguageModel,
    tokenizer: Path | None,
    source: Source,
    options: TrainOptions,
    out_dir: Path,
    resume: bool = False,
    progress: Progress | None = None,
    *,
    teacher: Teacher | None = None,
    bf16_is_real: Callable[[], bool] | bool | None = None,
    save_dtype: str = "fp32",
    command: Sequence[str] = (),
) -> TrainResult:
    """Trains `model` in place and writes it with `train.json` to `out_dir`.

    While it runs, `out_dir/checkpoints/step-*` holds the newest checkpoint (itself a model folder); it goes
    when the run is finished. Ctrl-C leaves a checkpoint of the last finished update and is raised on.

    Args:
        model: dense weights; turned to fp32. On `resume` its weights are overwritten from the checkpoint.
        tokenizer: folder whose tokenizer files go with the model.
        progress: called after each update with step, steps, loss, lr, grad_norm, tokens_per_sec, eta_sec,
            heldout_loss and heldout_bits_per_byte (the newest, or None).
        teacher: distils it into the model.
        bf16_is_real: decides `dtype="auto"`; None asks `hardware.dtype_support`.
        save_dtype: of the finished model, fp32, fp16 or bf16.
        command: the command line, for `train.json`.

    Raises:
        UsageError: options that do not fit the model, the data, the folder or the checkpoint.
        CheckpointError: the checkpoint is damaged.
        ParetuneError: the loss became NaN or infinite (names the step), too short a text, a full disk.
    """
    checkpoint.dtype_of(save_dtype)  # a wrong name fails now, not after hours
    source.check(model, options)
    if options.patience and not source.heldout_names:
        raise UsageError("--patience needs held-out data", "Hold some out, or leave --patience out")
    if teacher is not None:
        teacher.check(model)
    ensure_folder(out_dir)
    found = data.find_checkpoint(out_dir, resume)
    state = data.read_state(found) if found else None
    if options.dtype == "auto":
        options = replace(options, dtype=auto_dtype(options.device, state, bf16_is_real))
    model.to(options.device).float().train().requires_grad_(True)
    try:
        run = _Run(model, tokenizer, source, options, out_dir, command, teacher)
        if found and state:
            run.restore(found, state)
        with Interrupts() as interrupts:
            try:
                run.until_done(interrupts, progress)
                return run.finish(save_dtype)
            except KeyboardInterrupt:
                with interrupts.held_back():
                    run.save_checkpoint()
                raise
    finally:
        model.zero_grad(set_to_none=True)
        model.eval().requires_grad_(False)


class _Run:
    """The state of a run. `step`, `sampler_state`, `rng` and `points` belong to the last finished update."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Path | None,
        source: Source,
        options: TrainOptions,
        out_dir: Path,
        command: Sequence[str],
        teacher: Teacher | None,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.source, self.out_dir, self.command, self.teacher = source, out_dir, command, teacher
        self.distilled = None if teacher is None else teacher.settings
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, options.weight_decay), lr=0.0, betas=options.betas, fused=True
        )
        self.forward = torch.compile(model) if options.compile else model
        self.sampler = source.sampler(options)
        self.scaler = torch.amp.GradScaler(torch.device(options.device).type, enabled=options.dtype == "fp16")
        self.best: dict[str, Tensor] | None = None  # weights of the best evaluation, with `patience`
        torch.manual_seed(options.seed)
        self.step, self.saved_step = 0, -1
        self.points: list[dict[str, Any]] = [{"step": 0}]
        self.update_sec = self.elapsed_sec = 0.0
        self.n_tokens = 0  # shown in all updates, padding included
        self.sampler_state, self.rng = self.sampler.state(), rng_state(options.device)

    def until_done(self, interrupts: Interrupts, progress: Progress | None) -> None:
        o, first_step, earlier_sec, start = self.options, self.step, self.elapsed_sec, clock.now()
        while True:
            due = self.step in (0, o.steps) or (o.eval_every > 0 and self.step % o.eval_every == 0)
            if due and "heldout_loss" not in self.points[-1]:
                scores = self.source.evaluate(self.model, o)
                with interrupts.held_back():  # a checkpoint never has a best loss without its weights
                    self.points[-1] |= scores
                    self._keep_best()
            self.elapsed_sec = earlier_sec + clock.now() - start
            if o.checkpoint_every and 0 < self.step < o.steps and self.step % o.checkpoint_every == 0:
                self.save_checkpoint()
            if progress and self.step > first_step:
                eta = (clock.now() - start) / (self.step - first_step) * (o.steps - self.step)
                newest = {
                    k: next((p[k] for p in reversed(self.points) if k in p), None) for k in ("heldout_loss", BITS)
                }
                progress({**self.points[-1], "steps": o.steps, "eta_sec": eta, **newest})
            if self.step == o.steps or self.stopped_early:
                return
            self._update(interrupts)
            self.elapsed_sec = earlier_sec + clock.now() - start

    def _update(self, interrupts: Interrupts) -> None:
        """One update. Before the optimizer only gradients change, so Ctrl-C may come at any time."""
        o, begin = self.options, clock.now()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=o.device)
        batches = [self.sampler.next() for _ in range(o.grad_accumulation)]
        n_counted = sum(counted(targets) for _, targets in batches)
        for inputs, targets in batches:
            shown, wanted = inputs.to(o.device), targets.to(o.device)
            loss = summed_loss(self.forward, shown, wanted, o.dtype, self.teacher) / n_counted
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), o.clip).item()
        # In fp16 a gradient that overflows halves the scale and costs this update, no more.
        is_overflow = self.scaler.is_enabled() and not math.isfinite(norm) and self.scaler.get_scale() > 1
        if not (math.isfinite(total.item()) and (math.isfinite(norm) or is_overflow)):
            raise ParetuneError(
                f"the loss is {total.item():g} (gradient norm {norm:g}) at step {self.step + 1} of {o.steps}",
                "Lower --learning-rate, raise --warmup-steps or use --dtype fp32, in a new folder",
            )
        rate = learning_rate(
            self.step,
            peak=o.learning_rate,
            steps=o.steps,
            warmup_steps=o.warmup_steps,
            min_ratio=o.min_learning_rate,
        )
        with interrupts.held_back():  # half an update must never reach a checkpoint
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.scaler.step(self.optimizer)
            self.scaler.update()
            clock.synchronize(torch.device(o.device).type)
            sec = clock.now() - begin
            self.step += 1
            self.update_sec += sec
            self.sampler_state, self.rng = self.sampler.state(), rng_state(o.device)
            tokens = sum(inputs.numel() for inputs, _ in batches)
            self.n_tokens += tokens
            point = {"step": self.step, "loss": total.item(), "lr": rate, "grad_norm": None if is_overflow else norm}
            point |= {"skipped": True} if is_overflow else {}
            self.points.append(point | {"tokens_per_sec": tokens / sec if sec > 0 else None})

    @property
    def _scored(self) -> list[tuple[float, int]]:
        """(held-out loss, step) of the evaluations so far."""
        found = [(p.get("heldout_loss"), p["step"]) for p in self.points]
        return [(loss, step) for loss, step in found if loss is not None]

    @property
    def stopped_early(self) -> bool:
        scored = self._scored
        n_since = len(scored) - 1 - scored.index(min(scored)) if scored else 0
        return 0 < self.options.patience <= n_since

    @property
    def kept_step(self) -> int:
        """The update whose weights a run that ends here leaves: the best evaluation's, or the last."""
        return self.step if self.best is None else min(self._scored)[1]

    def _keep_best(self) -> None:
        if self.options.patience and self._scored and min(self._scored)[1] == self.step:
            self.best = {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}

    def save_checkpoint(self) -> None:
        """Writes the last finished update; the checkpoint before it goes only when this one is whole."""
        if self.step == self.saved_step:
            return
        folder = self.out_dir / "checkpoints" / f"step-{self.step:08d}"
        tensors = {f"rng.{k}": v for k, v in self.rng.items()}
        for name, p in self.model.named_parameters():
            for part, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{name}.{part}"] = value.detach().cpu().contiguous()
        with whole_folder(folder, overwrite=True) as temporary:
            checkpoint.save(self.model, temporary, self.tokenizer)
            try:
                save_file(tensors, temporary / "optimizer.safetensors")
            except SafetensorError as error:
                raise ParetuneError(f"cannot write {folder}: {error}", "Free some space") from None
            if self.best is not None:
                save_file(self.best, temporary / "best.safetensors")
            state = {
                "schema_version": data.SCHEMA_VERSION,
                "step": self.step,
                "options": plain_options(self.options),
                "text": self.source.key,
                "teacher": self.distilled,
                "sampler": self.sampler_state,
                "scaler": self.scaler.state_dict(),
                "n_tokens": self.n_tokens,
                "update_sec": self.update_sec,
                "elapsed_sec": self.elapsed_sec,
                "points": self.points,
                "sha256": {f.name: data.sha256(f) for f in sorted(temporary.glob("*.safetensors"))},
            }
            write_json(temporary / "state.json", state)
        for other in folder.parent.glob("step-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        self.saved_step = self.step
        self._write_history()

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Puts the run where the checkpoint is.

        Raises:
            UsageError: other options, another text, teacher or model, or a model that attends in another way.
            CheckpointError: a file is missing or damaged.
        """
        try:
            check_same(self.options, self.source.key, self.distilled, state, folder)
            tensors = load_file(folder / "optimizer.safetensors")
            began = checkpoint.load(folder)
            check_same_model(self.model, began, folder)
            stored = dict(began.named_parameters())
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(stored[name])
                    for part in OPTIMIZER_PARTS if state["step"] else ():
                        self.optimizer.state[p][part] = tensors[f"{name}.{part}"].to(p.device)
            self.sampler.restore(state["sampler"])
            self.scaler.load_state_dict(state["scaler"])
            self.n_tokens = int(state["n_tokens"])
            if (folder / "best.safetensors").is_file():
                self.best = load_file(folder / "best.safetensors")
            self.step = self.saved_step = int(state["step"])
            self.points = list(state["points"])
            self.update_sec, self.elapsed_sec = float(state["update_sec"]), float(state["elapsed_sec"])
            torch.set_rng_state(tensors["rng.cpu"])
            if "rng.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["rng.cuda"], self.options.device)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise data.damaged(folder, f"{type(error).__name__}: {error}") from None
        self.sampler_state, self.rng = self.sampler.state(), rng_state(self.options.device)

    def finish(self, save_dtype: str) -> TrainResult:
        self.optimizer.zero_grad(set_to_none=True)  # not to be copied with the model
        if self.best is not None:  # also at the last update, which may come before patience is at its end
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(self.best[name])
        try:
            save_model(self.model, self.out_dir, self.tokenizer, save_dtype, self.source.files)
        except ParetuneError:
            self.save_checkpoint()  # the work is not lost with the last write
            raise
        self._write_history()
        shutil.rmtree(self.out_dir / "checkpoints", ignore_errors=True)
        last, first = self.points[-1], self.points[0]
        kept = next(p for p in self.points if p["step"] == self.kept_step)
        return TrainResult(
            folder=self.out_dir,
            steps=self.step,
            loss=last["loss"],
            heldout_bits_per_byte=kept.get(BITS),
            first_heldout_bits_per_byte=first.get(BITS),
            dtype=self.options.dtype,
            tokens_per_sec=self.n_tokens / self.update_sec if self.update_sec > 0 else math.nan,
            elapsed_sec=self.elapsed_sec,
            points=tuple(self.points),
            heldout_loss=kept.get("heldout_loss"),
            first_heldout_loss=first.get("heldout_loss"),
            stopped_early=self.stopped_early,
            kept_step=self.kept_step,
        )

    def _write_history(self) -> None:
        from paretune import hardware

        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from the sources
            versions["paretune"] = importlib.metadata.version("paretune")
        history = {
            "schema_version": data.SCHEMA_VERSION,
            "command": list(self.command),
            "seed": self.options.seed,
            "versions": versions,
            "hardware": hardware.fingerprint(),
            "options": plain_options(self.options),
            "finished": self.step == self.options.steps or self.stopped_early,
            "stopped_early": self.stopped_early,
            "kept_step": self.kept_step,
            "elapsed_sec": self.elapsed_sec,
            "heldout": list(self.source.heldout_names),
            "teacher": self.distilled,
            "points": self.points,
        }
        write_json(self.out_dir / "train.json", history)
