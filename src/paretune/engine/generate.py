"""Generation on top of a runner: prompts in, text out; and the oracle that it is held to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from paretune import clock
from paretune.engine.request import Generation, Request
from paretune.engine.runners.base import Runner
from paretune.engine.sampling import SamplingOptions
from paretune.engine.scheduler import Scheduler
from paretune.engine.speculation import Speculator
from paretune.errors import UsageError
from paretune.model.base import LanguageModel
from paretune.model.tokenizer import Tokenizer


@dataclass
class Timing:
    """Seconds of one `generate` call: definitions as in `docs`, tokenisation outside."""

    ttft_sec: float = 0.0  # start of the call to the first token
    total_sec: float = 0.0
    model_sec: float = 0.0  # inside runner.forward
    n_steps: int = 0  # decode steps of the model


@dataclass
class GenerateResult:
    generations: list[Generation]
    timing: Timing

    @property
    def tpot_sec(self) -> float | None:
        """Seconds per output token after the first, of the longest text; None for fewer than two."""
        n = max((len(g.tokens) for g in self.generations), default=0) - 1
        return (self.timing.total_sec - self.timing.ttft_sec) / n if n > 0 else None


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


def _counted(n_equal: Counter[tuple[int, ...]], prompt: Sequence[int]) -> int:
    """How many equal prompts came before this one."""
    key = tuple(prompt)
    n_equal[key] += 1
    return n_equal[key] - 1


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
    speculator: Speculator | None = None,
) -> GenerateResult:
    """Continues each prompt.

    Every row gets the tokens it would get alone: positions are its own, and its random numbers are counted by seed and
    position. Equal prompts are samples of one request: the second of them draws other numbers than the first.

    Args:
        prompts: token ids; lengths may differ.
        tokenizer: needed for text, stop strings and streaming.
        stop: strings that end a sequence; they are not part of the text.
        ignore_eos: fixed output length, for measurements.
        eos_run: end tokens in a row that end a sequence; 2 where a model ends each of its sentences with one.
        on_text: called with (row, piece) as text becomes certain: after the first token, then after the first one that
            is `scheduler.FRAME_SEC` or later than the call before, then at the end.
        speculator: proposes tokens; the text is the same. None: plain decoding.
    """
    config = runner.config
    check_request(prompts, max_new_tokens, config.longest, config.vocab_size)
    sampling = sampling or SamplingOptions()
    n_equal: Counter[tuple[int, ...]] = Counter()  # prompts so far
    requests = [
        Request(
            prompt,
            max_new_tokens,
            sampling,
            sample=_counted(n_equal, prompt),
            eos=() if ignore_eos else config.eos_token_ids,
            eos_run=eos_run,
            stop=stop,
            tokenizer=tokenizer,
            on_text=None if on_text is None else partial(on_text, row),
        )
        for row, prompt in enumerate(prompts)
    ]
    if speculator is not None:
        speculator.ready(len(prompts))  # what is measured once belongs to no request
    timing = Timing()
    started = clock.now()
    loop = Scheduler(runner, len(prompts), max(map(len, prompts)) + max_new_tokens, speculator=speculator)
    for request in requests:
        loop.add(request)
    loop.step()
    timing.ttft_sec = clock.now() - started
    while loop.is_busy:
        loop.step()
        timing.n_steps += 1
    timing.total_sec, timing.model_sec = clock.now() - started, loop.decode.model_sec
    return GenerateResult([request.generation for request in requests], timing)
