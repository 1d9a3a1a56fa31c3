"""`evaluate/perplexity.py` against a brute-force oracle and against the loop that Hugging Face documents."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from paretune import native_build
from paretune.errors import ParetuneError, UsageError
from paretune.evaluate.perplexity import (
    Perplexity,
    block_means,
    count_blocks,
    perplexity,
    rolling_windows,
    safe_exp,
    token_nll,
)


class TinyCache:
    """Lengths and the tokens seen: enough for a model that looks back."""

    def __init__(self, batch_size: int, capacity: int) -> None:
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        self.tokens = torch.zeros(batch_size, capacity, dtype=torch.int64)

    def truncate_(self, lengths: list[int]) -> None:
        assert len(lengths) == len(self.lengths)
        self.lengths = torch.tensor(lengths)


class BagRunner:
    """p(next) from the mean embedding of all tokens in the cache: depends on the whole context."""

    same_bits_at_any_width = False

    def __init__(self, vocab_size: int = 31, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.embed = torch.randn(vocab_size, 8, generator=g)
        self.head = torch.randn(8, vocab_size, generator=g)
        self.calls: list[tuple[int, ...]] = []

    def new_cache(self, batch_size: int, capacity: int) -> TinyCache:
        return TinyCache(batch_size, capacity)

    def forward(self, tokens: torch.Tensor, cache: TinyCache, logits: str = "last") -> torch.Tensor:
        self.calls.append(tuple(tokens.shape))
        n, k = int(cache.lengths[0]), tokens.shape[1]
        assert n + k <= cache.tokens.shape[1], "over capacity"
        cache.tokens[:, n : n + k] = tokens
        cache.lengths = cache.lengths + k
        sums = self.embed[cache.tokens[:, : n + k]].cumsum(dim=1)
        h = sums / torch.arange(1, n + k + 1)[:, None] + self.embed[cache.tokens[:, : n + k]]
        out = (h @ self.head)[:, n:]
        return out if logits == "all" else out[:, -1:]


class UniformRunner(BagRunner):
    def forward(self, tokens: torch.Tensor, cache: TinyCache, logits: str = "last") -> torch.Tensor:
        return torch.full_like(super().forward(tokens, cache, logits), 0.5)


class AnyWidthRunner(BagRunner):
    """Computes each position by itself, so that pieces of a window give the same bits."""

    same_bits_at_any_width = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[tuple[tuple[int, ...], str]] = []

    def forward(self, tokens: torch.Tensor, cache: TinyCache, logits: str = "last") -> torch.Tensor:
        self.asked.append((tuple(tokens.shape), logits))
        parts = [super(AnyWidthRunner, self).forward(tokens[:, j : j + 1], cache) for j in range(tokens.shape[1])]
        return torch.cat(parts if logits == "all" else parts[-1:], dim=1)


class HfRunner:
    """A transformers model behind the runner protocol (fresh cache only: perplexity is all prefill)."""

    same_bits_at_any_width = False

    def __init__(self, model: Any) -> None:
        self.model = model

    def new_cache(self, batch_size: int, capacity: int) -> TinyCache:
        return TinyCache(batch_size, capacity)

    def forward(self, tokens: torch.Tensor, cache: TinyCache, logits: str = "last") -> torch.Tensor:
        assert int(cache.lengths.max()) == 0
        cache.lengths = cache.lengths + tokens.shape[1]
        out = self.model(tokens).logits
        return out if logits == "all" else out[:, -1:]


def text_of(n: int, vocab_size: int = 31, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


def brute_force(runner: BagRunner, tokens: torch.Tensor, context: int, stride: int) -> dict[int, float]:
    """{token index: nll}, one forward pass a token, straight from the words of the protocol."""
    n = len(tokens)
    out: dict[int, float] = {}
    for t in range(1, n):
        # The first window that shows token t begins at the least multiple of stride with t < begin + context.
        begin = next(b for b in range(0, n, stride) if t < b + context)
        if begin == t:
            continue
        cache = runner.new_cache(1, n)
        logits = runner.forward(tokens[None, begin:t], cache, "last")[0, 0].double()
        out[t] = float(torch.logsumexp(logits, -1) - logits[tokens[t]])
    return out


SHAPES = [
    (64, 16, 16),
    (64, 16, 8),
    (61, 16, 16),
    (65, 16, 16),
    (61, 16, 5),
    (50, 7, 3),
    (20, 20, 1),
    (16, 16, 4),
]


@pytest.mark.parametrize("n, context, stride", SHAPES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_the_brute_force_oracle(n: int, context: int, stride: int, batch_size: int) -> None:
    tokens = text_of(n)
    got = perplexity(
        BagRunner(),
        tokens,
        context=context,
        stride=stride,
        n_bytes=4 * n,
        batch_size=batch_size,
        text_name="t/x",
    )
    expected = brute_force(BagRunner(), tokens, context, stride)
    assert got.n_tokens_scored == len(expected)
    assert got.n_tokens_unscored == n - len(expected)
    assert got.nll_per_token == pytest.approx(np.mean(list(expected.values())), rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(np.mean(list(expected.values()))), rel=1e-5)
    assert got.bits_per_byte == pytest.approx(sum(expected.values()) / math.log(2) / (4 * n), rel=1e-5)
    assert got.protocol == f"t/x/ctx{context}/stride{stride}/token"


@pytest.mark.parametrize("n, context, stride", SHAPES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_pieces_of_a_window_score_the_same(
    monkeypatch: pytest.MonkeyPatch, n: int, context: int, stride: int, batch_size: int
) -> None:
    shape: dict[str, Any] = {"context": context, "stride": stride, "n_bytes": n, "batch_size": batch_size}
    whole = perplexity(AnyWidthRunner(), text_of(n), **shape)
    assert whole.nll_per_token == pytest.approx(perplexity(BagRunner(), text_of(n), **shape).nll_per_token, rel=1e-5)
    for rows in (1, 7):
        monkeypatch.setattr("paretune.evaluate.perplexity.PIECE_ROWS", rows)
        assert perplexity(AnyWidthRunner(), text_of(n), **shape) == whole


def test_the_head_is_not_asked_for_what_is_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows of 16 that advance by 8, in pieces of 6: logits of 15 and of 8 positions, the context's last token
    among them; the last token of a window predicts nothing."""
    monkeypatch.setattr("paretune.evaluate.perplexity.PIECE_ROWS", 6)
    runner = AnyWidthRunner()
    perplexity(runner, text_of(24), context=16, stride=8, n_bytes=24)
    first = [((1, 6), "all"), ((1, 6), "all"), ((1, 3), "all")]
    second = [((1, 7), "last"), ((1, 6), "all"), ((1, 2), "all")]
    assert runner.asked == first + second


@pytest.mark.skipif(native_build.unavailable_reason() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("config", ["native", "native_int8"])
def test_the_native_runner_keeps_its_word(pocket_folder: Any, monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    """`same_bits_at_any_width`: whole windows, in batches and one after the other, and pieces of odd sizes."""
    from paretune.engine.load import load_recipe
    from paretune.recipe import preset

    runner = load_recipe(pocket_folder, preset(config), check=False).runner
    shape: dict[str, Any] = {"context": 96, "stride": 48, "n_bytes": 1}
    tokens = text_of(400, vocab_size=8192)
    found = []
    for rows, batch_size in ((1000, 1), (1000, 3), (37, 1), (64, 2)):
        monkeypatch.setattr("paretune.evaluate.perplexity.PIECE_ROWS", rows)
        found.append(perplexity(runner, tokens, batch_size=batch_size, **shape))
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("n", [*range(2, 12), 64, 65])
@pytest.mark.parametrize("context", [2, 5, 8])
def test_each_token_is_scored_exactly_once(n: int, context: int) -> None:
    for stride in range(1, context + 1):
        scored = [t for w in rolling_windows(n, context, stride) for t in range(w.first_scored, w.end)]
        assert scored == sorted(set(scored))
        if stride < context:
            assert scored == list(range(1, n))
        else:
            assert scored == [t for t in range(n) if t % context]
        for w in rolling_windows(n, context, stride):
            assert w.begin < w.first_scored < w.end <= w.begin + context


def hf_documented_loop(
    model: Any, ids: torch.Tensor, context: int, stride: int
) -> tuple[list[float], list[int], list[int]]:
    """The loop of huggingface.co/docs/transformers/perplexity: window means, its weights, true counts."""
    losses, weights, counts = [], [], []
    prev_end = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        trg_len = end - prev_end
        input_ids = ids[None, begin:end]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            loss = model(input_ids, labels=target_ids).loss
        losses.append(float(loss))
        weights.append(int((target_ids != -100).sum()) - 1)
        counts.append(int((target_ids[:, 1:] != -100).sum()))
        prev_end = end
        if end == len(ids):
            break
    return losses, weights, counts


@pytest.fixture(scope="module")
def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # far from uniform, so that an error of one position shows
    return model


@pytest.mark.parametrize("n", [160, 171])
@pytest.mark.parametrize("stride", [32, 16, 7])
def test_equals_the_hugging_face_loop(gpt2: Any, n: int, stride: int) -> None:
    tokens = text_of(n, 97)
    losses, weights, counts = hf_documented_loop(gpt2, tokens, 32, stride)
    got = perplexity(HfRunner(gpt2), tokens, context=32, stride=stride, n_bytes=n, batch_size=4)
    assert got.n_windows == len(losses)
    assert got.n_tokens_scored == sum(counts)
    assert got.nll_per_token == pytest.approx(np.average(losses, weights=counts), rel=1e-5)
    if stride == 32:  # without context the documented weights are the true counts: literal equality
        assert weights == counts
    assert got.nll_per_token == pytest.approx(np.average(losses, weights=weights), rel=2e-2)


@pytest.mark.parametrize("stride", [16, 8])
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(stride: int) -> None:
    got = perplexity(UniformRunner(), text_of(6000), context=16, stride=stride, n_bytes=6000)
    assert got.perplexity == pytest.approx(31, rel=1e-6)
    assert got.low == pytest.approx(31, rel=1e-6) and got.high == pytest.approx(31, rel=1e-6)
    assert got.bits_per_byte == pytest.approx(math.log2(31) * got.n_tokens_scored / 6000, rel=1e-6)


def test_the_interval_holds_the_value_and_has_about_the_right_width() -> None:
    n = 128 * 60 + 1
    got = perplexity(BagRunner(), text_of(n), context=64, stride=32, n_bytes=n)
    assert got.n_blocks == 60 and got.note == ""
    assert got.low is not None and got.high is not None and got.low < got.perplexity < got.high
    per_token = np.array(list(brute_force(BagRunner(), text_of(1500), 64, 32).values()))
    expected = 2 * 1.96 * per_token.std() / math.sqrt(n)  # random text: blocks are independent
    assert math.log(got.high / got.low) == pytest.approx(expected, rel=0.5)
    assert got.to_json()["interval"] == [got.low, got.high]


def test_little_text_has_no_interval() -> None:
    got = perplexity(BagRunner(), text_of(128 * 39), context=32, stride=16, n_bytes=9000)
    assert (got.low, got.high, got.note) == (None, None, "too little text")
    assert got.to_json()["interval"] is None


def test_nan_is_none_in_json_with_a_note() -> None:
    class NanRunner(BagRunner):
        def forward(self, tokens: torch.Tensor, cache: TinyCache, logits: str = "last") -> torch.Tensor:
            return super().forward(tokens, cache, logits) * math.nan

    got = perplexity(NanRunner(), text_of(64), context=16, stride=8, n_bytes=64)
    assert math.isnan(got.perplexity) and got.low is None
    assert "NaN" in got.note
    plain = got.to_json()
    assert plain["perplexity"] is None and plain["bits_per_byte"] is None
    json.dumps(plain, allow_nan=False)


def test_batches_keep_one_shape_but_for_the_rest() -> None:
    runner = BagRunner()
    done: list[tuple[int, int]] = []
    perplexity(
        runner,
        text_of(67),
        context=16,
        stride=16,
        n_bytes=67,
        batch_size=2,
        progress=lambda i, n: done.append((i, n)),
    )
    assert runner.calls == [(2, 16), (2, 16), (1, 3)]
    assert done == [(2, 5), (4, 5), (5, 5)]


def test_a_list_is_as_good_as_a_tensor() -> None:
    tokens = text_of(80)
    a = perplexity(BagRunner(), tokens.tolist(), context=16, stride=8, n_bytes=80)
    assert a == perplexity(BagRunner(), tokens, context=16, stride=8, n_bytes=80)
    assert isinstance(a, Perplexity)


def test_errors_name_cause_and_cure() -> None:
    with pytest.raises(ParetuneError, match=r"has 15 tokens.*--context 15 or smaller"):
        perplexity(BagRunner(), text_of(15), context=16, stride=8, n_bytes=15)
    with pytest.raises(ParetuneError, match=r"has 0 tokens.*Use a longer text$"):
        perplexity(BagRunner(), [], context=16, stride=8, n_bytes=15)
    for wrong in ({"stride": 17}, {"stride": 0}, {"context": 1}, {"n_bytes": 0}, {"batch_size": 0}):
        settings: dict[str, Any] = {"context": 16, "stride": 8, "n_bytes": 15} | wrong
        with pytest.raises(UsageError):
            perplexity(BagRunner(), text_of(64), **settings)


def test_token_nll_slices_give_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(37, 11) * 5, torch.randint(11, (37,))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(token_nll(logits, targets), expected)
    monkeypatch.setattr("paretune.evaluate.perplexity._SLICE_ELEMENTS", 50)
    torch.testing.assert_close(token_nll(logits, targets), expected)
    assert token_nll(logits.bfloat16(), targets).dtype == torch.float32


@pytest.mark.parametrize(
    "n, s, expected",
    [
        (50, 128, 50),
        (50, 127, 50),
        (3, 512, 12),
        (90, 32, 22),
        (90, 31, 22),
        (90, 63, 45),
        (400, 3, 10),
        (1, 5, 1),
        (7, 200, 7),
        (2, 383, 6),
    ],
)
def test_block_means_hold_every_token_once(n: int, s: int, expected: int) -> None:
    x = np.random.default_rng(0).normal(size=(n, s)) + 3
    blocks = block_means(x)
    assert blocks.size == count_blocks(n, s) == expected
    assert blocks.mean() == pytest.approx(x.mean(), rel=0.02)
    assert block_means(np.full((n, s), 3.25)) == pytest.approx(3.25, rel=1e-12)
    if s in (127, 128):
        np.testing.assert_allclose(blocks, x.mean(axis=1))
    if s == 512:
        np.testing.assert_allclose(blocks, x.reshape(-1, 128).mean(axis=1))


def test_safe_exp() -> None:
    assert safe_exp(1e6) == math.inf and math.isnan(safe_exp(math.nan)) and safe_exp(-math.inf) == 0.0
