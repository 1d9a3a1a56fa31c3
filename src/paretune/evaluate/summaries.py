"""Quality of summaries: ROUGE and BLEU through the standard packages, with intervals, lengths and the worst examples.

ROUGE is rouge-score's (Lin 2004, with Porter stemming), F-measure, 0 to 1; BLEU is sacrebleu's (Papineni et al. 2002;
Post 2018, arXiv:1804.08771), 0 to 100, one reference, its signature beside it. Intervals are bootstraps over documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paretune import stats
from paretune.engine.generate import generate
from paretune.engine.runners.base import Runner
from paretune.engine.sampling import SamplingOptions
from paretune.errors import UsageError
from paretune.evaluate.pairs import Pair
from paretune.model.prompt import PromptFormat, sentences
from paretune.model.tokenizer import Tokenizer

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
METRICS = (*ROUGE, "bleu")
N_WORST = 5
_MAX_ORDER = 4

DEFINITIONS = {
    "ROUGE-1, -2": "overlap of words, of pairs of words, between summary and reference (F-measure, stemmed), 0 to 1.",
    "ROUGE-L, -Lsum": "longest common subsequence of the whole text, and of its sentences together.",
    "BLEU": "sacrebleu's corpus BLEU, 0 to 100 (the published tables write 0 to 1); its signature says how.",
    "Interval": "95 %, bootstrapped over documents (another set of articles). It says nothing of another training run.",
    "Length": "words of all summaries / words of all references. Stopping early is not speed.",
    "Ended": "share of the summaries that the model ended itself, within the limit.",
    "lead-3": "the first three sentences of the article. News is written so that this is hard to beat.",
    "copy": "the article from its beginning, as many tokens as the model may write.",
}


@dataclass(frozen=True)
class Summary:
    """One generated summary.

    Attributes:
        n_tokens: new tokens, end tokens included.
        ended: by the model itself, within the limit.
    """

    text: str
    n_tokens: int
    ended: bool


@dataclass(frozen=True, eq=False)
class SummaryScores:
    """Scores of one system on a set of documents.

    Attributes:
        metrics: name -> estimate with its interval.
        per_document: name -> [n] ROUGE F-measures; BLEU's as counts, see `bleu_counts`.
        length_ratio: words of all summaries / words of all references.
        ended_share: None for what no model wrote.
        signature: sacrebleu's.
        worst: the documents of the lowest ROUGE-L.
    """

    name: str
    metrics: dict[str, stats.Interval]
    per_document: dict[str, NDArray[np.float64]]
    length_ratio: float
    n_tokens: int
    ended_share: float | None
    signature: str
    worst: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "n_documents": len(next(iter(self.per_document.values()))),
            "metrics": {name: value.to_json() for name, value in self.metrics.items()},
            "length_ratio": self.length_ratio,
            "n_tokens": self.n_tokens,
            "ended_share": self.ended_share,
            "bleu_signature": self.signature,
            "per_document": {name: self.per_document[name].tolist() for name in ROUGE},
            "worst": self.worst,
        }


def summarize(
    runner: Runner,
    tokenizer: Tokenizer,
    form: PromptFormat,
    articles: Sequence[str],
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Summary]:
    """Greedy summaries, in the order of the articles.

    Args:
        max_new_tokens: default the format's.
        progress: called with (articles done, articles in all).

    Raises:
        UsageError: the format's limit does not fit the model.
    """
    limit = form.max_new_tokens if max_new_tokens is None else max_new_tokens
    prompts = [form.prompt(tokenizer, article, room=limit)[0] for article in articles]
    # Prompts of like length go together, so that little is padding; each row gets what it would get alone.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    done: dict[int, Summary] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        result = generate(
            runner,
            [prompts[i] for i in chosen],
            limit,
            SamplingOptions(),
            tokenizer=tokenizer,
            eos_run=form.eos_run,
        )
        for i, g in zip(chosen, result.generations, strict=True):
            done[i] = Summary(g.text.strip(), len(g.tokens), g.finish_reason == "eos")
        if progress:
            progress(len(done), len(prompts))
    return [done[i] for i in range(len(prompts))]


def lead(article: str, n: int = 3) -> str:
    """The first `n` sentences of the article; a title (a first line without a full stop) is not a sentence."""
    lines = article.strip().splitlines()
    body = lines[1:] if len(lines) > 1 and not lines[0].rstrip().endswith((".", "!", "?", '"')) else lines
    return " ".join(sentences("\n".join(body))[:n])


def baselines(
    pairs: Sequence[Pair], tokenizer: Tokenizer, form: PromptFormat, max_new_tokens: int | None = None
) -> dict[str, list[Summary]]:
    """What needs no model: lead-3, and the article's beginning as long as the model may write."""
    limit = form.max_new_tokens if max_new_tokens is None else max_new_tokens

    def plain(text: str) -> Summary:
        return Summary(text, len(tokenizer.encode(text, special_tokens=False)), False)

    heads = [tokenizer.encode(p.article.strip(), special_tokens=False)[:limit] for p in pairs]
    return {
        "lead-3": [plain(lead(p.article)) for p in pairs],
        "copy": [plain(tokenizer.decode(head).strip()) for head in heads],
    }


def score(name: str, summaries: Sequence[Summary], pairs: Sequence[Pair], *, by_model: bool = True) -> SummaryScores:
    """ROUGE, BLEU, lengths and the worst examples of summaries against their references.

    Raises:
        UsageError: there is nothing to score.
    """
    if not pairs:
        raise UsageError("there is no pair to score", "Pass a file with articles and summaries")
    assert len(summaries) == len(pairs)
    texts = [s.text for s in summaries]
    references = [p.summary for p in pairs]
    per_document = rouge(texts, references)
    counts, signature = bleu_counts(texts, references)
    metrics = {key: stats.bootstrap(per_document[key], np.mean) for key in ROUGE}
    metrics["bleu"] = stats.bootstrap(counts, bleu_of_counts)
    worst = np.argsort(per_document["rougeL"], kind="stable")[:N_WORST]
    n_words = sum(len(r.split()) for r in references)
    return SummaryScores(
        name,
        metrics,
        {**per_document, "bleu": counts},
        sum(len(t.split()) for t in texts) / n_words,
        sum(s.n_tokens for s in summaries),
        sum(s.ended for s in summaries) / len(summaries) if by_model else None,
        signature,
        [
            {
                "id": pairs[i].id,
                "rougeL": float(per_document["rougeL"][i]),
                "summary": texts[i],
                "reference": references[i],
                "article_start": pairs[i].article[:200],
            }
            for i in worst
        ],
    )


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """F-measures `[n]` of each kind. Lsum sees a sentence a line, as rouge-score asks."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=True)
    found = []
    for text, reference in zip(texts, references, strict=True):
        by_line = ("\n".join(sentences(reference)), "\n".join(sentences(text)))
        found.append(scorer.score(*by_line))
    return {key: np.array([f[key].fmeasure for f in found]) for key in ROUGE}


def bleu_counts(texts: Sequence[str], references: Sequence[str]) -> tuple[NDArray[np.float64], str]:
    """Per document `[n, 10]`: matched and possible n-grams of orders 1 to 4, both lengths; and the signature."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)  # for single sentences; `bleu_of_counts` takes all orders
    rows = []
    for text, reference in zip(texts, references, strict=True):
        s = metric.sentence_score(text, [reference])
        rows.append([*s.counts, *s.totals, s.sys_len, s.ref_len])
    corpus = BLEU()
    corpus.corpus_score(list(texts[:1]), [list(references[:1])])  # the signature knows the number of references then
    return np.array(rows, dtype=np.float64), str(corpus.get_signature())


def bleu_of_counts(counts: NDArray[np.float64], axis: int = 0) -> NDArray[np.float64]:
    """Corpus BLEU, 0 to 100, of documents along `axis`: sacrebleu's formula with its exponential smoothing."""
    total = counts.sum(axis=axis)
    right, possible = total[..., :_MAX_ORDER], total[..., _MAX_ORDER : 2 * _MAX_ORDER]
    sys_len, ref_len = total[..., -2], total[..., -1]
    missed = np.cumsum(right == 0, axis=-1)  # an order without a match counts as 1 / 2^k of one, k-th of its kind
    precision = np.where(right == 0, 1 / 2.0**missed, right) / np.maximum(possible, 1)
    brevity = np.exp(np.minimum(0.0, 1 - ref_len / np.maximum(sys_len, 1)))
    value = 100 * brevity * np.exp(np.log(precision).mean(axis=-1))
    return np.where((possible == 0).any(axis=-1) | (right.sum(axis=-1) == 0), 0.0, value)


def difference(ours: SummaryScores, theirs: SummaryScores) -> dict[str, stats.Interval]:
    """Per metric ours minus theirs on the same documents, paired; the interval is over documents."""
    out = {}
    for key in METRICS:
        both = np.stack([ours.per_document[key], theirs.per_document[key]], axis=-1)

        def gap(draws: NDArray[np.float64], axis: int, is_bleu: bool = key == "bleu") -> NDArray[np.float64]:
            if is_bleu:
                return bleu_of_counts(draws[..., 0], axis) - bleu_of_counts(draws[..., 1], axis)
            return (draws[..., 0] - draws[..., 1]).mean(axis=axis)

        out[key] = stats.bootstrap(both, gap)
    return out


def summary_row(scores: SummaryScores) -> dict[str, Any]:
    """One flat row for tables: each metric with its ends."""
    row: dict[str, Any] = {"system": scores.name}
    for key, value in scores.metrics.items():
        row |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
    return row | {"length_ratio": scores.length_ratio, "ended_share": scores.ended_share}
