"""What really happens: one prefill and one decode step through a runner, watched."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass

import torch
from torch.autograd.profiler import profile

from paretune.engine.cache_formats import INT4
from paretune.engine.runners.base import Runner
from paretune.errors import ParetuneError

# The profiler's own log lines ("profiler_start") would stand among a command's; read at its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

PROMPT_LEN = 8  # tokens of the probe's prefill: more than one, few enough to be free


@dataclass(frozen=True)
class Observation:
    """Facts for `Transform.verify` and the report."""

    kernels: dict[str, int]  # operators and kernels by name, with counts
    compiled: bool  # the runner executes compiled graphs
    own_kernels: bool  # the runner has products and attention of its own
    graph_breaks: int
    cache_dtype: str
    bytes_by_dtype: dict[str, int]  # stored parameters and buffers, each storage once
    runner: dict[str, object]  # Runner.describe()


def observe(runner: Runner, batch_size: int = 1, capacity: int = 0) -> Observation:
    """Runs one prefill and one decode step under the profiler, after an unwatched round (compilation, first use).

    Args:
        batch_size, capacity: of the cache (at least what the probe needs).

    Raises:
        ParetuneError: the model gives NaN or infinity.
    """
    breaks_before = _graph_breaks()
    tokens = (torch.arange(PROMPT_LEN) % runner.config.vocab_size).repeat(batch_size, 1).to(runner.device)
    prompt_len = min(PROMPT_LEN, runner.config.n_positions - 1)

    def once() -> tuple[torch.Tensor, torch.dtype]:
        cache = runner.new_cache(batch_size, max(capacity, prompt_len + 1))
        runner.forward(tokens[:, :prompt_len], cache, "last")
        return runner.forward(tokens[:, :1], cache, "last"), cache.layers[0].k.dtype

    once()
    # What `torch.profiler` is made of: that one imports PyTorch's compiler, which takes seconds.
    with profile(use_kineto=True, use_device="cuda" if runner.device.type == "cuda" else None) as watched:
        logits, cache_dtype = once()
    if not bool(torch.isfinite(logits).all()):
        raise ParetuneError("the model gives NaN or infinity", "Use a wider dtype, or check the weights")
    assert watched.kineto_results is not None
    # The names alone: PyTorch's tree of events takes seconds to build for a deep model.
    kernels = Counter(event.name() for event in watched.kineto_results.events())
    kernels.update(runner.kernels)
    sizes: dict[str, int] = {}
    storages = {t.untyped_storage().data_ptr(): t for t in [*runner.model.parameters(), *runner.model.buffers()]}
    for t in storages.values():
        key = str(t.dtype).removeprefix("torch.")
        sizes[key] = sizes.get(key, 0) + t.nbytes
    described = runner.describe()
    if runner.cache_dtype != runner.dtype:
        described["cache_dtype"] = "int4" if cache_dtype == INT4 else str(cache_dtype).removeprefix("torch.")
    return Observation(
        kernels=dict(kernels),
        compiled=runner.compiled,
        own_kernels=runner.own_kernels,
        graph_breaks=_graph_breaks() - breaks_before,
        cache_dtype=str(cache_dtype),
        bytes_by_dtype=sizes,
        runner=described,
    )


def _graph_breaks() -> int:
    """Of all that this process has compiled. What compiles has imported the compiler, which takes seconds."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else sum(utils.counters["graph_break"].values())
