"""The loop: requests come, wait, are read in, go on and leave; each gets the tokens it would get alone."""

from __future__ import annotations

import pytest
import torch

from paretune import native_build
from paretune.engine.generate import generate
from paretune.engine.request import Request
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.runners.native import NativeRunner
from paretune.engine.sampling import SamplingOptions
from paretune.engine.scheduler import Scheduler
from paretune.errors import UsageError
from paretune.model import checkpoint

needs_compiler = pytest.mark.skipif(native_build.unavailable_reason() is not None, reason="no C++ compiler")
KINDS = {"eager": EagerRunner, "native": NativeRunner}
CAPACITY = 48
LENGTHS = (3, 17, 9, 1, 30, 6)
NEW = (12, 5, 18, 2, 9, 1)


@pytest.fixture(params=["eager", pytest.param("native", marks=needs_compiler)])
def runner(request, tiny_gpt2_folder):
    return KINDS[request.param](checkpoint.load(tiny_gpt2_folder))


def requests_of(seed=None):
    g = torch.Generator().manual_seed(3)
    out = []
    for i, (n, n_new) in enumerate(zip(LENGTHS, NEW, strict=True)):
        prompt = torch.randint(2, 131, (n,), generator=g).tolist()
        sampling = SamplingOptions() if seed is None else SamplingOptions(1.0, seed=seed + i)
        out.append(Request(prompt, n_new, sampling))
    return out


def alone(runner, request):
    result = generate(runner, [request.prompt], request.max_new_tokens, request.sampling, ignore_eos=True)
    return result.generations[0].tokens


@pytest.mark.parametrize("n_rows", [1, 2, 4])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "sampled"])
def test_more_requests_than_rows(runner, n_rows, chunk, seed):
    """Rows are filled again as they come free; prompts go in whole or in pieces while others go on."""
    loop, requests = Scheduler(runner, n_rows, CAPACITY, chunk=chunk), requests_of(seed)
    for request in requests:
        loop.add(request)
    loop.run()
    assert [r.tokens for r in requests] == [alone(runner, r) for r in requests]
    assert len({tuple(r.tokens) for r in requests}) == len(requests)
    assert not loop.is_busy and loop.rows == [None] * n_rows and loop.cache.free_rows == list(range(n_rows))


def test_requests_come_while_others_run(runner):
    loop, requests = Scheduler(runner, 3, CAPACITY, chunk=8), requests_of()
    expected = [alone(runner, r) for r in requests]
    for request in requests:
        loop.add(request)
        loop.step()
        loop.step()
    loop.run()
    assert [r.tokens for r in requests] == expected


def test_a_long_prompt_does_not_stop_the_others(runner):
    """A piece of it goes in, then everybody who runs takes a step."""
    loop, (first, *_), long = Scheduler(runner, 2, CAPACITY, chunk=5), requests_of(), requests_of()[4]
    loop.add(first)
    loop.step()
    loop.add(long)
    for n in (2, 3, 4, 5, 6, 7):
        assert not long.tokens
        loop.step()
        assert len(first.tokens) == n and long.n_read == min(30, 5 * (n - 1))
    assert len(long.tokens) == 1


@needs_compiler
def test_rows_that_are_done_leave_at_once(tiny_gpt2_folder):
    """On a runner of the same bits at any width; the others pay for their own rows alone."""
    runner = NativeRunner(checkpoint.load(tiny_gpt2_folder))
    loop, requests = Scheduler(runner, 6, CAPACITY), requests_of()
    for request in requests:
        loop.add(request)
    loop.step()
    assert [r.is_done for r in requests] == [False, False, False, False, False, True]  # one new token
    assert loop.cache.free_rows == [5]
    loop.step()
    assert loop.cache.free_rows == [3, 5] and loop.cache.n_rows == 5
    loop.step()
    assert loop.cache.n_rows == 4


def test_eager_rows_run_along_while_others_do(tiny_gpt2_folder):
    """The width of a step would change the last bits of the neighbours; a row ends where its place does."""
    runner = EagerRunner(checkpoint.load(tiny_gpt2_folder))
    loop = Scheduler(runner, 2, 20)
    short, long = Request([5] * 17, 2), Request([7] * 3, 15)
    loop.add(short)
    loop.add(long)
    loop.step()
    loop.step()
    assert short.is_done and loop.rows == [short, long]
    assert loop.cache.n_rows == 2
    loop.run()
    assert len(short.tokens) == 2 and len(long.tokens) == 15
    assert [short.tokens, long.tokens] == [alone(runner, short), alone(runner, long)]


def test_back_to_where_a_slice_began(runner):
    loop, request = Scheduler(runner, 1, CAPACITY, keeps_done=True), Request([3, 4, 5], 4)
    loop.add(request)
    loop.run()
    first = list(request.tokens)
    assert len(first) == 4 and request.is_done and not loop.is_busy
    loop.rewind(1)
    assert loop.is_busy and request.tokens == first[:1] and loop.cache.host_lengths == (3,)
    loop.run()
    assert request.tokens == first
    loop.clear()
    assert loop.rows == [None] and not loop.is_busy
    with pytest.raises(AssertionError, match="nothing is left"):
        loop.step()


def test_the_batch_may_choose_for_all(runner):
    loop, requests = (
        Scheduler(runner, 6, CAPACITY, choose=lambda logits: list(range(10, 10 + len(logits)))),
        requests_of(),
    )
    for request in requests:
        loop.add(request)
    loop.run()
    assert [r.tokens for r in requests] == [[10 + i] * n for i, n in enumerate(NEW)]


def test_what_does_not_fit_is_refused(runner):
    loop = Scheduler(runner, 1, 20)
    loop.add(Request([5] * 17, 4))  # the last token is not read in
    with pytest.raises(UsageError, match="17 prompt tokens and 5 new ones do not fit into rows of 20"):
        loop.add(Request([5] * 17, 5))
    loop.run()
