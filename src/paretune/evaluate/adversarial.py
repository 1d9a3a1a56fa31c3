"""The few word changes in an article that hurt its summary most, found by gradient.

HotFlip (Ebrahimi et al. 2018, arXiv:1712.06751) on whole words: to first order, replacing the token at position i by w
changes the loss by (e_w - e_i) . dL/de_i. The best candidates are tried for real; the worst one stays; again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from paretune.evaluate.pairs import Pair
from paretune.model.base import LanguageModel
from paretune.model.prompt import PromptFormat
from paretune.model.tokenizer import Tokenizer

N_EDITS = 3
N_TRIED = 16  # candidates of a step that are scored for real


@dataclass(frozen=True)
class Attack:
    """One article after its edits.

    Attributes:
        edits: (word before, word after) in the order found.
        loss_before, loss_after: nats per token of the reference summary.
    """

    article: str
    edits: tuple[tuple[str, str], ...]
    loss_before: float
    loss_after: float


def attack(
    model: LanguageModel,
    tokenizer: Tokenizer,
    form: PromptFormat,
    pair: Pair,
    *,
    n_edits: int = N_EDITS,
    n_tried: int = N_TRIED,
) -> Attack:
    """Replaces up to `n_edits` words of the article, each by the word of the vocabulary that raises the loss most.

    A word is one token before and after the change (a space and letters), so that the edit survives being text.
    The loss never falls: an edit that does not raise it ends the search.
    """
    answer = tokenizer.encode(f" {pair.summary.strip()}", special_tokens=False)[: form.max_new_tokens]
    shown, _ = form.prompt(tokenizer, pair.article, room=len(answer))
    tail = len(tokenizer.encode(form.suffix, special_tokens=False))
    head = len(tokenizer.encode(form.prefix)) if form.prefix else 0
    device = next(model.parameters()).device
    ids = torch.tensor([*shown, *answer], device=device)
    words = word_tokens(tokenizer, device)
    is_word = torch.zeros(model.embedding.weight.out_features, dtype=torch.bool, device=device)
    is_word[words] = True
    table: Tensor = model.embedding.weight.dequantize().float()
    n_prompt, edits, touched = len(shown), [], set()
    before = loss = float(_losses(model, ids[None], n_prompt)[0])
    for _ in range(n_edits):
        gradient = _gradient(model, ids, n_prompt)  # (T, C)
        places = [i for i in range(head, n_prompt - tail) if bool(is_word[ids[i]]) and i not in touched]
        if not places:
            break
        at = torch.tensor(places, device=device)
        gain = gradient[at] @ table[words].t() - (gradient[at] * table[ids[at]]).sum(-1, keepdim=True)  # (n, words)
        best = gain.flatten().topk(min(n_tried, gain.numel())).indices
        tried = ids.repeat(len(best), 1)
        rows = torch.arange(len(best), device=device)
        tried[rows, at[best // len(words)]] = words[best % len(words)]
        scored = _losses(model, tried, n_prompt)
        worst = int(scored.argmax())
        if float(scored[worst]) <= loss:
            break
        place = int(at[best[worst] // len(words)])
        edits.append(tuple(tokenizer.decode([int(t)]).strip() for t in (ids[place], tried[worst, place])))
        ids, loss = tried[worst], float(scored[worst])
        touched.add(place)
    article = tokenizer.decode(ids[head : n_prompt - tail].tolist())
    return Attack(article, tuple(edits), before, loss)  # type: ignore[arg-type]


def word_tokens(tokenizer: Tokenizer, device: torch.device | str = "cpu") -> Tensor:
    """Ids of the tokens that are a whole word with its space: letters alone, three or more."""
    found = []
    for i in range(tokenizer.vocab_size):
        text = tokenizer.decode([i])
        if text[:1] == " " and len(text) > 3 and text[1:].isalpha() and text[1:].isascii():
            found.append(i)
    return torch.tensor(found, device=device)


@torch.no_grad()
def _losses(model: LanguageModel, ids: Tensor, n_prompt: int) -> Tensor:
    """Mean nats of the summary's tokens: `[B, T] -> [B]`."""
    logits = model(ids[:, :-1], None, "all")[:, n_prompt - 1 :].float()
    targets = ids[:, n_prompt:]
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(-1)


def _gradient(model: LanguageModel, ids: Tensor, n_prompt: int) -> Tensor:
    """dL / d(embedding of each token), `[T - 1, C]`; the parameters get none."""
    held: list[Tensor] = []

    def keep(module: object, inputs: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_(True)
        held.append(leaf)
        return leaf

    with _frozen(model), torch.enable_grad():
        handle = model.embedding.register_forward_hook(keep)
        try:
            logits = model(ids[None, :-1], None, "all")[0, n_prompt - 1 :].float()
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, ids[n_prompt:]), held[0])
    return gradient[0].float()


class _frozen:
    """The parameters without gradients for the body, as they were after it."""

    def __init__(self, model: LanguageModel) -> None:
        self._flags = [(p, p.requires_grad) for p in model.parameters()]

    def __enter__(self) -> None:
        for p, _ in self._flags:
            p.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for p, flag in self._flags:
            p.requires_grad_(flag)


def attack_all(
    model: LanguageModel, tokenizer: Tokenizer, form: PromptFormat, pairs: Sequence[Pair], **options: int
) -> list[Attack]:
    """`attack` on each pair."""
    return [attack(model, tokenizer, form, pair, **options) for pair in pairs]
