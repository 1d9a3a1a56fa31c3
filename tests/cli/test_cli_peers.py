"""`paretune peers` and `bench --engine`: what a user types, and what is said when it is wrong."""

from __future__ import annotations

import json

import pytest

from paretune.cli.app import run
from paretune.errors import ParetuneError
from paretune.measure import bench as measure
from paretune.measure.peers import convert, envs
from paretune.measure.peers.catalogue import PEERS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def built(monkeypatch):
    """Installations that succeed at once, except llama.cpp's; the names, in order."""
    names = []

    def install(peer, say):
        names.append(peer.name)
        if peer.name == "llama.cpp":
            raise ParetuneError("llama.cpp could not be installed: no compiler", "The whole of it is in a log")
        folder = envs.folder_of(peer)
        python = envs._python_in(folder)
        python.parent.mkdir(parents=True)
        python.touch()
        mark = {"requirements": list(peer.requirements), "install_sec": 61.2}
        (folder / envs.MARK).write_text(json.dumps(mark))
        return folder

    monkeypatch.setattr(envs, "install", install)
    monkeypatch.setattr(envs, "shares", lambda peer: False)
    return names


def test_ls_shows_every_peer_and_its_formats(capsys):
    assert run(["peers", "ls"]) == 0
    out = capsys.readouterr().out
    for name in PEERS:
        assert name in out
    assert "not installed" in out and "Q4_K_M*" in out
    assert run(["peers", "--json"]) == 0  # `ls` is the default
    rows = json.loads(capsys.readouterr().out)["peers"]
    assert [row["peer"] for row in rows] == list(PEERS) and rows[1]["converted_bytes"] == 0


def test_install_takes_lists_and_skips_what_is_there(built, capsys):
    assert run(["peers", "install", "ctranslate2,onnxruntime", "ctranslate2", "-q"]) == 0
    assert built == ["ctranslate2", "onnxruntime"]
    out, err = capsys.readouterr()
    assert "ctranslate2: installed in 61.2 s" in out and err == ""
    assert run(["peers", "install", "ctranslate2:int8"]) == 0
    assert "installed already" in capsys.readouterr().out and len(built) == 2


def test_one_failure_does_not_keep_the_others_out(built, capsys):
    assert run(["peers", "install", "all"]) == 1
    out, err = capsys.readouterr()
    assert built == list(PEERS) and "onnxruntime: installed" in out
    assert "llama.cpp could not be installed: no compiler. The whole of it is in a log" in err
    assert "Traceback" not in err


def test_remove_takes_environment_and_conversions(built, capsys):
    assert run(["peers", "install", "ctranslate2", "-q"]) == 0
    (convert.models_folder() / "ctranslate2-int8-gpt2-0").mkdir(parents=True)
    (convert.models_folder() / "ctranslate2-int8-gpt2-0" / "model.bin").write_bytes(b"x" * 5000)
    capsys.readouterr()
    assert run(["peers", "remove", "ctranslate2", "--converted"]) == 0
    assert "5.00 kB are free again" in capsys.readouterr().out
    assert envs.is_current(PEERS["ctranslate2"])
    assert run(["peers", "remove", "all"]) == 0
    out = capsys.readouterr().out
    assert "ctranslate2: removed" in out and "llama.cpp: nothing to remove" in out
    assert not envs.folder_of(PEERS["ctranslate2"]).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["peers", "instal", "llama.cpp"], "unknown action 'instal'"),
        (["peers", "install"], "`install` needs names. Known: transformers, llama.cpp"),
        (["peers", "install", "lama.cpp"], "unknown engine 'lama.cpp'. Did you mean 'llama.cpp'?"),
        (["peers", "install", "paretune"], "paretune is not a peer of itself"),
        (["peers", "ls", "llama.cpp"], "`ls` takes no names"),
        (["bench", "pocket", "--engine", "vllm"], "unknown engine 'vllm'"),
        (["bench", "pocket", "--engine", "llama.cpp:Q9"], "llama.cpp has no format 'Q9'"),
        (["bench", "pocket", "--engine", ","], "--engine is empty"),
    ],
)
def test_wrong_input_is_one_line(capsys, arguments, message):
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""


def test_bench_asks_for_the_engines(monkeypatch):
    calls = []

    def fake(folder, configs, **options):
        calls.append((configs, options["engines"]))
        raise ParetuneError("enough")

    monkeypatch.setattr(measure, "bench", fake)
    assert run(["bench", "pocket", "--engine", "paretune,llama.cpp:q8_0", "--config", "baseline,int8"]) == 1
    assert run(["bench", "pocket", "--engine", "transformers", "--config", "int8,baseline"]) == 1
    assert run(["bench", "pocket"]) == 1
    names = [([name for name, _ in configs], [engine.name for engine in engines]) for configs, engines in calls]
    assert names == [
        (["baseline", "int8"], ["llama.cpp:Q8_0"]),
        (["baseline"], ["transformers:fp32", "transformers:bf16"]),  # the baseline stands for us
        (["baseline", "bf16", "int8"], []),
    ]


def test_dry_run_says_what_is_not_installed(capsys):
    assert run(["bench", "pocket", "--engine", "llama.cpp", "--dry-run"]) == 0
    assert "engine llama.cpp:Q8_0: not installed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_missing_peer_is_a_row_in_every_form(tiny_gpt2_folder, tmp_path, capsys, monkeypatch):
    import torch

    before = torch.get_num_threads()
    monkeypatch.setattr(measure, "WARM_UP_SEC", 0.2)
    arguments = ["--input-len", "8", "--output-len", "4", "--min-blocks", "2", "--max-blocks", "2", "--min-time", "0"]
    arguments += ["--threads", "1", "--quiet", "-o", str(tmp_path / "out")]
    assert run(["bench", str(tiny_gpt2_folder), "--engine", "llama.cpp:F32", *arguments]) == 0
    torch.set_num_threads(before)
    out = capsys.readouterr().out
    cure = "llama.cpp is not installed. Run `paretune peers install llama.cpp`"
    assert "failed" in out and cure in " ".join(out.split()) and "Peers" in out
    row = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"][-1]
    assert (row["config"], row["status"], row["engine"], row["format"]) == (
        "llama.cpp:F32",
        "failed",
        "llama.cpp",
        "F32",
    )
    assert cure in (tmp_path / "out" / "bench.md").read_text() and cure in (tmp_path / "out" / "bench.csv").read_text()
    assert "llama.cpp:F32" in (tmp_path / "out" / "bench.html").read_text()
