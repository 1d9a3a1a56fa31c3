"""The attention study, first half: fine-tuning the mechanisms on pairs, and the summaries that they write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from paretune import stats
from paretune.engine.load import load_recipe
from paretune.evaluate import summaries
from paretune.evaluate.pairs import PairSet
from paretune.evaluate.summaries import Summary, SummaryScores
from paretune.model import checkpoint
from paretune.model.layers import DEFAULT_ATTENTION
from paretune.model.prompt import PromptFormat
from paretune.model.tokenizer import Tokenizer
from paretune.report.tables import Row
from paretune.studies.attention_data import FLASH, STANDARD, Mechanism
from paretune.studies.common import Say
from paretune.train import loop
from paretune.train.pairs import PairSource
from paretune.transforms.base import Context

MIN_SEEDS = 3  # fewer: no difference between fine-tuned rows is claimed


@dataclass
class Tuned:
    """Fine-tuned weights: a folder a seed, and what training them took."""

    folders: dict[int, Path] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


def fine_tune(
    folder: Path,
    chosen: Sequence[Mechanism],
    source: PairSource,
    options: loop.TrainOptions,
    seeds: Sequence[int],
    out: Path,
    say: Say,
) -> dict[str, Tuned]:
    """Converts and fine-tunes each set of weights with each seed; all alike but for the mechanism."""
    first = {m.weights: m for m in reversed(chosen) if m.form != DEFAULT_ATTENTION}
    tuned: dict[str, Tuned] = {name: Tuned() for name in dict.fromkeys(m.weights for m in chosen)}
    for seed in seeds:
        for name, found in tuned.items():
            say(f"fine-tuning {name}, seed {seed}: {options.steps} updates")
            net = checkpoint.load(folder)
            net = first[name].training.apply(net, Context(device=options.device))
            place = out / f"{name.replace(' ', '')}-{seed}"
            done = loop.fit(net, folder, source, replace(options, seed=seed), place, save_dtype="fp32")
            found.folders[seed] = place
            found.rows.append(
                {
                    "weights": name,
                    "seed": seed,
                    "updates": done.steps,
                    "first_heldout_loss": done.first_heldout_loss,
                    "heldout_loss": done.heldout_loss,
                    "train_sec": done.elapsed_sec,
                    "train_tokens_per_sec": done.tokens_per_sec,
                    "dtype": done.dtype,
                }
            )
    return tuned


@dataclass
class Written:
    """The summaries of a mechanism by seed, and their scores."""

    summaries: dict[int, list[Summary]] = field(default_factory=dict)
    scores: dict[int, SummaryScores] = field(default_factory=dict)


def write_summaries(
    mechanism: Mechanism,
    tuned: Tuned,
    pairs: PairSet,
    form: PromptFormat,
    *,
    device: str,
    batch_size: int,
    articles: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> Written:
    """Summaries of the held-out pairs by each seed's weights.

    Args:
        articles: other texts in place of the pairs' own, in their order (noise, attacks).
        seeds: only these.
    """
    found = Written()
    for seed, folder in tuned.folders.items():
        if seeds is not None and seed not in seeds:
            continue
        runner = load_recipe(folder, mechanism.recipe(is_converted=True), device, check=False).runner
        texts = [p.article for p in pairs.pairs] if articles is None else articles
        made = summaries.summarize(runner, Tokenizer(folder), form, texts, batch_size=batch_size)
        found.summaries[seed] = made
        found.scores[seed] = summaries.score(mechanism.name, made, pairs.pairs)
    return found


def quality_row(name: str, by_seed: Mapping[int, SummaryScores]) -> Row:
    """Means over seeds; the interval is over documents, of their means over seeds."""
    scores = list(by_seed.values())
    row: Row = {"system": name, "n_seeds": len(scores)}
    for key in summaries.METRICS:
        if key == "bleu":
            counts = np.stack([s.per_document[key] for s in scores], axis=1)  # (n, seeds, 10)

            def mean_bleu(draws: np.ndarray, axis: int) -> np.ndarray:
                return np.mean([summaries.bleu_of_counts(draws[:, :, s], axis) for s in range(draws.shape[2])], axis=0)

            value = stats.bootstrap(counts, mean_bleu)
        else:
            value = stats.bootstrap(np.mean([s.per_document[key] for s in scores], axis=0), np.mean)
        means = [s.metrics[key].value for s in scores]
        row |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
        row |= {f"{key}_seed_min": min(means), f"{key}_seed_max": max(means)}
    row["length_ratio"] = float(np.mean([s.length_ratio for s in scores]))
    ended = [s.ended_share for s in scores if s.ended_share is not None]
    row["ended_share"] = float(np.mean(ended)) if ended else None
    return row


def verdict(name: str, written: Mapping[str, Written]) -> str:
    """What may be said of a row against Flash GPT-2 on the same documents (ROUGE-L).

    Exact variants: whether every summary is the same text. Fine-tuned ones: a difference only where at least three
    seeds agree on its sign and each seed's paired interval over documents leaves out 0.
    """
    ours, theirs = written[name], written[FLASH]
    if name == FLASH:
        return "reference"
    if name == STANDARD:
        same = all(
            [s.text for s in ours.summaries[seed]] == [s.text for s in theirs.summaries[seed]]
            for seed in ours.summaries
        )
        return "identical texts (same weights, exact)" if same else "DIFFERENT TEXTS: not exact"
    if len(ours.scores) < MIN_SEEDS:
        return f"no claim: {len(ours.scores)} seed{'s' * (len(ours.scores) > 1)}"
    gaps = [summaries.difference(ours.scores[s], theirs.scores[s])["rougeL"] for s in ours.scores]
    if all(g.low > 0 for g in gaps):
        return "better in every seed"
    return "worse in every seed" if all(g.high < 0 for g in gaps) else "no difference beyond noise"


def step_count(n_examples: int, epochs: float, rows: int) -> int:
    return max(2, math.ceil(epochs * n_examples / rows))
