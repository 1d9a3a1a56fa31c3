"""What is timed: one batch of requests of fixed length, on a loaded runner.

A sample is a slice of at least `MIN_SLICE_SEC` at the same positions for every configuration. Definitions:

- TTFT: start of the request to the first token (prefill and its argmax), per batch.
- TPOT: one decode step at the positions after the prompt, per step (so per token of a sequence).
- throughput sample: the whole request, prefill and all output tokens, per output token of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from paretune import clock
from paretune.engine.cache import KVCache
from paretune.engine.request import Request
from paretune.engine.runners.base import Runner
from paretune.engine.scheduler import Scheduler
from paretune.engine.speculation import Speculator
from paretune.errors import UsageError
from paretune.measure import memory
from paretune.model.layers import Embedding, Linear

MIN_SLICE_SEC = 0.15  # 20 slices, the least that decide a final, are then the 3 s that a final needs
WARM_SLICE_SEC = 0.03  # of warming up: a trend needs eight slices, not eight long ones
DECODE_SLICE = 16  # tokens: short enough that all are "at the same position"
KINDS = ("tpot", "ttft", "throughput")


@dataclass(frozen=True)
class Workload:
    """The shape of a request.

    Args:
        input_len: prompt tokens.
        output_len: new tokens.
        batch_size: sequences at once.
        seed: of the random prompt; fresh seeds make fresh prompts.
    """

    input_len: int = 128
    output_len: int = 32
    batch_size: int = 1
    seed: int = 0

    def check(self, n_positions: int) -> None:
        """Raises UsageError where the request does not fit the model."""
        for name in ("input_len", "output_len", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}", "It has to be 1 or more")
        if self.input_len + self.output_len > n_positions:
            raise UsageError(
                f"{self.input_len} input and {self.output_len} output tokens exceed the context of {n_positions}",
                "Choose smaller --input-len or --output-len",
            )


def draw_prompts(workload: Workload, vocab_size: int) -> torch.Tensor:
    """Random tokens `[B, input_len]`, the same for everyone who is measured under this workload."""
    generator = torch.Generator().manual_seed(workload.seed)
    return torch.randint(0, vocab_size, (workload.batch_size, workload.input_len), generator=generator)


class Bench:
    """Samples of one runner under one workload, in the loop that users' requests go through. Output length is fixed: no
    early stop.

    Args:
        prompts: tokens `[B, input_len]`; None draws random ones from the vocabulary.
        speculator: of this runner; None: plain decoding. Then a slice has the steps that its tokens take.
    """

    def __init__(
        self,
        runner: Runner,
        workload: Workload,
        prompts: torch.Tensor | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        config: Any = runner.config
        workload.check(config.n_positions)
        self.runner, self.workload = runner, workload
        if prompts is None:
            prompts = draw_prompts(workload, config.vocab_size)
        self.prompts: list[list[int]] = prompts.tolist()
        capacity = workload.input_len + workload.output_len
        self.loop = Scheduler(runner, workload.batch_size, capacity, keeps_done=True, speculator=speculator)
        self.is_plain = speculator is None  # a step gives each row one token
        self._is_read = False  # whether the prompts are in the cache

    @property
    def cache(self) -> KVCache:
        return self.loop.cache

    @property
    def n_decode(self) -> int:
        """Decode steps of one slice."""
        return max(1, min(DECODE_SLICE, self.workload.output_len - 1))

    def sample(self, kind: str, min_sec: float | None = None) -> float:
        """Seconds per unit (see the definitions above), mean over one slice.

        Args:
            min_sec: how long it is at least; None: `MIN_SLICE_SEC`.
        """
        run, n_units = {
            "ttft": (self._prefill, 1),
            "tpot": (self._decode_slice, self.n_decode),
            "throughput": (self._request, self.workload.batch_size * self.workload.output_len),
        }[kind]
        return self._timed(kind, run, n_units, MIN_SLICE_SEC if min_sec is None else min_sec)

    def short_sample(self, kind: str) -> float:
        """As `sample`, of a slice as short as `WARM_SLICE_SEC` and a single step: for warming up and side figures."""
        if kind == "tpot":
            return self._timed(kind, self._decode_step, 1, WARM_SLICE_SEC)
        if kind == "ttft":
            return self._timed(kind, self._prefill, 1, WARM_SLICE_SEC)
        return self.sample(kind)

    def _timed(self, kind: str, run: Callable[[], None], n_units: int, min_sec: float) -> float:
        if kind != "ttft" and not self._is_read:
            self._prefill()
        device = self.runner.device.type
        n = 0
        with clock.quiet():
            clock.synchronize(device)
            started = clock.now()
            while True:
                run()
                n += 1
                clock.synchronize(device)
                elapsed = clock.now() - started
                if elapsed >= min_sec:
                    return elapsed / (n * n_units)

    def _prefill(self) -> None:
        self.loop.clear()
        for prompt in self.prompts:
            self.loop.add(Request(prompt, max(2, self.workload.output_len)))  # a decode step has a second token
        self.loop.step()
        self._is_read = True

    def _decode_slice(self) -> None:
        self.loop.rewind(1)
        self._steps(self.n_decode)

    def _decode_step(self) -> None:
        """One step at the next of the slice's positions."""
        start = self.workload.input_len
        if not start <= self.cache.host_lengths[0] < start + self.n_decode:
            self.loop.rewind(1)
        self._steps(1)

    def request_peak(self) -> float:
        """Runs what takes as much memory as a whole request: its prompt and, unless the output is long beside it, one
        step (later ones see a few more positions, and take less than the prompt). Gives the seconds of the prompt."""
        before = clock.now()
        self._prefill()
        prompt_sec = clock.now() - before
        is_short = 2 * self.workload.output_len <= self.workload.input_len
        self._steps(min(1, self.workload.output_len - 1) if is_short else self.workload.output_len - 1)
        return prompt_sec

    def _request(self) -> None:
        self._prefill()
        self._steps(self.workload.output_len - 1)

    def _steps(self, n: int) -> None:
        """Steps until each sequence has n tokens more."""
        assert self._is_read, "no prompt was prefilled"
        if self.is_plain:
            for _ in range(n):
                self.loop.step()
            return
        requests = [request for request in self.loop.rows if request is not None]
        wanted = [min(len(r.tokens) + n, r.max_new_tokens) for r in requests]
        while any(len(r.tokens) < w for r, w in zip(requests, wanted, strict=True)):
            self.loop.step()


def step_weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that a decode step reads whole: all but tables of which it takes single rows
    (positions, an untied token embedding)."""
    used = {id(m.weight) for m in model.modules() if isinstance(m, Linear)}
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, Embedding)}
    looked_up = sum(weight.stored_bytes for key, weight in tables.items() if key not in used)
    return memory.storage_bytes(model)["total"] - looked_up
