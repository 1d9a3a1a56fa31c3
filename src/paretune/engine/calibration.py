"""Calibration windows for transforms that need them: from a text, or written by the model itself.

Text that a model writes needs no download, is of its own kind, and is disjoint from every evaluation text (Williams et
al. 2024, "Self-calibration for Language Model Quantization and Pruning", arXiv:2410.17170).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from paretune import hardware
from paretune.engine.runners.base import Runner
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.runners.native import NativeRunner
from paretune.errors import UsageError
from paretune.model.base import CannotLower, LanguageModel
from paretune.model.layers import Embedding, Linear
from paretune.model.tokenizer import Tokenizer

WINDOWS, WINDOW_LEN = 32, 256
AT_LEAST = 4  # windows


def from_text(folder: Path, text: str, n_windows: int = WINDOWS, window_len: int = WINDOW_LEN, seed: int = 0) -> Tensor:
    """Windows of a text, at random places that do not overlap, int64 `[n_windows or fewer, window_len]`.

    Raises:
        UsageError: the text has fewer than four windows.
    """
    ids = Tokenizer(folder).encode(text)
    n = len(ids) // window_len
    if n < AT_LEAST:
        raise UsageError(
            f"calibration text too short: {len(ids):,} tokens", f"Give {AT_LEAST * window_len:,} tokens or more"
        )
    windows = torch.tensor(ids[: n * window_len]).view(n, window_len)
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:n_windows]
    return windows[chosen.sort().values]


@torch.inference_mode()
def from_model(
    model: LanguageModel,
    n_windows: int = WINDOWS,
    window_len: int = WINDOW_LEN,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Tensor:
    """What the model writes by itself, drawn from its own distribution, int64 `[n_windows, window_len]`.

    The first token is drawn evenly from the vocabulary, so that the windows differ. The model is left as it is. The
    same machine, threads and seed give the same text; another runner adds in another order, so a token may differ.

    Args:
        say: told that it is not native code that writes, and why.
    """
    generator = torch.Generator().manual_seed(seed)
    window_len = min(window_len, model.config.n_positions)
    runner, reason = _writer(model)
    if reason:
        say(f"the calibration text is written by PyTorch, slower than by native code: {reason}")
    cache = runner.new_cache(n_windows, window_len)
    token = torch.randint(model.config.vocab_size, (n_windows, 1), generator=generator)
    tokens = [token]
    for _ in range(window_len - 1):
        logits = runner.forward(token.to(runner.device), cache, "last")[:, 0]
        token = _draw(logits.float().cpu(), generator)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token of each row's distribution, int64 `[B, 1]`, of logits `[B, V]`: one random number a row.

    `torch.multinomial` draws one for each token of the vocabulary, which takes as long as a small model's step.
    """
    up_to = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    at = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator) * up_to[:, -1:]
    # Right of what is equal: a token without probability ends where the one before it does, and is never found.
    return torch.searchsorted(up_to, at, right=True).clamp_(max=logits.size(1) - 1)


def _writer(model: LanguageModel) -> tuple[Runner, str]:
    """The fastest runner that leaves the model alone, and why it is not native code, which needs a copy of the weights
    ("" where it is)."""
    reason = NativeRunner.requires(model.embedding.weight.device.type)
    if reason is None:
        weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, Linear | Embedding)}
        n_bytes = sum(weight.stored_bytes for weight in weights.values())
        free = hardware.available_memory_bytes()
        if n_bytes < free // 2:
            # Modules are copied and their weights shared: the runner gives the copy packed ones in their place.
            twin = copy.deepcopy(model, dict(weights))
            try:
                return NativeRunner(twin), ""
            except CannotLower as error:  # attention or a format that native code does not have
                reason = error.cause
        else:
            reason = (
                f"a copy of the weights takes {n_bytes / 1e9:.2g} GB, more than half of the {free / 1e9:.2g} GB free"
            )
    return EagerRunner(model), reason
