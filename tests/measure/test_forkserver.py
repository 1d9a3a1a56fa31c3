"""Trials forked from a server: what they share, what is theirs alone, and every way in which the server can end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest

from paretune.measure import forkserver, session
from paretune.measure.forkserver import ForkedProcess
from paretune.measure.interleave import SubjectError
from paretune.measure.session import LOST, TrialProcess

pytestmark = pytest.mark.skipif(not forkserver.is_possible(), reason="nothing is forked on this system")

# Says what it is. `preload` counts how often it ran; state changed by one trial must not be seen by another.
MODULE = """
import os, sys, threading
from paretune import process
loads = []

def preload():
    loads.append(os.getpid())
    {preload}

def about(request):
    loads.append("mine")
    return {{
        "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0), "loads": loads, "cwd": os.getcwd(),
        "variables": {{key: value for key, value in os.environ.items() if key.startswith(("PLUM", "OPENBLAS"))}},
        "files": sorted(os.readlink(f"/proc/self/fd/{{fd}}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2 and
                        os.path.exists(f"/proc/self/fd/{{fd}}")),
        "threads": len(os.listdir("/proc/self/task")),
    }}

def main():
    print("started", file=sys.stderr, flush=True)
    process.serve({{"about": about, "raise": lambda request: sys.exit("a last word")}}, ())
"""


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """Starts trials of a worker; all are closed at the end. `fork.worker(preload)` writes the worker first."""
    monkeypatch.setattr(session, "_fork", session._Server())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    processes: list[TrialProcess] = []

    def start(preload: str = "pass", **options) -> TrialProcess:
        (tmp_path / "fork_worker.py").write_text(MODULE.format(preload=preload))
        log = tmp_path / f"{len(processes)}.log"
        processes.append(TrialProcess(f"t{len(processes)}", "tpot", log=log, module="fork_worker", **options))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


def test_trials_share_what_was_imported_and_nothing_that_they_did(fork):
    first, second = (fork().ask("about") for _ in range(2))
    server = session._fork.server.pid
    assert first["parent"] == second["parent"] == server and first["pid"] != second["pid"]
    # Each fork makes sure of the imports; neither sees what the other appended.
    assert first["loads"] == [server, "mine"] and second["loads"] == [server, server, "mine"]
    assert first["session"] == first["pid"], "Ctrl-C in the terminal would reach it"


def test_no_descriptor_of_another_trial_is_held(fork):
    """A pipe that a second process held open would never end."""
    first = fork()
    first.ask("about")
    second = fork().ask("about")
    assert [f for f in second["files"] if not f.startswith(("pipe:", "/dev/null", "/proc"))] == []
    # Its own: the copy of standard output that answers go through.
    assert len([f for f in second["files"] if f.startswith("pipe:")]) == 1
    first.close()
    assert first._process.poll() == -signal.SIGKILL


def test_a_trial_has_the_directory_and_the_variables_of_its_parent_now(fork, tmp_path, monkeypatch):
    first = fork()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLUM", "blue")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    second = fork(environment={"PLUM_2": "red"})
    assert second.ask("about")["parent"] == first.ask("about")["parent"]
    told = second.ask("about")
    assert (told["cwd"], told["variables"]) == (str(tmp_path), {"PLUM": "blue", "PLUM_2": "red"})


def test_what_is_read_at_import_makes_a_new_server(fork, monkeypatch):
    first = fork()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    second = fork()
    assert second.ask("about")["parent"] != first.ask("about")["parent"], "the older one still serves its trial"


def test_its_log_is_its_own(fork, tmp_path):
    for _ in range(2):
        fork().ask("about")
    assert [(tmp_path / f"{i}.log").read_text() for i in range(2)] == ["started\n"] * 2


def test_a_worker_that_leaves_says_its_last_words(fork, tmp_path):
    process = fork()
    with pytest.raises(SubjectError, match="exit code 1"):
        process.ask("raise")
    assert process._process.wait(10.0) == 1


def test_a_thread_in_the_server_means_no_fork(fork, capsys):
    """A forked process would have none of its threads, and could wait for them for ever."""
    process = fork("threading.Thread(target=threading.Event().wait, daemon=True).start()")
    assert not isinstance(process._process, ForkedProcess)
    assert "fork_worker starts 1 threads when it is imported" in process.note and "newly executed" in process.note
    assert fork().note == "", "said once"


def test_the_server_that_is_gone_before_a_fork_is_told_and_trials_are_executed(fork):
    forked = fork()
    os.kill(session._fork.server.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while session._fork.server._process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process = fork()
    assert "ended with SIGKILL" in process.note and "\n" not in process.note
    assert process._process.wait is not None and not isinstance(process._process, ForkedProcess)
    with pytest.raises(SubjectError) as error:
        forked.ask("about")
    assert error.value.kind == LOST and not forked.alive


def test_trials_go_with_the_server_stopped_or_not(fork):
    process = fork()
    pid = process.ask("about")["pid"]
    process.pause()
    os.kill(session._fork.server.pid, signal.SIGKILL)
    with pytest.raises(SubjectError, match="the server that forks trials ended") as error:
        process.ask("about")
    assert error.value.kind == LOST
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_server_that_cannot_be_started_is_no_end(fork, monkeypatch):
    import subprocess

    real = subprocess.Popen

    def popen(command, **options):
        if forkserver.__name__ in command:
            raise FileNotFoundError(2, "No such file or directory")
        return real(command, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    process = fork()
    assert "could not be started: No such file" in process.note


def test_what_a_worker_needs_is_imported_without_threads(fork):
    """The real workers, on the real libraries: one thread, and modules that a trial would wait seconds for."""
    script = (
        "import json, os, sys\n"
        "import paretune.measure.worker, paretune.tune.worker, paretune.train.worker\n"
        "for module in (paretune.measure.worker, paretune.tune.worker, paretune.train.worker): module.preload()\n"
        "names = ['torch', 'paretune.engine.exact', 'paretune.evaluate.fidelity',\n"
        "         'paretune.engine.runners.native', 'paretune.transforms.gptq',\n"
        "         'paretune.model.families.llama.model']\n"
        "missing = [n for n in names if n not in sys.modules]\n"
        # As long an import again as all else, for the few trials that compile.
        "print(json.dumps([len(os.listdir('/proc/self/task')), missing, 'torch._dynamo' in sys.modules]))\n"
    )
    import subprocess

    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=240)
    assert json.loads(done.stdout) == [1, [], False], done.stderr


def test_imports_are_waited_for_before_anything_is_measured(fork, tmp_path):
    """`prepare` comes back at once, `settle` when the module is there; what fails shows when a trial is started."""
    fork("import time; time.sleep(1.0); open(__file__ + '.done', 'w').close()").close()
    (tmp_path / "fork_worker.py.done").unlink()
    before = time.monotonic()
    session.prepare("fork_worker")
    assert time.monotonic() - before < 0.9 and not (tmp_path / "fork_worker.py.done").exists()
    session.settle("fork_worker")
    assert (tmp_path / "fork_worker.py.done").exists()
    with pytest.raises(forkserver.ForkFailed, match="ModuleNotFoundError: No module named 'no_such_worker'"):
        session._fork.server.settle("no_such_worker")
    session.settle("no_such_worker")


def test_bench_waits_for_the_imports_before_its_first_trial(monkeypatch, pocket_folder):
    from paretune.measure import bench
    from paretune.recipe import preset

    done = []
    monkeypatch.setattr(session, "prepare", lambda: done.append("prepare"))
    monkeypatch.setattr(session, "settle", lambda: done.append("settle"))
    monkeypatch.setattr(bench.Run, "run", lambda run, cells: done.append("run"))
    monkeypatch.setattr(bench.Run, "known_ceilings", lambda run: done.append("ceilings"))
    bench.bench(pocket_folder, [("baseline", preset("baseline"))])
    assert done == ["prepare", "settle", "run", "ceilings"]


def test_a_server_that_is_stopped_ends_with_its_parent(tmp_path):
    """It cannot read that its socket is at its end, and would stay for ever."""
    import subprocess

    (tmp_path / "fork_worker.py").write_text(MODULE.format(preload="pass"))
    script = (
        "import os, signal, time\n"
        "from paretune.measure import session\n"
        "trial = session.TrialProcess('t', 'tpot', module='fork_worker')\n"
        "pids = [session._fork.server.pid, trial.ask('about')['pid']]\n"
        "for pid in pids: os.kill(pid, signal.SIGSTOP)\n"
        "print(*pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(os.path.exists(f"/proc/{pid}") for pid in pids)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    """Whether there is such a process and it has not ended: one that nobody waits for stays as a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_whose_thread_has_ended_is_replaced(fork):
    """The system ends it with the thread that started it."""
    import threading

    first: list[TrialProcess] = []
    thread = threading.Thread(target=lambda: first.append(fork()))
    thread.start()
    thread.join()
    second = fork()
    assert second.note == "" and isinstance(second._process, ForkedProcess)
    assert second.ask("about")["parent"] == session._fork.server.pid
