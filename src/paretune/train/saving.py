"""What a run leaves behind and how it is stopped: the finished model, the random state, Ctrl-C between two updates."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paretune.errors import ParetuneError
from paretune.files import write_error, write_json
from paretune.model import checkpoint
from paretune.model.base import LanguageModel


class Interrupts:
    """Ctrl-C between two updates, never inside one. Does nothing outside the main thread."""

    def __enter__(self) -> Interrupts:
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


def rng_state(device: str) -> dict[str, Tensor]:
    """The random state, uint8 tensors (nothing draws from it today; a model with dropout would)."""
    state = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def save_model(
    model: LanguageModel, out_dir: Path, tokenizer: Path | None, dtype: str, extra: Mapping[str, Any]
) -> None:
    """Writes the finished model into `out_dir` file by file, each whole, `config.json` last.

    Args:
        extra: names and contents of more JSON files.
    """
    temporary = Path(tempfile.mkdtemp(prefix=".model-", dir=out_dir))
    try:
        cast = copy.deepcopy(model).to(checkpoint.dtype_of(dtype))
        if not all(torch.isfinite(p).all() for p in cast.parameters()):
            raise ParetuneError(f"a weight exceeds {dtype}", "Go on with --resume --save-dtype fp32")
        checkpoint.save(cast, temporary, tokenizer)
        for name, content in extra.items():
            write_json(temporary / name, content)
        for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
            os.replace(file, out_dir / file.name)
    except OSError as error:
        raise write_error(out_dir, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
