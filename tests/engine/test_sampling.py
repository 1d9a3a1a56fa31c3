"""Sampling: who survives, with what probability, and that draws follow it."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from paretune.engine.sampling import (
    Sampler,
    SamplingOptions,
    Uniforms,
    argmax,
    draw,
    draw_nucleus,
    penalize_repetition,
    philox,
    survivors,
)
from paretune.errors import UsageError

pytestmark = pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")

# Few different values: ties are the rule.
tied_logits = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0]), min_size=1, max_size=40).map(torch.tensor)
any_logits = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40).map(torch.tensor)
quick = settings(max_examples=150, deadline=None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@quick
@given(tied_logits, st.integers(1, 50), st.floats(0.1, 5))
def test_exactly_k_survive_ties(logits, k, temperature):
    ids, probabilities = survivors(logits, SamplingOptions(temperature, top_k=k))
    n = min(k, logits.numel())
    assert len(ids) == len(probabilities) == len(set(ids.tolist())) == n
    dropped = [x for i, x in enumerate(logits.tolist()) if i not in set(ids.tolist())]
    assert not dropped or min(logits[ids].tolist()) >= max(dropped)


@quick
@given(any_logits, st.floats(0.05, 3), st.integers(0, 20), st.floats(0.01, 1, exclude_min=True), st.floats(0, 1))
def test_survivors_form_a_distribution(logits, temperature, k, p, m):
    options = SamplingOptions(temperature, top_k=k, top_p=p, min_p=m)
    ids, probabilities = survivors(logits, options)
    assert len(ids) >= 1 and len(set(ids.tolist())) == len(ids)
    assert math.isclose(float(probabilities.double().sum()), 1, abs_tol=1e-5)
    assert (probabilities >= 0).all() and (probabilities.diff() <= 0).all()
    assert logits[ids[0]] == logits.max()
    # In proportion to what they had.
    softmax = torch.softmax(logits.double() / temperature, 0)[ids]
    assert_close(probabilities.double(), softmax / softmax.sum(), atol=1e-5, rtol=1e-4)


@quick
@given(any_logits, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    ids, _ = survivors(logits, SamplingOptions(1.0, top_p=p))
    probabilities = torch.softmax(logits.double(), 0)
    mass = float(probabilities[ids].sum())
    assert mass >= p - 1e-5
    assert mass - float(probabilities[ids[-1]]) < p + 1e-5  # one fewer would not reach it
    outside = set(range(len(logits))) - set(ids.tolist())
    assert all(probabilities[i] <= probabilities[ids[-1]] for i in outside)


@quick
@given(any_logits, st.floats(0, 1))
def test_min_p_keeps_those_at_least_that_share_of_the_first(logits, m):
    ids, _ = survivors(logits, SamplingOptions(1.0, min_p=m))
    share = torch.exp(logits.double() - logits.double().max())
    kept = set(ids.tolist())
    assert all(share[i] >= m - 1e-5 for i in kept)
    assert all(share[i] <= m + 1e-5 for i in set(range(len(logits))) - kept)


OPTIONS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 500},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.1},
    {"top_k": 30, "top_p": 0.7, "min_p": 0.02},
]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_survivors_equal_transformers(options, temperature):
    """The kept set and the probabilities of transformers' warpers, on logits without ties."""
    warpers = [TemperatureLogitsWarper(temperature)]
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    sizes = []
    for seed in range(10):
        logits = 3 * torch.randn(200, generator=generator(seed))
        scores = logits[None]
        for warper in warpers:
            scores = warper(None, scores)
        expected = torch.softmax(scores[0], 0)
        ids, probabilities = survivors(logits, SamplingOptions(temperature, **options))
        ours = torch.zeros(200).index_copy(0, ids, probabilities)
        assert set(ids.tolist()) == set(torch.isfinite(scores[0]).nonzero().flatten().tolist())
        assert_close(ours, expected, atol=1e-6, rtol=1e-4)
        sizes.append(len(ids))
    assert options.get("min_p") == 1.0 or options.get("top_k") in (1, 500) or 1 <= min(sizes) <= max(sizes) < 200


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 4.0])
def test_repetition_penalty_equals_transformers(penalty):
    logits = torch.randn(50, generator=generator())
    seen = [3, 7, 7, 3, 49, 0]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[None].clone())[0]
    before = logits.clone()
    assert torch.equal(penalize_repetition(logits, torch.tensor(sorted(set(seen))), penalty), expected)
    assert torch.equal(logits, before)  # the model's logits are not written to
    assert (penalty == 1) == torch.equal(expected, logits)


def test_the_sampler_remembers_prompt_and_output():
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0), [0, 0])
    logits = torch.tensor([4.0, 3.0, 2.5, 1.9])
    # 4 -> 2 (prompt), then the chosen: 3 -> 1.5, 2.5 -> 1.25; then the 2 is the most
    assert [sampler.choose(logits, i) for i in range(2, 6)] == [1, 2, 0, 0]


def test_penalty_and_temperature_zero_is_greedy_on_penalised_logits():
    sampler = Sampler(SamplingOptions(repetition_penalty=1.5), [2])
    assert sampler.choose(torch.tensor([1.0, 0.0, 1.4]), 1) == 0


def test_greedy():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, -1.0]])
    assert argmax(logits) == [1, 0]
    assert argmax(logits.bfloat16()) == [1, 0]
    assert SamplingOptions().greedy and not SamplingOptions(0.1).greedy
    sampler = Sampler(SamplingOptions(), [])
    assert [sampler.choose(logits[0], i) for i in range(3)] == [1, 1, 1]


def chi_square(counts: Counter, probabilities: torch.Tensor) -> tuple[float, float]:
    """The statistic, and a limit that chance exceeds about once in 10,000 (Wilson-Hilferty)."""
    n = sum(counts.values())
    cells = [(i, float(p)) for i, p in enumerate(probabilities) if p > 0]
    assert set(counts) <= {i for i, _ in cells}, "a token outside the set was drawn"
    statistic = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in cells)
    df = len(cells) - 1
    return statistic, df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3


LOGITS = torch.tensor([1.5, -0.3, 0.9, 0.1, -1.2, 0.4, 1.1, -0.7, 0.0, 0.6, -2.0, 0.3])


@pytest.mark.parametrize(
    ("top_p", "min_p"), [(1.0, 0.0), (0.8, 0.0), (0.5, 0.0), (1.0, 0.3), (0.85, 0.25), (0.35, 0.1)]
)
def test_the_nucleus_draws_what_survives(top_p, min_p):
    options = SamplingOptions(1.0, top_p=top_p, min_p=min_p)
    ids, kept = survivors(LOGITS, options)
    expected = torch.zeros(len(LOGITS)).index_copy(0, ids, kept)
    assert (len(ids) < len(LOGITS)) == (top_p < 1 or min_p > 0)
    probabilities = torch.softmax(LOGITS, 0)
    counts = Counter(draw_nucleus(probabilities, top_p, min_p, Uniforms(1, 0, i)) for i in range(8000))
    statistic, limit = chi_square(counts, expected)
    assert statistic < limit
    if 0.3 < top_p < 1:  # and the test would notice: the untruncated distribution does not fit
        with pytest.raises(AssertionError):
            chi_square(Counter(draw(probabilities, Uniforms(1, 1, i)) for i in range(2000)), expected)


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.05, 0.25])
    drawn = Counter(draw(probabilities, Uniforms(2, 0, i)) for i in range(8000))
    statistic, limit = chi_square(drawn, probabilities)
    assert statistic < limit
    assert chi_square(Counter({0: 4400, 2: 1600, 3: 400, 4: 1600}), probabilities)[0] > limit


def test_the_sampler_follows_survivors_with_top_k():
    options = SamplingOptions(0.8, top_k=5, top_p=0.9, seed=3)
    ids, kept = survivors(LOGITS, options)
    sampler = Sampler(options, [])
    counts = Counter(sampler.choose(LOGITS, i) for i in range(6000))
    statistic, limit = chi_square(counts, torch.zeros(len(LOGITS)).index_copy(0, ids, kept))
    assert statistic < limit and 1 < len(ids) <= 5


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.7])
def test_ties_in_the_nucleus_go_by_index(top_p):
    """Ten equal tokens: the smallest set that reaches p is a fixed one of p * 10 tokens."""
    probabilities = torch.full((10,), 0.1, dtype=torch.float64)
    drawn = {draw_nucleus(probabilities, top_p, 0.0, Uniforms(0, 0, i)) for i in range(400)}
    assert drawn == set(range(round(top_p * 10)))


@quick
@given(tied_logits, st.floats(0.05, 1), st.floats(0, 1), st.integers(0, 5))
def test_the_nucleus_always_ends_on_a_legal_token(logits, top_p, min_p, seed):
    probabilities = torch.softmax(logits, 0)
    token = draw_nucleus(probabilities, top_p, min_p, Uniforms(seed, 0, 0))
    assert probabilities[token] >= min_p * probabilities.max() * (1 - 1e-6)
    assert probabilities[probabilities > probabilities[token]].sum() < top_p + 1e-6


ONE = {
    "greedy": SamplingOptions(),
    "temperature": SamplingOptions(0.9, seed=5),
    "top_k": SamplingOptions(0.9, top_k=4, seed=5),
    "nucleus": SamplingOptions(0.9, top_p=0.8, min_p=0.05, seed=5),
}


@pytest.mark.parametrize("name", ONE)
def test_a_seed_gives_the_same_draws(name):
    a, b = Sampler(ONE[name], [1]), Sampler(ONE[name], [1])
    torch.manual_seed(123)
    first = [a.choose(LOGITS, i) for i in range(30)]
    torch.manual_seed(321)  # the global generator is not asked
    assert [b.choose(LOGITS, i) for i in range(30)] == first
    if name != "greedy":
        other = Sampler(SamplingOptions(0.9, seed=6), [1])
        assert [other.choose(LOGITS, i) for i in range(30)] != first
        second = Sampler(ONE[name], [1], sample=1)
        assert [second.choose(LOGITS, i) for i in range(30)] != first


def test_the_generator_is_philox():
    """Against NumPy's, and the known answer of its authors for counter and key 0 (NumPy counts before it draws)."""
    assert philox((0, 0), (0, 0, 0, 0))[0] == 0x16554D9ECA36314C
    rng = np.random.default_rng(0)
    for _ in range(20):
        counter, key = rng.integers(1, 2**64, 4, np.uint64), rng.integers(0, 2**64, 2, np.uint64)
        before = counter.copy()
        before[0] -= 1
        expected = np.random.Philox(key=key, counter=before).random_raw(4)
        assert list(philox((int(key[0]), int(key[1])), tuple(map(int, counter)))) == expected.tolist()


def test_the_numbers_of_a_token_are_its_own():
    def first(n, *at):
        random = Uniforms(*at)
        return [random() for _ in range(n)]

    assert first(9, 5, 0, 70) == first(9, 5, 0, 70) and first(3, 5, 0, 70) == first(9, 5, 0, 70)[:3]
    drawn = [tuple(first(9, *at)) for at in ((5, 0, 70), (6, 0, 70), (5, 1, 70), (5, 0, 71))]
    flat = [u for numbers in drawn for u in numbers]
    assert len(set(flat)) == len(flat) and all(0 <= u < 1 for u in flat)


def test_tokens_do_not_depend_on_the_order_in_which_they_are_drawn():
    a, b = Sampler(ONE["nucleus"], [1]), Sampler(ONE["nucleus"], [1])
    forward = [a.choose(LOGITS, i) for i in range(40)]
    assert [b.choose(LOGITS, i) for i in reversed(range(40))] == forward[::-1]
    assert [a.choose(LOGITS, i) for i in range(40)] == forward  # nothing was used up


@pytest.mark.parametrize("lag", [1, 2, 7])
def test_neighbouring_positions_are_independent(lag):
    """Uniform, and pairs of them too: a chi-square of 10 by 10 cells, which a shared number fails at once."""
    u = [Uniforms(3, 0, i)() for i in range(8000 + lag)]

    def statistic(pairs):
        counts = Counter((int(10 * a), int(10 * b)) for a, b in pairs)
        n = sum(counts.values())
        return sum((counts[i, j] - n / 100) ** 2 / (n / 100) for i in range(10) for j in range(10))

    limit = 99 * (1 - 2 / (9 * 99) + 3.72 * math.sqrt(2 / (9 * 99))) ** 3
    assert statistic(zip(u, u[lag:], strict=False)) < limit
    assert statistic(zip(u, u, strict=True)) > limit


def test_without_a_seed_every_sampler_draws_its_own():
    a, b = (Sampler(SamplingOptions(1.0), []) for _ in range(2))
    assert [a.choose(LOGITS, i) for i in range(40)] != [b.choose(LOGITS, i) for i in range(40)]


@pytest.mark.parametrize("options", list(ONE.values()), ids=list(ONE))
def test_impossible_tokens_are_never_drawn(options):
    logits = torch.where(torch.arange(12) % 2 == 0, LOGITS, -math.inf)
    sampler = Sampler(options, [])
    assert all(sampler.choose(logits, i) % 2 == 0 for i in range(100))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("options", list(ONE.values())[1:], ids=list(ONE)[1:])
@pytest.mark.parametrize("bad", [[math.nan] * 12, [math.inf, *[0.0] * 11], [-math.inf] * 12])
def test_broken_logits_end_in_an_error(options, bad):
    """Not in an endless loop of rejections."""
    from paretune.errors import ParetuneError

    with pytest.raises(ParetuneError, match="NaN or infinity"):
        Sampler(options, []).choose(torch.tensor(bad), 0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.01}, "top-p"),
        ({"top_p": math.nan}, "top-p"),
        ({"min_p": -0.01}, "min-p"),
        ({"min_p": 1.5}, "min-p"),
        ({"repetition_penalty": 0.0}, "repetition-penalty"),
        ({"repetition_penalty": -1.0}, "repetition-penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
    ],
    ids=str,
)
def test_bad_options(change, named):
    with pytest.raises(UsageError, match=f"{named} is") as failure:
        SamplingOptions(**change)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "options",
    [{"top_p": 1.0}, {"min_p": 0.0}, {"min_p": 1.0}, {"top_k": 0}, {"temperature": 0.0}, {"seed": 2**63 - 1}],
    ids=str,
)
def test_the_edges_are_allowed(options):
    assert 0 <= Sampler(SamplingOptions(**{"temperature": 1.0, "seed": 0} | options), []).choose(LOGITS, 0) < 12
