"""Whether a peer computes the same model: its logits and greedy tokens against our fp32 eager.

Exact before fast: a peer that disagrees by more than its number format explains is not timed. The two are compared on
tokens that the model itself writes: on tokens drawn at random a trained model is lost, its best tokens are near ties,
and its activations are not those of text. A format that falls short although its engine is sound is told from an error
of conversion by rounding the inputs of our own matrices as it does (`share_with_inputs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from paretune import hardware
from paretune.engine import calibration
from paretune.engine.generate import generate
from paretune.engine.load import load_recipe
from paretune.model.config import ModelConfig
from paretune.model.layers import Linear
from paretune.recipe import preset
from paretune.records.bench import Agreement

N_SEQUENCES, SEQUENCE_LEN = 2, 128
PROMPT_LEN, N_GREEDY = 16, 64
# By bits of a weight: the least share of positions with the same top token, and how far apart our own logits have to
# hold two tokens for a swap to count, as a share of the spread (standard deviation) of the logits at that position.
# Random weights leave many tokens that close, trained ones few.
LEAST_TOP1 = {32: 0.99, 16: 0.95, 8: 0.9}  # 4 bit: reported only
TIE_WIDTH = {32: 0.01, 16: 0.02, 8: 0.05, 4: 0.05}


@dataclass(frozen=True)
class Reference:
    """What our fp32 eager says.

    Args:
        sequences: token ids, each `T` long.
        logits: fp32 `[len(sequences) * T, V]`.
        prompt, greedy: a prompt and our greedy tokens after it.
    """

    sequences: list[list[int]]
    logits: np.ndarray
    prompt: list[int]
    greedy: list[int]

    @property
    def n_tokens(self) -> int:
        """The longest sequence that a peer has to hold for it."""
        return max(len(self.sequences[0]), len(self.prompt) + len(self.greedy))


def lengths(config: ModelConfig) -> tuple[int, int, int]:
    """(sequence, prompt, greedy tokens) that fit this model, sliding windows included."""
    most = min(config.n_positions, config.sliding_window or config.n_positions)
    prompt = max(1, min(PROMPT_LEN, most // 2))
    return min(SEQUENCE_LEN, most), prompt, max(1, min(N_GREEDY, most - prompt))


@torch.inference_mode()
def make_reference(folder: Path, config: ModelConfig, threads: int | None, seed: int = 0) -> Reference:
    """Runs our fp32 eager on what it wrote itself: 256 positions or more, more sequences where the context is short."""
    hardware.set_threads(threads)
    runner = load_recipe(folder, preset("fp32"), check=False).runner
    length, n_prompt, n_greedy = lengths(config)
    n = max(N_SEQUENCES, -(-N_SEQUENCES * SEQUENCE_LEN // length))
    written = calibration.from_model(runner.model, n + 1, length, seed)
    tokens, prompt = written[:n], written[n:, :n_prompt]
    logits = [runner.forward(row[None], runner.new_cache(1, length), "all")[0].float().numpy() for row in tokens]
    greedy = generate(runner, prompt.tolist(), n_greedy, ignore_eos=True).generations[0].tokens
    return Reference(tokens.tolist(), np.concatenate(logits), prompt[0].tolist(), greedy)


@torch.inference_mode()
def share_with_inputs(folder: Path, reference: Reference, inputs: str, bits: int, threads: int | None) -> float:
    """The share of positions, near ties aside, at which our fp32 still has its most likely token when the inputs of its
    matrices, and nothing else, are rounded to 8 bits.

    Args:
        inputs: `tensor` (ONNX's DynamicQuantizeLinear: 256 levels from the least to the largest, zero among them) or
            `row` (from minus to plus the largest of a token), as in `catalogue.INPUTS`.
        bits: of the weights of the form that is explained; its near ties count.
    """
    hardware.set_threads(threads)
    runner = load_recipe(folder, preset("fp32"), check=False).runner
    for module in runner.model.modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(lambda _, args: (_ROUND[inputs](args[0]), *args[1:]))
    rows = [torch.tensor(row) for row in reference.sequences]
    logits = [runner.forward(row[None], runner.new_cache(1, len(row)), "all")[0].float().numpy() for row in rows]
    return compare(reference, np.concatenate(logits), reference.greedy, bits).top1_share_beyond_ties


def _round_tensor(x: torch.Tensor) -> torch.Tensor:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny)
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale


def _round_rows(x: torch.Tensor) -> torch.Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / scale).round() * scale


_ROUND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"tensor": _round_tensor, "row": _round_rows}


def compare(reference: Reference, logits: np.ndarray, greedy: Sequence[int], bits: int) -> Agreement:
    """Lays a peer's logits `[N, V]` and greedy tokens beside ours.

    Raises:
        ValueError: another shape, or values that are not numbers.
    """
    ours = reference.logits
    if logits.shape != ours.shape:
        raise ValueError(f"logits {list(logits.shape)} instead of {list(ours.shape)}")
    if not np.isfinite(logits).all():
        raise ValueError("logits that are not finite")
    rows = np.arange(len(ours))
    mine, theirs = ours.argmax(-1), logits.argmax(-1)
    margins = ours[rows, mine] - ours[rows, theirs]  # 0 where they agree
    tied = margins <= TIE_WIDTH[bits] * ours.std(-1)
    same = next((i for i, (a, b) in enumerate(zip(reference.greedy, greedy, strict=False)) if a != b), None)
    difference = np.square(logits.astype(np.float64) - ours).mean()
    return Agreement(
        top1_share=float((mine == theirs).mean()),
        top1_share_beyond_ties=float(tied.mean()),
        logits_rel_rms=float(np.sqrt(difference / np.square(ours.astype(np.float64)).mean())),
        greedy_same=min(len(reference.greedy), len(greedy)) if same is None else same,
        greedy_n=len(reference.greedy),
        n_positions=len(ours),
    )


def shortfall(agreement: Agreement, bits: int) -> str | None:
    """Why this is not the same model any more, as a clause; None where the format explains the difference."""
    least = LEAST_TOP1.get(bits)
    share = agreement.top1_share_beyond_ties
    if least is None or share >= least:
        return None
    return (
        f"the most likely token agrees with our fp32 at {share:.1%} of {agreement.n_positions} positions, near ties "
        f"aside; {least:.0%} is the least for {bits} bits"
    )
