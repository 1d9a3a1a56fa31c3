"""What other engines do to the text: their perplexity on the windows on which the winner is confirmed.

A peer is asked for the loss of every token of a window that is shown whole, one window at a time: that is its prefill.
What its decode steps would add to it is not asked. The baseline's losses stand beside it token by token, so the
difference is paired and its bound is that of the gate (`evaluate.fidelity.paired_increase`).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from paretune import hardware
from paretune.engine.load import load_recipe
from paretune.errors import ParetuneError
from paretune.evaluate.fidelity import Scores, paired_increase
from paretune.evaluate.perplexity import MIN_BLOCKS, count_blocks, finite_or_none, safe_exp, token_nll
from paretune.measure.peers.catalogue import Engine
from paretune.measure.peers.subject import Peers
from paretune.model import checkpoint
from paretune.recipe import Recipe
from paretune.records.peers import PeerQuality

CAP_SEC = 600.0  # of scoring, for each peer


def losses_of(scores: Scores) -> np.ndarray:
    """The baseline's losses in the order of the text, `[N, T - 1]`: those of its prefill, then those of its decode."""
    return np.concatenate([scores.prefill.nll, scores.decode.nll], axis=1)


@torch.inference_mode()
def baseline_losses(folder: Path, recipe: Recipe, windows: torch.Tensor, threads: int | None) -> np.ndarray:
    """-log p, nats, `[N, T - 1]`, of every token but the first of `windows [N, T]`, in this process."""
    hardware.set_threads(threads)
    runner = load_recipe(folder, recipe, check=False).runner
    rows = []
    for window in windows:
        logits = runner.forward(window[None, :-1], runner.new_cache(1, len(window) - 1), "all")[0]
        rows.append(token_nll(logits, window[1:]).numpy())
    return np.stack(rows)


def measure(
    folder: Path,
    engines: Sequence[Engine],
    windows: torch.Tensor,
    baseline_nll: np.ndarray,
    max_ppl_increase: float,
    *,
    threads: int,
    cap_sec: float = CAP_SEC,
    say: Callable[[str], None] = lambda line: None,
    on_result: Callable[[str, PeerQuality], object] = lambda name, result: None,
) -> dict[str, PeerQuality]:
    """Perplexity of each engine beside the baseline's, on the same windows.

    Args:
        folder: the checkpoint.
        windows: token ids, int64 `[N, T]`.
        baseline_nll: the baseline's losses of every token but the first of each window, nats, `[N, T - 1]`.
        max_ppl_increase: the bound as a fraction; the one-sided 95 % upper bound of the increase is held to it.
        cap_sec: of scoring, for each engine; loading, and the first time converting, come on top.
        on_result: called with each engine's name and result as soon as it is there.

    Returns:
        By name of the engine. `keeps_bound` is None where it is not known: the engine failed, or the cap came before
        the last window.
    """
    assert baseline_nll.shape == (len(windows), windows.shape[1] - 1), "one loss for every token but the first"
    peers = Peers(engines, folder, checkpoint.read_config(folder), threads, say)
    found = {}
    for engine in engines:
        say(f"scoring {engine.name} on {len(windows)} windows of text")
        with tempfile.TemporaryDirectory(prefix="paretune-peer-") as scratch:
            try:
                nll = peers.losses(engine.name, windows.tolist(), Path(scratch), cap_sec)
            except ParetuneError as error:
                found[engine.name] = PeerQuality.unknown(f"it could not be scored: {error.cause}")
            else:
                found[engine.name] = judge(nll, baseline_nll, max_ppl_increase, cap_sec)
        on_result(engine.name, found[engine.name])
    return found


def judge(nll: np.ndarray, baseline_nll: np.ndarray, max_ppl_increase: float, cap_sec: float = CAP_SEC) -> PeerQuality:
    """The result of `measure` from losses `[n, T - 1]` of the first n windows and the baseline's `[N, T - 1]`."""
    n = len(nll)
    if n == 0:
        return PeerQuality.unknown(f"not one window was scored within {cap_sec:.0f} s")
    base = baseline_nll[:n]
    increase, upper = paired_increase(base, nll)
    within: bool | None = upper <= max_ppl_increase
    change = f"perplexity {increase:+.2%}, with 95 % confidence at most {upper:+.2%}"
    if not np.isfinite(nll).all():
        within, reason = False, f"it gives NaN or infinity at {int((~np.isfinite(nll)).sum())} of {nll.size} tokens"
    elif n < len(baseline_nll):
        within, reason = None, f"{n} of {len(baseline_nll)} windows were scored within {cap_sec:.0f} s: {change}"
    elif count_blocks(*nll.shape) < MIN_BLOCKS:
        within, reason = None, f"too little text for a bound: {change}"
    else:
        reason = f"{change}, {'within' if within else 'over'} the bound of {max_ppl_increase:+.2%}"
    values = (
        safe_exp(float(nll.mean(dtype=np.float64))),
        safe_exp(float(base.mean(dtype=np.float64))),
        increase,
        upper,
    )
    perplexity, baseline_perplexity, known_increase, known_upper = (
        None if math.isnan(v) else finite_or_none(v) for v in values
    )
    return PeerQuality(
        perplexity=perplexity,
        baseline_perplexity=baseline_perplexity,
        ppl_increase=known_increase,
        ppl_increase_upper=known_upper,
        n_windows=n,
        keeps_bound=within,
        quality_reason=reason,
    )
