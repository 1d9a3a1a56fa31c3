"""The trial process of `tune`: the timing worker, and quality and a profile through the very same runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paretune.measure.worker import Trial, serve

EAGER_ROWS = 20  # windows scored at once; the same kernels as one row (int8 changes its way above 32 rows)
ROW_LEN = 257  # tokens of such a window; of longer ones fewer are scored at once


def score(trial: Trial, request: dict[str, Any]) -> dict[str, Any]:
    """Scores token windows and stores the result for `fidelity.compare`."""
    import numpy as np
    import torch

    from paretune import clock
    from paretune.evaluate import fidelity

    windows = torch.from_numpy(np.load(request["windows"])[request["start"] : request["stop"]])
    runner = trial.loaded.runner
    # A compiled decode graph has a fixed batch: it is scored as it was timed.
    n_rows = max(1, EAGER_ROWS * ROW_LEN // max(ROW_LEN, windows.size(1)))
    batch_size = request["batch_size"] if runner.fixed_batch else n_rows
    started = clock.now()
    scores = fidelity.score(
        runner,
        windows,
        keep_positions=request["keep_positions"],
        batch_size=batch_size,
        text_name=request["text_name"],
    )
    scores.save(Path(request["out"]))
    return {"score_sec": clock.now() - started}


def why(trial: Trial, request: dict[str, Any]) -> dict[str, Any]:
    """Takes a step of the loaded model apart, quickly: the sentences of `paretune profile`."""
    from paretune import hardware
    from paretune.measure import profile, profile_facts
    from paretune.measure.profile_steps import Step

    breaks = profile_facts.BreakCounter()
    workload, capacity = trial.bench.workload, trial.bench.cache.capacity
    step = Step(trial.loaded, request["phase"], workload.input_len, workload.batch_size, capacity=capacity)
    for _ in range(2):
        step.prepare()
        step.run()
    found = profile.examine(
        step,
        hardware.Ceilings.from_json(request["ceilings"]),
        request["threads"],
        breaks,
        quick=True,
        with_kernels=not trial.loaded.runner.compiled,  # its kernels were compiled without names
    )
    return {"explanations": found["explanations"], "sec": found["whole"]["sec"]}


def preload() -> None:
    """As `measure.worker.preload`, and what scores and profiles."""
    import paretune.evaluate.fidelity
    import paretune.measure.profile  # noqa: F401
    from paretune.measure import worker

    worker.preload()


def main() -> None:
    trial = Trial()
    own = {"score": lambda request: score(trial, request), "why": lambda request: why(trial, request)}
    serve({**trial.handlers(), **own})


if __name__ == "__main__":
    main()
