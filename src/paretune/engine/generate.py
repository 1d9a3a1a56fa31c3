"""Generation on top of a runner: prefill, decode, sampling, stop strings, streaming, batches of unequal prompts.

Between two steps stands only what the next step needs. Text is made of several tokens at once where they come fast:
decoding and writing after every token would cost a small model as much as half a step (its code has left the caches,
and the reader of a pipe wakes up on a core that the step needs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from paretune import clock
from paretune.engine.runners.base import Runner
from paretune.engine.sampling import Sampler, SamplingOptions, argmax
from paretune.errors import UsageError
from paretune.model.base import LanguageModel
from paretune.model.tokenizer import TextStream, Tokenizer

FRAME_SEC = 0.02  # streamed text goes out 50 times a second at most, which reads as steady


@dataclass
class Generation:
    """One finished sequence."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)  # new ones, an end token included
    text: str = ""  # of the new tokens, cut before a stop string
    finish_reason: str = "length"  # length, eos, stop


@dataclass
class Timing:
    """Seconds of one `generate` call: definitions as in `docs`, tokenisation outside."""

    ttft_sec: float = 0.0  # start of the call to the first token
    total_sec: float = 0.0
    model_sec: float = 0.0  # inside runner.forward
    n_steps: int = 0  # decode steps


@dataclass
class GenerateResult:
    generations: list[Generation]
    timing: Timing

    @property
    def tpot_sec(self) -> float | None:
        """Seconds per output token after the first; None for fewer than two."""
        n = self.timing.n_steps
        return (self.timing.total_sec - self.timing.ttft_sec) / n if n else None


@torch.inference_mode()
def naive_generate(
    model: LanguageModel, prompt: Sequence[int], max_new_tokens: int, guess: Sequence[int] = ()
) -> tuple[list[int], list[float]]:
    """The oracle: greedy, no cache, the whole sequence again for every token.

    Args:
        guess: what the tokens may be. As far as it is right, one pass over all of it finds them.

    Returns:
        the new tokens, and for each the margin between the two largest logits.
    """
    ids, margins, device = list(prompt), [], next(model.parameters()).device

    def look(logits: Tensor) -> int:
        top = logits.float().topk(2).values
        margins.append(float(top[0] - top[1]))
        ids.append(int(logits.argmax()))
        return ids[-1]

    guess = list(guess[:max_new_tokens])
    if guess:
        rows = model(torch.tensor([ids + guess[:-1]], device=device), None, "all")[0, len(prompt) - 1 :]
        for row, guessed in zip(rows, guess, strict=True):
            if look(row) != guessed:
                break
    while len(ids) < len(prompt) + max_new_tokens:
        look(model(torch.tensor([ids], device=device), None, "last")[0, 0])
    return ids[len(prompt) :], margins


def check_request(prompts: Sequence[Sequence[int]], max_new_tokens: int, n_positions: int, vocab_size: int) -> None:
    """Refuses what cannot be generated.

    Raises:
        UsageError: no prompt, an empty one, one that does not fit, or a token that the model does not know.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}", "It has to be 1 or more")
    if not prompts:
        raise UsageError("there is no prompt", "Pass --prompt TEXT")
    for prompt in prompts:
        if not prompt:
            raise UsageError("the prompt is empty", "Pass at least one word with --prompt")
        if len(prompt) > n_positions:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens, the model's context is {n_positions}", "Shorten the prompt"
            )
        if len(prompt) + max_new_tokens > n_positions:
            raise UsageError(
                f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the context of {n_positions}",
                f"Ask for at most {n_positions - len(prompt)} new tokens or shorten the prompt",
            )
        if min(prompt) < 0:
            raise UsageError(f"the prompt has token {min(prompt)}", "Token ids are 0 or more")
        if max(prompt) >= vocab_size:
            raise UsageError(
                f"the tokenizer gives token {max(prompt)}, the model knows {vocab_size}",
                "The tokenizer belongs to another model",
            )


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingOptions | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    eos_run: int = 1,
    on_text: Callable[[int, str], None] | None = None,
) -> GenerateResult:
    """Continues each prompt.

    Every row gets the tokens it would get alone: positions are its own, and its generator is seeded with
    `seed + row`.

    Args:
        prompts: token ids; lengths may differ.
        tokenizer: needed for text, stop strings and streaming.
        stop: strings that end a sequence; they are not part of the text.
        ignore_eos: fixed output length, for measurements.
        eos_run: end tokens in a row that end a sequence; 2 where a model ends each of its sentences with one.
        on_text: called with (row, piece) as text becomes certain: after the first token, then after the first one that
            is `FRAME_SEC` or later than the call before, then at the end.
    """
    config = runner.config
    check_request(prompts, max_new_tokens, config.longest, config.vocab_size)
    if (stop or on_text) and tokenizer is None:
        raise UsageError("stop strings and streaming need a tokenizer", "Pass the model's tokenizer")
    sampling = sampling or SamplingOptions()
    rows = [_Row(i, p, sampling, tokenizer, stop, on_text) for i, p in enumerate(prompts)]
    eos = () if ignore_eos else config.eos_token_ids
    plain_greedy = sampling.greedy and sampling.repetition_penalty == 1
    timing = Timing()
    started = shown_at = clock.now()

    lengths = [len(p) for p in prompts]
    cache = runner.new_cache(len(prompts), max(lengths) + max_new_tokens)
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = torch.tensor(prompt)
    if min(lengths) < max(lengths):
        cache.stage_(lengths)
    step = tokens.to(runner.device)
    for i in range(max_new_tokens):
        before = clock.now()
        if plain_greedy and runner.chooses:
            chosen = runner.greedy(step, cache)
            timing.model_sec += clock.now() - before
        else:
            logits = runner.forward(step, cache, "last")[:, 0]  # (B, V)
            clock.synchronize(runner.device.type)
            timing.model_sec += clock.now() - before
            chosen = _choose(logits, rows, plain_greedy)
        for row, token in zip(rows, chosen, strict=True):
            row.accept(token, eos, eos_run)
        if on_text is not None and (i == 0 or clock.now() - shown_at >= FRAME_SEC):
            for row in rows:
                row.show()
            shown_at = clock.now()
        if i == 0:
            timing.ttft_sec = clock.now() - started
        else:
            timing.n_steps += 1
        if all(row.done for row in rows):
            break
        step = torch.tensor(chosen, device=runner.device)[:, None]
    for row in rows:
        row.finish()
    timing.total_sec = clock.now() - started
    return GenerateResult([row.generation for row in rows], timing)


def _choose(logits: Tensor, rows: list[_Row], plain_greedy: bool) -> list[int]:
    if plain_greedy:
        return argmax(logits)
    logits = logits.cpu()
    return [0 if row.done else row.sampler.choose(logits[i]) for i, row in enumerate(rows)]


class _Row:
    """One sequence of the batch: its sampler, its text so far, whether it is done."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        sampling: SamplingOptions,
        tokenizer: Tokenizer | None,
        stop: Sequence[str],
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        seed = None if sampling.seed is None else sampling.seed + index
        self.index, self.stop, self.on_text = index, [s for s in stop if s], on_text
        self.sampler = Sampler(replace(sampling, seed=seed), prompt)
        self.stream = TextStream(tokenizer) if tokenizer else None
        self.generation = Generation(list(prompt))
        self.done = False
        self._longest_stop = max((len(s) for s in self.stop), default=1)
        self._eos_run = 0  # end tokens in a row
        self._unread: list[int] = []  # tokens that are not part of the text yet
        self._shown = 0  # characters already given to on_text

    def accept(self, token: int, eos: Sequence[int], eos_run: int = 1) -> None:
        if self.done:
            return
        self.generation.tokens.append(token)
        self._eos_run = self._eos_run + 1 if token in eos else 0
        if self._eos_run >= eos_run:
            self.done, self.generation.finish_reason = True, "eos"
            return
        if self.stream is not None:
            self._unread.append(token)
        if self.stop:  # each token can be the last one
            self._read()

    def show(self) -> None:
        """Streams what can no longer become part of a stop string."""
        self._read()
        hold_back = 0 if self.done else self._longest_stop - 1
        upto = max(len(self.generation.text) - hold_back, self._shown)
        if self.on_text is not None and upto > self._shown:
            self.on_text(self.index, self.generation.text[self._shown : upto])
        self._shown = upto

    def finish(self) -> None:
        self._read()
        if self.stream is not None and self.generation.finish_reason != "stop":
            self._add(self.stream.flush())  # a stop string may stand before half a character, which held it back
        self.done = True
        self.show()

    def _read(self) -> None:
        if self.stream is not None and self._unread:
            unread, self._unread = self._unread, []
            self._add(self.stream.push(*unread))

    def _add(self, piece: str) -> None:
        """Appends to the text and cuts it before the first stop string, which ends the row."""
        # No stop string ends within the text so far: a new one overlaps the piece.
        start = max(0, len(self.generation.text) - self._longest_stop + 1)
        self.generation.text += piece
        found = [at for at in (self.generation.text.find(s, start) for s in self.stop) if at >= 0]
        if found:
            self.generation.text = self.generation.text[: min(found)]
            self.done, self.generation.finish_reason = True, "stop"
