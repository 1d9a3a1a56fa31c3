"""Real worker processes: the protocol, stopping, and every way in which one can end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paretune.measure.forkserver import ForkedProcess
from paretune.measure.interleave import SubjectError
from paretune.measure.session import TrialProcess
from paretune.model.checkpoint import read_config, resolve
from paretune.recipe import preset

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _pocket() -> Path:
    return resolve("pocket").resolve()


# A worker without PyTorch, so that it starts at once.
MODULE = """
import os, sys, time
from paretune.errors import UsageError
from paretune.measure.worker import serve

def noisy(request):
    print("a library says hello")
    os.write(1, b"and so does its C code\\n")
    sys.stdout.flush()
    return {"value": request["value"]}

def refuse(request):
    raise UsageError("it does not fit", "Choose another")

def bug(request):
    return {"value": 1 / 0}

def memory(request):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 TB")

def leave(request):
    print("the last words", file=sys.stderr, flush=True)
    os._exit(7)

def main():
    serve({
        "noisy": noisy, "refuse": refuse, "bug": bug, "memory": memory, "leave": leave,
        "sample": lambda request: {"sec": 0.5, "kind": request["kind"]},
        "hang": lambda request: time.sleep(600) or {},
    })

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def light_module(tmp_path, monkeypatch):
    (tmp_path / "light_worker.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return "light_worker"


@pytest.fixture(params=["forked", "executed"])
def light(request, tmp_path, light_module):
    """A started light worker; closed at the end."""
    fresh = request.param == "executed"
    process = TrialProcess("light", "tpot", log=tmp_path / "log", module=light_module, fresh=fresh)
    assert isinstance(process._process, subprocess.Popen if fresh else ForkedProcess) and not process.note
    yield process
    process.close()


@pytest.fixture(scope="module")
def pocket_trial(tmp_path_factory):
    """`pocket` under the baseline on one thread, in a real worker, and the answer to `start`."""
    process = TrialProcess("pocket", "tpot", log=tmp_path_factory.mktemp("worker") / "log")
    answer = process.ask(
        "start",
        folder=str(_pocket()),
        recipe=preset("baseline").to_dict(),
        workload={"input_len": 16, "output_len": 4, "batch_size": 2, "seed": 1},
        threads=1,
        check_prompt=list(range(10, 22)),
        kinds=["tpot"],
        warm_sec=0.2,
        side=["ttft", "tpot"],
        timeout_sec=240.0,
    )
    yield process, answer
    process.close()


def state_of(process: TrialProcess) -> str:
    """R, S, D, T (stopped), Z: the field after the name in parentheses."""
    text = Path(f"/proc/{process._process.pid}/stat").read_text()
    return text.rpartition(")")[2].split()[0]


def is_gone(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return text.rpartition(")")[2].split()[0] == "Z"  # dead, and no one has asked for its exit code yet


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_load_answers_with_proof_bytes_and_the_threads_read_back(pocket_trial):
    _, answer = pocket_trial
    assert answer["threads"]["threads"] == 1
    assert any("sdpa attention" in sentence for sentence in answer["proof"])
    assert any("equal the reference" in sentence for sentence in answer["proof"])
    assert answer["load_sec"] > 0 and answer["compile_sec"] == 0
    # 7.1 million parameters in fp32; the table of 1024 positions is not read whole by a step.
    assert 28_000_000 < answer["weights_bytes"] < 29_000_000
    assert answer["weights_bytes"] - answer["step_weights_bytes"] == 1024 * read_config(_pocket()).n_embd * 4
    assert answer["kv_cache_bytes"] == answer["kv_bytes_per_token"] * 20
    assert answer["attention_pattern"] == "causal"
    assert answer["compute_dtype"] == "float32" and answer["notes"] == []


def test_a_start_is_told_in_parts(pocket_trial):
    _, answer = pocket_trial
    parts = answer["start_parts_sec"]
    assert set(parts) == {"load", "convert", "calibrate", "prove", "exact", "memory", "warm"}
    assert all(parts[part] > 0 for part in ("load", "prove", "exact", "memory", "warm")) and parts["calibrate"] >= 0
    assert parts["load"] + parts["convert"] + parts["calibrate"] == pytest.approx(answer["load_sec"])
    assert set(answer["warm"]) == {"tpot"} and answer["warm"]["tpot"]["timings_sec"]
    assert set(answer["side_sec"]) == {"ttft", "tpot"} and min(answer["side_sec"].values()) > 0
    assert answer["memory"]["weights_bytes"] == answer["weights_bytes"]


@pytest.mark.parametrize("kind", ["ttft", "tpot", "throughput"])
def test_samples_are_above_zero(pocket_trial, kind):
    process, _ = pocket_trial
    process.kind = kind
    assert process.sample() > 0


def test_warm_and_memory(pocket_trial):
    process, answer = pocket_trial
    warm = process.ask("warm", kind="tpot", max_sec=0.2)
    assert warm["timings_sec"] and all(t > 0 for t in warm["timings_sec"]) and isinstance(warm["settled"], bool)
    parts = process.ask("memory")
    assert parts["weights_bytes"] == answer["weights_bytes"] < parts["rss_bytes"] <= parts["rss_peak_bytes"]
    assert parts["activation_peak_bytes"] is None or parts["activation_peak_bytes"] >= 0
    # What the server imported is in its memory, as it is in that of a process which imports it itself.
    assert 50_000_000 < parts["shared_bytes"] < parts["rss_bytes"] - 28_000_000


def test_a_bad_request_leaves_the_worker_alive(pocket_trial):
    process, _ = pocket_trial
    with pytest.raises(SubjectError, match="exceed the context"):
        process.ask(
            "load",
            folder=str(_pocket()),
            recipe=preset("baseline").to_dict(),
            workload={"input_len": 2000, "output_len": 4, "batch_size": 1, "seed": 1},
            threads=1,
        )
    assert process.alive


def test_pause_really_stops_the_process_and_resume_wakes_it(light):
    light.kind = "ttft"
    assert light.sample() == 0.5
    light.pause()
    light.pause()  # twice in a row is allowed
    wait_for(lambda: state_of(light) == "T", "the process did not stop")
    light.send("sample", kind="ttft")  # lies in the pipe; nobody works on it
    light.resume()
    wait_for(lambda: state_of(light) != "T", "the process did not wake")
    assert light.receive(30.0)["sec"] == 0.5


def test_what_libraries_print_does_not_garble_the_protocol(light, tmp_path):
    assert [light.ask("noisy", value=i)["value"] for i in range(3)] == [0, 1, 2]
    log = (tmp_path / "log").read_text()
    assert log.count("a library says hello") == log.count("and so does its C code") == 3


@pytest.mark.parametrize(
    ("verb", "reason"),
    [
        ("refuse", "it does not fit. Choose another"),
        ("bug", "ZeroDivisionError: division by zero"),
        ("memory", "can't allocate memory"),
        ("nonsense", "KeyError"),
    ],
)
def test_an_error_is_an_answer_and_the_worker_goes_on(light, verb, reason):
    with pytest.raises(SubjectError, match=reason):
        light.ask(verb)
    assert light.ask("noisy", value=5)["value"] == 5


def test_a_killed_worker_is_an_error_with_its_cause(light):
    light.ask("noisy", value=0)
    light.pause()
    os.kill(light._process.pid, signal.SIGKILL)  # reaches a stopped process too
    with pytest.raises(SubjectError, match="killed"):
        light.sample()
    light.pause()
    light.resume()
    assert not light.alive


def test_a_worker_that_ends_says_its_last_words(light):
    with pytest.raises(SubjectError, match="exit code 7: the last words"):
        light.ask("leave")


def test_a_crash_names_the_signal(light):
    light.ask("noisy", value=0)
    os.kill(light._process.pid, signal.SIGSEGV)
    with pytest.raises(SubjectError, match="SIGSEGV"):
        light.ask("noisy", value=0)


def test_a_hanging_worker_times_out_and_is_ended(light):
    light.ask("noisy", value=0)
    with pytest.raises(SubjectError, match="no answer within"):
        light.ask("hang", timeout_sec=0.3)
    assert not light.alive
    with pytest.raises(SubjectError):
        light.sample()


def test_a_closed_stdin_ends_the_worker(light):
    light.ask("noisy", value=0)
    light._process.stdin.close()
    assert light._process.wait(timeout=30) == 0


def test_close_ends_a_stopped_worker_and_may_come_twice(light):
    light.ask("noisy", value=0)
    light.pause()
    light.close()
    light.close()
    assert not light.alive


@pytest.mark.parametrize("fresh", [False, True])
def test_the_worker_dies_with_its_parent(tmp_path, fresh):
    (tmp_path / "light_worker.py").write_text(MODULE)
    script = (
        "import os\nfrom paretune.measure.session import TrialProcess\n"
        f"p = TrialProcess('x', 'tpot', module='light_worker', fresh={fresh})\np.ask('noisy', value=1)\np.pause()\n"
        "print(p._process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    pid = int(done.stdout.split()[-1])

    wait_for(lambda: is_gone(pid), f"worker {pid} outlived its parent")
