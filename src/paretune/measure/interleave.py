"""Interleaved blocks: every subject once a block, in random order, so that drift and noisy neighbours cancel.

The scheduler owns no process and times nothing itself: a `Subject` runs one slice and says how long a unit
of work took. It decides who runs when, keeps all but one asleep, and hands out each sample the moment it is
taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from paretune import clock, stats
from paretune.errors import ParetuneError
from paretune.records.bench import BenchSample

MAX_REPEATS = 2
MAX_PROBE_CHANGE = 0.2
MAX_WARM_UP_SEC = 30.0
MAX_REPEATABLE_SEC = 1.0  # states last seconds: what the ends of a longer slice differ by says nothing of its middle


class SubjectError(ParetuneError):
    """A subject that cannot go on: it crashed, ran out of memory or timed out.

    Args:
        kind: the class of the error where the subject named one (`NoEffectError`), else empty.
    """

    def __init__(self, cause: str, cure: str = "", kind: str = "") -> None:
        super().__init__(cause, cure)
        self.kind = kind


class Subject(Protocol):
    """One configuration under measurement, usually a worker process.

    Every method may raise `SubjectError`. `sample` collects garbage, synchronises the device and times by
    `paretune.clock` itself. `pause` and `resume` may be called twice in a row.
    """

    @property
    def name(self) -> str: ...

    def sample(self) -> float:
        """Runs one slice (0.1 to 0.5 s, the same positions for each subject); seconds per unit of work."""
        ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


@dataclass(frozen=True)
class Sample:
    """One timed slice: the atom of the journal.

    Args:
        subject: its name.
        block: the index of the block, counted over the whole run.
        position: where in the block's order it was due (a dropped subject leaves its place empty).
        value_sec: seconds per unit of work.
        bandwidth_before, bandwidth_after: bytes/s by the probe around it; None without a probe.
        n_repeated: how many slices were thrown away before this one because the probes around them differed.
    """

    subject: str
    block: int
    position: int
    value_sec: float
    bandwidth_before: float | None = None
    bandwidth_after: float | None = None
    n_repeated: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Sample:
        """Raises: ParetuneError: a field is missing or of the wrong kind."""
        try:
            before, after = data["bandwidth_before"], data["bandwidth_after"]
            sample = cls(
                subject=str(data["subject"]),
                block=int(data["block"]),
                position=int(data["position"]),
                value_sec=float(data["value_sec"]),
                bandwidth_before=None if before is None else float(before),
                bandwidth_after=None if after is None else float(after),
                n_repeated=int(data["n_repeated"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ParetuneError(f"not a sample of a journal: {data!r} ({error!r})") from None
        if not (math.isfinite(sample.value_sec) and sample.value_sec > 0):
            raise ParetuneError(f"not a sample of a journal: it took {sample.value_sec} s")
        return sample


def sample_of(record: BenchSample) -> Sample:
    """The slice of a sample that a result of `bench` holds."""
    return Sample(
        record.subject,
        record.block,
        record.position,
        record.value_sec,
        record.bandwidth_before,
        record.bandwidth_after,
        record.n_repeated,
    )


@dataclass(frozen=True)
class BlockRun:
    """What `run_blocks` brought.

    Args:
        samples: those that were there before (`done`) and the new ones, in the order taken.
        failures: the subjects that were dropped, with the cause.
        is_cut: the deadline came first; the last block may be partly finished.
    """

    samples: list[Sample] = field(default_factory=list)
    failures: dict[str, SubjectError] = field(default_factory=dict)
    is_cut: bool = False


def block_order(names: Sequence[str], rng_seed: int, block: int) -> list[str]:
    """The order of one block: sorted by a hash of (seed, block, name).

    A hash rather than a generator, so that the order depends on nothing that came before: a resumed run
    goes on identically, and where one subject is dropped the others keep theirs.
    """

    def key(name: str) -> bytes:
        return hashlib.blake2b(f"{rng_seed}\0{block}\0{name}".encode(), digest_size=16).digest()

    return sorted(names, key=key)


def warm_up(
    subject: Subject,
    k: int = stats.TREND_WINDOW,
    min_n: int = 8,
    max_sec: float = MAX_WARM_UP_SEC,
) -> list[float]:
    """Samples one subject until its last `k` timings show no trend, for `max_sec` at most, and pauses it.

    Returns every timing, in seconds per unit of work. Where `stats.has_trend(timings, k)` still holds the
    time was over first: say so beside the result. The other subjects must be paused.

    Raises:
        SubjectError: from the subject.
    """
    end = clock.now() + max_sec
    timings: list[float] = []
    with _awake(subject):
        while True:
            timings.append(_timed(subject))
            if len(timings) >= min_n and not stats.has_trend(timings, k):
                return timings
            if clock.now() >= end:
                return timings


def run_blocks(
    subjects: Sequence[Subject],
    *,
    rng_seed: int,
    n_blocks: int,
    start_block: int = 0,
    probe: Callable[[], float] | None = None,
    deadline_sec: float | None = None,
    max_repeats: int = MAX_REPEATS,
    max_probe_change: float = MAX_PROBE_CHANGE,
    on_sample: Callable[[Sample], None] | None = None,
    done: Sequence[Sample] = (),
) -> BlockRun:
    """Measures blocks `start_block` to `start_block + n_blocks - 1`, every subject once in each.

    Args:
        subjects: warmed up, of different names. All are paused first and left paused.
        rng_seed: with the block and the names it fixes the order.
        probe: measures the bandwidth in bytes/s (about 15 ms). It runs between the slices, and before the first, with
            every subject asleep; where the two around a slice differ by more than `max_probe_change` the slice is
            repeated, at most `max_repeats` times, and the last one counts. One of more than `MAX_REPEATABLE_SEC` is
            not repeated.
        deadline_sec: the moment of `clock.now()` from which no slice is started.
        on_sample: called with each new sample when it is taken, before anything else happens: put it on
            disk there.
        done: samples of an earlier, killed run; what is there is not measured again.

    A subject that raises `SubjectError` is dropped from here on and listed in `failures`. Anything else
    that is raised (Ctrl-C, a full disk in `on_sample`) goes up, with every subject paused.
    """
    by_name = {subject.name: subject for subject in subjects}
    assert len(by_name) == len(subjects), "two subjects of one name"
    run = BlockRun(samples=list(done))
    taken = {(sample.block, sample.subject) for sample in done}

    latest: float | None = None  # the probe after one slice is the one before the next

    def measure(subject: Subject, block: int, position: int) -> Sample:
        nonlocal latest
        n_repeated = 0
        while True:
            before = probe() if probe and latest is None else latest
            began = clock.now()
            with _awake(subject):
                value_sec = _timed(subject)
            is_long = clock.now() - began > MAX_REPEATABLE_SEC
            latest = after = probe() if probe else None
            if n_repeated == max_repeats or is_long or not _differ(before, after, max_probe_change):
                return Sample(subject.name, block, position, value_sec, before, after, n_repeated)
            n_repeated += 1

    for subject in subjects:
        try:
            subject.pause()
        except SubjectError as error:
            run.failures[subject.name] = error
    for block in range(start_block, start_block + n_blocks):
        for position, name in enumerate(block_order(list(by_name), rng_seed, block)):
            if name in run.failures or (block, name) in taken:
                continue
            if deadline_sec is not None and clock.now() >= deadline_sec:
                return replace(run, is_cut=True)
            try:
                sample = measure(by_name[name], block, position)
            except SubjectError as error:
                run.failures[name] = error
                continue
            if on_sample:
                on_sample(sample)
            run.samples.append(sample)
    return run


@contextlib.contextmanager
def _awake(subject: Subject) -> Iterator[None]:
    try:
        subject.resume()  # inside the try: half resumed is also put back to sleep
        yield
    except SubjectError:
        with contextlib.suppress(SubjectError):  # a dead process cannot be paused either; the first cause counts
            subject.pause()
        raise
    except BaseException:
        subject.pause()
        raise
    subject.pause()


def _timed(subject: Subject) -> float:
    value_sec = subject.sample()
    if not (math.isfinite(value_sec) and value_sec > 0):
        raise SubjectError(f"{subject.name} reports that a unit of work took {value_sec} s")
    return value_sec


def _differ(before: float | None, after: float | None, max_change: float) -> bool:
    if before is None or after is None:
        return False
    return max(before, after) > (1 + max_change) * min(before, after)


class Blocks:
    """The samples of a run, paired by block.

    Where a sample is there twice (a journal put together by hand) the first one counts.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples: dict[tuple[str, int], Sample] = {}
        for sample in samples:
            self.samples.setdefault((sample.subject, sample.block), sample)

    @property
    def subjects(self) -> list[str]:
        """The names, in order of appearance."""
        return list(dict.fromkeys(name for name, _ in self.samples))

    @property
    def n_repeated(self) -> int:
        """Slices thrown away because the bandwidth changed meanwhile: the measure of a restless host."""
        return sum(sample.n_repeated for sample in self.samples.values())

    def values(self, name: str) -> stats.FloatArray:
        """[n] seconds per unit of work of one subject, by block."""
        return np.array([self.samples[name, block].value_sec for block in self._blocks_of(name)])

    def paired(self, baseline: str, variant: str) -> tuple[stats.FloatArray, stats.FloatArray]:
        """([n], [n]) seconds per unit of work over the blocks that hold both."""
        return self._paired(baseline, variant, self._shared_blocks(baseline, variant))

    def ratio(
        self,
        baseline: str,
        variant: str,
        level: float = stats.LEVEL,
        n_draws: int = stats.N_DRAWS,
        seed: int = 0,
    ) -> stats.Interval:
        """`stats.speed_ratio` of the variant: more than 1 is faster."""
        return stats.speed_ratio(*self.paired(baseline, variant), level, n_draws, seed)

    def aa_resolution(self, baseline: str, twin: str, level: float = stats.LEVEL) -> float:
        """The A/A half width: the baseline against its twin, the larger |log bound| (0.01 is one percent).

        Infinite below `stats.MIN_BLOCKS` blocks. `stats.verdict` takes it as `resolution`.
        """
        ratio = self.ratio(baseline, twin, level)
        if ratio.low <= 0:
            return math.inf
        return max(abs(math.log(ratio.low)), abs(math.log(ratio.high)))

    def by_state(self, baseline: str, variant: str, level: float = stats.LEVEL) -> dict[int, stats.Interval] | None:
        """The ratio in each bandwidth state of the host (0 low, 1 high), None where it has no states.

        The states are found over the probes of all subjects. A block counts for a state where all four
        probes of the pair lie in it; one in which the state changed counts for none.
        """
        probed = [
            (key, sample.bandwidth_before, sample.bandwidth_after)
            for key, sample in self.samples.items()
            if sample.bandwidth_before is not None and sample.bandwidth_after is not None
        ]
        labels = stats.bandwidth_states([b for _, b, _ in probed] + [a for _, _, a in probed])
        if labels is None:
            return None
        n = len(probed)
        seen = {key: {labels[i], labels[i + n]} for i, (key, _, _) in enumerate(probed)}
        ratios = {}
        for state in (0, 1):
            blocks = [
                block
                for block in self._shared_blocks(baseline, variant)
                if seen.get((baseline, block)) == {state} == seen.get((variant, block))
            ]
            ratios[state] = stats.speed_ratio(*self._paired(baseline, variant, blocks), level)
        return ratios

    def _blocks_of(self, name: str) -> list[int]:
        return sorted(block for subject, block in self.samples if subject == name)

    def _shared_blocks(self, baseline: str, variant: str) -> list[int]:
        return sorted(set(self._blocks_of(baseline)) & set(self._blocks_of(variant)))

    def _paired(self, baseline: str, variant: str, blocks: Sequence[int]) -> tuple[stats.FloatArray, stats.FloatArray]:
        sides = [[self.samples[name, block].value_sec for block in blocks] for name in (baseline, variant)]
        return np.array(sides[0], dtype=np.float64), np.array(sides[1], dtype=np.float64)
