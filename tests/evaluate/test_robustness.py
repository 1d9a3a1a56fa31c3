"""Noise, adversarial edits, attention by head, longer inputs: each against what is known of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from paretune.engine.runners.eager import EagerRunner
from paretune.errors import UsageError
from paretune.evaluate import adversarial, attention_shift, length, noise
from paretune.evaluate.pairs import Pair
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.model.prompt import PromptFormat
from paretune.model.tokenizer import Tokenizer
from paretune.recipe import Recipe
from paretune.registry import ATTENTION
from paretune.transforms.base import Context

TEXT = "The keeper of the lighthouse wrote his log with great patience, winding the lamp each night."


def tiny(n_positions: int = 64, transforms=(), seed: int = 1, vocab_size: int = 97, form: str = "sdpa"):
    hf = {"model_type": "gpt2", "vocab_size": vocab_size, "n_positions": n_positions, "n_layer": 2, "n_head": 4}
    model = checkpoint.new(ModelConfig.from_hf(hf | {"n_embd": 32, "eos_token_id": 0, "bos_token_id": 0}), seed)
    recipe = Recipe.from_dict({"transforms": [*transforms, {"name": "attention", "form": form}]})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # attention that is far from uniform
    return recipe.apply(model, Context())


# ---- noise


@pytest.mark.parametrize("kind", noise.KINDS)
def test_noise_is_a_function_of_text_and_seed(kind):
    text = f"{TEXT} {TEXT.replace('log', 'book')}"
    once = noise.noisy(text, kind, 3)
    assert once != text and once == noise.noisy(text, kind, 3)
    if "small" not in kind:
        assert once != noise.noisy(text, kind, 4)


def test_what_each_noise_keeps():
    text = " ".join(f"word{i} is Here" for i in range(100))
    swapped = noise.swap_characters(text, 1.0)
    assert [sorted(w) for w in swapped.split()] == [sorted(w) for w in text.split()]
    assert all(a[0] == b[0] and a[-1] == b[-1] for a, b in zip(swapped.split(), text.split(), strict=True))
    dropped = noise.drop_words(text, 0.2).split()
    assert 200 < len(dropped) < 280 and set(dropped) <= set(text.split())
    assert noise.change_case(text) == text.lower()
    assert noise.drop_words("one", 1.0) == "one"  # never nothing
    with pytest.raises(UsageError, match="unknown noise"):
        noise.noisy(text, "fog")


# ---- adversarial edits


@pytest.fixture(scope="module")
def words():
    return Tokenizer(checkpoint.resolve("pocket"))


def test_the_gradient_is_the_derivative(words):
    model = tiny(vocab_size=8192)
    ids = torch.tensor(words.encode(TEXT))[:24]
    n_prompt = 16
    gradient = adversarial._gradient(model, ids, n_prompt)
    table = model.embedding.weight.values
    assert not table.requires_grad and table.grad is None
    # A small change of one embedding, by hand: the token occurs once, so the table's row is that embedding.
    place = next(i for i in range(n_prompt) if int((ids == ids[i]).sum()) == 1 and int(ids[i]) < 8192)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    h = 1e-3
    losses, held = [], []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: held.append(inputs[0]))
    for sign in (1, -1):
        with torch.no_grad():
            table[ids[place]] += sign * h * direction
            held.clear()
            model(ids[None, :-1], None, "all")
            table[ids[place]] -= sign * h * direction
            logits = held[0][0] @ table.t()  # the head is tied: keep it as it was
            losses.append(F.cross_entropy(logits[n_prompt - 1 :].float(), ids[n_prompt:]).item())
    slope = (losses[0] - losses[1]) / (2 * h)
    assert slope == pytest.approx(float(gradient[place] @ direction), rel=0.05, abs=1e-3)


def test_an_attack_raises_the_loss_by_whole_words(words):
    model, form = tiny(vocab_size=8192), PromptFormat(max_len=60, max_new_tokens=12)
    pair = Pair("1", TEXT, "The keeper wrote a log.")
    found = adversarial.attack(model, words, form, pair, n_edits=2, n_tried=8)
    assert found.loss_after > found.loss_before and 1 <= len(found.edits) <= 2
    assert all(a.isalpha() and b.isalpha() and a != b for a, b in found.edits)
    before, after = TEXT.split(), found.article.split()
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    assert changed == len(found.edits)
    none = adversarial.attack(model, words, form, pair, n_edits=0)
    assert none.article == TEXT and none.loss_after == none.loss_before
    shown = form.prompt(words, TEXT, room=len(words.encode(" The keeper wrote a log.", special_tokens=False)))[0]
    ids = torch.tensor([*shown, *words.encode(" The keeper wrote a log.", special_tokens=False)])
    logits = model(ids[None, :-1], None, "all")[0, len(shown) - 1 :]
    assert none.loss_before == pytest.approx(F.cross_entropy(logits, ids[len(shown) :]).item(), rel=1e-5)


# ---- attention by head


ALIBI = {"name": "mechanism", "alibi": True}
WINDOW = {"name": "mechanism", "pattern": "prefix:2+window:5"}


@pytest.mark.parametrize("form", [f for f in ("eager", "sdpa") if f in ATTENTION.names()])
@pytest.mark.parametrize("transforms", [(), (ALIBI,), (WINDOW,)], ids=["dense", "alibi", "window"])
def test_weights_read_through_the_seam_are_the_softmax(form, transforms):
    model = tiny(transforms=transforms, form=form)
    tokens = torch.randint(0, 97, (2, 21))
    found = attention_shift.attention_weights(model, tokens)
    assert found.shape == (2, 2, 4, 21, 21)
    assert torch.allclose(found.sum(-1), torch.ones(2, 2, 4, 21), atol=1e-5)
    future = torch.ones(21, 21, dtype=torch.bool).triu(1)
    assert float(found[..., future].abs().max()) == 0
    # Layer 0 by hand: scores, bias and mask from the specification.
    layer = model.h[0].attn
    x = model.h[0].ln_1(model.wte(tokens) + (model.wpe(torch.arange(21)) if model.config.has_positions else 0))
    q, k, _ = layer.c_attn(x).view(2, 21, 3, 4, 8).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * layer.spec.scale
    if layer.spec.slopes:
        away = (torch.arange(21)[:, None] - torch.arange(21)[None]).float()
        scores = scores - torch.tensor(layer.spec.slopes)[:, None, None] * away
    scores = scores.masked_fill(~layer.spec.pattern.dense(21), float("-inf"))
    assert torch.allclose(found[0], scores.softmax(-1), atol=1e-5)


def test_shift_of_a_model_from_itself_and_from_a_window():
    dense, sparse = tiny(), tiny(transforms=(WINDOW,))
    tokens = torch.randint(0, 97, (2, 21))
    assert all(
        h.kl < 1e-6 and h.entropy == pytest.approx(h.dense_entropy) for h in attention_shift.shift(dense, dense, tokens)
    )
    rows = attention_shift.shift(sparse, dense, tokens)
    assert len(rows) == 8 and {(h.layer, h.head) for h in rows} == {(i, j) for i in range(2) for j in range(4)}
    assert all(h.kl > 0 for h in rows) and all(math.isfinite(h.kl) for h in rows)
    # the seam is as it was
    assert sparse.h[0].attn.attention is ATTENTION.get("sdpa")
    with pytest.raises(UsageError, match="513 tokens"):
        attention_shift.attention_weights(dense, torch.zeros(1, 513, dtype=torch.int64))


# ---- beyond the trained length


def test_learned_positions_refuse_and_alibi_goes_on():
    tokens = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    learned = length.by_position(EagerRunner(tiny(32)), tokens, 32, max_windows=2)
    assert [s.perplexity is None for s in learned] == [False, False] + [True] * 6
    assert learned[2].cause == "refused: positions end at 32"
    for transforms in ((ALIBI,), ({**ALIBI, "pattern": "prefix:2+window:8"},)):
        open_ended = length.by_position(EagerRunner(tiny(32, transforms)), tokens, 32, max_windows=2)
        assert [(s.begin, s.end) for s in open_ended] == [(16 * i, 16 * i + 16) for i in range(8)]
        assert all(s.perplexity and s.low <= s.perplexity <= s.high for s in open_ended)
        assert [s.n_tokens for s in open_ended] == [30] + [32] * 7  # the first token has no context


def test_perplexity_by_position_is_that_of_one_forward_pass(monkeypatch):
    monkeypatch.setattr(length, "STEP_TOKENS", 5)  # steps that do not divide the window
    model = tiny(32, (ALIBI,))
    tokens = torch.randint(0, 97, (64,))
    found = length.by_position(EagerRunner(model), tokens.tolist(), 32, factor=2, per_context=1, max_windows=1)
    with torch.no_grad():
        logits = model(tokens[None, :-1], None, "all")[0]
    losses = F.cross_entropy(logits, tokens[1:], reduction="none")
    expected = [losses[:31].mean().exp().item(), losses[31:].mean().exp().item()]
    assert [s.perplexity for s in found] == pytest.approx(expected, rel=1e-4)


def test_beyond_holds_the_same_tokens_against_each_other():
    """A token of the last quarter: with all of its long window before it, and with its own quarter alone."""
    model = tiny(32, (ALIBI,))
    tokens = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(3))
    found = length.beyond(EagerRunner(model), tokens.tolist(), 32, max_windows=5)
    differences = []
    for window in tokens[:256].view(2, 128):  # 300 tokens hold two
        far, near = (
            F.cross_entropy(model(x[None, :-1], None, "all")[0], x[1:], reduction="none") for x in (window, window[96:])
        )
        differences.append(far[96:] - near)
    wanted = torch.cat(differences)
    assert found["change"] == pytest.approx(math.expm1(wanted.mean().item()), rel=1e-3)
    assert abs(found["change"]) > 1e-3 and found["n_tokens"] == len(wanted) == 62
    assert found["low"] is None and found["high"] is None  # 62 tokens are one block


def test_beyond_is_not_moved_by_another_text():
    """A model that sees one token does as well far out as near, whatever the stretches hold."""
    alone = {"name": "mechanism", "alibi": True, "pattern": "window:1"}
    runner = EagerRunner(tiny(32, (alone,)))
    easy, hard = torch.full((96,), 5), torch.randint(0, 97, (32,), generator=torch.Generator().manual_seed(3))
    tokens = torch.cat([easy, hard]).repeat(9).tolist()
    stretches = length.by_position(runner, tokens, 32, per_context=1)
    assert abs(stretches[-1].perplexity / stretches[0].perplexity - 1) > 0.1
    found = length.beyond(runner, tokens, 32)
    assert found["n_tokens"] == 8 * 31
    assert all(found[name] == pytest.approx(0, abs=1e-5) for name in ("change", "low", "high"))


def test_beyond_needs_such_positions_and_a_window_of_text():
    tokens = [1] * 256
    assert length.beyond(EagerRunner(tiny(32)), tokens, 32) is None
    assert length.beyond(EagerRunner(tiny(32, (ALIBI,))), tokens[:127], 32) is None
    runner = EagerRunner(tiny(32, (ALIBI,)))
    seen = []
    forward = runner.forward
    runner.forward = lambda x, *rest: (seen.append(x.numel()), forward(x, *rest))[1]
    assert length.beyond(runner, tokens, 32, max_windows=1)["n_tokens"] == 31
    assert sum(seen) == 127 + 31  # one window and its last quarter, whatever more text there is
