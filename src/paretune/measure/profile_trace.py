"""One warm step as a trace that Chrome (chrome://tracing) and Perfetto open: gzipped JSON in the Trace Event format.

Module names are ranges around the operators they call. A trace is bounded: beyond `MAX_EVENTS` the shortest operators
are left out and the file says how many.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from paretune import files
from paretune.errors import ParetuneError
from paretune.ops.weights.base import Weight

MAX_EVENTS = 100_000
_NATIVE_LANE = 1_000_000_000  # above the numbers that systems give threads
_RANGES = ("user_annotation", "gpu_user_annotation")
# What PyTorch writes beside the events and a reader needs; the rest names the machine and its paths.
_KEPT_KEYS = ("schemaVersion", "displayTimeUnit")
_FLOWS = {"s", "t", "f"}  # arrows: from a launch to its kernel, from a forward pass to its backward
_PHASES = {"X", "M", "i", *_FLOWS}


@contextlib.contextmanager
def module_ranges(model: nn.Module) -> Iterator[None]:
    """While it is open, each module's forward is a range under its name."""
    handles = []
    opened: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            opened.append(record_function(name))
            opened[-1].__enter__()

        return hook

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        opened.pop().__exit__(None, None, None)

    try:
        for name, module in model.named_modules():
            if isinstance(module, Weight | nn.ModuleList):  # a weight is called by its layer, not as a module
                continue
            handles.append(module.register_forward_pre_hook(enter(name or type(model).__name__)))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(
    run: Callable[[], Any],
    prepare: Callable[[], Any],
    model: nn.Module | None,
    device: str,
    name: str,
    native: Sequence[tuple[str, float]] = (),
) -> bytes:
    """A gzipped trace of one step, `name` the range around it all.

    Args:
        model: None: no ranges for modules.
        native: operations of the native runner with their seconds, in their order: a lane of its own.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.startswith("cuda") else [])
    with module_ranges(model) if model is not None else contextlib.nullcontext():
        with profile(activities=activities):  # what a profiler sets up at its first use is not in the trace
            prepare()
            run()
        prepare()
        with profile(activities=activities) as watched, record_function(name):
            run()
    with tempfile.TemporaryDirectory(prefix="paretune-trace-") as scratch:
        path = Path(scratch) / "trace.json"
        watched.export_chrome_trace(str(path))
        raw = json.loads(path.read_text("utf-8"))
    raw["traceEvents"] = [*raw.get("traceEvents", ()), *native_lane(raw.get("traceEvents", ()), name, native)]
    # A fixed time stamp: the same trace gives the same bytes.
    return gzip.compress(json.dumps(bounded(raw), separators=(",", ":")).encode(), mtime=0)


def native_lane(
    events: Sequence[Mapping[str, Any]], name: str, native: Sequence[tuple[str, float]]
) -> list[dict[str, Any]]:
    """The native runner's operations as ranges: PyTorch's profiler sees nothing of them.

    Their durations are those of the runner's own counters in another step; they are laid end to end from where the
    range `name` begins, since counters know no starting times.
    """
    outer = next((e for e in events if e.get("ph") == "X" and e.get("name") == name), None)
    if not native or outer is None:
        return []
    lane = {"pid": outer["pid"], "tid": _NATIVE_LANE}
    title = "native operations (from counters, laid end to end)"
    out: list[dict[str, Any]] = [{"ph": "M", "name": "thread_name", "ts": 0, **lane, "args": {"name": title}}]
    at = float(outer["ts"])
    for operation, sec in native:
        out.append({"ph": "X", "cat": _RANGES[0], "name": operation, "ts": at, "dur": 1e6 * sec, **lane})
        at += 1e6 * sec
    return out


def bounded(raw: dict[str, Any], max_events: int = MAX_EVENTS) -> dict[str, Any]:
    """The trace without what names the machine, at most `max_events` events: ranges first, then the longest."""
    events = [e for e in raw.get("traceEvents", ()) if e.get("ph") in _PHASES]
    for event in events:
        if event.get("name") in ("process_name", "process_labels") and "name" in event.get("args", {}):
            event["args"]["name"] = "python"
    n_left = max(0, len(events) - max_events)
    if n_left:
        first = [e for e in events if e.get("ph") == "M" or e.get("cat") in _RANGES]
        rest = sorted((e for e in events if e.get("ph") == "X" and e.get("cat") not in _RANGES), key=_length)
        events = [*first, *rest][:max_events]
    kept = {key: raw[key] for key in _KEPT_KEYS if key in raw}
    return {**kept, "traceEvents": events, "otherData": {"producer": "paretune", "events_left_out": n_left}}


def _length(event: dict[str, Any]) -> float:
    return -float(event.get("dur", 0))


def problems(data: bytes) -> list[str]:
    """What in a gzipped trace breaks the Trace Event format; empty: a viewer opens it.

    Checked: strict JSON (no NaN), an object with a list `traceEvents`; of each event a known phase, a name, a process
    and a thread, numbers where numbers belong; complete events have a duration of 0 or more and, on one thread, lie
    inside or beside each other; arrows have an id; metadata have arguments.
    """

    def no_constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        trace = json.loads(gzip.decompress(data), parse_constant=no_constant)
    except (OSError, EOFError, ValueError) as error:
        return [f"not gzipped JSON ({error})"]
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(events, list) or not events:
        return ["no list of traceEvents"]
    bad = []
    lanes: dict[tuple[Any, Any], list[tuple[float, float, str]]] = {}
    for i, event in enumerate(events):
        phase = event.get("ph")
        if phase not in _PHASES:
            bad.append(f"event {i}: phase {phase!r}")
        elif not isinstance(event.get("name"), str):
            bad.append(f"event {i}: no name")
        elif "pid" not in event or "tid" not in event:
            bad.append(f"event {i}: no process or thread")
        elif phase == "M":
            if not isinstance(event.get("args"), dict):
                bad.append(f"event {i}: metadata without arguments")
        elif not isinstance(event.get("ts"), int | float):
            bad.append(f"event {i}: time stamp {event.get('ts')!r}")
        elif phase in _FLOWS:
            if "id" not in event:
                bad.append(f"event {i}: an arrow without an id")
        elif phase == "X":
            start, length = event["ts"], event.get("dur")
            if not isinstance(length, int | float) or length < 0:
                bad.append(f"event {i}: duration {length!r}")
            else:
                lanes.setdefault((event["pid"], event["tid"]), []).append((start, -length, event["name"]))
    for lane in lanes.values():
        ends: list[float] = []
        for start, minus_length, name in sorted(lane):
            end = start - minus_length
            while ends and ends[-1] <= start + 0.002:  # time stamps are rounded to nanoseconds
                ends.pop()
            if ends and end > ends[-1] + 0.002:
                bad.append(f"{name} at {start} ends after what it lies in")
            ends.append(end)
    return bad


def write(folder: Path, name: str, data: bytes) -> Path:
    """Writes `NAME.json.gz` after a check of its form.

    Raises:
        ParetuneError: it is not a trace, or the folder cannot be written.
    """
    wrong = problems(data)
    if wrong:
        raise ParetuneError(f"the trace {name} is not valid: {wrong[0]}", "Please report it")
    path = folder / f"{name}.json.gz"
    files.write_bytes(path, data)
    return path
