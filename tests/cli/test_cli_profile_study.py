"""`paretune profile` and `paretune study` as a user meets them."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

import made_records as made
from paretune import hardware
from paretune.cli.app import run
from paretune.hardware import Ceilings
from paretune.measure import profile as measure
from paretune.measure import profile_blocks, profile_facts, profile_trace

CEILINGS = Ceilings(
    device="cpu",
    kind="native",
    threads=2,
    read_bandwidth=({"bytes": 1 << 28, "threads": 2, "bytes_per_sec": 2e10, "kind": "native", "state": "high"},),
    matrix_rates={"fp32": 1e11},
)


@pytest.fixture
def command(capsys, monkeypatch):
    before = torch.get_num_threads()
    for name, value in (("QUICK_SLICE_SEC", 0.0), ("QUICK_BLOCKS", 1), ("WARM_UP_SEC", 0.0), ("MAX_WARM_UP_SEC", 0.0)):
        monkeypatch.setattr(profile_blocks, name, value)
    monkeypatch.setattr(measure, "QUICK_KERNELS", (0.0, 3))
    monkeypatch.setattr(profile_facts, "_WATCH_SEC", 0.0)
    monkeypatch.setattr(hardware, "BandwidthProbe", lambda threads: lambda: 1e10)
    monkeypatch.setattr(hardware, "ceilings", lambda device="cpu", quick=False: CEILINGS)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    yield call
    torch.set_num_threads(before)


def test_profile_writes_a_report_pictures_and_traces(command, tiny_gpt2_folder, tmp_path):
    out = tmp_path / "out"
    code, text, err = command(
        "profile", str(tiny_gpt2_folder), "--quick", "--input-len", "9", "--config", "eager_attn", "-o", str(out)
    )
    assert code == 0, err
    for word in ("QKV projection", "Residual 2", "Softmax", "Linear output layer", "Kernels", "GEMV", "middle half"):
        assert word in text
    assert "timing decode" in err and "profiler_start" not in err
    names = {
        "report.html",
        "profile.json",
        "profile.md",
        "roofline.png",
        "trace-prefill.json.gz",
        "trace-decode.json.gz",
    }
    assert {p.name for p in out.iterdir()} == names
    for phase in ("prefill", "decode"):
        data = (out / f"trace-{phase}.json.gz").read_bytes()
        assert profile_trace.problems(data) == []
    found = json.loads((out / "profile.json").read_text("utf-8"))
    assert [p["phase"] for p in found["profiles"]] == ["prefill", "decode"]
    page = (out / "report.html").read_text("utf-8")
    assert "Roofline" in page and "Within self-attention" not in page and "Prefill: within self-attention" in page


def test_profile_json_is_json_alone(command, tiny_llama_folder):
    code, text, _ = command(
        "profile", str(tiny_llama_folder), "--phase", "decode", "--quick", "--input-len", "9", "--json", "-q"
    )
    assert code == 0 and json.loads(text)["phase"] == "decode"


def test_profile_of_training(command, tiny_gpt2_folder):
    code, text, _ = command(
        "profile", str(tiny_gpt2_folder), "--phase", "train", "--quick", "--input-len", "9", "--batch-size", "2", "-q"
    )
    assert code == 0 and "Optimiser step" in text and "training" in text


def test_native_profile_says_what_is_not_there(command, tiny_gpt2_folder):
    reason = __import__("paretune.native_build", fromlist=["x"]).unavailable_reason()
    if reason:
        pytest.skip(reason)
    code, text, err = command(
        "profile", str(tiny_gpt2_folder), "--phase", "decode", "--runner", "native", "--quick", "--input-len", "9", "-q"
    )
    assert code == 0, err
    assert "Native operations" in text and "inside one call of the native runner" in text
    assert "native code" in text and "launch gap" not in text and "Python" not in text.partition("##")[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--phase", "think"], "unknown phase 'think'"),
        (["--phase", ","], "--phase is empty"),
        (["--phase", "train", "--config", "int8"], "has no training phase"),
        (["--phase", "train", "--runner", "native"], "its runner is native"),
        (["--runner", "warp"], "unknown runner 'warp'"),
        (["--config", "no_such"], "unknown config 'no_such'"),
        (["--input-len", "0"], "--input-len is 0"),
        (["--input-len", "64"], "exceed the context of 64"),
        (["--threads", "0"], "--threads is 0"),
        (["--device", "tpu"], "there is no device 'tpu'"),
        (["--device-profile", "tpu"], "unknown device profile 'tpu'"),
        (["--predict", "--device-profile", "t4"], "--predict is about this machine"),
        (["--predict", "--batch-size", "2", "--input-len", "9"], "--predict knows one sequence"),
    ],
)
def test_usage_errors_are_one_line(command, tiny_gpt2_folder, arguments, words):
    code, out, err = command("profile", str(tiny_gpt2_folder), *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_said_first(command, tiny_gpt2_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    short = ("--input-len", "9")
    monkeypatch.setattr(measure, "load_recipe", lambda *_: pytest.fail("loaded"))
    code, out, err = command("profile", str(tiny_gpt2_folder), "-o", str(tmp_path / "file" / "traces"), *short)
    assert (code, out) == (1, "") and "cannot write" in err and err.count("\n") == 1
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        code, _, err = command("profile", str(tiny_gpt2_folder), "-o", str(tmp_path / "locked" / "x"), *short)
        assert code == 1 and "permission denied" in err


def test_too_large_for_the_memory(command, tiny_gpt2_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 1 << 20)
    code, out, err = command("profile", str(tiny_gpt2_folder), "-o", str(tmp_path / "none"), "--input-len", "9")
    assert (code, out) == (1, "") and "GB are free" in err and not (tmp_path / "none").exists()


def test_device_profile_predicts_and_says_so(command, tiny_gpt2_folder):
    code, text, _ = command("profile", str(tiny_gpt2_folder), "--device-profile", "t4", "--input-len", "9")
    assert code == 0 and "a prediction, nothing was run" in text and "capability 7.5 has no bf16 units" in text
    code, text, _ = command("profile", str(tiny_gpt2_folder), "--device-profile", "h100", "--json", "--input-len", "9")
    found = json.loads(text)
    assert found["is_prediction"] is True and all(row["is_prediction"] for row in found["rows"])


@pytest.mark.parametrize("what", [("--predict",), ("--device-profile", "t4")])
@pytest.mark.parametrize(
    "more", [("--phase", "train"), ("--config", "native_int4"), ("--runner", "native"), ("-o", "never")]
)
def test_a_prediction_refuses_what_it_would_ignore(command, tiny_gpt2_folder, tmp_path, monkeypatch, what, more):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("profile", str(tiny_gpt2_folder), *what, *more)
    assert code == 2 and "a prediction takes no --" in err
    assert not (tmp_path / "never").exists()


def test_predict_says_so_and_loads_the_small_model_alone(command, tiny_gpt2_folder, monkeypatch):
    from paretune.measure import busy, predict_here

    monkeypatch.setattr(predict_here, "MIN_SEC", 0.0)
    monkeypatch.setattr(predict_here, "SIDES", (16, 32))
    monkeypatch.setattr(hardware, "probe_bytes", lambda: 1 << 14)
    loaded = []
    load = measure.load_recipe
    monkeypatch.setattr(
        measure, "load_recipe", lambda folder, *a, **k: loaded.append(folder.name) or load(folder, *a, **k)
    )
    code, text, err = command("profile", str(tiny_gpt2_folder), "--predict", "--quick", "--input-len", "9")
    assert code == 0, err
    assert loaded == ["pocket"] and "a prediction, the model was not loaded" in text and "native_int4" in text
    code, text, _ = command(
        "profile", str(tiny_gpt2_folder), "--predict", "--quick", "--input-len", "9", "--json", "-q"
    )
    assert code == 0 and json.loads(text)["is_prediction"] is True
    monkeypatch.setattr(busy, "words_of", lambda seen: ["this process lost its processor 900 times a second"])
    _, text, _ = command("profile", str(tiny_gpt2_folder), "--predict", "--quick", "--input-len", "9", "-q")
    assert "Busy machine: this process lost its processor 900 times a second" in text


# ---- the study


def fake_bench(folder, configs, **options):
    """Four rows without a process: what `study` makes of them is tested here."""
    rows = []
    for i, (name, recipe) in enumerate(configs):
        role = "baseline" if i == 0 else ""
        if i == 3:
            rows.append(made.row(name, role, "the compiler failed", recipe=recipe.name, throughput=made.phase(None)))
            continue
        speedup, verdict = 1.0 + 0.3 * i, ["baseline", "indistinguishable", "faster"][i]
        judged = made.phase(speedup, speedup - 0.1, speedup + 0.1, verdict, p50_sec=1e-3 / speedup)
        rate = {"throughput_tokens_per_sec": 1e3 * speedup}
        rows.append(made.row(name, role, recipe=recipe.name, throughput=judged, **rate))
    assert options["output_lens"] == [32] and options["kinds"] == ["throughput"]  # 64 positions, 32 of them prompt
    return made.result(rows, CEILINGS, aa=[made.resolution(0.13)])


def test_study_kernels(command, tiny_gpt2_folder, tmp_path, monkeypatch):
    from paretune.measure import bench

    monkeypatch.setattr(bench, "bench", fake_bench)
    support = {n: hardware.DtypeSupport(True, n == "bf16", 1.0, 1.0, f"{n} here") for n in ("fp32", "bf16", "fp16")}
    monkeypatch.setattr(hardware, "dtype_support", lambda device="cpu": support)
    out = tmp_path / "study"
    code, text, err = command("study", "kernels", "--quick", "--model", str(tiny_gpt2_folder), "-o", str(out))
    assert code == 0, err
    assert "FP16 against FP32: 1.30x [1.20, 1.40], indistinguishable." in text and "the compiler failed" in text
    names = {p.name for p in out.iterdir()}
    assert {"report.html", "results.csv", "results.json", "roofline.png", "breakdown.png"} <= names
    assert {"trace-prefill.json.gz", "trace-decode.json.gz"} <= names
    page = (out / "report.html").read_text("utf-8")
    assert "no smaller than 13 %" in page
    for words in ("Why Triton and not CUTLASS", "Published", "31.4 %", "The T4 of the study, predicted", "Prediction:"):
        assert words in page, words
    result = json.loads((out / "results.json").read_text("utf-8"))
    shares = {row["part"]: row["published_share"] for row in result["profiles"][0]["parts"]}
    assert shares["activation"] == 0.314 and shares["blocks"] == 0.898 and shares["cache_append"] is None
    assert {"schema_version", "command", "seed", "versions", "hardware"} <= set(result)
    assert "QKV projection" in (out / "results.csv").read_text("utf-8")


def test_a_study_that_cannot_judge_speed_says_so_and_ends_well(command, tmp_path, monkeypatch):
    """Its pages stand; `--strict` is for those who want the speeds or nothing."""
    said = ["Speed could not be judged on this machine now: the baseline differs from itself by up to 40%."]

    def study(model, out, **options):
        return {"summary": ["Sizes stand."], "noise": said, "is_noisy": True, "too_noisy": True}

    monkeypatch.setattr(
        "paretune.cli.study.STUDIES", SimpleNamespace(get=lambda name: study, package_of=lambda name: None)
    )
    code, text, err = command("study", "kernels", "-o", str(tmp_path / "x"))
    assert (code, err) == (0, f"written: {tmp_path / 'x'}\n") and text == "Sizes stand.\n" + said[0] + "\n"
    code, text, err = command("study", "kernels", "-o", str(tmp_path / "x"), "--strict")
    assert code == 5 and "too noisy for --strict" in err and "Sizes stand." in text


def test_every_published_share_has_a_row():
    from paretune.measure.profile_rows import ORDER
    from paretune.studies.kernels import PUBLISHED_SHARES

    assert set(PUBLISHED_SHARES) <= set(ORDER) and len(PUBLISHED_SHARES) == 23


@pytest.mark.parametrize(
    ("package", "words"),
    [("my-toys", "the study 'sums' of the package my-toys failed (ZeroDivisionError"), (None, "internal error")],
)
@pytest.mark.parametrize("is_in_result", [False, True])
def test_who_is_to_blame_for_a_study(command, tmp_path, monkeypatch, package, words, is_in_result):
    def study(model, out, **options):
        return {} if is_in_result else 1 / 0

    tables = SimpleNamespace(get=lambda name: study, package_of=lambda name: package)
    monkeypatch.setattr("paretune.cli.study.STUDIES", tables)
    code, _, err = command("study", "sums", "-o", str(tmp_path / "x"))
    said = words.replace("ZeroDivisionError", "KeyError") if is_in_result else words
    assert code == 1 and said in err and ("report it" in err.lower()) and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["poetry"], "unknown study 'poetry'"), (["kernels", "--device", "tpu"], "there is no device 'tpu'")],
)
def test_study_usage_errors(command, arguments, words, tmp_path):
    code, out, err = command("study", *arguments, "-o", str(tmp_path / "x"))
    assert (code, out) == (2, "") and words in err and not (tmp_path / "x").exists()
