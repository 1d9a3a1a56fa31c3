"""Bytes count once, result files name no private folder, limits are known numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from paretune import clock, process
from paretune.measure import environment, memory, roofline
from paretune.ops.attention.pattern import parse
from paretune.records.record import from_json, to_json
from paretune.records.trial import MemoryParts


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("mask", torch.zeros(8, dtype=torch.uint8))
        self.register_buffer("view_of_mask", self.mask[2:4])


def test_storage_counts_tied_layers_and_views_once():
    assert memory.storage_bytes(Tied()) == {"parameters": 160, "buffers": 8, "total": 168, "n_storages": 2}


def test_storage_counts_equal_views_under_two_parameters_once():
    module = torch.nn.Module()
    data = torch.zeros(6, 4)
    module.a = torch.nn.Parameter(data[:3])
    module.b = torch.nn.Parameter(data[3:])
    assert memory.storage_bytes(module)["total"] == 96


def test_storage_on_the_meta_device():
    with torch.device("meta"):
        assert memory.storage_bytes(torch.nn.Linear(4, 4, bias=False))["total"] == 64


def test_rss_grows_and_the_peak_stays():
    start = process.rss_bytes()
    block = torch.ones(16 << 20)  # 64 MiB
    assert process.rss_bytes() > start + (32 << 20)
    del block
    assert process.peak_rss_bytes() > start + (32 << 20)
    if process.reset_peak_rss():
        assert process.peak_rss_bytes() <= process.rss_bytes() + (64 << 20)


def test_memory_parts_come_back_from_json():
    parts = memory.take(100, kv_cache_bytes=50)
    assert parts.weights_bytes == 100 and parts.activation_peak_bytes is None
    assert parts.device_allocated_bytes is None and parts.rss_bytes > 0
    assert from_json(MemoryParts, json.loads(json.dumps(to_json(parts)))) == parts


def test_header_has_what_a_result_file_carries():
    with clock.use(clock.FakeClock()):
        head = environment.header(["x/__main__.py", "bench", "--prompt", "a b"], seed=3)
    assert json.loads(json.dumps(head, allow_nan=False)) == head
    assert head["schema_version"] == 1 and head["seed"] == 3
    assert head["command"] == "paretune bench --prompt 'a b'"
    assert head["created"].endswith("+00:00")
    assert head["versions"]["python"] and head["versions"]["torch"] == torch.__version__
    assert head["hardware"]["id"] and head["hardware"]["cpu_model"]
    assert head["environment"]["threads"]["intra_op"] == torch.get_num_threads()


def test_no_private_folder_leaks(tmp_path, monkeypatch):
    home, work = tmp_path / "home" / "someone", tmp_path / "home" / "someone" / "work"
    work.mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.chdir(work)
    argv = [f"{home}/bin/paretune", "bench", f"{home}/models/a", "-o", f"{work}/out", f"--data={home}"]
    head = environment.header(argv, seed=None)
    assert str(tmp_path) not in json.dumps(head)
    assert "~/models/a" in head["command"] and "./out" in head["command"]
    assert environment.hide_paths(f"{home}-of-another") == f"{home}-of-another"
    assert environment.hide_paths(str(home)) == "~"


def test_a_script_is_named_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [str(tmp_path / "benchmarks" / "peers.py"), "--model", "a b"]
    assert environment.header(argv)["command"] == "python benchmarks/peers.py --model 'a b'"
    assert environment.header(["/x/paretune/__main__.py", "ls"])["command"] == "paretune ls"


def test_environment_lists_only_known_variables(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    found = environment.environment()
    assert found["variables"]["OMP_NUM_THREADS"] == "3" and "hush" not in json.dumps(found)


def test_git_commit_of_a_checkout_only(tmp_path):
    package = tmp_path / "src" / "paretune"
    package.mkdir(parents=True)
    assert environment.git_commit(package) is None
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert environment.git_commit(package) is None  # no commit yet
    (git / "packed-refs").write_text("# pack-refs\nabc refs/heads/main\n")
    assert environment.git_commit(package) == "abc"
    (git / "refs" / "heads" / "main").write_text("def\n")
    assert environment.git_commit(package) == "def"
    (git / "HEAD").write_text("0123\n")
    assert environment.git_commit(package) == "0123"
    installed = tmp_path / "site-packages" / "paretune"  # inside somebody's checkout, but not a checkout of ours
    installed.mkdir(parents=True)
    assert environment.git_commit(installed) is None


def test_git_commit_of_a_work_tree(tmp_path):
    package = tmp_path / "tree" / "src" / "paretune"
    package.mkdir(parents=True)
    private = tmp_path / "repo" / ".git" / "worktrees" / "tree"
    private.mkdir(parents=True)
    (tmp_path / "tree" / ".git").write_text(f"gitdir: {private}\n")
    (private / "HEAD").write_text("ref: refs/heads/side\n")
    (private / "commondir").write_text("../..\n")
    refs = tmp_path / "repo" / ".git" / "refs" / "heads"
    refs.mkdir(parents=True)
    (refs / "side").write_text("beef\n")
    assert environment.git_commit(package) == "beef"


GPT2 = SimpleNamespace(
    n_layer=12,
    n_embd=768,
    n_head=12,
    n_kv_head=12,
    head_dim=64,
    n_inner=3072,
    vocab_size=50257,
    gated_mlp=False,
)


def test_flops_of_gpt2():
    # 84,934,656 weights in the blocks and 38,597,376 in the head; 12 layers x 4 x 768 FLOP a visible key.
    assert roofline.decode_flops(GPT2, 1024) == 2 * (84_934_656 + 38_597_376) + 36_864 * 1024
    assert roofline.prefill_flops(GPT2, 1024) == (2 * 84_934_656 * 1024 + 36_864 * 1024 * 1025 // 2 + 2 * 38_597_376)
    assert roofline.prefill_flops(GPT2, 1) == roofline.decode_flops(GPT2, 1)
    every = roofline.prefill_flops(GPT2, 10, logits="all")
    assert every == sum(roofline.decode_flops(GPT2, n) for n in range(1, 11))


def test_a_window_is_counted_by_what_it_sees():
    """Decode at 10,000 tokens with a window of 256 reads 256 keys, and a prompt computes the pairs that are left."""
    window, both = parse("window:256"), parse("prefix:16+window:256")
    assert roofline.keys_seen(parse("causal"), 20.5) == 20.5
    assert [roofline.keys_seen(window, n) for n in (1, 200.5, 256, 257, 10_000)] == [1, 200.5, 256, 256, 256]
    assert [roofline.keys_seen(both, n) for n in (10, 272, 10_000)] == [10, 272, 272]
    dense = roofline.prefill_flops(GPT2, 1024)
    # 256 * 257 / 2 pairs while the window fills, then 768 queries of 256.
    left = 256 * 257 // 2 + 768 * 256
    assert dense - roofline.prefill_flops(GPT2, 1024, pattern=window) == 36_864 * (1024 * 1025 // 2 - left)
    assert roofline.prefill_flops(GPT2, 200, pattern=window) == roofline.prefill_flops(GPT2, 200)


def test_flops_of_grouped_queries_and_a_gated_mlp():
    config = SimpleNamespace(
        n_layer=1, n_embd=8, n_head=4, n_kv_head=2, head_dim=2, n_inner=16, vocab_size=10, gated_mlp=True
    )
    # q 8x8, k and v 8x4 each, o 8x8, three of 8x16, head 8x10.
    assert roofline.decode_flops(config, 5) == 2 * (64 + 32 + 32 + 64 + 3 * 128 + 80) + 4 * 8 * 5


def test_utilisation():
    assert roofline.decode_bytes(100, 20) == 120
    assert roofline.mbu(50e9, 1.0, 100e9) == 0.5
    assert roofline.mfu(1e12, 2.0, 1e12) == 0.5


def test_quantity():
    quantity = roofline.quantity
    assert [
        quantity(28.4e6, "B"),
        quantity(85e9, "B/s"),
        quantity(1.394e12, "FLOP/s"),
        quantity(12, "B"),
    ] == [
        "28.4 MB",
        "85 GB/s",
        "1.39 TFLOP/s",
        "12 B",
    ]
    assert quantity(999.96e6, "B") == "1 GB" and quantity(200e9, "B/s") == "200 GB/s"


def test_sentence_of_overhead():
    label, sentence = roofline.bound_by("decode", 28.4e6 / 12.1e9, 28.4e6, 5e6, 85e9, 180e9)
    assert label == "overhead"
    assert sentence.startswith(
        "decode reads 28.4 MB per token at 12.1 GB/s, 14 % of the 85 GB/s measured here: "
        "it is bound by overhead, not by memory"
    )


def test_labels():
    bound = roofline.bound_by
    assert bound("decode", 1.0, 70e9, 1e9, 85e9, 180e9)[0] == "memory"
    label, sentence = bound("decode", 1.0, 100e9, 1e9, 85e9, 180e9)
    assert label == "memory" and "cache" in sentence
    label, sentence = bound("prefill", 1.0, 1e9, 150e9, 85e9, 180e9)
    assert label == "compute"
    assert sentence == (
        "prefill does 150 GFLOP per prompt at 150 GFLOP/s, 83 % of the 180 GFLOP/s measured here: "
        "it is bound by compute"
    )
    assert "not by compute" in bound("prefill", 1.0, 1e9, 20e9, 85e9, 180e9)[1]
    assert bound("decode", 1.0, 1e9, 1e9, None, None)[0] == "unknown"
    assert bound("decode", 1.0, 1e9, 1e9, 85e9, None)[0] == "unknown"
    assert bound("decode", 1.0, 70e9, 1e9, 85e9, None)[0] == "memory"


@pytest.mark.skipif(os.name == "nt", reason="no load average on Windows")
def test_load_average_is_three_numbers():
    assert len(environment.environment()["load_average"]) == 3
