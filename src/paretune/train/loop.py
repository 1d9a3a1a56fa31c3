"""Language-model training: AdamW, warm-up and cosine, gradient accumulation, autocast, exact resume.

A checkpoint holds all that decides the next update, as safetensors and JSON, never pickle: a run that was
interrupted and resumed has bit for bit the weights of one that was not (same machine and number of threads).
Reference: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import math
import os
import platform
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paretune import clock
from paretune.errors import ParetuneError, UsageError
from paretune.files import ensure_folder, whole_folder, write_error, write_json
from paretune.model import checkpoint
from paretune.model.base import LanguageModel
from paretune.train import data
from paretune.train.data import BatchSampler, TokenStream
from paretune.train.schedule import (
    TrainOptions,
    TrainResult,
    auto_dtype,
    check_fits,
    check_same,
    learning_rate,
    parameter_groups,
    plain_options,
)

__all__ = ["TrainOptions", "TrainResult", "heldout_loss", "parameter_groups", "train"]

BITS = "heldout_bits_per_byte"
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
    *,
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
            heldout_bits_per_byte (the newest, or None).
        bf16_is_real: decides `dtype="auto"`; None asks `hardware.dtype_support`.
        save_dtype: of the finished model, fp32, fp16 or bf16.
        command: the command line, for `train.json`.

    Raises:
        UsageError: options that do not fit the model, the text, the folder or the checkpoint.
        CheckpointError: the checkpoint is damaged.
        ParetuneError: the loss became NaN or infinite (names the step), too short a text, a full disk.
    """
    checkpoint.dtype_of(save_dtype)  # a wrong name fails now, not after hours
    check_fits(model, options, train_tokens.tokens, heldout_tokens.tokens if heldout_tokens else None)
    ensure_folder(out_dir)
    found = data.find_checkpoint(out_dir, resume)
    state = data.read_state(found) if found else None
    if options.dtype == "auto":
        options = replace(options, dtype=auto_dtype(options.device, state, bf16_is_real))
    model.to(options.device).float().train().requires_grad_(True)
    try:
        run = _Run(model, tokenizer, train_tokens, heldout_tokens, options, out_dir, command)
        if found and state:
            run.restore(found, state)
        with _Interrupts() as interrupts:
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


@torch.no_grad()
def heldout_loss(
    model: LanguageModel,
    tokens: np.ndarray,
    block_size: int,
    batch_size: int,
    n_windows: int = 0,
    dtype: str = "fp32",
) -> float:
    """Mean nats per token over non-overlapping windows (each token but the first is a target once).

    Args:
        n_windows: score this many, evenly spread; 0: all.
    """
    device = next(model.parameters()).device
    total, n = 0.0, 0
    for batch in data.heldout_batches(tokens, block_size, batch_size, n_windows):
        shown = batch.to(device)
        loss = _loss(model, shown[:, :-1], shown[:, 1:], dtype)
        total, n = total + loss.item() * shown[:, 1:].numel(), n + shown[:, 1:].numel()
    return total / n


class _Run:
    """The state of a run. `step`, `sampler_state`, `rng` and `points` belong to the last finished update."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Path | None,
        train_tokens: TokenStream,
        heldout: TokenStream | None,
        options: TrainOptions,
        out_dir: Path,
        command: Sequence[str],
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.text_key, self.heldout, self.out_dir, self.command = train_tokens.key, heldout, out_dir, command
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, options.weight_decay), lr=0.0, betas=options.betas, fused=True
        )
        self.forward = torch.compile(model) if options.compile else model
        self.sampler = BatchSampler(train_tokens.tokens, options.batch_size, options.block_size, options.seed)
        torch.manual_seed(options.seed)
        self.step, self.saved_step = 0, -1
        self.points: list[dict[str, Any]] = [{"step": 0}]
        self.update_sec = self.elapsed_sec = 0.0
        self.sampler_state, self.rng = self.sampler.state(), _rng_state(options.device)

    def until_done(self, interrupts: _Interrupts, progress: Progress | None) -> None:
        o, first_step, earlier_sec, start = self.options, self.step, self.elapsed_sec, clock.now()
        while True:
            due = self.step in (0, o.steps) or (o.eval_every > 0 and self.step % o.eval_every == 0)
            if due and self.heldout and "heldout_loss" not in self.points[-1]:
                self.points[-1] |= self._evaluate(self.heldout)
            self.elapsed_sec = earlier_sec + clock.now() - start
            if o.checkpoint_every and 0 < self.step < o.steps and self.step % o.checkpoint_every == 0:
                self.save_checkpoint()
            if progress and self.step > first_step:
                eta = (clock.now() - start) / (self.step - first_step) * (o.steps - self.step)
                newest = next((p[BITS] for p in reversed(self.points) if BITS in p), None)
                progress({**self.points[-1], "steps": o.steps, "eta_sec": eta, BITS: newest})
            if self.step == o.steps:
                return
            self._update(interrupts)
            self.elapsed_sec = earlier_sec + clock.now() - start

    def _update(self, interrupts: _Interrupts) -> None:
        """One update. Before the optimizer only gradients change, so Ctrl-C may come at any time."""
        o, begin = self.options, clock.now()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=o.device)
        for _ in range(o.grad_accumulation):
            inputs, targets = (t.to(o.device) for t in self.sampler.next())
            loss = _loss(self.forward, inputs, targets, o.dtype) / o.grad_accumulation
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), o.clip).item()
        if not (math.isfinite(total.item()) and math.isfinite(norm)):
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
            self.optimizer.step()
            clock.synchronize(torch.device(o.device).type)
            sec = clock.now() - begin
            self.step += 1
            self.update_sec += sec
            self.sampler_state, self.rng = self.sampler.state(), _rng_state(o.device)
            tokens = o.batch_size * o.block_size * o.grad_accumulation
            point = {"step": self.step, "loss": total.item(), "lr": rate, "grad_norm": norm}
            self.points.append(point | {"tokens_per_sec": tokens / sec if sec > 0 else None})

    def _evaluate(self, heldout: TokenStream) -> dict[str, float | None]:
        o = self.options
        loss = heldout_loss(self.model, heldout.tokens, o.block_size, o.batch_size, o.eval_windows, o.dtype)
        bits = loss / math.log(2) * len(heldout.tokens) / heldout.n_bytes
        # A model that is broken from the start gives NaN here, which strict JSON has no word for.
        return {
            "heldout_loss": loss if math.isfinite(loss) else None,
            BITS: bits if math.isfinite(bits) else None,
        }

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
            state = {
                "schema_version": data.SCHEMA_VERSION,
                "step": self.step,
                "options": plain_options(self.options),
                "text": self.text_key,
                "sampler": self.sampler_state,
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
            UsageError: other options, another text or another model.
            CheckpointError: a file is missing or damaged.
        """
        try:
            check_same(self.options, self.text_key, state, folder)
            tensors = load_file(folder / "optimizer.safetensors")
            stored = dict(checkpoint.load(folder).named_parameters())
            ours = dict(self.model.named_parameters())
            if {k: v.shape for k, v in stored.items()} != {k: v.shape for k, v in ours.items()}:
                raise UsageError(
                    f"{folder} holds a model of another shape",
                    "Resume with the MODEL that the run began with",
                )
            with torch.no_grad():
                for name, p in ours.items():
                    p.copy_(stored[name])
                    for part in OPTIMIZER_PARTS if state["step"] else ():
                        self.optimizer.state[p][part] = tensors[f"{name}.{part}"].to(p.device)
            self.sampler.restore(state["sampler"])
            self.step = self.saved_step = int(state["step"])
            self.points = list(state["points"])
            self.update_sec, self.elapsed_sec = float(state["update_sec"]), float(state["elapsed_sec"])
            torch.set_rng_state(tensors["rng.cpu"])
            if "rng.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["rng.cuda"], self.options.device)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise data.damaged(folder, f"{type(error).__name__}: {error}") from None
        self.sampler_state, self.rng = self.sampler.state(), _rng_state(self.options.device)

    def finish(self, save_dtype: str) -> TrainResult:
        self.optimizer.zero_grad(set_to_none=True)  # not to be copied with the model
        try:
            _save_model(self.model, self.out_dir, self.tokenizer, save_dtype)
        except ParetuneError:
            self.save_checkpoint()  # the work is not lost with the last write
            raise
        self._write_history()
        shutil.rmtree(self.out_dir / "checkpoints", ignore_errors=True)
        o, last, first = self.options, self.points[-1], self.points[0]
        n_tokens = o.steps * o.batch_size * o.block_size * o.grad_accumulation
        return TrainResult(
            folder=self.out_dir,
            steps=o.steps,
            loss=last["loss"],
            heldout_bits_per_byte=last.get(BITS),
            first_heldout_bits_per_byte=first.get(BITS),
            dtype=o.dtype,
            tokens_per_sec=n_tokens / self.update_sec if self.update_sec > 0 else math.nan,
            elapsed_sec=self.elapsed_sec,
            points=tuple(self.points),
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
            "finished": self.step == self.options.steps,
            "elapsed_sec": self.elapsed_sec,
            "heldout": list(self.heldout.documents) if self.heldout else [],
            "points": self.points,
        }
        write_json(self.out_dir / "train.json", history)


class _Interrupts:
    """Ctrl-C between two updates, never inside one. Does nothing outside the main thread."""

    def __enter__(self) -> _Interrupts:
        self._held = self._pending = False
        self._previous = signal.getsignal(signal.SIGINT)
        self._active = threading.current_thread() is threading.main_thread() and callable(self._previous)
        if self._active:
            signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._previous)

    def _on_interrupt(self, number: int, frame: Any) -> None:
        self._pending = self._held
        if not self._held:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """A Ctrl-C inside the body is raised at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt


def _loss(forward: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, dtype: str) -> Tensor:
    """Mean cross-entropy, nats per token, a scalar in fp32: inputs and targets `[B, T]`."""
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=dtype == "bf16"):
        logits = forward(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.reshape(-1))


def _rng_state(device: str) -> dict[str, Tensor]:
    """The random state, uint8 tensors (nothing draws from it today; a model with dropout would)."""
    state = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _save_model(model: LanguageModel, out_dir: Path, tokenizer: Path | None, dtype: str) -> None:
    """Writes the finished model into `out_dir` file by file, each whole, `config.json` last."""
    temporary = Path(tempfile.mkdtemp(prefix=".model-", dir=out_dir))
    try:
        cast = copy.deepcopy(model).to(checkpoint.dtype_of(dtype))
        if not all(torch.isfinite(p).all() for p in cast.parameters()):
            raise ParetuneError(f"a weight exceeds {dtype}", "Go on with --resume --save-dtype fp32")
        checkpoint.save(cast, temporary, tokenizer)
        for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
            os.replace(file, out_dir / file.name)
    except OSError as error:
        raise write_error(out_dir, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
