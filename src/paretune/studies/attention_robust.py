"""The attention study, second half: noise, attacks, other domains, attention by head, longer inputs, streaming."""

from __future__ import annotations

import ast
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretune import clock
from paretune.engine.load import load_recipe
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import UsageError
from paretune.evaluate import adversarial, attention_shift, length, noise, summaries, texts
from paretune.evaluate.pairs import Pair, PairSet
from paretune.evaluate.summaries import SummaryScores
from paretune.measure import streaming
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.model.prompt import PromptFormat
from paretune.model.tokenizer import Tokenizer
from paretune.report.tables import Row
from paretune.studies.attention_data import Mechanism
from paretune.studies.attention_train import Tuned, write_summaries
from paretune.studies.common import Say
from paretune.transforms.base import Context

OWN_CODE = "source code and its descriptions"
SHIFT_TOKENS = 128


def code_pairs(n: int) -> PairSet:
    """Out of every model's domain, and always at hand: modules of this program, each with what it says of itself."""
    found = []
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        source = path.read_text("utf-8")
        said = ast.get_docstring(ast.parse(source))
        if said and len(source) > 2000:
            body = source.split('"""', 2)[-1].strip()
            found.append(Pair(path.stem, body, said.split("\n\n")[0].replace("\n", " ")))
    return PairSet(OWN_CODE, tuple(found)).take(n)


def under_noise(
    chosen: Sequence[Mechanism],
    tuned: Mapping[str, Tuned],
    pairs: PairSet,
    other: PairSet,
    form: PromptFormat,
    *,
    seed: int,
    device: str,
    batch_size: int,
    say: Say,
) -> list[Row]:
    """Scores of each mechanism on clean, noisy and foreign articles, with the paired change against the clean ones."""
    rows: list[Row] = []
    shape: dict[str, Any] = {"device": device, "batch_size": batch_size, "seeds": [seed]}
    for m in chosen:
        say(f"robustness: {m.name}")
        clean = write_summaries(m, tuned[m.weights], pairs, form, **shape).scores[seed]
        rows.append(_robust_row(m.name, "clean", clean, None))
        for kind in noise.KINDS:
            changed = [noise.noisy(p.article, kind, seed) for p in pairs.pairs]
            scored = write_summaries(m, tuned[m.weights], pairs, form, articles=changed, **shape).scores[seed]
            rows.append(_robust_row(m.name, kind, scored, clean))
        scored = write_summaries(m, tuned[m.weights], other, form, **shape).scores[seed]
        rows.append(_robust_row(m.name, f"out of domain: {other.name}", scored, None))
    return rows


def _robust_row(name: str, condition: str, scores: SummaryScores, clean: SummaryScores | None) -> Row:
    row = {"mechanism": name, "condition": condition, "n": len(scores.per_document["rouge1"])}
    row |= summaries.summary_row(scores)
    del row["system"]
    gap = summaries.difference(scores, clean)["rougeL"] if clean else None
    ends = (gap.value, gap.low, gap.high) if gap else (None, None, None)
    return row | dict(zip(("change_rougeL", "change_rougeL_low", "change_rougeL_high"), ends, strict=True))


def under_attack(
    chosen: Sequence[Mechanism],
    tuned: Mapping[str, Tuned],
    pairs: PairSet,
    form: PromptFormat,
    *,
    seed: int,
    device: str,
    batch_size: int,
    say: Say,
) -> list[Row]:
    """A few word changes, found on each mechanism itself, beside as many random ones."""
    rows: list[Row] = []
    for m in chosen:
        say(f"adversarial edits: {m.name}")
        folder = tuned[m.weights].folders[seed]
        # Gradients need PyTorch's own operators.
        net = load_recipe(folder, m.recipe(is_converted=True, form="sdpa"), device, check=False).runner.model
        tokenizer = Tokenizer(folder)
        found = adversarial.attack_all(net, tokenizer, form, pairs.pairs)
        at_random = [
            _random_edits(net, tokenizer, form, p, len(a.edits), seed) for p, a in zip(pairs.pairs, found, strict=True)
        ]
        del net
        made: dict[str, Any] = {"device": device, "batch_size": batch_size, "seeds": [seed]}
        clean = write_summaries(m, tuned[m.weights], pairs, form, **made).scores[seed]
        hurt = write_summaries(m, tuned[m.weights], pairs, form, articles=[a.article for a in found], **made).scores[
            seed
        ]
        gap = summaries.difference(hurt, clean)["rougeL"]
        rows.append(
            {
                "mechanism": m.name,
                "n": len(found),
                "edits": float(np.mean([len(a.edits) for a in found])),
                "loss_before": float(np.mean([a.loss_before for a in found])),
                "loss_after": float(np.mean([a.loss_after for a in found])),
                "loss_random": float(np.mean(at_random)),
                "rougeL_before": clean.metrics["rougeL"].value,
                "rougeL_after": hurt.metrics["rougeL"].value,
                "change_rougeL": gap.value,
                "change_rougeL_low": gap.low,
                "change_rougeL_high": gap.high,
                "example": "; ".join(f"{a} -> {b}" for a, b in (found[0].edits if found else ())),
            }
        )
    return rows


def _random_edits(net: Any, tokenizer: Tokenizer, form: PromptFormat, pair: Pair, n: int, seed: int) -> float:
    """The loss after `n` random word changes to what the model is shown: an edit that nobody searched for."""
    draw = random.Random(f"{seed}{pair.id}")
    words = adversarial.attack(net, tokenizer, form, pair, n_edits=0).article.split(" ")
    vocabulary = adversarial.word_tokens(tokenizer).tolist()
    for i in draw.sample(range(len(words)), min(n, len(words))):
        words[i] = tokenizer.decode([draw.choice(vocabulary)]).strip()
    changed = Pair(pair.id, " ".join(words), pair.summary)
    return adversarial.attack(net, tokenizer, form, changed, n_edits=0).loss_before


def head_shift(
    chosen: Sequence[Mechanism],
    dense: Mechanism,
    tuned: Mapping[str, Tuned],
    pairs: PairSet,
    *,
    seed: int,
    n_documents: int,
    say: Say,
) -> list[Row]:
    """Every head of each mechanism against the dense model's same head: entropy, divergence, how far it looks."""
    folder = tuned[dense.weights].folders[seed]
    tokenizer = Tokenizer(folder)
    encoded = [tokenizer.encode(p.article)[:SHIFT_TOKENS] for p in pairs.pairs[:n_documents]]
    T = min(len(e) for e in encoded)
    tokens = torch.tensor([e[:T] for e in encoded])
    reference = load_recipe(folder, dense.recipe(is_converted=True), check=False).runner.model
    rows: list[Row] = []
    for m in chosen:
        if m.weights == dense.weights:
            continue
        say(f"attention by head: {m.name}")
        place = tuned[m.weights].folders[seed]
        net = load_recipe(place, m.recipe(is_converted=True, form="sdpa"), check=False).runner.model
        for head in attention_shift.shift(net, reference, tokens):
            rows.append({"mechanism": m.name, **head.__dict__, "n_tokens": T, "n_documents": len(encoded)})
    return rows


def shift_summary(rows: Sequence[Row]) -> list[Row]:
    """Means over heads, and the head that moved most."""
    out = []
    for name in dict.fromkeys(r["mechanism"] for r in rows):
        own = [r for r in rows if r["mechanism"] == name]
        most = max(own, key=lambda r: r["kl"])
        means = {k: float(np.mean([r[k] for r in own])) for k in ("entropy", "dense_entropy", "kl")}
        means |= {k: float(np.mean([r[k] for r in own])) for k in ("distance", "dense_distance")}
        out.append({"mechanism": name, **means, "kl_max": most["kl"], "kl_max_head": f"{most['layer']}.{most['head']}"})
    return out


def beyond_length(
    chosen: Sequence[Mechanism],
    tuned: Mapping[str, Tuned],
    trained_len: int,
    *,
    seed: int,
    device: str,
    max_windows: int,
    say: Say,
) -> tuple[list[Row], list[Row]]:
    """Perplexity by position up to four times the trained context, on the project's own text.

    And what the far positions cost against the same tokens in windows of that context, of mechanisms that go so far.
    """
    rows: list[Row] = []
    far: list[Row] = []
    text = texts.text_of("confirm")
    for m in chosen:
        say(f"beyond the trained length: {m.name}")
        folder = tuned[m.weights].folders[seed]
        runner = load_recipe(folder, m.recipe(is_converted=True), device, check=False).runner
        tokens = Tokenizer(folder).encode(text)
        for stretch in length.by_position(runner, tokens, trained_len, max_windows=max_windows):
            rows.append({"mechanism": m.name, "positions": f"{stretch.begin}-{stretch.end}", **stretch.to_json()})
        change = length.beyond(runner, tokens, trained_len, max_windows=max_windows)
        if change is not None:
            far.append({"mechanism": m.name, **change})
    return rows, far


def stream_documents(
    config: ModelConfig,
    chosen: Sequence[Mechanism],
    lengths: Sequence[int],
    *,
    device: str,
    n_repeats: int,
    until: float,
    seed: int,
    say: Say,
) -> list[Row]:
    """Time to the first token and between tokens by length of the document, on random weights with enough positions.

    Mechanisms take turns in random order; what is predicted to end after `until` is a row that says so.
    """
    wide = config.with_positions(max(lengths) + streaming.N_NEW)
    runners: dict[str, EagerRunner] = {}
    for m in chosen:
        net = checkpoint.new(wide, seed).to(device)
        runners[m.name] = EagerRunner(m.recipe().apply(net, Context(device=device)))
        streaming.stream(runners[m.name], min(64, min(lengths)), n_new=3)  # warms up
    took: dict[str, tuple[int, float]] = {}
    rows: list[Row] = []
    draw = random.Random(seed)
    for n in sorted(lengths):
        say(f"streaming documents of {n} tokens")
        taken: dict[str, list[streaming.Latency]] = {m.name: [] for m in chosen}
        causes: dict[str, str] = {}
        for repeat in range(n_repeats):
            for m in draw.sample(list(chosen), len(chosen)):
                before = took.get(m.name)
                predicted = before[1] * (n / before[0]) ** 2 if before else 0.0
                if clock.now() + predicted > until:
                    if not repeat:
                        causes[m.name] = "not reached: the time budget would end first"
                    continue
                began = clock.now()
                try:
                    taken[m.name].append(streaming.stream(runners[m.name], n, seed=seed + repeat))
                except (UsageError, MemoryError, RuntimeError) as error:
                    causes[m.name] = " ".join(str(error).split())[:160]
                    continue
                took[m.name] = (n, clock.now() - began)
        for m in chosen:
            row: Row = {"mechanism": m.name, "document_tokens": n, "n_repeats": len(taken[m.name])}
            gaps = [g for latency in taken[m.name] for g in latency.itl_sec]
            known = bool(gaps)
            row["ttft_sec"] = float(np.median([x.ttft_sec for x in taken[m.name]])) if known else None
            row["itl_p50_sec"] = float(np.median(gaps)) if known else None
            row["itl_max_sec"] = max(gaps) if known else None
            row["kv_cache_bytes"] = taken[m.name][-1].kv_cache_bytes if known else None
            rows.append({**row, "cause": causes.get(m.name, "") if not known else ""})
    return rows
