"""ROUGE and BLEU against their packages, exact variants, baselines."""

from __future__ import annotations

import numpy as np
import pytest

from paretune.engine.load import load_recipe
from paretune.evaluate import summaries
from paretune.evaluate.pairs import own_pairs
from paretune.evaluate.summaries import Summary
from paretune.model.prompt import PromptFormat
from paretune.model.tokenizer import Tokenizer
from paretune.recipe import preset

PAIRS = own_pairs("confirm").pairs[:12]
FORM = PromptFormat(max_len=96, max_new_tokens=12)


def made(n: int = 12) -> list[Summary]:
    """Summaries that share words with their references, one of them empty."""
    texts = [" ".join(p.summary.split()[: 5 + 3 * i]) + " and more" for i, p in enumerate(PAIRS[:n])]
    return [Summary(t, len(t.split()), True) for t in [*texts[:-1], ""]]


def test_bleu_is_sacrebleus():
    import sacrebleu

    texts, references = [s.text for s in made()], [p.summary for p in PAIRS]
    counts, signature = summaries.bleu_counts(texts, references)
    expected = sacrebleu.corpus_bleu(texts, [references])
    assert float(summaries.bleu_of_counts(counts)) == pytest.approx(expected.score, abs=1e-9)
    assert "nrefs:1" in signature and "version:" in signature
    # without a single match of an order, sacrebleu smooths; without any match at all it gives 0
    for pair in ((["a b c d e"], ["a b x c d y"]), (["x"], ["a b c"]), ([""], ["a b c"])):
        counts, _ = summaries.bleu_counts(*pair)
        assert float(summaries.bleu_of_counts(counts)) == pytest.approx(sacrebleu.corpus_bleu(pair[0], [pair[1]]).score)


def test_rouge_is_rouge_scores():
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    found = summaries.rouge([s.text for s in made()], [p.summary for p in PAIRS])
    for i, (s, p) in enumerate(zip(made(), PAIRS, strict=True)):
        expected = scorer.score(p.summary, s.text)
        assert found["rouge1"][i] == expected["rouge1"].fmeasure and found["rougeL"][i] == expected["rougeL"].fmeasure
    two = summaries.rouge(["First it rained. Then it stopped."], ["Then it stopped. First it rained."])
    assert two["rougeLsum"][0] > two["rougeL"][0]  # Lsum does not mind the order of sentences


def test_scores_have_intervals_lengths_and_the_worst():
    scores = summaries.score("ours", made(), PAIRS)
    for value in scores.metrics.values():
        assert value.low <= value.value <= value.high and value.n == 12
    assert scores.worst[0]["summary"] == "" and scores.worst[0]["rougeL"] == 0
    words = sum(len(s.text.split()) for s in made()) / sum(len(p.summary.split()) for p in PAIRS)
    assert scores.length_ratio == pytest.approx(words)
    perfect = summaries.score("perfect", [Summary(p.summary, 1, True) for p in PAIRS], PAIRS)
    assert perfect.metrics["rouge1"].value == 1 and perfect.metrics["bleu"].value == pytest.approx(100)
    gap = summaries.difference(perfect, scores)
    assert all(value.low > 0 for value in gap.values())
    same = summaries.difference(scores, scores)
    assert all((v.value, v.low, v.high) == (0, 0, 0) for v in same.values())


def test_lead_and_copy(pocket_folder):
    text = "The Title\n\nOne is here. Two is there! Three? Four comes."
    assert summaries.lead(text) == "One is here. Two is there! Three?"
    tokenizer = Tokenizer(pocket_folder)
    found = summaries.baselines(PAIRS, tokenizer, FORM)
    assert set(found) == {"lead-3", "copy"}
    for pair, copied in zip(PAIRS, found["copy"], strict=True):
        assert copied.n_tokens <= 13 and pair.article.startswith(copied.text[:20])


def test_exact_variants_have_identical_rouge(pocket_folder):
    """Not similar: identical, text by text. The sum of a flash kernel differs in its last bits, its argmax does not."""
    tokenizer = Tokenizer(pocket_folder)
    articles = [p.article for p in PAIRS[:4]]
    texts, scores = {}, {}
    for name in ("eager_attn", "flash_attn"):
        runner = load_recipe(pocket_folder, preset(name)).runner
        out = summaries.summarize(runner, tokenizer, FORM, articles, batch_size=2)
        texts[name] = [s.text for s in out]
        scores[name] = summaries.score(name, out, PAIRS[:4])
    assert texts["eager_attn"] == texts["flash_attn"] and all(texts["eager_attn"])
    for key in summaries.ROUGE:
        assert np.array_equal(scores["eager_attn"].per_document[key], scores["flash_attn"].per_document[key])


def test_batches_give_what_each_article_gives_alone(pocket_folder):
    tokenizer = Tokenizer(pocket_folder)
    runner = load_recipe(pocket_folder, preset("baseline")).runner
    articles = [PAIRS[0].article[:90], PAIRS[1].article, PAIRS[2].article[:300]]
    together = summaries.summarize(runner, tokenizer, FORM, articles, batch_size=3)
    alone = [summaries.summarize(runner, tokenizer, FORM, [a])[0] for a in articles]
    assert [s.text for s in together] == [s.text for s in alone]
