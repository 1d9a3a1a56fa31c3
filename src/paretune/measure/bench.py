"""Configurations side by side on a grid of workloads: interleaved blocks, one process each, verdicts.

Every cell of the grid (input length x output length x batch) has a process per configuration and one more for
the baseline again: what those two differ by is what this machine resolves now (A/A). `bench_rows` turns what
was measured into the rows of the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from paretune import clock, files, hardware, stats
from paretune.engine.dispatch import Table
from paretune.errors import UsageError
from paretune.measure import environment, session
from paretune.measure.bench_rows import DEFINITIONS, is_judged
from paretune.measure.bench_run import Run
from paretune.measure.grid import cells_of, n_parameters
from paretune.measure.peers.catalogue import Engine
from paretune.measure.peers.subject import Peers
from paretune.measure.workload import KINDS
from paretune.model import checkpoint
from paretune.recipe import Recipe
from paretune.records.bench import (
    BenchModel,
    BenchResult,
    BenchRow,
    BenchSettings,
    BenchThreads,
    Probe,
)
from paretune.records.header import Ceilings
from paretune.records.judge import is_noisy
from paretune.records.record import from_json

MIN_BLOCKS, MAX_BLOCKS, MIN_TIME_SEC = 8, 27, 3.0

Config = tuple[str, Recipe]


def bench(
    folder: Path,
    configs: Sequence[Config],
    *,
    input_lens: Sequence[int] = (128,),
    output_lens: Sequence[int] = (32,),
    batch_sizes: Sequence[int] = (1,),
    baseline: str = "baseline",
    kinds: Sequence[str] = ("ttft", "tpot"),
    min_blocks: int = MIN_BLOCKS,
    max_blocks: int = MAX_BLOCKS,
    min_time_sec: float = MIN_TIME_SEC,
    budget_sec: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    on_progress: Callable[[str], None] | None = None,
    sample_log: Path | None = None,
    folders: Mapping[str, Path] | None = None,
    engines: Sequence[Engine] = (),
    loading_counts: bool = True,
    keeps_processes: bool = False,
    tables: Mapping[str, Table] | None = None,
    on_first: Callable[[list[BenchRow]], None] | None = None,
    keeps_interrupted: bool = False,
) -> BenchResult:
    """Measures every configuration against the baseline on every cell of the grid.

    Args:
        configs: names and recipes; all rows carry the name.
        baseline: the configuration that the others are compared with; the first where none has this name.
        kinds: what is sampled (`workload.KINDS`), each in blocks of its own.
        min_blocks, max_blocks: after how many blocks the first and the last look is taken.
        min_time_sec: how long each kind of a configuration is sampled at least, its probes included.
        budget_sec: for everything; what is not reached then is said to be so. None: until all is decided, or
            `max_blocks`.
        on_progress: called with a line, only while nothing is being timed.
        sample_log: a JSON line for every sample, written the moment it is taken.
        folders: the checkpoint of a configuration where it is not `folder` (a plan's converted one).
        engines: peers that are measured beside the configurations, on the checkpoint of `folder`.
        loading_counts: whether `budget_sec` also holds loading, converting and checking; else they come on top.
        keeps_processes: a process serves all cells of its configuration, where memory holds them all: for large grids.
            Proof and check of exactness are those of the first cell.
        tables: of configurations that choose their form by regime; each cell runs what the table says, and says so.
        on_first: called with the rows of a group as soon as each has an interval of every kind; none is judged yet.
        keeps_interrupted: a `KeyboardInterrupt` gives what is known instead of going up.

    Returns:
        the rows and everything that they were made from.

    Raises:
        UsageError: wrong arguments, before any process starts.
    """
    assert not (keeps_processes and tables), "a kept process runs one recipe"
    names = [name for name, _ in configs]
    if not names:
        raise UsageError("there is no configuration to measure", "Give --config")
    all_names = names + [engine.name for engine in engines]
    if len(set(all_names)) != len(all_names):
        twice = next(n for n in all_names if all_names.count(n) > 1)
        raise UsageError(f"config {twice!r} is given twice", "Name each configuration once")
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"unknown kind {kind!r}", f"Known: {', '.join(KINDS)}")
    if not 1 <= min_blocks <= max_blocks:
        raise UsageError(f"{min_blocks} to {max_blocks} blocks", "The first has to be 1 or more, the second no less")
    config = checkpoint.read_config(folder)
    cells = cells_of(config.longest, input_lens, output_lens, batch_sizes)
    header = environment.head(seed=seed)
    say = on_progress or (lambda line: None)
    if device == "cpu":
        session.prepare()
    threads_read = hardware.set_threads(threads)
    run = Run(
        folder=Path(folder),
        config=config,
        n_params=n_parameters(config),
        configs=dict(configs),
        peers=Peers(engines, Path(folder), config, threads_read["threads"], say),
        folders={k: Path(v) for k, v in (folders or {}).items()},
        baseline=baseline if baseline in names else names[0],
        kinds=tuple(kinds),
        schedule=stats.looks(min_blocks, max_blocks),
        min_time_sec=min_time_sec,
        seed=seed,
        device=device,
        threads=threads,
        probe=hardware.BandwidthProbe(threads) if device == "cpu" else None,
        say=say,
        measure_ceilings=lambda: hardware.ceilings(device, quick=True),
        on_first=on_first,
        deadline=None if budget_sec is None else clock.now() + budget_sec,
        loading_counts=loading_counts,
        keeps_processes=keeps_processes,
        tables=dict(tables or {}),
    )
    if device == "cpu":
        session.settle()
    interrupted = False
    with _log(sample_log) as run.log:
        try:
            run.run(cells)
            run.known_ceilings()
        except KeyboardInterrupt:
            if not keeps_interrupted:
                raise
            interrupted = True
    noisy = any(is_noisy(entry.half_width) for entry in run.aa)
    return BenchResult(
        **vars(header),
        model=BenchModel(folder.name, config.family, run.n_params),
        device=device,
        threads=from_json(BenchThreads, threads_read),
        baseline=run.baseline,
        configs={name: recipe.to_dict() for name, recipe in configs},
        engines=[engine.name for engine in engines],
        cells=cells,
        settings=BenchSettings(list(kinds), run.schedule, run.level, stats.DELTA, min_time_sec, budget_sec),
        ceilings=None if run.ceilings is None else from_json(Ceilings, run.ceilings.to_json()),
        probe=None if run.probe is None else Probe(run.probe.kind, run.probe.note),
        rows=run.rows,
        aa=run.aa,
        samples=run.samples,
        warm_up=run.warm_ups,
        definitions=DEFINITIONS,
        is_noisy=noisy,
        too_noisy=noisy and not is_judged(run.rows),
        interrupted=interrupted,
    )


@contextlib.contextmanager
def _log(path: Path | None) -> Iterator[IO[str] | None]:
    if path is None:
        yield None
        return
    try:
        handle = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise files.write_error(path, error) from None
    with handle:
        yield handle
