"""Latency of streaming summaries: time to the first token of a long document, and between the tokens after it.

The document is prefilled in chunks, as a server does it, which bounds the working memory; decode steps are timed one by
one. Speed does not depend on the weights, so a model with random ones and enough positions will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from paretune import clock, stats
from paretune.engine.request import Request
from paretune.engine.runners.base import Runner
from paretune.engine.scheduler import Scheduler
from paretune.errors import UsageError

CHUNK = 512  # tokens of one prefill step
N_NEW = 33  # tokens of the summary that are timed: 32 gaps


@dataclass(frozen=True)
class Latency:
    """One document.

    Attributes:
        ttft_sec: from the request until the first token is chosen.
        itl_sec: each gap between two tokens.
        kv_cache_bytes: as allocated at the end.
    """

    n_tokens: int
    ttft_sec: float
    itl_sec: tuple[float, ...]
    kv_cache_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "n_tokens": self.n_tokens,
            "ttft_sec": self.ttft_sec,
            "itl_p50_sec": stats.percentile(self.itl_sec, 50),
            "itl_max_sec": max(self.itl_sec),
            "n_gaps": len(self.itl_sec),
            "kv_cache_bytes": self.kv_cache_bytes,
        }


def stream(runner: Runner, n_tokens: int, *, n_new: int = N_NEW, chunk: int = CHUNK, seed: int = 0) -> Latency:
    """Feeds a document of `n_tokens` random tokens and generates `n_new` greedy ones.

    Raises:
        UsageError: the document does not fit the model.
    """
    config: Any = runner.config
    longest = int(getattr(config, "longest", config.n_positions))
    if n_tokens + n_new > longest:
        raise UsageError(f"{n_tokens} tokens and {n_new} new ones exceed the context of {longest}", "Use a shorter one")
    assert n_tokens >= 1 and n_new >= 2
    generator = torch.Generator().manual_seed(seed)
    document = torch.randint(0, config.vocab_size, (n_tokens,), generator=generator).tolist()
    kind = runner.device.type
    gaps = []
    with clock.quiet():
        clock.synchronize(kind)
        began = clock.now()
        loop, request = Scheduler(runner, 1, n_tokens + n_new, chunk=chunk), Request(document, n_new)
        loop.add(request)
        while not request.tokens:
            loop.step()
        clock.synchronize(kind)
        last = clock.now()
        ttft = last - began
        for _ in range(n_new - 1):
            loop.step()
            clock.synchronize(kind)
            now = clock.now()
            gaps.append(now - last)
            last = now
    return Latency(n_tokens, ttft, tuple(gaps), loop.cache.nbytes)
