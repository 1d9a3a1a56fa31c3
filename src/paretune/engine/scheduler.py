"""The one loop in which text is made: requests come into rows of a cache, take steps together, and leave.

What users wait for, what is timed and what the model is calibrated on goes through it. Between two steps stands only
what the next step needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch

from paretune import clock
from paretune.engine.decode.plain import Choose, Plain
from paretune.engine.request import Request
from paretune.engine.runners.base import Runner
from paretune.engine.speculation import Speculator
from paretune.errors import UsageError

FRAME_SEC = 0.02  # streamed text goes out 50 times a second at most, which reads as steady


class Scheduler:
    """Requests in the rows of one cache.

    On a runner that gives the same bits at any width, a row that is done leaves at once. On others it runs along until
    its place is needed or all are done: the width of the steps would change the last bits of its neighbours.

    Args:
        n_rows: sequences at once; others wait.
        capacity: tokens of each row, prompt and new ones.
        chunk: prompt tokens of a row that go in at once; None: whole prompts.
        choose: of the next tokens, for the whole batch; None: each request chooses its own.
        keeps_done: a row that is done keeps its place until others wait for it, so that `rewind` can go back in it.
        speculator: of this runner; None: plain decoding. Not beside `choose`.

    Attributes:
        rows: the request in each row of the cache, or None.
        decode: takes the steps.
    """

    def __init__(
        self,
        runner: Runner,
        n_rows: int,
        capacity: int,
        *,
        chunk: int | None = None,
        choose: Choose | None = None,
        keeps_done: bool = False,
        speculator: Speculator | None = None,
    ) -> None:
        assert chunk is None or chunk >= 1
        assert choose is None or speculator is None, "proposals are held against what each request chooses"
        self.runner, self.chunk, self.keeps_done = runner, chunk, keeps_done
        self.cache = runner.new_cache(n_rows, capacity)
        self.cache.clear_()
        self.decode = Plain(runner, self.cache, choose) if speculator is None else speculator.decode(runner, self.cache)
        self.rows: list[Request | None] = [None] * n_rows
        self.waiting: deque[Request] = deque()
        self._device = runner.device
        self._runs_along = not runner.same_bits_at_any_width
        self._streams = False
        self._shown_at = 0.0
        self._regroup()

    def _regroup(self) -> None:
        """What follows from who is in which row: looked up in each step, and changed in few."""
        self._reading = [row for row, r in enumerate(self.rows) if r is not None and r.n_read < len(r.prompt)]
        read_in = [None if row in self._reading else r for row, r in enumerate(self.rows)]
        # Rows of the next decode step; of a row that is done, only the numbers are needed.
        self._decoding = [None if r is None or (r.is_done and not self._runs_along) else r for r in read_in]
        self._running = [(row, r) for row, r in enumerate(read_in) if r is not None and not r.is_done]
        self._is_along = any(r is not None and r.is_done for r in self._decoding)
        n_new = [int(r is not None) for r in self._decoding]
        self._staged = None if all(n_new) else n_new

    @property
    def is_busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.waiting or self._reading or self._running)

    def add(self, request: Request) -> None:
        """Puts a request behind those that wait.

        Raises:
            UsageError: it does not fit into a row.
        """
        n_held = len(request.prompt) + request.max_new_tokens - 1  # the last token is not read in
        if n_held > self.cache.capacity:
            raise UsageError(
                f"{len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones do not fit into rows of "
                f"{self.cache.capacity}",
                "Shorten the prompt, or ask for fewer new tokens",
            )
        self.waiting.append(request)

    def clear(self) -> None:
        """Forgets all requests."""
        self.waiting.clear()
        for row, request in enumerate(self.rows):
            if request is not None:
                self.decode.evict(row, request)
        self.rows = [None] * len(self.rows)
        self.cache.clear_()
        self._regroup()

    def rewind(self, n_tokens: int) -> None:
        """Takes the requests back to when each had so many new tokens, one at least (see `Request.rewind`)."""
        assert n_tokens >= 1 and not self.waiting and not self._reading
        lengths = []
        for row, request in enumerate(self.rows):
            lengths.append(0)
            if request is not None:
                request.rewind(n_tokens)
                self.decode.rewind(row, request)
                lengths[-1] = len(request.prompt) + n_tokens - 1  # the newest token is not in the cache yet
        self.cache.truncate_(lengths)
        self._regroup()

    def run(self) -> None:
        """Steps until every request is done."""
        while self.is_busy:
            self.step()

    def step(self) -> None:
        """A token for each row whose prompt is read in, or more where they were proposed, and a piece of each prompt
        that is not."""
        assert self.is_busy, "nothing is left to do"
        if self._is_along:
            self._leave_where_full()
        if self.waiting:
            self._admit()
        if self._running:
            self._step_on()
        is_first = bool(self._reading) and self._read()
        if self._streams and (is_first or clock.now() - self._shown_at >= FRAME_SEC):
            for request in self.rows:
                if request is not None and request.on_text is not None:
                    request.show()
            self._shown_at = clock.now()

    def _admit(self) -> None:
        for row, request in enumerate(self.rows):
            if not self.waiting:
                break
            if request is not None and request.is_done:
                self._evict(row)
            if self.rows[row] is None:
                self.cache.admit_(row)
                self.rows[row] = admitted = self.waiting.popleft()
                self.decode.admit(row, admitted)
        self._streams = any(r is not None and r.on_text is not None for r in self.rows)
        self._regroup()

    def _leave_where_full(self) -> None:
        """A row that runs along ends where its place does."""
        for row, along in enumerate(self.rows):
            if along is not None and along.is_done and self.cache.host_lengths[row] >= self.cache.capacity:
                self._evict(row)
        self._regroup()

    def _evict(self, row: int) -> None:
        self.cache.evict_(row)
        if (request := self.rows[row]) is not None:
            self.decode.evict(row, request)
        self.rows[row] = None

    def _read(self) -> bool:
        """Reads the next piece of the prompts in; whether any row has its first token now."""
        rows: dict[int, Request] = {row: r for row in self._reading if (r := self.rows[row]) is not None}
        lengths = self.cache.host_lengths
        # What is padded needs room too; a row has it for one token more at least.
        room = self.cache.capacity - max(lengths if self.cache.static else (lengths[row] for row in rows))
        most = room if self.chunk is None else min(self.chunk, room)
        parts = {row: r.prompt[r.n_read : r.n_read + most] for row, r in rows.items()}
        n_new = [len(parts.get(row, ())) for row in range(len(self.rows))]
        K = max(n_new)
        if min(n_new) < K:
            self.cache.stage_(n_new)
            tokens = torch.zeros(len(n_new), K, dtype=torch.int64)
            for row, part in parts.items():
                tokens[row, : len(part)] = torch.tensor(part)
        else:
            tokens = torch.tensor([parts[row] for row in range(len(n_new))])
        ending = {row: r for row, r in rows.items() if r.n_read + n_new[row] == len(r.prompt)}
        choosing = [ending.get(row) for row in range(len(n_new))]
        chosen = self.decode.step(tokens.to(self._device), choosing)
        for row, request in rows.items():
            request.n_read += n_new[row]
        for row, request in ending.items():
            self.decode.give(row, request, chosen[row])
        self._leave_where_done(ending.values())
        self._regroup()
        return bool(ending)

    def _step_on(self) -> None:
        self.decode.advance(self._decoding, self._running, self._staged)
        if self._leave_where_done(request for _, request in self._running):
            self._regroup()

    def _leave_where_done(self, requests: Iterable[Request]) -> bool:
        """Whether any of these is done; then those that are leave, unless their places are kept."""
        if not any(request.is_done for request in requests):
            return False
        if not self.keeps_done:
            is_needed = self._runs_along and any(r is not None and not r.is_done for r in self.rows)
            for row, held in enumerate(self.rows):
                if held is not None and held.is_done and not is_needed:
                    self._evict(row)
        return True
