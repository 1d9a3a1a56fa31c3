"""`evaluate/fidelity.py`: what is scored, what is compared, and what the gate lets through."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paretune import stats
from paretune.errors import ParetuneError, UsageError
from paretune.evaluate import fidelity
from paretune.evaluate.fidelity import PhaseScores, Scores, compare, score, windows_of
from paretune.evaluate.perplexity import kl_divergence
from paretune.records.record import to_json

V = 29


class ToyCache:
    def __init__(self, batch_size: int, capacity: int) -> None:
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        self.tokens = torch.zeros(batch_size, capacity, dtype=torch.int64)

    def truncate_(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)


class ToyRunner:
    """Logits from the mean embedding of the whole context; noise that a variant adds in one phase or both."""

    def __init__(
        self, *, noise: float = 0.0, phases: tuple[str, ...] = ("prefill", "decode"), bad: float = 0.0
    ) -> None:
        g = torch.Generator().manual_seed(3)
        self.embed = torch.randn(V, 8, generator=g)
        self.head = torch.randn(8, V, generator=g)
        self.noise, self.phases, self.bad = noise * torch.randn(8, V, generator=g), phases, bad
        self.calls: list[tuple[tuple[int, ...], str]] = []

    def new_cache(self, batch_size: int, capacity: int) -> ToyCache:
        return ToyCache(batch_size, capacity)

    def forward(self, tokens: torch.Tensor, cache: ToyCache, logits: str = "last") -> torch.Tensor:
        self.calls.append((tuple(tokens.shape), logits))
        n, k = int(cache.lengths[0]), tokens.shape[1]
        cache.tokens[:, n : n + k] = tokens
        cache.lengths = cache.lengths + k
        phase = "decode" if k == 1 else "prefill"
        head = self.head + self.noise if phase in self.phases else self.head
        x = self.embed[cache.tokens[:, : n + k]]
        h = (x.cumsum(dim=1) / torch.arange(1, n + k + 1)[:, None] + x)[:, n:]
        out = h @ head
        if self.bad and phase in self.phases:
            out = out * self.bad
        return out if logits == "all" else out[:, -1:]


def windows(n: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (n, length), generator=torch.Generator().manual_seed(seed))


def full_logits(runner: ToyRunner, rows: torch.Tensor) -> torch.Tensor:
    """[N, T, V] in one prefill, on a fresh cache."""
    return runner.forward(rows, runner.new_cache(*rows.shape), "all")


def made(nll: dict[str, np.ndarray], log_probs: np.ndarray | None = None) -> Scores:
    """Scores with given losses, for the arithmetic of `compare`."""
    parts = {}
    for phase, values in nll.items():
        kept = np.arange(0 if log_probs is None else len(log_probs))
        kept_probs = np.zeros((0, V), np.float32) if log_probs is None else log_probs
        parts[phase] = PhaseScores(values.astype(np.float32), np.zeros(values.shape, np.int32), kept, kept_probs)
    return Scores("made", "0", **parts)


# --- what is scored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, n_prefill, n_decode", [(16, 8, 7), (17, 8, 8), (4, 2, 1), (5, 2, 2)])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_equal_one_full_pass(length: int, n_prefill: int, n_decode: int, batch_size: int) -> None:
    rows = windows(5, length)
    got = score(ToyRunner(), rows, batch_size=batch_size, text_name="toy/test")
    logits = full_logits(ToyRunner(), rows)
    log_probs = torch.log_softmax(logits.double(), -1)
    nll = -log_probs[:, :-1].gather(-1, rows[:, 1:, None]).squeeze(-1).numpy()  # [5, T - 1], token 0 has none
    assert got.prefill.nll.shape == got.prefill.top1.shape == (5, n_prefill)
    assert got.decode.nll.shape == got.decode.top1.shape == (5, n_decode)
    both = np.concatenate([got.prefill.nll, got.decode.nll], axis=1)
    np.testing.assert_allclose(both, nll, rtol=1e-4, atol=1e-5)
    top1 = logits[:, :-1].argmax(-1).numpy()
    np.testing.assert_array_equal(np.concatenate([got.prefill.top1, got.decode.top1], axis=1), top1)
    for part, first in ((got.prefill, 0), (got.decode, n_prefill)):
        assert part.kept.size == part.nll.size and part.log_probs.dtype == np.float32  # small: all are kept
        w, j = np.divmod(part.kept, part.nll.shape[1])
        np.testing.assert_allclose(part.log_probs, log_probs[w, first + j].numpy(), rtol=1e-4, atol=1e-5)
    assert got.protocol == f"toy/test/win{length}/prefill{n_prefill}+decode{n_decode}/token"


def test_goes_through_prefill_and_decode_with_one_shape_each() -> None:
    runner, done = ToyRunner(), []
    score(runner, windows(5, 9), batch_size=2, progress=lambda i, n: done.append((i, n)))
    batch = [((2, 4), "all"), *[((2, 1), "last")] * 4]
    assert runner.calls == batch * 3  # the third batch is filled up
    assert done == [(2, 5), (4, 5), (5, 5)]


def test_kept_positions_are_seeded_spread_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = windows(20, 33)
    a, b = score(ToyRunner(), rows, keep_positions=100), score(ToyRunner(noise=1.0), rows, keep_positions=100)
    for phase in fidelity.PHASES:
        kept = getattr(a, phase).kept
        np.testing.assert_array_equal(kept, getattr(b, phase).kept)
        assert kept.size == np.unique(kept).size == 50
        assert np.unique(kept // 16).size > 10  # over many windows, and over all of a window
        assert np.unique(kept % 16).size > 10
    other = score(ToyRunner(), rows, keep_positions=100, seed=1)
    assert not np.array_equal(a.decode.kept, other.decode.kept)
    monkeypatch.setattr(fidelity, "_KEPT_BYTES", 30 * V * 2)
    small = score(ToyRunner(), rows)
    assert small.decode.log_probs.dtype == np.float16
    assert small.decode.log_probs.nbytes + small.prefill.log_probs.nbytes <= 2 * fidelity._KEPT_BYTES
    assert small.decode.kept.size == 30
    none = score(ToyRunner(), rows, keep_positions=0)
    assert compare(none, none).kl_mean is None


def test_windows_of_cuts_without_overlap() -> None:
    got = windows_of(list(range(23)), 5)
    assert got.dtype == torch.int64 and got.tolist() == [list(range(i, i + 5)) for i in range(0, 20, 5)]
    with pytest.raises(ParetuneError, match="text too short: 4 tokens, one window needs 5"):
        windows_of(torch.arange(4), 5)
    with pytest.raises(UsageError):
        windows_of(torch.arange(40), 3)


def test_wrong_arguments_of_score() -> None:
    for rows in (windows(1, 3), torch.zeros(8, dtype=torch.int64), torch.zeros(0, 8, dtype=torch.int64)):
        with pytest.raises(UsageError):
            score(ToyRunner(), rows)
    with pytest.raises(UsageError):
        score(ToyRunner(), windows(2, 8), batch_size=0)


# --- files --------------------------------------------------------------------------------------------------


def test_saves_and_loads(tmp_path: Path) -> None:
    a = score(ToyRunner(), windows(6, 16))
    path = tmp_path / "deep" / "baseline.npz"
    a.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["baseline.npz"]
    b = Scores.load(path)
    assert (a.protocol, a.text_hash) == (b.protocol, b.text_hash)
    for phase in fidelity.PHASES:
        for field in dataclasses.fields(PhaseScores):
            x, y = getattr(getattr(a, phase), field.name), getattr(getattr(b, phase), field.name)
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
    assert compare(a, b).identical


def test_a_missing_or_damaged_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ParetuneError, match="cannot read the scores"):
        Scores.load(tmp_path / "none.npz")
    path = tmp_path / "a.npz"
    score(ToyRunner(), windows(6, 16)).save(path)
    whole = path.read_bytes()
    for data in (b"", b"abc", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(data)
        with pytest.raises(ParetuneError, match="is not a whole file of scores"):
            Scores.load(path)
    np.save(tmp_path / "b.npy", np.zeros(3))
    np.savez(tmp_path / "c.npz", format=99)
    for name in ("b.npy", "c.npz"):
        with pytest.raises(ParetuneError, match="is not a whole file of scores"):
            Scores.load(tmp_path / name)


# --- comparing ----------------------------------------------------------------------------------------------


def noisy_pair(delta: float, spread: float, n: int = 60, seed: int = 0) -> tuple[Scores, Scores]:
    """Losses whose text varies far more than the difference, of mean `delta` and that spread a block."""
    rng = np.random.default_rng(seed)
    base = {p: 3 + rng.normal(size=(n, 1)) + rng.normal(size=(n, 128)) for p in fidelity.PHASES}
    offsets = {p: rng.normal(size=(n, 1)) for p in fidelity.PHASES}
    other = {p: base[p] + delta + spread * (offsets[p] - offsets[p].mean()) for p in fidelity.PHASES}
    return made(base), made(other)


def test_an_identical_variant_passes_a_bound_of_zero() -> None:
    rows = windows(60, 257)
    a = score(ToyRunner(), rows, batch_size=60, keep_positions=400)
    got = compare(a, score(ToyRunner(), rows, batch_size=60, keep_positions=400), 0.0)
    assert got.identical and got.within_bound and not got.too_little_text
    assert got.ppl_increase == got.ppl_increase_upper == got.kl_mean == got.kl_p99 == 0.0
    assert got.top1_agreement == 1.0 and got.perplexity == got.baseline_perplexity
    assert got.prefill.n_blocks == got.decode.n_blocks == 60
    assert got.prefill.n_top1_agree == got.prefill.n_tokens == 60 * 128
    mean = np.concatenate([a.prefill.nll, a.decode.nll]).mean(dtype=np.float64)
    assert got.perplexity == pytest.approx(math.exp(mean), rel=1e-9)


def test_the_paired_interval_is_far_tighter_than_the_unpaired() -> None:
    a, b = noisy_pair(delta=0.01, spread=0.01)
    got = compare(a, b, 0.05)
    paired = math.log1p(got.prefill.ppl_increase_upper) - math.log1p(got.prefill.ppl_increase)
    x, y = a.prefill.nll.mean(axis=1), b.prefill.nll.mean(axis=1)
    draws = np.random.default_rng(0).integers(0, 60, size=(2, 2000, 60))
    unpaired = np.quantile(y[draws[0]].mean(axis=1) - x[draws[1]].mean(axis=1), 0.95) - (y.mean() - x.mean())
    assert 0 < paired < unpaired / 20
    assert got.prefill.ppl_increase == pytest.approx(math.expm1(0.01), rel=1e-3)


def test_the_gate_is_the_one_sided_upper_bound() -> None:
    a, b = noisy_pair(delta=0.009, spread=0.02)
    got = compare(a, b, 0.01)
    assert got.ppl_increase < 0.01 < got.ppl_increase_upper
    assert not got.within_bound and "over the bound of +1.00%" in got.reason
    loose = compare(a, b, 0.02)
    assert loose.within_bound and "within the bound of +2.00%" in loose.reason
    blocks = (b.prefill.nll.astype(np.float64) - a.prefill.nll).mean(axis=1)
    assert got.prefill.ppl_increase_upper == pytest.approx(math.expm1(stats.upper_mean(blocks)), rel=1e-9)
    # One-sided: 1.645 standard errors up, not 1.96. Student's t at 60 blocks is 1.67.
    reach = (math.log1p(got.prefill.ppl_increase_upper) - 0.009) / (blocks.std(ddof=1) / math.sqrt(60))
    assert 1.6 < reach < 1.85
    assert compare(a, b, got.ppl_increase_upper).within_bound  # the limit itself is allowed


def test_a_better_variant_passes_a_bound_of_zero() -> None:
    a, b = noisy_pair(delta=-0.05, spread=0.01)
    assert compare(a, b, 0.0).within_bound
    assert not compare(b, a, 0.0).within_bound


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_worse_phase_is_gated(phase: str) -> None:
    rows = windows(42, 257)
    base = score(ToyRunner(), rows, batch_size=42, keep_positions=64)
    broken = score(ToyRunner(noise=0.8, phases=(phase,)), rows, batch_size=42, keep_positions=64)
    # Tokens are drawn at random, so a direction is not known: swap the two where the noise happens to help.
    if getattr(broken, phase).nll.mean() < getattr(base, phase).nll.mean():
        base, broken = broken, base
    got = compare(base, broken, 0.001)
    other = got.decode if phase == "prefill" else got.prefill
    assert got.phase == phase and not got.within_bound and not got.identical
    assert got.ppl_increase == getattr(got, phase).ppl_increase > 0.001
    assert other.ppl_increase == other.kl_mean == 0.0 and other.top1_agreement == 1.0
    assert getattr(got, phase).top1_agreement < 1.0
    assert phase in got.reason


def test_too_little_text_cannot_pass_a_bound() -> None:
    rows = windows(39, 257)
    a = score(ToyRunner(), rows, batch_size=39, keep_positions=8)
    got = compare(a, a, 1.0)
    assert got.too_little_text and not got.within_bound and got.identical
    assert "too little text: 39 blocks" in got.reason
    assert compare(a, a).within_bound  # no bound: nothing to pass
    one = score(ToyRunner(), windows(1, 16))
    alone = compare(one, one, 1.0)
    assert alone.ppl_increase == 0.0 and not alone.within_bound
    json.dumps(to_json(alone), allow_nan=False)
    assert to_json(alone)["ppl_increase_upper"] is None  # one block says nothing about its spread


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("limit", [None, 10.0])
def test_a_variant_that_gives_nan_never_passes(value: float, limit: float | None) -> None:
    rows = windows(40, 257)
    a = score(ToyRunner(), rows, batch_size=40, keep_positions=64)
    b = score(ToyRunner(bad=value, phases=("decode",)), rows, batch_size=40, keep_positions=64)
    got = compare(a, b, limit)
    assert not got.within_bound and got.phase == "decode" and "the variant gives NaN" in got.reason
    assert got.decode.n_not_finite > 0 and got.prefill.ppl_increase == 0.0
    plain = to_json(got)
    json.dumps(plain, allow_nan=False)
    assert plain["ppl_increase_upper"] is None and plain["decode"]["perplexity"] is None
    with pytest.raises(ParetuneError, match="the baseline gives NaN"):
        compare(b, a, limit)


def test_one_nan_outweighs_a_phase_without_a_bound() -> None:
    a = score(ToyRunner(), windows(1, 16))
    nll = a.decode.nll.copy()
    nll[0, 3] = math.nan
    b = dataclasses.replace(a, decode=dataclasses.replace(a.decode, nll=nll))
    assert compare(a, b).phase == "decode" and not compare(a, b).within_bound


def test_only_the_same_text_and_vocabulary_compare() -> None:
    a = score(ToyRunner(), windows(6, 16))
    for b in (score(ToyRunner(), windows(6, 16, seed=1)), score(ToyRunner(), windows(6, 18))):
        with pytest.raises(ParetuneError, match="different text was scored"):
            compare(a, b)
    a = score(ToyRunner(), windows(6, 16), keep_positions=8)
    for keep, seed in ((4, 0), (8, 5)):
        with pytest.raises(ParetuneError, match="kept different distributions"):
            compare(a, score(ToyRunner(), windows(6, 16), keep_positions=keep, seed=seed))


def test_kl_is_zero_for_itself_and_matches_torch() -> None:
    rows = windows(40, 33)
    a, b = score(ToyRunner(), rows), score(ToyRunner(noise=0.2), rows)
    assert compare(a, a).kl_mean == 0.0
    got = compare(a, b)
    expected = []
    for phase in fidelity.PHASES:
        p, q = (torch.from_numpy(getattr(x, phase).log_probs).double() for x in (a, b))
        expected.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
        assert getattr(got, phase).kl_mean == pytest.approx(float(expected[-1].mean()), rel=1e-4)
        assert getattr(got, phase).n_kl == 640
    both = torch.cat(expected)
    assert got.kl_mean == pytest.approx(float(both.mean()), rel=1e-4)
    assert got.kl_p99 == pytest.approx(float(both.quantile(0.99)), rel=1e-3)
    few = compare(score(ToyRunner(), rows, keep_positions=366), score(ToyRunner(noise=0.2), rows, keep_positions=366))
    assert few.kl_mean is not None and few.kl_p99 is None  # 366 samples do not carry a 99th percentile


def test_kl_in_fp16_is_off_by_second_order_only() -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.log_softmax(3 * torch.randn(100, 5000, generator=g), -1)
    q = torch.log_softmax(p + 0.02 * torch.randn(100, 5000, generator=g), -1)
    exact = kl_divergence(p.numpy(), q.numpy())
    rounded = kl_divergence(p.half().numpy(), q.half().numpy())
    assert exact.mean() > 1e-4
    assert abs(rounded.mean() - exact.mean()) < 1e-5 and (rounded >= 0).all()


def test_minus_infinity_is_a_probability_of_zero() -> None:
    class Masked(ToyRunner):
        def forward(self, tokens: torch.Tensor, cache: ToyCache, logits: str = "last") -> torch.Tensor:
            out = super().forward(tokens, cache, logits).clone()
            out[..., V - 1] = -math.inf  # a padded vocabulary
            return out

    rows = windows(6, 16).clamp(max=V - 2)
    a = score(Masked(), rows)
    assert compare(a, a).kl_mean == 0.0 and np.isfinite(a.decode.log_probs).all()


def test_json_has_the_keys_of_a_result() -> None:
    a, b = noisy_pair(delta=0.01, spread=0.01)
    plain: dict[str, Any] = json.loads(json.dumps(to_json(compare(a, b, 0.1)), allow_nan=False))
    wanted = "protocol perplexity baseline_perplexity ppl_increase ppl_increase_upper kl_mean top1_agreement"
    wanted += " n_windows phase within_bound too_little_text identical prefill decode reason"
    assert set(wanted.split()) <= set(plain)
    assert plain["within_bound"] is True and plain["n_windows"] == 60
    assert plain["decode"]["n_blocks"] == 60
