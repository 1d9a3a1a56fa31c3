"""Training on pairs: what counts in the loss, exact resume, early stop, distillation, loss scaling."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from paretune.errors import ParetuneError, UsageError
from paretune.evaluate.pairs import Pair, PairSet, own_pairs
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.model.prompt import PromptFormat
from paretune.train import loop, objective
from paretune.train.objective import IGNORED, Teacher
from paretune.train.pairs import Example, PairSampler, collate, pair_source

POCKET = checkpoint.resolve("pocket")
FORM = PromptFormat(max_len=48, max_new_tokens=8)
OPTIONS = loop.TrainOptions(learning_rate=3e-3, steps=4, batch_size=3, dtype="fp32", seed=3)


def tiny(seed: int = 1):
    hf = {"model_type": "gpt2", "vocab_size": 8192, "n_positions": 64, "n_layer": 1, "n_head": 2, "n_embd": 16}
    return checkpoint.new(ModelConfig.from_hf(hf | {"eos_token_id": 0, "bos_token_id": 0}), seed)


@pytest.fixture(scope="module")
def source():
    short = [Pair(p.id, p.article, " ".join(p.summary.split()[:6])) for p in own_pairs("search").pairs[:13]]
    return pair_source(PairSet("s", tuple(short[:9])), PairSet("h", tuple(short[9:])), POCKET, FORM)


def weights(model):
    return {k: v.detach().clone() for k, v in model.named_parameters()}


def test_only_the_summary_counts():
    examples = [Example(np.array([5, 6, 7, 8, 0]), 3), Example(np.array([5, 9, 0]), 1)]
    inputs, targets = collate(examples)
    assert inputs.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert targets.tolist() == [[IGNORED, IGNORED, 8, 0], [9, 0, IGNORED, IGNORED]]


def test_padding_and_accumulation_change_nothing(source):
    """Micro-batches of any size give the gradient of the whole batch: sums over tokens, not means of means."""
    model = tiny().requires_grad_(True)
    batch = list(source.examples[:6])

    def gradient(parts):
        model.zero_grad()
        data = [collate(part) for part in parts]
        n = sum(objective.counted(t) for _, t in data)
        for inputs, targets in data:
            (objective.summed_loss(model, inputs, targets, "fp32", None) / n).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient([batch])
    assert torch.allclose(gradient([batch[:1], batch[1:]]), whole, atol=1e-7, rtol=1e-4)
    assert torch.allclose(gradient([[e] for e in batch]), whole, atol=1e-7, rtol=1e-4)
    inputs, targets = collate(batch)
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    mean = objective.mean_loss(model, inputs, targets, "fp32")
    assert mean.item() == pytest.approx(expected.item(), rel=1e-6)


def test_every_epoch_shows_each_pair_once(source):
    sampler = PairSampler(source.examples, 3, seed=5)
    n = len(source.examples)
    first = [tuple(row.tolist()) for _ in range(n // 3) for row in sampler.next()[1]]
    assert n == 9 and sampler.state() == {"epoch": 0, "position": 9}
    second = [tuple(row.tolist()) for _ in range(n // 3) for row in sampler.next()[1]]

    def answers(rows):
        return sorted(tuple(t for t in row if t != IGNORED) for row in rows)

    assert answers(first) == answers(second) and first != second


def test_resume_is_exact_and_the_format_is_recorded(source, tmp_path):
    straight = tiny()
    loop.fit(straight, POCKET, source, OPTIONS, tmp_path / "a")
    other = tiny()

    def stop(p):
        if p["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.fit(other, POCKET, source, OPTIONS, tmp_path / "b", progress=stop)
    other = tiny(seed=9)
    loop.fit(other, POCKET, source, OPTIONS, tmp_path / "b", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(other).values(), strict=True))
    found = PromptFormat.read(tmp_path / "a")
    assert found == source.format and found.suffix == FORM.suffix and 8 <= found.max_new_tokens <= 24
    assert json.loads((tmp_path / "a" / "train.json").read_text())["heldout"] == list(source.heldout_names)


def test_training_lowers_the_heldout_loss(source, tmp_path):
    result = loop.fit(tiny(), POCKET, source, replace(OPTIONS, steps=12, learning_rate=1e-2), tmp_path / "a")
    assert result.heldout_loss < result.first_heldout_loss - 0.5


def test_early_stop_keeps_the_best_weights(source, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 2.0, 4.0, 4.5, 1.0])
    best = {}

    def evaluate(self, model, options):
        loss = next(losses)
        if loss == 2.0:
            best.update(weights(model))
        return {"heldout_loss": loss}

    monkeypatch.setattr(type(source), "evaluate", evaluate)
    model = tiny()
    options = replace(OPTIONS, steps=40, eval_every=1, patience=2)
    result = loop.fit(model, POCKET, source, options, tmp_path / "a")
    assert result.stopped_early and (result.steps, result.kept_step, result.heldout_loss) == (4, 2, 2.0)
    assert all(torch.equal(v, best[k]) for k, v in weights(model).items())
    assert json.loads((tmp_path / "a" / "train.json").read_text())["finished"] is True


def test_a_run_to_its_last_step_keeps_the_best_weights_too(source, tmp_path, monkeypatch):
    losses = iter([5.0, 2.0, 3.0, 2.5, 2.25])
    best = {}

    def evaluate(self, model, options):
        loss = next(losses)
        if loss == 2.0:
            best.update(weights(model))
        return {"heldout_loss": loss, "heldout_bits_per_byte": 10 * loss}

    monkeypatch.setattr(type(source), "evaluate", evaluate)
    model = tiny()
    result = loop.fit(model, POCKET, source, replace(OPTIONS, eval_every=1, patience=9), tmp_path / "a")
    assert not result.stopped_early and (result.steps, result.kept_step) == (4, 1)
    assert (result.heldout_loss, result.heldout_bits_per_byte) == (2.0, 20.0)  # of what was written, not of step 4
    assert all(torch.equal(v, best[k]) for k, v in weights(model).items())
    assert json.loads((tmp_path / "a" / "train.json").read_text())["kept_step"] == 1


def test_with_patience_a_resume_is_held_to_the_evaluations(source, tmp_path):
    """They decide which weights are the best: losses of other windows do not compare."""

    def stop(p):
        raise KeyboardInterrupt

    options = replace(OPTIONS, eval_every=1, patience=9)
    with pytest.raises(KeyboardInterrupt):
        loop.fit(tiny(), POCKET, source, options, tmp_path / "a", progress=stop)
    with pytest.raises(UsageError, match="eval_windows was 0 and is 2"):
        loop.fit(tiny(), POCKET, source, replace(options, eval_windows=2), tmp_path / "a", True)


def test_without_patience_the_last_weights_are_kept(source, tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(type(source), "evaluate", lambda self, model, options: {"heldout_loss": next(losses)})
    result = loop.fit(tiny(), POCKET, source, replace(OPTIONS, eval_every=1), tmp_path / "a")
    assert (result.kept_step, result.heldout_loss, result.stopped_early) == (4, 5.0, False)


def test_resume_is_held_to_the_teacher(source, tmp_path):
    def teacher(key="key", weight=0.5, temperature=2.0):
        return Teacher(tiny(seed=7).eval().requires_grad_(False), key, weight, temperature)

    def go(resume, teacher, progress=None):
        return loop.fit(tiny(), POCKET, source, OPTIONS, tmp_path / "a", resume, progress, teacher=teacher)

    def stop(p):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(False, teacher(), stop)
    for other, words in (
        (teacher(weight=0.75), "weight 0.5, temperature 2, and is .* weight 0.75, temperature 2"),
        (teacher(temperature=1.0), "temperature 2, and is .* temperature 1"),
        (teacher(key="other"), "the teacher was key at .* and is other at"),
        (None, "and is none"),
    ):
        with pytest.raises(UsageError, match=words):
            go(True, other)
    go(True, teacher())
    history = json.loads((tmp_path / "a" / "train.json").read_text())
    assert history["teacher"] == {"key": "key", "weight": 0.5, "temperature": 2.0}


def test_distillation_pulls_towards_the_teacher(source, tmp_path):
    teacher = Teacher(tiny(seed=7).eval().requires_grad_(False), "key", weight=1.0)
    inputs, targets = collate(source.examples)

    def distance(model):
        with torch.no_grad():
            return objective.summed_loss(model, inputs, targets, "fp32", teacher).item()

    student = tiny()
    before = distance(student)
    loop.fit(student, POCKET, source, replace(OPTIONS, steps=10), tmp_path / "a", teacher=teacher)
    assert distance(student) < 0.8 * before and abs(distance(teacher.model)) < 1e-3


def test_teacher_arguments():
    with pytest.raises(UsageError, match="--distill-weight is 0"):
        Teacher(tiny(), "k", weight=0)
    small = checkpoint.new(
        ModelConfig.from_hf(
            {"model_type": "gpt2", "vocab_size": 64, "n_positions": 8, "n_layer": 1, "n_head": 1, "n_embd": 8}
        )
    )
    with pytest.raises(UsageError, match="the teacher knows 64 tokens"):
        Teacher(small, "k").check(tiny())


def test_an_overflow_in_fp16_costs_the_update_and_no_weights(source, tmp_path, monkeypatch):
    real = torch.amp.GradScaler
    options = replace(OPTIONS, dtype="fp16")
    model, before = tiny(), weights(tiny())
    with monkeypatch.context() as m:
        m.setattr(torch.amp, "GradScaler", lambda device, enabled: real(device, init_scale=2.0**127, enabled=enabled))
        result = loop.fit(model, POCKET, source, options, tmp_path / "a")
    assert all(p["skipped"] and p["grad_norm"] is None for p in result.points[1:]) and np.isfinite(result.loss)
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())
    result = loop.fit(model, POCKET, source, options, tmp_path / "b")
    assert result.dtype == "fp16" and not any(p.get("skipped") for p in result.points)
    assert not all(torch.equal(v, before[k]) for k, v in weights(model).items())


def test_summaries_that_are_too_long_are_counted():
    many = PairSet("x", (Pair("1", "short article", "word " * 60), Pair("2", "other article " * 40, "two words")))
    found = pair_source(many, None, POCKET, FORM)
    assert len(found.examples) == 1 and len(found.examples[0].tokens) == 48
    assert "1 skipped: the summary fills more than half of the limit" in found.said
    assert "1 articles cut to the limit" in found.said
    with pytest.raises(ParetuneError, match="no pair of y is left"):
        pair_source(PairSet("y", many.pairs[:1]), None, POCKET, FORM)


def test_the_limit_has_to_fit_the_model(source, tmp_path):
    hf = {"model_type": "gpt2", "vocab_size": 8192, "n_positions": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
    with pytest.raises(UsageError, match="--max-len 48 exceeds the model's 16 positions"):
        loop.fit(checkpoint.new(ModelConfig.from_hf(hf)), POCKET, source, OPTIONS, tmp_path / "a")
