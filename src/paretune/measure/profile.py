"""One phase of one recipe, taken apart: by part, by layer, by kernel, against this machine's ceilings, with a trace.

The plain step, the marked step and a doubly marked one run in turns, in blocks with a bandwidth probe around each;
figures are means over the half of the turns whose plain and marked steps stand to each other as most do, in the blocks
of the bandwidth state that most blocks saw. The plain step is the whole that the parts are held against; nothing is
scaled to fit it.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from paretune import hardware
from paretune.engine.load import Loaded, load_recipe
from paretune.errors import ParetuneError
from paretune.measure import environment, explain, profile_facts, profile_native, roofline
from paretune.measure.profile_blocks import time_blocks
from paretune.measure.profile_count import CountingMode, Counts
from paretune.measure.profile_kernels import Kernel, by_class, kernels_of
from paretune.measure.profile_marks import Instrument, Key, Marks, cost_of_a_reading
from paretune.measure.profile_rows import alike_half, layers_of, middle_half, rows_of, seconds_of
from paretune.measure.profile_steps import Phase, Step, check_memory, check_phase
from paretune.measure.profile_trace import record
from paretune.measure.workload import step_weights_bytes
from paretune.model import checkpoint
from paretune.recipe import Recipe
from paretune.records.record import to_json

SHORT_DTYPES = {long: short for short, long in hardware.TORCH_NAMES.items()}
KERNELS, QUICK_KERNELS = (0.3, 50), (0.1, 20)  # least seconds and most steps under the profiler
CLOSES = (0.95, 1.05)  # the sum of the parts over the whole


@contextlib.contextmanager
def _named_kernels(recipe: Recipe, device: str) -> Iterator[None]:
    """While it is open, the compiler writes each CPU kernel's name where a profiler sees it (a setting of the compiler,
    restored at the end)."""
    if not recipe.runner_class.compiled or device != "cpu":
        yield
        return
    from torch._inductor import config

    with config.patch({"cpp.enable_kernel_profile": True}):
        yield


def profile(
    folder: Path,
    recipe: Recipe,
    name: str,
    *,
    phase: Phase = "decode",
    input_len: int = 128,
    batch_size: int = 1,
    device: str = "cpu",
    threads: int | None = None,
    quick: bool = False,
    seed: int = 0,
    with_trace: bool = True,
    ceilings: hardware.Ceilings | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], bytes | None]:
    """Takes one phase apart.

    Args:
        name: of the recipe, for people.
        quick: fewer and shorter blocks.
        ceilings: of this machine, where they were measured already; else they are measured before and after loading.

    Returns:
        strict JSON (the head of a result file, `whole`, `parts`, `layers`, `kernels`, `explanations`, ...), and the
        gzipped trace of one warm step.

    Raises:
        UsageError: the phase is not there or the request does not fit the model.
        ParetuneError: out of memory (before loading).
    """
    check_phase(phase, recipe, name)
    config = checkpoint.read_config(folder)
    check_memory(config, phase, input_len, batch_size, recipe)
    recipe.check(device, config)
    threads_read = hardware.set_threads(recipe.engine.threads or threads)
    header = environment.header(seed=seed)
    are_given = ceilings is not None
    if ceilings is None:
        say("measuring the ceilings of this machine")
        ceilings = hardware.ceilings(device, quick=True)
    say(f"loading {recipe.name}")
    with _named_kernels(recipe, device):
        loaded = load_recipe(folder, recipe, device, check=False)
        watch = profile_facts.BreakCounter()
        step = Step(loaded, phase, input_len, batch_size, seed)
        say(f"warming up {phase}")
        for _ in range(2):
            step.prepare()
            step.run()
    if not are_given:  # again, some seconds later: another program may have taken the machine the first time
        ceilings = ceilings.or_better(hardware.ceilings(device, quick=True))
    result = {
        **header,
        "model": {"name": folder.name, "family": config.family},
        "config": name,
        "recipe": recipe.to_dict(),
        "ceilings": ceilings.to_json(),
        **examine(step, ceilings, threads_read, watch, quick=quick, seed=seed, say=say),
    }
    if not with_trace:
        return result, None
    say("recording one step")
    model = step.model if result["parts"] else None
    native = profile_native.spans(loaded.runner, step)
    return result, record(step.run, step.prepare, model, device, f"{phase} step", native)


def examine(
    step: Step,
    ceilings: hardware.Ceilings,
    threads: dict[str, Any],
    breaks: profile_facts.BreakCounter,
    *,
    quick: bool = False,
    seed: int = 0,
    with_kernels: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Takes a step that is ready and warm apart, and explains it.

    Args:
        threads: what `hardware.set_threads` read back.
        breaks: made before the step ran for the first time.
    """
    loaded, device = step.loaded, step.runner.device.type
    result = {
        "phase": step.phase,
        "input_len": step.input_len,
        "batch_size": step.batch_size,
        "device": device,
        "threads": threads,
        "runner": step.runner.describe(),
        **take_apart(loaded, step, ceilings, quick=quick, seed=seed, with_kernels=with_kernels, say=say),
    }
    result["facts"] = profile_facts.facts(loaded, step, result, breaks)
    known = {"recipe": loaded.recipe.to_dict(), "ceilings": ceilings.to_json()}
    result["explanations"] = [to_json(e) for e in explain.explain(result | known)]
    return result


def take_apart(
    loaded: Loaded,
    step: Step,
    ceilings: hardware.Ceilings,
    *,
    quick: bool = False,
    seed: int = 0,
    with_kernels: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """`whole`, `overhead`, `parts`, `layers`, `closing`, `kernels`, `native`, `notes` of a step that is ready.

    Args:
        with_kernels: False leaves them out: those of a graph that was compiled without names would count as its calls.
    """
    runner, phase = loaded.runner, step.phase
    ceilings = _of_threads(ceilings, torch.get_num_threads())
    device = runner.device.type
    is_training = phase == "train"
    notes: list[str] = []
    dtype = SHORT_DTYPES.get(str(runner.dtype).removeprefix("torch."), "fp32")
    marks: Marks | None = Marks(device, is_training)
    instrument: Instrument | None = Instrument(step.model, marks) if marks else None
    counts = Counts()
    calls: dict[Key, int] = {}
    if runner.compiled:  # a wrapper would be compiled for once more, and break the graph
        marks = instrument = None
        notes.append(_INSIDE.format("a compiled graph"))
    else:
        assert marks is not None and instrument is not None
        counts, calls = _count(step, marks, instrument)
        if len(counts.parts) <= 1:
            marks = instrument = None
            notes.append(_INSIDE.format(f"one call of the {runner.name} runner").replace("kernels", "operations"))
        else:
            notes += [f"{name}: not in this model, its time stands with the part before" for name in instrument.missing]
    say(f"timing {phase}")
    instruments = [] if instrument is None else [instrument]
    if instrument is not None and device == "cpu":
        instruments.append(instrument.around(step.model))
    timed = time_blocks(step, instruments, quick, seed)
    kept, state = timed.kept()
    plain = [sec for block in kept.plain for sec in block]
    marked = [parts_of_step for block in kept.marked for parts_of_step in block]
    quiet = alike_half(plain, [sum(m.values()) for m in marked]) if marked else middle_half(plain)
    plain_sec = statistics.fmean(plain[i] for i in quiet)
    parts: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    overhead = closing = None
    if marks is not None:
        seconds = seconds_of([marked[i] for i in quiet])
        marked_sec = sum(seconds.values())
        cost = alone = 0.0
        if device == "cpu":
            alone = cost_of_a_reading()
            twice = [sec for block in kept.twice for sec in block]
            more = [twice[i] - sum(marked[i].values()) for i in quiet]
            # Few steps on a busy machine show anything: at least an empty module's cost, at most three times as much.
            cost = min(max(statistics.median(more) / instruments[1].marks.n_readings, alone), 3 * alone)
        # Off each part what its own readings cost, as a second set of them showed: never a factor that makes it fit.
        seconds = {key: max(0.0, sec - cost * calls.get(key, 0)) for key, sec in seconds.items()}
        parts = rows_of(seconds, counts, calls, plain_sec, ceilings, dtype, runner.model.family.titles)
        layers = layers_of(seconds)
        total = sum(seconds.values())
        overhead = {
            "marked_sec": marked_sec,
            "share": marked_sec / plain_sec - 1,
            "n_readings": sum(calls.values()),
            "sec_per_reading": cost,
            "alone_sec": alone,
        }
        closing = {
            "sum_sec": total,
            "share": total / plain_sec,
            "between_sec": plain_sec - total,
            "closes": CLOSES[0] <= total / plain_sec <= CLOSES[1],
        }
        if not closing["closes"]:
            notes.append(
                f"the parts add up to {closing['share']:.0%} of the step timed on its own, outside 95 to 105 %: the "
                "machine was busy, or the step is too short for readings; measure again"
            )
    say(f"kernels of {phase}")
    whole = _whole(step, plain_sec, kept.plain, counts, ceilings, dtype)
    native = profile_native.rows(runner, step, whole, ceilings)
    kernels: list[Kernel] = []
    profiled_sec = None
    if with_kernels:
        kernels, profiled_sec = kernels_of(step.run, step.prepare, device, *(QUICK_KERNELS if quick else KERNELS))
    if kernels and runner.own_kernels and not parts:  # the profiler sees nothing of it, which is not a gap
        kernels[-1] = replace(kernels[-1], name="the native runner's own code", kind="native code", count=1)
    return {
        "whole": whole,
        "blocks": {"n": len(timed.plain), "n_kept": len(kept.plain), "state": state, "states": timed.states()},
        "overhead": overhead,
        "closing": closing,
        "parts": parts,
        "layers": layers,
        "kernels": [k.to_json() for k in kernels],
        "kernel_classes": by_class(kernels),
        "profiled_sec": profiled_sec,
        "native": native,
        "notes": notes,
    }


_INSIDE = (
    "the parts of this step are inside {}, where no reading can be taken: see its kernels, or profile the same recipe "
    "with --runner eager"
)


def _of_threads(ceilings: hardware.Ceilings, threads: int) -> hardware.Ceilings:
    """The ceilings of a run on so many threads, where they were measured."""
    rows = tuple(row for row in ceilings.read_bandwidth if row["threads"] == threads)
    return replace(ceilings, read_bandwidth=rows) if rows else ceilings


def _count(step: Step, marks: Marks, instrument: Instrument) -> tuple[Counts, dict[Key, int]]:
    """Operators of one step by part; the marked step must give the plain one's logits, bit by bit."""
    step.prepare()
    expected = step.run() if step.phase != "train" else None
    instrument.install()
    try:
        step.prepare()
        marks.start()
        got = step.run(marks)
        marks.stop()
        calls = marks.counts()
        if expected is not None and not torch.equal(expected, got):
            raise ParetuneError("the marked step gives other logits than the plain one", "Please report it")
        step.prepare()
        mode = CountingMode(lambda: marks.current, step.model, step.cache_tensors)
        with mode:
            marks.start()
            step.run(marks)
            marks.stop()
    finally:
        instrument.remove()
    return mode.counts, calls


def _whole(
    step: Step, sec: float, blocks: list[list[float]], counts: Counts, ceilings: hardware.Ceilings, dtype: str
) -> dict[str, Any]:
    """The plain step: its time, and what it must read and compute at least."""
    config: Any = step.runner.config
    n_bytes: int | None = None
    flops: int | None = None
    sentence, mbu, mfu = None, None, None
    if step.phase != "train":
        kv_per_token = sum(t.nbytes for t in step.cache_tensors) / step.cache.n_slots
        pattern, is_decode = config.attention_pattern, step.phase == "decode"
        # A prompt's keys are all seen by some query; a step's only as far back as the window goes.
        seen = round(roofline.keys_seen(pattern, step.input_len + 1)) if is_decode else step.input_len
        n_bytes = step_weights_bytes(step.model) + round(kv_per_token * seen)
        flops = step.batch_size * (
            roofline.decode_flops(config, seen)
            if is_decode
            else roofline.prefill_flops(config, step.input_len, pattern=pattern)
        )
        bandwidth, rate = ceilings.bandwidth_at(n_bytes), ceilings.matrix_rates.get(dtype)
        sentence = roofline.bound_by(step.phase, sec, n_bytes, flops, bandwidth, rate)[1]
        mbu = roofline.mbu(n_bytes, sec, bandwidth)
        mfu = roofline.mfu(flops, sec, rate) if rate else None
    return {
        "sec": sec,
        "samples": blocks,
        "n_steps": sum(len(b) for b in blocks),
        "tokens_per_sec": step.n_tokens / sec,
        "dtype": dtype,
        "bytes_per_weight": profile_facts.bytes_per_weight(step.model),
        "needed_bytes": n_bytes,
        "needed_flops": flops,
        "counted_bytes": counts.total().n_bytes or None,
        "counted_flops": counts.total().flops or None,
        "mbu": mbu,
        "mfu": mfu,
        "bound_by": sentence,
    }
