"""Article/summary pairs as training data: tokens, what counts in the loss, batches in random order.

The loss is on the summary and its end tokens alone; the article is only read.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ParetuneError, UsageError
from paretune.evaluate.pairs import PairSet
from paretune.model import prompt
from paretune.model.base import LanguageModel
from paretune.model.prompt import PromptFormat
from paretune.model.tokenizer import Tokenizer
from paretune.train.data import end_of_text_id, tokenizer_hash
from paretune.train.objective import IGNORED, counted, mean_loss
from paretune.train.schedule import TrainOptions, check_trainable

MAX_SUMMARY_SHARE = 0.5  # of the token limit: a longer summary would leave too little of its article


@dataclass(frozen=True, eq=False)
class Example:
    """One pair as tokens: `tokens[:n_prompt]` is the prompt, the rest the summary."""

    tokens: np.ndarray  # int64 [n]
    n_prompt: int


@dataclass(frozen=True, eq=False)
class PairSource:
    """What a run on pairs learns from (`loop.Source`).

    Attributes:
        format: recorded beside the finished model.
        examples, heldout: training and held-out pairs as tokens.
        said: what was cut or left out, in words.
    """

    format: PromptFormat
    examples: Sequence[Example]
    heldout: Sequence[Example]
    heldout_names: Sequence[str]
    key: str
    said: Sequence[str]

    @property
    def files(self) -> Mapping[str, Any]:
        return {prompt.FILE: self.format.to_json()}

    def sampler(self, options: TrainOptions) -> PairSampler:
        return PairSampler(self.examples, options.batch_size, options.seed)

    def check(self, model: LanguageModel, options: TrainOptions) -> None:
        config: Any = model.config
        check_trainable(model)
        if self.format.max_len > config.n_positions and getattr(config, "longest", 0) < self.format.max_len:
            raise UsageError(
                f"--max-len {self.format.max_len} exceeds the model's {config.n_positions} positions",
                f"Use --max-len {config.n_positions} or less",
            )
        largest = max(int(e.tokens.max()) for e in (*self.examples, *self.heldout))
        if largest >= config.vocab_size:
            raise UsageError(
                f"the pairs have token {largest}, the model knows {config.vocab_size}",
                "Use the tokenizer that belongs to the model",
            )

    def evaluate(self, model: LanguageModel, options: TrainOptions) -> dict[str, float | None]:
        """Mean nats per token of the held-out summaries, given their articles."""
        if not self.heldout:
            return {}
        chosen = self.heldout[: options.eval_windows or None]
        total, n = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(chosen), options.batch_size):
                inputs, targets = (t.to(options.device) for t in collate(chosen[start : start + options.batch_size]))
                n_here = counted(targets)
                total += mean_loss(model, inputs, targets, options.dtype).item() * n_here
                n += n_here
        return {"heldout_loss": total / n if np.isfinite(total) else None}


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 `[B, T]`, padded on the right; what does not count is `IGNORED` in the targets.

    Causal attention never looks to the right, so the padding changes nothing of what counts.
    """
    T = max(len(e.tokens) for e in examples) - 1
    inputs = np.zeros((len(examples), T), np.int64)
    targets = np.full((len(examples), T), IGNORED, np.int64)
    for row, e in enumerate(examples):
        n = len(e.tokens) - 1
        inputs[row, :n] = e.tokens[:-1]
        targets[row, e.n_prompt - 1 : n] = e.tokens[e.n_prompt :]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


class PairSampler:
    """Batches of pairs in a random order that is a function of the seed and the epoch.

    Within a stretch of `_NEAR` batches pairs of like length go together (less padding); a batch may reach from one
    epoch into the next.
    """

    _NEAR = 8

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        self._examples, self._batch_size, self._seed = examples, batch_size, seed
        self._position = 0
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        # RandomState and not default_rng: NumPy never changes its streams, and a resume relies on that.
        draw = np.random.RandomState([self._seed & 0xFFFFFFFF, self._seed >> 32, epoch])
        order = draw.permutation(len(self._examples))
        span = self._NEAR * self._batch_size
        stretches = [order[i : i + span] for i in range(0, len(order), span)]
        batches = [
            part[i : i + self._batch_size]
            for part in (sorted(s, key=lambda j: len(self._examples[j].tokens)) for s in stretches)
            for i in range(0, len(part), self._batch_size)
        ]
        self._order = [int(j) for i in draw.permutation(len(batches)) for j in batches[i]]

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `batch_size` pairs."""
        rows: list[Example] = []
        while len(rows) < self._batch_size:
            if self._position == len(self._order):
                self._begin(self._epoch + 1)
                self._position = 0
            rows.append(self._examples[self._order[self._position]])
            self._position += 1
        return collate(rows)

    def state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position}

    def restore(self, state: Mapping[str, int]) -> None:
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= len(self._examples):
            raise ValueError(f"no such sampler state: {dict(state)}")
        self._begin(epoch)
        self._position = position


def pair_source(train: PairSet, heldout: PairSet | None, tokenizer_folder: Path, form: PromptFormat) -> PairSource:
    """Pairs as tokens. Articles that are too long lose their end; summaries that are too long are skipped: counted.

    `max_new_tokens` of the recorded format becomes what 95 % of the training summaries need, and a quarter more.

    Raises:
        ParetuneError: no pair is left.
        UsageError: the tokenizer has no end token.
    """
    tokenizer = Tokenizer(tokenizer_folder)
    end = end_of_text_id(tokenizer)
    seen: Counter[str] = Counter()
    examples = list(_examples(train, tokenizer, form, end, seen))
    if not examples:
        raise ParetuneError(
            f"no pair of {train.name} is left: {', '.join(f'{n} {w}' for w, n in seen.items())}", "Raise --max-len"
        )
    said = [train.said, *_words(seen)]
    held: list[Example] = []
    if heldout is not None and len(heldout):
        seen = Counter()
        held = list(_examples(heldout, tokenizer, form, end, seen))
        said += [f"held out: {len(held)} pairs", *_words(seen)]
    longest = int(np.percentile([len(e.tokens) - e.n_prompt for e in examples], 95) * 1.25) + 1
    form = replace(form, max_new_tokens=min(longest, int(MAX_SUMMARY_SHARE * form.max_len)))
    about = [train.key, heldout.key if heldout else "", tokenizer_hash(tokenizer_folder), form.to_json()]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    names = [p.id for p in heldout.pairs] if heldout and held else []
    return PairSource(form, examples, held, names, key, said)


def _examples(
    pairs: PairSet, tokenizer: Tokenizer, form: PromptFormat, end: int, seen: Counter[str]
) -> Iterator[Example]:
    for pair in pairs.pairs:
        answer = form.answer(tokenizer, pair.summary, end)
        if len(answer) > MAX_SUMMARY_SHARE * form.max_len:
            seen["skipped: the summary fills more than half of the limit"] += 1
            continue
        shown, is_cut = form.prompt(tokenizer, pair.article, room=len(answer))
        if is_cut:
            seen["articles cut to the limit"] += 1
        yield Example(np.array([*shown, *answer], np.int64), len(shown))


def _words(seen: Mapping[str, int]) -> list[str]:
    return [f"{n} {what}" for what, n in seen.items()]
