"""The whole job of `paretune tune`, for the command line and for Python: folder, search, files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from paretune.engine.plan import PLAN_FILE
from paretune.errors import UsageError
from paretune.files import ensure_folder, write_error
from paretune.model import checkpoint
from paretune.records.tune import TuneResult
from paretune.tune import peers, regimes
from paretune.tune import result as results
from paretune.tune.goal import Goal
from paretune.tune.journal import EVENTS, SAMPLES
from paretune.tune.race import REFERENCES
from paretune.tune.search import Search

REPORTS = ("trials.jsonl", PLAN_FILE, "report.json", "report.html")
OURS = (EVENTS, SAMPLES, *REPORTS, peers.SAMPLES, regimes.SAMPLES, "logs", "scores", REFERENCES, "model")


def run(
    model: str,
    goal: Goal,
    folder: Path,
    *,
    text: Path | None = None,
    resume: bool = False,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> TuneResult:
    """Searches and writes a plan into `folder`.

    Args:
        text: file to evaluate on; None takes the project's own pieces.
        resume: continue the run in `folder`.
        force: replace it.
        say: progress, a line at a time.

    Returns:
        what `report.json` holds.

    Raises:
        UsageError: `folder` holds an earlier run and neither was asked for, or both; or the request is impossible.
    """
    if resume and force:
        raise UsageError("--resume and --force contradict each other", "Pass one of them")
    folder = folder.expanduser()
    _refuse_earlier_run(folder, resume, force)

    if goal.regimes:
        regimes.grid_of(goal, checkpoint.read_config(checkpoint.resolve(model)).longest)  # refused now, not at the end

    def prepare() -> None:  # when the model, the goal and the text are known to be right
        if force:
            _remove_earlier_run(folder)
        ensure_folder(folder)

    search = Search(model, goal, folder, text=text, resume=resume, say=say, prepare=prepare)
    for name, cause in peers.missing(goal).items():
        say(f"{name} will not be compared: {cause}")
    try:
        out = search.run()
        say("writing the report")
        result = results.write(out, folder)  # whatever happens after it, there is a plan
        if goal.regimes or goal.engines:
            search.journal.stop_clock()
        if goal.regimes:
            out.regimes = regimes.explore(out, folder, say)
            say("writing the report again, with the choice by regime")
            result = results.write(out, folder, is_stored=True)
        if goal.engines:
            out.peers = peers.compare(out, folder, say, windows=search.windows["confirm"])
            say("writing the report again, with the peers")
            result = results.write(out, folder, is_stored=True)
        return result
    finally:
        search.journal.close()


def _refuse_earlier_run(folder: Path, resume: bool, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise write_error(folder, NotADirectoryError(20, "it is a file"))
    if not (resume or force) and any((folder / name).exists() for name in OURS):
        raise UsageError(
            f"{folder} holds an earlier run", "Pass --resume to continue it, --force to replace it, or another -o"
        )
    if resume and not (folder / EVENTS).is_file():
        raise UsageError(f"{folder} holds no run to continue", "Leave out --resume")


def _remove_earlier_run(folder: Path) -> None:
    """Only what `tune` itself wrote: a folder of one of its names beside no run is the user's own."""
    was_run = any((folder / name).is_file() for name in (EVENTS, PLAN_FILE))
    try:
        for path in [folder / name for name in OURS if (folder / name).exists()]:
            if not path.is_dir():
                path.unlink()
            elif was_run:
                shutil.rmtree(path)
    except OSError as error:
        raise write_error(folder, error) from None
