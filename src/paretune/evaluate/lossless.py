"""Whether ways to run a model give the text of plain decoding, token for token, and what it means where they do not.

A runner whose sums depend on neither the batch nor the width of a step (`same_bits_at_any_width`) owes the very same
text however it is run. Others add in another order: there a token may fall otherwise where the two largest logits are
nearly equal. A config that changes numbers may write something else; how much worse that is, perplexity says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paretune.engine.generate import generate
from paretune.engine.runners.base import Runner
from paretune.engine.sampling import SamplingOptions
from paretune.engine.speculation import Speculator
from paretune.records.lossless import Divergence, LosslessVerdict, Way

# Of logits in fp32, whose sums over a few hundred numbers differ by some 1e-5 with their order.
NEAR_TIE = 1e-4

Texts = list[list[int]]


@dataclass(frozen=True)
class Reference:
    """Plain decoding, one prompt at a time.

    Args:
        runner: that took it; margins are asked of it.
        texts: new tokens of each prompt.
    """

    runner: Runner
    prompts: Sequence[Sequence[int]]
    sampling: SamplingOptions
    texts: Texts


def reference(
    runner: Runner, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: SamplingOptions
) -> Reference:
    """Decodes each prompt by itself."""
    return Reference(runner, prompts, sampling, texts(runner, prompts, max_new_tokens, sampling))


def texts(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingOptions,
    batch_size: int = 1,
    speculator: Speculator | None = None,
) -> Texts:
    """The new tokens of each prompt, `batch_size` prompts at once."""
    found: Texts = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        done = generate(runner, part, max_new_tokens, sampling, speculator=speculator)
        found += [g.tokens for g in done.generations]
    return found


def way(
    name: str, known: Reference, found: Texts, *, same_bits: bool, changes_numbers: bool, notes: Sequence[str] = ()
) -> Way:
    """What a way to run gave, beside the reference.

    Args:
        same_bits: it owes the same bits: the runner of the reference has `same_bits_at_any_width`, and this is it.
        changes_numbers: its config does, by what it declares.
    """
    divergences = [
        d for i, text in enumerate(found) if (d := _first_difference(known, i, text)) is not None
    ]  # one a prompt: what follows the first is another text
    return Way(
        name=name,
        sampling=in_words(known.sampling),
        n_prompts=len(found),
        n_identical=len(found) - len(divergences),
        n_tokens=sum(map(len, found)),
        verdict=judge(divergences, same_bits=same_bits, changes_numbers=changes_numbers),
        divergences=divergences,
        notes=list(notes),
    )


def judge(divergences: Sequence[Divergence], *, same_bits: bool, changes_numbers: bool) -> LosslessVerdict:
    """The word for what was found; see `records.lossless.Way`."""
    if not divergences:
        return "identical"
    if changes_numbers:
        return "other numbers"
    if same_bits:
        return "bug"
    # Drawn texts have no margin: a probability that moves by a rounding moves what is drawn at its edge.
    near = all(d.margin is None or abs(d.margin) <= NEAR_TIE for d in divergences)
    return "numerics" if near else "bug"


def in_words(sampling: SamplingOptions) -> str:
    return "greedy" if sampling.greedy else f"temperature {sampling.temperature:g}, seed {sampling.seed}"


def _first_difference(known: Reference, prompt: int, text: Sequence[int]) -> Divergence | None:
    ours = known.texts[prompt]
    if list(text) == ours:
        return None
    at = next((i for i, (a, b) in enumerate(zip(ours, text, strict=False)) if a != b), min(len(ours), len(text)))
    expected = ours[at] if at < len(ours) else None
    got = text[at] if at < len(text) else None
    margin = None
    if expected is not None and got is not None and known.sampling.greedy:
        tokens = torch.tensor([[*known.prompts[prompt], *ours[:at]]], device=known.runner.device)
        cache = known.runner.new_cache(1, tokens.size(1) + 1)
        logits = known.runner.forward(tokens, cache, "last")[0, -1].float()
        margin = float(logits[expected] - logits[got])
    return Divergence(prompt, at, expected, got, margin)
