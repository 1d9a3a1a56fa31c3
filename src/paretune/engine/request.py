"""One sequence to be continued: what is asked for, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from paretune.engine.sampling import Sampler, SamplingOptions
from paretune.errors import UsageError
from paretune.model.tokenizer import TextStream, Tokenizer


@dataclass
class Generation:
    """One finished sequence."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)  # new ones, an end token included
    text: str = ""  # of the new tokens, cut before a stop string
    finish_reason: str = "length"  # length, eos, stop


class Request:
    """A prompt with all that decides how it goes on; it shares nothing with the requests beside it.

    Text is made of several tokens at once where they come fast: decoding after every token would cost a small model as
    much as half a step (its code has left the caches).

    Args:
        prompt: token ids.
        max_new_tokens: after which it ends with the reason `length`.
        sampling: its seed is that of this request's own random numbers.
        sample: which of several samples of this prompt and seed it is, from 0.
        eos: end tokens.
        eos_run: end tokens in a row that end the sequence.
        stop: strings that end the sequence; they are not part of the text.
        tokenizer: needed for text, stop strings and streaming.
        on_text: called with each piece of text that has become certain.

    Attributes:
        tokens: new ones, an end token included.
        text: of the new tokens as far as it was asked for, cut before a stop string.
        is_done: no token is added any more.
        n_read: prompt tokens that are in the cache.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingOptions | None = None,
        *,
        sample: int = 0,
        eos: Sequence[int] = (),
        eos_run: int = 1,
        stop: Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        self.prompt, self.max_new_tokens = list(prompt), max_new_tokens
        self.sampling = SamplingOptions() if sampling is None else sampling
        self.sample = sample
        self.eos, self.eos_run, self.on_text = tuple(eos), eos_run, on_text
        self.stop = [s for s in stop if s]
        if (stop or on_text) and tokenizer is None:
            raise UsageError("stop strings and streaming need a tokenizer", "Pass the model's tokenizer")
        self.is_greedy = self.sampling.greedy and self.sampling.repetition_penalty == 1
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason = "length"
        self.is_done = False
        self.n_read = 0
        self._stream = TextStream(tokenizer) if tokenizer else None
        self._longest_stop = max((len(s) for s in self.stop), default=1)
        self._n_eos = 0  # end tokens in a row
        self._unread: list[int] = []  # tokens that are not part of the text yet
        self._shown = 0  # characters already given to on_text

    @cached_property
    def sampler(self) -> Sampler:
        """Chooses the tokens, where they are not simply the likeliest; holds the request's own seed."""
        return Sampler(self.sampling, self.prompt, self.sample)

    def choose(self, logits: Tensor) -> int:
        """The next token for `logits[V]`; it has to be accepted then."""
        return self.sampler.choose(logits, len(self.prompt) + len(self.tokens))

    @property
    def generation(self) -> Generation:
        """The outcome so far."""
        return Generation(self.prompt, self.tokens, self.text, self.finish_reason)

    def accept(self, token: int) -> None:
        """Adds a token; the sequence may be done with it."""
        assert not self.is_done, "this request has ended"
        self.tokens.append(token)
        if token in self.eos:
            self._n_eos += 1
            if self._n_eos >= self.eos_run:
                self.is_done, self.finish_reason = True, "eos"
                return
        else:
            self._n_eos = 0
        if self._stream is not None:
            self._unread.append(token)
            if self.stop:  # each token can be the last one
                self._read()
        if len(self.tokens) >= self.max_new_tokens:
            self.is_done = True

    def rewind(self, n_tokens: int) -> None:
        """Goes back to when it had so many new tokens, for measurements: nothing but a fixed length may end it."""
        assert self._stream is None and not self.eos and self.is_greedy and n_tokens <= len(self.tokens)
        del self.tokens[n_tokens:]
        self.is_done = len(self.tokens) >= self.max_new_tokens

    def show(self) -> None:
        """Streams what can no longer become part of a stop string."""
        self._read()
        hold_back = 0 if self.is_done else self._longest_stop - 1
        upto = max(len(self.text) - hold_back, self._shown)
        if self.on_text is not None and upto > self._shown:
            self.on_text(self.text[self._shown : upto])
        self._shown = upto

    def finish(self) -> None:
        """After the last token: completes the text and streams the rest of it."""
        self._read()
        if self._stream is not None and self.finish_reason != "stop":
            self._add(self._stream.flush())  # a stop string may stand before half a character, which held it back
        self.is_done = True
        self.show()

    def _read(self) -> None:
        if self._stream is not None and self._unread:
            unread, self._unread = self._unread, []
            self._add(self._stream.push(*unread))

    def _add(self, piece: str) -> None:
        """Appends to the text and cuts it before the first stop string, which ends the sequence."""
        # No stop string ends within the text so far: a new one overlaps the piece.
        start = max(0, len(self.text) - self._longest_stop + 1)
        self.text += piece
        found = [at for at in (self.text.find(s, start) for s in self.stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.is_done, self.finish_reason = True, "stop"
