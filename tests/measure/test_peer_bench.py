"""`bench` with real processes of fake peers: every way in which a peer can end is a row."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from paretune.measure import bench as measure
from paretune.measure import bench_group
from paretune.measure.peers import convert, envs, subject
from paretune.measure.peers.catalogue import Engine, Format, Peer
from paretune.recipe import preset
from paretune.records.bench import BenchResult
from paretune.records.record import from_json, to_json

SCRIPT = Path(__file__).parent / "fake_peer.py"
FORMATS = ("good", "wrong", "dies", "hangs", "unconvertible", "mixed_rows")
EIGHT = Format(8, inputs="tensor")  # what fails there is told apart: its inputs, or something else
FAKE = Peer(
    "fake",
    worker="fake",
    modules=(),
    requirements=("fake==1",),
    formats={name: EIGHT if name == "wrong" else Format(32) for name in FORMATS},
    default=("good",),
)
ABSENT = Peer(
    "absent", worker="x", modules=("x",), requirements=("x==1",), formats={"fp32": Format(32)}, default=("fp32",)
)


@pytest.fixture(scope="module")
def result(tiny_gpt2_folder, tmp_path_factory, cache_with_native_code):
    """One real run with all of them, and the folder of the cache."""
    cache = Path(cache_with_native_code(tmp_path_factory.mktemp("cache") / "own"))
    threads = torch.get_num_threads()
    real = envs.command
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARETUNE_CACHE", str(cache))
        patch.setattr(bench_group, "WARM_UP_SEC", 0.5)
        patch.setattr(subject, "LOAD_TIMEOUT_SEC", 12.0)
        patch.setattr(envs, "command", lambda peer: [sys.executable, str(SCRIPT)] if peer is FAKE else real(peer))
        found = measure.bench(
            tiny_gpt2_folder,
            [("baseline", preset("baseline"))],
            input_lens=[8],
            output_lens=[4],
            batch_sizes=[2],
            min_blocks=2,
            max_blocks=2,
            min_time_sec=0.0,
            threads=1,
            engines=[*(Engine(FAKE, name) for name in FORMATS), Engine(ABSENT, "fp32")],
        )
        models = sorted(path.name for path in convert.models_folder().iterdir())
    torch.set_num_threads(threads)
    data = to_json(found)
    assert from_json(BenchResult, json.loads(json.dumps(data, allow_nan=False))) == found
    return data, models


@pytest.fixture(scope="module")
def rows(result):
    return {row["config"]: row for row in result[0]["rows"]}


def test_rows_come_in_the_order_asked_for(result, rows):
    assert list(rows) == ["baseline", "baseline again", *(f"fake:{name}" for name in FORMATS), "absent:fp32"]
    assert result[0]["engines"][0] == "fake:good"


def test_a_peer_that_computes_what_we_do_is_measured(rows):
    row = rows["fake:good"]
    assert row["status"] == "measured" and row["cause"] == "" and row["role"] == "peer"
    assert (row["engine"], row["format"], row["engine_version"]) == ("fake", "good", "1.2.3")
    assert row["agreement_top1_share"] == 1.0 and row["agreement_logits_rel_rms"] < 1e-5
    assert row["agreement_greedy_same"] == row["agreement_greedy_n"] > 40
    assert row["agreement_n_positions"] >= 128
    assert row["ttft_sec"] > 0 and row["tpot_sec"] > 0 and row["decode_speedup"] > 0
    assert row["disk_bytes"] > 100 and row["rss_peak_bytes"] > 0 and row["threads"] == 1
    assert row["mbu"] is None  # what a peer reads in a step is its own affair


def test_a_peer_that_computes_something_else_is_invalid_and_not_timed(rows):
    row = rows["fake:wrong"]
    assert row["status"] == "invalid" and "agrees with our fp32" in row["cause"]
    assert row["agreement_top1_share"] < 0.2 and row["tpot_sec"] is None
    assert row["decode_verdict"] is None and row["decode_speedup"] is None
    # Its tokens are all wrong, and this model has no outliers that rounded inputs would lose.
    assert "8 bits with one scale for a whole tensor" in row["cause"] and "not its cause" in row["cause"]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("fake:dies", "exit code 7: the last words"),
        ("fake:hangs", "no answer within 12 s"),
        ("fake:unconvertible", "the conversion failed: it has no such matrix"),
        ("fake:mixed_rows", "2 rows of one prompt give different tokens"),
        ("absent:fp32", "absent is not installed. Run `paretune peers install absent`"),
    ],
)
def test_a_failure_is_a_row_with_its_cause(rows, name, cause):
    row = rows[name]
    assert row["status"] == "failed" and cause in row["cause"] and "\n" not in row["cause"]
    assert row["engine"] == name.partition(":")[0] and row["tpot_sec"] is None


def test_our_own_rows_are_as_before(rows):
    row = rows["baseline"]
    assert row["status"] == "measured" and row["engine"] == "paretune" and row["format"] is None
    assert row["agreement_top1_share"] is None and row["mbu"] > 0


def test_only_whole_conversions_are_kept(result):
    assert len(result[1]) == len(FORMATS) - 1 and not [name for name in result[1] if "unconvertible" in name]
    assert not [name for name in result[1] if name.startswith(".")]


def test_peers_get_our_prompts_threads_and_positions(tiny_gpt2_folder, tmp_path, monkeypatch):
    """What a peer is asked to load, against what our own bench draws."""
    from paretune.measure.peers.subject import Peers
    from paretune.measure.workload import MIN_SLICE_SEC, Bench, Workload
    from paretune.model import checkpoint

    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path))
    config = checkpoint.read_config(tiny_gpt2_folder)
    peers = Peers([Engine(FAKE, "good")], tiny_gpt2_folder, config, 3, lambda line: None)
    peers._converted["fake:good"] = tmp_path
    monkeypatch.setattr(peers, "_check", lambda process, engine: None)
    asked = {}

    class Process:
        name = "fake:good"

        def ask(self, do, timeout_sec, **request):
            asked.update(request)
            return {}

    workload = Workload(8, 4, 2, seed=5)
    peers.load(Process(), workload)
    from paretune.engine.load import load_recipe

    bench = Bench(load_recipe(tiny_gpt2_folder, preset("fp32"), check=False).runner, workload)
    assert asked["prompts"] == bench.prompts and asked["threads"] == 3
    assert asked["slice"] == {"min_sec": MIN_SLICE_SEC, "decode_steps": 16} and asked["capacity"] >= 64


@pytest.fixture
def fake_peers(tiny_gpt2_folder, tmp_path, monkeypatch):
    from paretune.model import checkpoint

    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(envs, "command", lambda peer: [sys.executable, str(SCRIPT)])
    engines = [Engine(FAKE, name) for name in ("good", "dies")]
    return subject.Peers(engines, tiny_gpt2_folder, checkpoint.read_config(tiny_gpt2_folder), 1, lambda line: None)


def test_a_peer_gives_the_losses_of_windows(fake_peers, tiny_gpt2_folder, tmp_path):
    import transformers

    windows = torch.randint(0, fake_peers.config.vocab_size, (6, 20), generator=torch.Generator().manual_seed(0))
    nll = fake_peers.losses("fake:good", windows.tolist(), tmp_path, 100.0)
    model = transformers.GPT2LMHeadModel.from_pretrained(tiny_gpt2_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(windows[:, :-1]).logits
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    torch.testing.assert_close(
        torch.from_numpy(nll).float(), wanted, atol=1e-4, rtol=1e-4
    )  # fp32, another order of sums


def test_scoring_ends_at_its_cap(fake_peers, tmp_path, monkeypatch):
    requests = []
    ask = subject.TrialProcess.ask

    def counted(process, do, *timeout, **request):
        requests.extend([do] if do == "nll" else [])
        return ask(process, do, *timeout, **request)

    monkeypatch.setattr(subject.TrialProcess, "ask", counted)
    monkeypatch.setattr(subject, "clock", SimpleNamespace(now=lambda: 60.0 * len(requests)))  # 60 s a request
    windows = [[1, 2, 3, 4, 5]] * 20
    nll = fake_peers.losses("fake:good", windows, tmp_path, 100.0)
    assert nll.shape == (2 * subject.WINDOWS_AT_ONCE, 4)
    assert fake_peers.losses("fake:good", windows, tmp_path, 0.0).shape == (0, 4)


def test_a_peer_that_dies_has_no_losses(fake_peers, tmp_path):
    with pytest.raises(subject.SubjectError, match="exit code 7: the last words"):
        fake_peers.losses("fake:dies", [[1, 2, 3, 4]], tmp_path, 100.0)


@pytest.mark.parametrize(
    ("sets", "is_said"),
    [(["avx2", "fma"], True), (["avx2", "avx_vnni"], False), (["avx512_vnni", "avx2"], False), (["neon"], False)],
)
def test_products_that_saturate_are_said_where_they_do(fake_peers, monkeypatch, sets, is_said):
    engine = Engine(dataclasses.replace(FAKE, formats={"good": Format(8, saturates=True)}), "good")
    monkeypatch.setattr(subject.hardware, "instruction_sets", lambda: sets)
    said = fake_peers._explained(engine, None)
    assert said == (
        ". This processor has no dot-product instruction, without which its 8-bit products saturate" if is_said else ""
    )
