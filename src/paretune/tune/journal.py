"""What has happened, on disk the moment it happens: a killed run goes on without loss or repetition.

`samples.jsonl` holds finished samples, `events.jsonl` everything else. A line is written whole and flushed; a last line
that a kill cut in two is dropped on reading.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paretune import clock
from paretune.errors import UsageError
from paretune.files import write_error
from paretune.measure.interleave import Sample

EVENTS, SAMPLES = "events.jsonl", "samples.jsonl"


class Journal:
    """The record of one `tune` run.

    Args:
        folder: where the files lie.
        key: what the run is about (model, goal, baseline); a resumed run must have the same.
        resume: continue what is there.

    Raises:
        UsageError: `resume` and the folder belongs to another run.
    """

    def __init__(self, folder: Path, key: dict[str, Any], resume: bool) -> None:
        self.folder = folder
        self.events: list[dict[str, Any]] = _read_lines(folder / EVENTS) if resume else []
        self.samples: list[Sample] = []
        # Without a head nobody knows whose samples they are.
        sample_lines = _read_lines(folder / SAMPLES) if self.events else []
        self.samples = [Sample.from_json(line) for line in sample_lines]
        plain = json.loads(json.dumps(key))
        if self.events and self.events[0].get("key") != plain:
            raise UsageError(
                f"{folder} holds another run (its model, goal, engines or version differ)",
                "Use the same flags, or --force",
            )
        # What an earlier run has used of the budget.
        self.used_sec = max((line.get("elapsed_sec", 0.0) for line in (*self.events, *sample_lines)), default=0.0)
        self._started: float | None = None
        try:
            for name, lines in ((EVENTS, self.events), (SAMPLES, sample_lines)):
                # Written again from what was read: a line cut in two by the kill is gone from the file too.
                text = "".join(json.dumps(line) + "\n" for line in lines)
                temporary = folder / f".{name}.{os.getpid()}.tmp"
                temporary.write_text(text, "utf-8")
                os.replace(temporary, folder / name)
            self._event_file = open(folder / EVENTS, "a", encoding="utf-8")  # noqa: SIM115 - closed in `close`
            self._sample_file = open(folder / SAMPLES, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise write_error(folder, error) from None
        if not self.events:
            self.record("begin", key=plain)

    @property
    def elapsed_sec(self) -> float:
        """Seconds of the budget that are gone, earlier runs included."""
        return self.used_sec + (0.0 if self._started is None else clock.now() - self._started)

    def start_clock(self) -> None:
        """From here on the budget is used up: the limits of the machine and the baseline are its precondition."""
        self._started = clock.now()

    def stop_clock(self) -> None:
        """What follows is not of the budget."""
        self.used_sec, self._started = self.elapsed_sec, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is not of the budget: an earlier run has paid for it."""
        used_sec, is_running = self.elapsed_sec, self._started is not None
        self.used_sec, self._started = used_sec, None
        try:
            yield
        finally:
            if is_running:
                self.start_clock()

    def record(self, event: str, **data: Any) -> dict[str, Any]:
        """Appends an event."""
        line = {"event": event, **data, "elapsed_sec": round(self.elapsed_sec, 3)}
        self.events.append(line)
        self._append(self._event_file, line)
        return line

    def add_sample(self, sample: Sample) -> None:
        self.samples.append(sample)
        self._append(self._sample_file, {**sample.to_json(), "elapsed_sec": round(self.elapsed_sec, 3)})

    def find(self, event: str, **match: Any) -> dict[str, Any] | None:
        """The last event of a kind whose fields match."""
        for line in reversed(self.events):
            if line["event"] == event and all(line.get(k) == v for k, v in match.items()):
                return line
        return None

    def all(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.events if line["event"] == event]

    def close(self) -> None:
        for file in (self._event_file, self._sample_file):
            with contextlib.suppress(OSError):  # a full disk was told when the line was written
                file.close()

    def _append(self, file: Any, line: dict[str, Any]) -> None:
        try:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self.folder, error) from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for raw in path.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(raw))
        except (json.JSONDecodeError, UnicodeDecodeError):
            break  # empty end, or the line that the kill cut
    return lines
