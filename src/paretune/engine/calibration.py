"""Calibration windows for transforms that need them: from a text, or written by the model itself.

Text that a model writes needs no download, is of its own kind, and is disjoint from every evaluation text (Williams et
al. 2024, "Self-calibration for Language Model Quantization and Pruning", arXiv:2410.17170).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from paretune.engine.runners.eager import EagerRunner
from paretune.errors import UsageError
from paretune.model.base import LanguageModel
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
def from_model(model: LanguageModel, n_windows: int = WINDOWS, window_len: int = WINDOW_LEN, seed: int = 0) -> Tensor:
    """What the model writes by itself, drawn from its own distribution, int64 `[n_windows, window_len]`.

    The first token is drawn evenly from the vocabulary, so that the windows differ.
    """
    generator = torch.Generator().manual_seed(seed)
    window_len = min(window_len, model.config.n_positions)
    runner = EagerRunner(model)
    cache = runner.new_cache(n_windows, window_len)
    token = torch.randint(model.config.vocab_size, (n_windows, 1), generator=generator)
    tokens = [token]
    for _ in range(window_len - 1):
        logits = runner.forward(token.to(runner.device), cache, "last")[:, 0].float().cpu()
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens.append(token)
    return torch.cat(tokens, dim=1)
