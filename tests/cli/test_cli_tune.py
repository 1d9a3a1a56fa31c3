"""`paretune tune` as it is typed: exit codes, one line for what is wrong, and nothing of the user's is touched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from made_tune import make_result
from paretune import hardware
from paretune.__main__ import main
from paretune.hardware import DtypeSupport
from paretune.records.tune import TuneGoal

OURS = {"events.jsonl": "{}\n", "samples.jsonl": "", "plan.json": "{}", "report.html": "old", "trials.jsonl": ""}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is measured here; a search that starts anyway fails the test."""
    good = {d: DtypeSupport(True, False, 1.0, 1.0, "good") for d in ("fp32", "bf16", "fp16")}
    monkeypatch.setattr(hardware, "dtype_support", lambda device="cpu": good)
    monkeypatch.setattr(hardware, "dtype_failure", lambda name, device="cpu": None)
    monkeypatch.setattr("paretune.native_build.compiler", lambda: "c++")

    def no_run(self):
        raise AssertionError("the search was started")

    monkeypatch.setattr("paretune.tune.search.Search.run", no_run)


@pytest.fixture
def tune(monkeypatch, capsys):
    """`tune(arguments...) -> (exit code, stdout, lines of stderr)`."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["paretune", "tune", *map(str, arguments)])
        code = main()
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return call


def assert_line(answer, code, *words):
    got, out, err = answer
    assert got == code, (got, err)
    assert len(err) == 1 and "error: " in err[0], err
    assert not out
    for word in words:
        assert word in err[0], err[0]


def test_dry_run_shows_the_space_and_measures_nothing(tune, tmp_path):
    code, out, err = tune("pocket", "--dry-run", "-o", tmp_path / "plan")
    lines = out.splitlines()
    assert code == 0 and not err
    assert lines[0] == "baseline: sdpa, eager" and lines[1] == "115 candidates:"
    names = [line.strip() for line in lines[2:117]]
    assert len(set(names)) == 115 and "sdpa + bf16 + int8, compile(default)" in names
    assert "Nothing was measured" in lines[-1] and "300 s" in lines[-1]
    assert not (tmp_path / "plan").exists()


def test_dry_run_says_what_cannot_run_here(tune, monkeypatch):
    monkeypatch.setenv("PARETUNE_NO_COMPILER", "1")  # what was compiled before is not taken either
    monkeypatch.setattr("paretune.native_build.compiler", lambda: None)
    code, out, _ = tune("pocket", "--dry-run")
    assert code == 0 and "17 candidates:" in out
    assert f"{222 + 24 + 19 + 4} left out" in out and "PARETUNE_NO_COMPILER" in out
    reasons = [line.rpartition(": ")[2] for line in out.partition("left out")[2].splitlines()[1:-1]]
    assert len(reasons) == len(set(reasons)) and " more: " in out  # each once


def test_dry_run_counts_mechanisms_for_long_requests(tune):
    code, out, _ = tune("pocket", "--dry-run", "--input-len", "480")
    assert code == 0 and "139 candidates:" in out and "  window:256 + sdpa + int4-g32, native" in out
    code, out, _ = tune("pocket", "--dry-run")
    assert "115 candidates:" in out and "skips nothing in a request of 160 tokens" in out


def test_dry_run_announces_the_peers_and_their_time(tune):
    code, out, err = tune("pocket", "--dry-run", "--engine", "paretune,llama.cpp:q8_0", "--objective", "size")
    assert code == 0 and not err
    assert "engine llama.cpp:Q8_0: " in out and "45 s of timing on top of the budget" in out
    assert "time per output token only, not in size" in out
    assert "engine" not in tune("pocket", "--dry-run")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--objective", "latency"], ["latency", "tpot", "size"]),
        (["--max-ppl-increase", "lots"], ["lots", "1%"]),
        (["--max-ppl-increase=-1%"], ["-1%"]),
        (["--budget", "soon"], ["soon", "5m"]),
        (["--budget", "0s"], ["0s"]),
        (["--min-speedup", "0"], ["min-speedup"]),
        (["--min-speedup", "inf"], ["min-speedup"]),
        (["--min-speedup", "nan"], ["min-speedup"]),
        (["--input-len", "0"], ["--input-len"]),
        (["--output-len", "0"], ["--output-len"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--input-len", "1000", "--output-len", "100"], ["1000", "100", "context of 1024"]),
        (["--threads", "0"], ["threads"]),
        (["--device", "tpu"], ["tpu"]),
        (["--bogus"], ["--bogus"]),
        (["--text", "absent.txt"], ["absent.txt"]),
        (["--engine", "lama.cpp"], ["unknown engine 'lama.cpp'", "'llama.cpp'?"]),
        (["--engine", "llama.cpp:Q9"], ["'Q9'", "llama.cpp:Q8_0"]),
        (["--engine", "paretune:int8"], ["'paretune:int8'", "searched"]),
        (["--engine", ""], ["--engine is empty"]),
        (["--engine", "openvino", "--device", "cuda"], ["on the CPU", "--device cpu"]),
    ],
    ids=lambda v: "".join(v) if isinstance(v, list) else None,
)
def test_bad_input_is_one_line_and_leaves_no_folder(tune, tmp_path, arguments, words):
    folder = tmp_path / "plan"
    assert_line(tune("pocket", "-o", folder, *arguments), 2, *words)
    assert not folder.exists(), "a refused command leaves nothing behind"


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_dry_run_on_a_device_that_is_not_there(tune, monkeypatch, device):
    if device == "cuda" and hardware.has_cuda():
        pytest.skip("there is one")
    assert_line(tune("pocket", "--dry-run", "--device", device), 2, device)


def test_an_unknown_model(tune, tmp_path):
    code, _, err = tune(tmp_path / "absent", "-o", tmp_path / "plan")
    assert code in (1, 2) and len(err) == 1 and "absent" in err[0]
    assert not (tmp_path / "plan").exists()


def test_a_text_too_short(tune, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("A short text. " * 50, "utf-8")
    assert_line(tune("pocket", "-o", tmp_path / "plan", "--text", text), 1, "windows", "--text", "tokens")
    assert not (tmp_path / "plan" / "plan.json").exists()


def test_an_empty_text(tune, tmp_path):
    text = tmp_path / "empty.txt"
    text.write_text(" \n", "utf-8")
    assert_line(tune("pocket", "-o", tmp_path / "plan", "--text", text), 2, "empty")


def test_an_output_folder_under_a_file(tune, tmp_path):
    (tmp_path / "file").write_text("mine", "utf-8")
    assert_line(tune("pocket", "-o", tmp_path / "file" / "plan"), 1, "cannot write", "is a file")
    assert_line(tune("pocket", "-o", tmp_path / "file"), 1, "cannot write", "file")
    assert_line(tune("pocket", "-o", tmp_path / "file", "--force"), 1, "cannot write", "file")
    assert (tmp_path / "file").read_text("utf-8") == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_folder(tune, tmp_path):
    folder = tmp_path / "plan"
    folder.mkdir(mode=0o555)
    assert_line(tune("pocket", "-o", folder), 1, "cannot write", "permission")


def test_a_read_only_file_system(tune, tmp_path):
    if not os.path.isdir("/proc/self"):
        pytest.skip("no such place here")
    code, _, err = tune("pocket", "-o", "/proc/plan")
    assert code == 1 and len(err) == 1 and "cannot write /proc/plan" in err[0]


def test_an_earlier_run_is_not_touched_without_force_or_resume(tune, tmp_path):
    for name, text in OURS.items():
        (tmp_path / name).write_text(text, "utf-8")
    assert_line(tune("pocket", "-o", tmp_path), 2, str(tmp_path), "--resume", "--force")
    assert {p.name: p.read_text("utf-8") for p in tmp_path.iterdir()} == OURS


def test_resume_of_nothing(tune, tmp_path):
    assert_line(tune("pocket", "-o", tmp_path / "absent", "--resume"), 2, "no run to continue", "--resume")
    assert not (tmp_path / "absent").exists()


def test_resume_and_force_contradict_each_other(tune, tmp_path):
    for name, text in OURS.items():
        (tmp_path / name).write_text(text, "utf-8")
    assert_line(tune("pocket", "-o", tmp_path, "--resume", "--force"), 2, "--resume", "--force")
    assert {p.name: p.read_text("utf-8") for p in tmp_path.iterdir()} == OURS


def test_force_takes_only_what_tune_wrote(tune, tmp_path):
    for name, text in OURS.items():
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "notes.txt").write_text("mine", "utf-8")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("mine", "utf-8")
    code, _, err = tune("pocket", "-o", tmp_path, "--force")
    assert "the search was started" in err[-1] and code == 1
    assert (tmp_path / "notes.txt").read_text("utf-8") == "mine"
    assert (tmp_path / "books" / "one.txt").read_text("utf-8") == "mine"
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("name", ["model", "logs", "scores"])
def test_force_takes_no_folder_of_the_user_that_has_a_name_of_ours(tune, tmp_path, name):
    """`-o .` in a project of the user's own: its `model/` is not ours, for there was no run here."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.bin").write_text("mine", "utf-8")
    tune("pocket", "-o", tmp_path, "--force")
    assert (tmp_path / name / "mine.bin").read_text("utf-8") == "mine"


@pytest.mark.parametrize(
    "arguments", [["absent-model"], ["pocket", "--input-len", "5000"], ["pocket", "--text", "no.txt"]]
)
def test_force_with_a_mistake_in_the_command_keeps_the_earlier_plan(tune, tmp_path, arguments):
    for name, text in OURS.items():
        (tmp_path / name).write_text(text, "utf-8")
    code, _, err = tune(*arguments, "-o", tmp_path, "--force")
    assert code in (1, 2) and len(err) == 1
    assert {n: (tmp_path / n).read_text("utf-8") for n in OURS if (tmp_path / n).exists()} == OURS


def test_the_exit_codes_of_the_outcomes(tune, tmp_path, monkeypatch):
    """Through the real command, with the search made up."""
    monkeypatch.setattr("paretune.tune.search.Search.run", lambda self: None)
    for outcome, winner, verdict, expected in [
        ("winner", "t2", ["it is faster"], 0),
        ("baseline", None, ["keep it"], 0),
        ("none", None, ["No recipe reaches the requested speed-up."], 3),
        ("baseline", None, ["this machine is too noisy now to judge anything."], 5),
        ("interrupted", None, [], 130),
    ]:
        goal, about = TuneGoal(min_speedup=3.0), {"winner_id": winner, "verdict": verdict, "too_noisy": expected == 5}
        result = make_result(outcome=outcome, goal=goal, **about)
        monkeypatch.setattr("paretune.tune.result.write", lambda out, folder, result=result: result)
        folder = tmp_path / f"plan-{outcome}-{expected}"
        code, out, err = tune("pocket", "-o", folder, "-q", "--json")
        assert code == expected
        assert json.loads(out)["outcome"] == outcome  # the answer is printed whatever the code
        assert len(err) == (1 if expected else 0), err


# -- the real thing


@pytest.mark.slow
def test_a_real_run_killed_and_resumed_gives_a_plan_that_generates(tmp_path):
    folder = tmp_path / "plan"
    command = [sys.executable, "-m", "paretune"]
    tune = [*command, "tune", "pocket", "--budget", "60s", "-o", str(folder)]
    first = subprocess.Popen(tune, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    events, samples = folder / "events.jsonl", folder / "samples.jsonl"
    started = time.monotonic()
    while first.poll() is None and time.monotonic() - started < 120:  # until it has something to lose
        if samples.is_file() and samples.read_bytes().count(b"\n") >= 10:
            break
        time.sleep(0.1)
    assert first.poll() is None, first.communicate()
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=30)
    assert events.is_file() and not (folder / "plan.json").exists()
    kept = b"".join(line for line in samples.read_bytes().splitlines(keepends=True) if line.endswith(b"\n"))
    second = subprocess.run([*tune, "--resume"], capture_output=True, text=True, timeout=280)
    assert second.returncode in (0, 5), second.stderr
    whole = samples.read_bytes()
    assert whole.startswith(kept)
    atoms = [(s["block"], s["subject"]) for s in map(json.loads, whole.splitlines())]
    assert len(set(atoms)) == len(atoms) >= kept.count(b"\n")
    for name in ("plan.json", "report.html", "report.json", "trials.jsonl"):
        assert (folder / name).stat().st_size > 0
    assert not list(folder.rglob("*.tmp"))
    say = [*command, "generate", str(folder), "--prompt", "The old man", "--max-new-tokens", "8"]
    answer = subprocess.run(say, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    shutil.rmtree(folder)


def test_dry_run_announces_the_grid_of_regimes_and_its_time(tune):
    code, out, err = tune("pocket", "--dry-run", "--regimes", "auto")
    assert code == 0 and not err
    assert "a choice by regime: batch 1, 8 x 128, 512, 1024 tokens: up to 150 s of timing on top of the budget" in out
    assert "regime" not in tune("pocket", "--dry-run")[1]
    assert_line(tune("pocket", "--dry-run", "--regimes", "1x4096"), 2, "4096", "1024")
    assert_line(tune("pocket", "--regimes", "many"), 2, "--regimes", "1,8x128,1024")
