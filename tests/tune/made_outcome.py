"""An outcome put together by hand: which candidates were measured, at which seconds, on a machine of known ceilings.

Not a test file: tests of the parts of the search import it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from points import BASE, Choice, candidate

from paretune.hardware import Ceilings
from paretune.measure.interleave import Blocks, Sample
from paretune.model import checkpoint
from paretune.records.trial import MemoryParts, SideTimes, TrialFacts
from paretune.tune import space as spaces
from paretune.tune.estimate import Estimator
from paretune.tune.goal import Goal
from paretune.tune.outcome import Outcome
from paretune.tune.race import BASELINE, TWIN

# The options of a CPU, in the order in which they are declared.
ATTENTION, PRECISION = ("sdpa", "eager"), (None, "bf16", "fp16")
NATIVE_QUANTIZE = ("int4", "w8a8", "w7a7")
QUANTIZE = (None, "int8", "int8-linear", *NATIVE_QUANTIZE)
RUNNERS = ("eager", "native", "compile:default", "compile:freeze", "compile:max-autotune")
CACHE = (None, "bf16", "int8", "int4")
N_BLOCKS = 8
ROWS = tuple(
    {"bytes": n << 20, "threads": 2, "bytes_per_sec": 1e10, "kind": "made", "samples": [1e10], "state": "high"}
    for n in (4, 64)
)
CEILINGS = Ceilings("cpu", "made", 2, ROWS, {"fp32": 1e11, "bf16": 1e11, "fp16": 1e11}, 1e11)


def choices() -> list[Choice]:
    """The whole space of a CPU without asking this machine."""
    import itertools

    every = itertools.product(ATTENTION, PRECISION, QUANTIZE, RUNNERS, CACHE)
    return [
        c
        for c in every
        if c != BASE
        and not (c[0] == "eager" and c[3] == "native")
        and not (c[3] != "native" and (c[4] or c[2] in NATIVE_QUANTIZE))
        and not (c[3] == "native" and c[1] and c[2] in ("int8", *NATIVE_QUANTIZE))
    ]


def outcome(
    seconds: dict[Choice, float],
    *,
    legal: list[Choice] | None = None,
    base_sec: float = 0.010,
    failures: dict[Choice, str] | None = None,
    noise: float = 0.002,
    **goal,
) -> Outcome:
    """Candidates of `seconds` were measured in `N_BLOCKS` blocks beside a baseline of `base_sec`; others were not."""
    config = checkpoint.read_config(checkpoint.resolve("pocket"))
    space = spaces.Space([candidate(*c) for c in (legal or choices())])
    random = np.random.default_rng(7)
    samples = []
    trials = {}
    memory = MemoryParts(28 << 20, 1 << 20, 1 << 20, 300 << 20, 400 << 20)

    def add(id, recipe, sec, failure=None):
        facts = TrialFacts(
            load_sec=0.5,
            compile_sec=0.0,
            proof=[],
            notes=[],
            runner={},
            bytes_by_dtype={},
            weights_bytes=memory.weights_bytes,
            step_weights_bytes=memory.weights_bytes,
            compute_dtype="float32",
            kv_cache_bytes=1 << 20,
            kv_bytes_per_token=1e4,
            memory=memory,
            side_sec=SideTimes(ttft=0.04, tpot=sec or 0.01),
        )
        trials[id] = SimpleNamespace(
            id=id,
            recipe=recipe,
            facts=None if failure else facts,
            failure=failure,
            failure_kind="failed",
            start_sec=1.0,
            process=None,
        )
        if sec:
            times = sec * np.exp(random.normal(0, noise, N_BLOCKS))
            samples.extend(Sample(id, b, 0, float(t)) for b, t in enumerate(times))

    add(BASELINE, spaces.baseline(), base_sec)
    add(TWIN, spaces.baseline(), base_sec)
    for choice, sec in seconds.items():
        one = candidate(*choice)
        add(one.id, one.recipe, sec)
    for choice, cause in (failures or {}).items():
        one = candidate(*choice)
        add(one.id, one.recipe, None, cause)
    race = SimpleNamespace(
        trials=trials, measured=lambda: Blocks(samples), journal=SimpleNamespace(elapsed_sec=60.0, samples=samples)
    )
    return Outcome(Goal(**goal), "pocket", Path("pocket"), config, space, race, CEILINGS)


def estimator(out: Outcome) -> Estimator:
    return Estimator(out.config, out.goal, CEILINGS)
