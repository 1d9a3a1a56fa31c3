"""The same text however it runs, and the right word where it is not."""

from __future__ import annotations

import pytest

from paretune.engine.decode.control import StepCosts
from paretune.engine.decode.speculative import Speculative
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.sampling import SamplingOptions
from paretune.engine.speculation import Speculator
from paretune.evaluate import lossless
from paretune.model import checkpoint
from paretune.records.lossless import Divergence

PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [9, 8, 7, 6]]
NEW = 12
NEAR, FAR = Divergence(0, 3, 5, 6, 5e-5), Divergence(1, 3, 5, 6, 0.02)
DRAWN, ENDED = Divergence(0, 3, 5, 6, None), Divergence(0, 3, None, 6, None)


@pytest.mark.parametrize(
    ("divergences", "same_bits", "changes_numbers", "word"),
    [
        ([], True, True, "identical"),
        ([FAR], False, True, "other numbers"),
        ([NEAR, DRAWN], False, False, "numerics"),
        ([NEAR, FAR], False, False, "bug"),
        ([NEAR], True, False, "bug"),  # the same bits are owed
        ([ENDED], True, False, "bug"),
    ],
)
def test_the_word_for_a_difference(divergences, same_bits, changes_numbers, word):
    assert lossless.judge(divergences, same_bits=same_bits, changes_numbers=changes_numbers) == word


@pytest.fixture
def runner(tiny_gpt2_folder):
    return EagerRunner(checkpoint.load(tiny_gpt2_folder))


@pytest.mark.parametrize("sampling", [SamplingOptions(), SamplingOptions(0.8, seed=1)])
def test_the_same_runner_again_is_identical(runner, sampling):
    known = lossless.reference(runner, PROMPTS, NEW, sampling)
    found = lossless.texts(runner, PROMPTS, NEW, sampling)
    way = lossless.way("again", known, found, same_bits=True, changes_numbers=False)
    assert (way.verdict, way.n_identical, way.n_tokens) == (
        "identical",
        2,
        sum(map(len, known.texts)),
    ) and not way.divergences


def test_a_difference_is_found_where_it_is_with_its_margin(runner):
    known = lossless.reference(runner, PROMPTS, NEW, SamplingOptions())
    found = [list(text) for text in known.texts]
    found[1][4] = (found[1][4] + 1) % runner.config.vocab_size
    found[1][9] = (found[1][9] + 1) % runner.config.vocab_size  # what follows the first difference does not count
    way = lossless.way("other", known, found, same_bits=False, changes_numbers=False)
    (only,) = way.divergences
    assert (only.prompt, only.position, only.expected, only.got) == (1, 4, known.texts[1][4], found[1][4])
    assert only.margin is not None and only.margin > 0  # greedy took the likeliest
    assert way.n_identical == 1


def test_a_text_that_ends_early_is_a_difference(runner):
    known = lossless.reference(runner, PROMPTS, NEW, SamplingOptions())
    way = lossless.way("cut", known, [known.texts[0][:-2], known.texts[1]], same_bits=True, changes_numbers=False)
    assert way.divergences == [Divergence(0, NEW - 2, known.texts[0][NEW - 2], None, None)] and way.verdict == "bug"


def test_a_wrong_acceptance_rule_is_caught(runner, monkeypatch):
    """Speculation that takes what was proposed instead of what the model says."""
    known = lossless.reference(runner, PROMPTS, NEW, SamplingOptions())
    real = Speculative._verify

    def careless(self, rows, running, parts):
        real(self, rows, running, parts)
        for row, request in running:
            if parts.get(row) and len(request.tokens) > 2:
                request.tokens[-1] = (parts[row][0] + 1) % runner.config.vocab_size

    free = StepCosts({1: 1.0, 16: 1.0})

    def spoken():
        maker = Speculator("lookup", runner, adapts=False, given=free)
        found = lossless.texts(runner, PROMPTS, NEW, SamplingOptions(), speculator=maker)
        assert maker.counts.n_proposed
        return lossless.way("lookup", known, found, same_bits=False, changes_numbers=False).verdict

    assert spoken() == "identical"
    monkeypatch.setattr(Speculative, "_verify", careless)
    assert spoken() == "bug"
