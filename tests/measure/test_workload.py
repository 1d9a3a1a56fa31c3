"""The timed workload on a fake runner that costs known seconds of a fake clock."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from paretune import clock
from paretune.engine.cache import KVCache
from paretune.errors import UsageError
from paretune.measure import workload
from paretune.measure.workload import Bench, Workload, step_weights_bytes

PREFILL_SEC, STEP_SEC = 0.04, 0.01


class FakeRunner:
    """Costs a prefill or a step of the fake clock and writes down where each call stood."""

    config = SimpleNamespace(n_positions=64, vocab_size=50)
    device = torch.device("cpu")
    chooses, same_bits_at_any_width = False, True

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []  # (position, tokens)
        self.prompts: list[torch.Tensor] = []

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        shape = {"n_layer": 0, "n_kv_head": 1, "head_dim": 1, "dtype": torch.float32}
        return KVCache(batch_size=batch_size, capacity=capacity, **shape)

    def forward(self, tokens: torch.Tensor, cache: KVCache, logits: str = "last") -> torch.Tensor:
        K = tokens.size(1)
        clock.sleep(STEP_SEC if K == 1 else PREFILL_SEC)
        self.calls.append((cache.host_lengths[0], K))
        if K > 1:
            self.prompts.append(tokens)
        cache.begin_(K)
        cache.commit_()
        return torch.zeros(tokens.size(0), 1, self.config.vocab_size)


@pytest.fixture(autouse=True)
def fake_clock():
    with clock.use(clock.FakeClock()) as fake:
        yield fake


def test_known_costs_give_ttft_tpot_and_throughput():
    bench = Bench(FakeRunner(), Workload(input_len=20, output_len=9, batch_size=2))
    assert bench.sample("ttft") == pytest.approx(PREFILL_SEC)
    assert bench.sample("tpot") == pytest.approx(STEP_SEC)
    # One prefill and 8 steps give 9 tokens in each of 2 rows.
    assert bench.sample("throughput") == pytest.approx((PREFILL_SEC + 8 * STEP_SEC) / 18)


def test_a_slice_lasts_long_enough():
    for kind in workload.KINDS:
        bench = Bench(FakeRunner(), Workload(20, 9))
        bench.sample("ttft")
        started = clock.now()
        bench.sample(kind)
        assert workload.MIN_SLICE_SEC <= clock.now() - started < 3 * workload.MIN_SLICE_SEC


@pytest.mark.parametrize(("output_len", "n_steps"), [(1, 1), (2, 1), (9, 8), (17, 16), (40, 16)])
def test_a_decode_slice_is_always_at_the_same_positions(output_len, n_steps):
    runner = FakeRunner()
    bench = Bench(runner, Workload(20, output_len))
    slices = []
    for kind in ("tpot", "throughput", "tpot", "ttft", "tpot"):
        runner.calls.clear()
        bench.sample(kind)
        if kind == "tpot":
            slices.append({call for call in runner.calls if call[1] == 1})
    assert bench.n_decode == n_steps
    assert slices == [{(20 + i, 1) for i in range(n_steps)}] * 3


def test_the_first_prefill_of_a_decode_pass_is_not_timed():
    runner = FakeRunner()
    assert Bench(runner, Workload(20, 9)).sample("tpot") == pytest.approx(STEP_SEC)
    assert runner.calls[0] == (0, 20)


def test_prompts_depend_on_the_seed_alone():
    prompts = []
    for seed in (1, 1, 2):
        runner = FakeRunner()
        Bench(runner, Workload(20, 4, 3, seed)).sample("ttft")
        prompts.append(runner.prompts[0])
    assert prompts[0].shape == (3, 20) and torch.equal(prompts[0], prompts[1])
    assert not torch.equal(prompts[0], prompts[2])


def test_a_workload_beyond_the_context_is_a_usage_error():
    with pytest.raises(UsageError, match="60 input and 5 output tokens exceed the context of 64"):
        Bench(FakeRunner(), Workload(60, 5))
    Bench(FakeRunner(), Workload(60, 4))


@pytest.mark.parametrize("field", ["input_len", "output_len", "batch_size"])
def test_lengths_below_one_are_usage_errors(field):
    with pytest.raises(UsageError, match=f"--{field.replace('_', '-')} is 0"):
        Workload(**{field: 0}).check(64)


def test_bytes_of_a_step_leave_out_what_only_single_rows_are_taken_of(tiny):
    tied, _, _ = tiny("gpt2")  # positions are looked up, the token table is the head
    total = sum(p.numel() for p in {id(p): p for p in tied.parameters()}.values())
    assert step_weights_bytes(tied) == 4 * (total - 64 * 48)
    untied, _, _ = tiny("llama")
    total = sum(p.numel() for p in untied.parameters())
    assert step_weights_bytes(untied) == 4 * (total - 137 * 48)
