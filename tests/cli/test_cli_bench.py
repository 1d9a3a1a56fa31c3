"""`paretune bench`: one tiny real run in all formats, and every wrong input in one line."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paretune.cli.app import run
from paretune.measure import bench as measure
from paretune.measure import bench_group
from paretune.records.bench import BenchResult
from paretune.records.record import from_json
from paretune.report import bench as report

TINY = [
    *("--input-len", "8", "--output-len", "4", "--min-blocks", "2", "--max-blocks", "2"),
    *("--min-time", "0", "--threads", "1", "--quiet"),
]


@pytest.fixture(autouse=True)
def _threads_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def real_run(tiny_gpt2_folder, tmp_path_factory):
    """Exit code and folder of a real run of three processes on a tiny model."""
    out = tmp_path_factory.mktemp("bench") / "out"
    arguments = ["bench", str(tiny_gpt2_folder), "--config", "baseline,eager_attn", *TINY, "--output_dir", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_group, "WARM_UP_SEC", 1.0)  # these numbers need not be good
        return run(arguments), out


def test_a_real_run_writes_all_formats(real_run):
    code, out = real_run
    assert code == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["bench.csv", "bench.html", "bench.json", "bench.md", "samples.jsonl"]
    result = json.loads((out / "bench.json").read_text())
    assert {"schema_version", "command", "seed", "versions", "hardware", "samples"} <= set(result)
    rows = {row["config"]: row for row in result["rows"]}
    assert list(rows) == ["baseline", "eager_attn", "baseline again"]
    for row in rows.values():
        assert row["status"] == "measured" and row["threads"] == 1, row["cause"]
        assert row["decode_tokens_per_sec"] == pytest.approx(1 / row["tpot_sec"])
        assert row["prefill_tokens_per_sec"] == pytest.approx(8 / row["ttft_sec"])
        assert row["rss_peak_bytes"] > row["weights_bytes"] > 0 and row["load_sec"] > 0
        assert row["mbu"] > 0 and row["bound_by"].startswith("decode")
        assert row["decode_verdict"] in ("baseline", "undecided")  # two blocks decide nothing
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert lines == result["samples"] and len(lines) == 2 * 2 * 3


def test_the_files_of_a_real_run_agree(real_run):
    _, out = real_run
    result = json.loads((out / "bench.json").read_text())
    with open(out / "bench.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["config"] for row in rows] == [row["config"] for row in result["rows"]]
    assert float(rows[0]["tpot_sec"]) == result["rows"][0]["tpot_sec"]
    page, text = (out / "bench.html").read_text(), (out / "bench.md").read_text()
    for part in ("Decode", "Prefill", "Memory and start", "eager_attn", "TPOT", "A/A", result["hardware"]["id"]):
        assert part in text
    assert "<script" not in page and "http" not in page.replace("http-equiv", "") and "eager_attn" in page
    assert "TTFT**: start of the request" in text  # the definitions are printed


@pytest.fixture
def faked(monkeypatch, real_run):
    """The result of the real run without running it again; what `bench` was asked for."""
    calls: list[tuple] = []
    result = json.loads((real_run[1] / "bench.json").read_text())

    def fake(folder, configs, **options):
        calls.append((folder, configs, options))
        return from_json(BenchResult, result)

    monkeypatch.setattr(measure, "bench", fake)
    fake.calls, fake.result = calls, result
    return fake


def test_stdout_is_a_table_with_units_and_definitions(faked, capsys):
    assert run(["bench", "pocket", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "Decode" in out and "Speed-up" in out and "TPOT: one decode step" in out and err == ""
    assert " ms" in out or " µs" in out or "\u00b5s" in out
    assert [name for name, _ in faked.calls[0][1]] == ["baseline", "bf16", "int8"]


def test_formats_on_stdout(faked, capsys):
    assert run(["bench", "pocket", "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("config,recipe,role,cell,")
    assert run(["bench", "pocket", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]
    assert run(["bench", "pocket", "--format", "md"]) == 0
    assert "| Config |" in capsys.readouterr().out


def test_lists_and_options_arrive(faked):
    arguments = ["--input-len", "8,16", "--output-len", "4", "--batch-size", "1,2", "--budget", "2m", "--seed", "7"]
    assert run(["bench", "pocket", "--config", "fp32,int8", *arguments, "--repeats", "30"]) == 0
    options = faked.calls[0][2]
    assert (options["input_lens"], options["batch_sizes"]) == ([8, 16], [1, 2])
    assert (options["budget_sec"], options["seed"]) == (120.0, 7)
    assert (options["min_blocks"], options["max_blocks"]) == (30, 30)


@pytest.mark.parametrize(
    ("too_noisy", "strict", "expected", "word"),
    [(True, False, 5, "too noisy to judge"), (False, False, 0, ""), (False, True, 5, "for --strict")],
)
def test_exit_5_is_for_no_verdict_at_all_or_strict(faked, tmp_path, capsys, too_noisy, strict, expected, word):
    faked.result |= {"is_noisy": True, "too_noisy": too_noisy}
    faked.result["aa"] = [{**faked.result["aa"][0], "half_width": 0.4}]
    flags = ["--strict"] if strict else []
    assert run(["bench", "pocket", "-o", str(tmp_path / "out"), "--quiet", *flags]) == expected
    assert (tmp_path / "out" / "bench.json").is_file(), "written all the same"
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("output", [[], ["--json"], ["-o"]])
def test_an_interrupt_prints_what_is_known_and_exits_130(faked, tmp_path, capsys, output):
    faked.result |= {"interrupted": True, "ceilings": None}
    flags = [*output, str(tmp_path / "out")] if output == ["-o"] else output
    assert run(["bench", "pocket", "--quiet", *flags]) == 130
    out, err = capsys.readouterr()
    assert "eager_attn" in out and "interrupted" in err
    if output == ["-o"]:
        assert json.loads((tmp_path / "out" / "bench.json").read_text())["interrupted"] is True
        assert "Interrupted: what follows" in (tmp_path / "out" / "bench.md").read_text()
    assert faked.calls[0][2]["keeps_interrupted"] is True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_run_that_is_told_to_end_says_what_it_knows(tiny_gpt2_folder, tmp_path, number):
    """Both signals, while it samples: a table, the files, exit code 130, and no process left behind."""
    command = [sys.executable, "-m", "paretune", "bench", str(tiny_gpt2_folder), "--config", "baseline,eager_attn"]
    command += ["--input-len", "8", "--output-len", "4", "--threads", "1", "--min-time", "600s", "--max-blocks", "9999"]
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "First intervals" in line:  # every row has an interval
            break
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, "".join(said) + err
    assert "eager_attn" in out and "Interrupted: what follows" in out and "Traceback" not in err
    result = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert result["interrupted"] and {row["status"] for row in result["rows"]} == {"measured"}
    assert children and not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_failed_and_late_rows_are_shown(faked, capsys):
    faked.result["rows"][1] |= {"status": "failed", "cause": "out of memory", "tpot_sec": None}
    faked.result["rows"][2] = {
        key: value for key, value in faked.result["rows"][2].items() if not key.startswith(("decode_", "prefill_"))
    } | {"status": "not_reached", "cause": "the time budget ended before its turn", "prefill_bound_by": None}
    for extra in ([], ["--format", "md"], ["--format", "csv"]):
        assert run(["bench", "pocket", *extra]) == 0
        assert "out of memory" in capsys.readouterr().out


def test_a_plan_is_compared_with_its_source(faked, tmp_path):
    from paretune.model import checkpoint
    from paretune.recipe import preset

    recipe = preset("int8")
    data = {"schema_version": 1, "recipe": recipe.to_dict(), "model": {"source": "pocket", "folder": None}}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert run(["bench", str(tmp_path)]) == 0
    folder, configs, options = faked.calls[0]
    assert folder == checkpoint.resolve("pocket") and options["folders"] == {"plan": folder}
    assert [name for name, _ in configs] == ["baseline", "plan"] and configs[1][1] == recipe


def test_dry_run_shows_cells_and_runs_nothing(faked, tiny_gpt2_folder, tmp_path, capsys):
    arguments = ["--input-len", "8,16", "--output-len", "4", "--dry-run", "-o", str(tmp_path / "out")]
    assert run(["bench", str(tiny_gpt2_folder), *arguments]) == 0
    out = capsys.readouterr().out
    assert out.count("cell: ") == 2 and "config int8: sdpa + int8, eager" in out and "estimate: " in out
    assert not faked.calls and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "baseline,int9"], "unknown config 'int9'. Did you mean 'int8'?"),
        (["--config", ","], "--config is empty"),
        (["--config", "plan"], "unknown config 'plan'"),
        (["--input-len", "8,x"], "--input-len is '8,x'"),
        (["--batch-size", "0"], "--batch-size is '0'"),
        (["--input-len", "60", "--output-len", "8"], "exceed the context of 64"),
        (["--format", "pdf"], "unknown format 'pdf'"),
        (["--budget", "soon"], "'soon' is not a duration"),
        (["--min-blocks", "0"], "--min-blocks is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--nonsense"], "unknown flag '--nonsense'"),
    ],
)
def test_wrong_input_is_one_line_and_starts_nothing(faked, tiny_gpt2_folder, capsys, arguments, message):
    assert run(["bench", str(tiny_gpt2_folder), *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""
    assert not faked.calls


def test_a_missing_model_is_one_line(capsys):
    assert run(["bench", "./nowhere"]) == 2
    assert "there is no folder './nowhere'" in capsys.readouterr().err


def test_a_read_only_output_folder_fails_at_the_start(faked, tmp_path, capsys):
    if os.geteuid() == 0:  # root writes everywhere: a file in the way is as good
        (tmp_path / "out").write_text("")
    else:
        (tmp_path / "out").mkdir(mode=0o500)
    assert run(["bench", "pocket", "-o", str(tmp_path / "out" / "deeper")]) == 1
    err = capsys.readouterr().err
    assert "cannot write" in err and err.count("\n") == 1
    assert not faked.calls


def test_the_columns_name_their_units():
    titles = [title for title, _ in report.columns_of_bench()]
    assert titles == ["Decode", "Prefill", "Memory and start"]


def test_several_formats_on_one_standard_output_are_refused(faked, capsys):
    assert run(["bench", "pocket", "--format", "csv,json"]) == 2
    assert "-o FOLDER" in capsys.readouterr().err and not faked.calls


def test_nothing_measured_is_a_failure(faked, capsys):
    for row in faked.result["rows"]:
        row["status"] = "not_reached"
    assert run(["bench", "pocket", "--max-time", "1s"]) == 1
    assert "--max-time" in capsys.readouterr().err
