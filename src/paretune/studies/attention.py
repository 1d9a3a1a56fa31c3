"""The published attention studies again: standard, Flash, ALiBi and sparse attention in one model, and hybrids.

Quality of fine-tuned summaries, speed, memory, training time, robustness, longer inputs, streaming: one command.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paretune import clock, files, hardware
from paretune.errors import UsageError
from paretune.evaluate import summaries
from paretune.evaluate.pairs import PairSet, own_pairs, own_training_pairs, read_pairs
from paretune.measure import bench
from paretune.measure.utilization import Sampler
from paretune.model.config import ModelConfig
from paretune.model.prompt import MAX_LEN, PromptFormat
from paretune.model.tokenizer import Tokenizer
from paretune.records.bench import BenchResult
from paretune.records.record import to_json
from paretune.studies import attention_data as data
from paretune.studies import attention_page as page
from paretune.studies import attention_robust as robust
from paretune.studies import attention_train as training
from paretune.studies import common
from paretune.studies.common import Say
from paretune.train.cost import BATCH_SIZES, training_costs
from paretune.train.pairs import pair_source
from paretune.train.schedule import TrainOptions, auto_dtype


@dataclass(frozen=True)
class Plan:
    """How much of everything: the quick study and the full one differ in nothing else."""

    max_len: int  # tokens of article and summary
    max_new_tokens: int
    n_train: int
    n_heldout: int
    seeds: int
    epochs: float
    bench_sec: float
    cost_length: int
    cost_blocks: int
    cost_sec: float
    n_noise: int
    n_attack: int
    n_shift: int
    n_windows: int
    stream_lengths: tuple[int, ...]
    stream_repeats: int
    stream_sec: float


QUICK = Plan(
    max_len=256,
    max_new_tokens=64,
    n_train=148,
    n_heldout=52,
    seeds=1,
    epochs=1.0,
    bench_sec=140.0,
    cost_length=32,
    cost_blocks=1,
    cost_sec=60.0,
    n_noise=10,
    n_attack=2,
    n_shift=4,
    n_windows=2,
    stream_lengths=(1024, 2048, 4096),
    stream_repeats=1,
    stream_sec=35.0,
)
FULL = Plan(
    max_len=MAX_LEN,
    max_new_tokens=MAX_LEN // 4,
    n_train=300,
    n_heldout=200,
    seeds=3,
    epochs=1.0,
    bench_sec=300.0,
    cost_length=MAX_LEN // 2,
    cost_blocks=6,  # fewer give no interval
    cost_sec=1500.0,
    n_noise=32,
    n_attack=8,
    n_shift=16,
    n_windows=6,
    stream_lengths=tuple(1024 * 2**i for i in range(6)),
    stream_repeats=2,
    stream_sec=360.0,
)


def run(
    model: str,
    output_dir: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    pairs: Path | None = None,
    article_column: str | None = None,
    summary_column: str | None = None,
) -> dict[str, Any]:
    """Measures everything and writes report.html, results.json, results.csv and pictures.

    Args:
        pairs: a .jsonl or .csv file with articles and summaries; default the project's own pieces.

    Raises:
        ParetuneError: the folder cannot be written, or the pairs cannot be used, before anything is measured.
    """
    folder, config, name = common.open_model(model)
    plan = QUICK if quick else FULL
    threads_read = hardware.set_threads(threads)
    header = common.header("attention", name, config, quick=quick, seed=seed)
    train_set, held = _pairs(plan, pairs, article_column, summary_column, seed)
    out = files.ensure_folder(output_dir)
    form = PromptFormat(max_len=min(plan.max_len, config.n_positions), max_new_tokens=1)
    source = pair_source(train_set, held, folder, form)
    form = replace(source.format, max_new_tokens=min(source.format.max_new_tokens, plan.max_new_tokens))
    options = _options(plan, len(source.examples), device)
    fast, no_fast = data.fast_form(device)
    chosen = data.mechanisms(config, fast)
    seeds = list(range(seed, seed + plan.seeds))
    own = held.name.startswith("paretune")
    foreign = robust.code_pairs(plan.n_noise) if own else own_pairs("confirm").take(plan.n_noise)
    result: dict[str, Any] = {
        **header,
        "device": device,
        "threads": threads_read,
        "pairs": {
            "train": train_set.name,
            "heldout": held.name,
            "n_train": len(source.examples),
            "n_heldout": len(held),
        },
        "data_said": list(source.said),
        "prompt": form.to_json(),
        "seeds": seeds,
        "pattern": data.pattern_of(config),
        "fast_form": fast,
        "fast_form_cause": no_fast,
        "options": {"learning_rate": options.learning_rate, "updates": options.steps, "pairs_per_update": ROWS},
    }
    with Sampler(device) as sampler, tempfile.TemporaryDirectory(prefix="paretune-study-") as scratch:
        work = Path(scratch)

        def phase(title: str) -> None:
            sampler.phase = title
            say(f"== {title}")

        phase("fine-tuning")
        tuned = training.fine_tune(folder, chosen, source, options, seeds, work, say)
        result["fine_tuning"] = [row for t in tuned.values() for row in t.rows]

        phase("summaries")
        result |= _quality(chosen, tuned, held, form, folder, device, say)

        phase("inference")
        measured = _speed(folder, config, chosen, plan, seed, device, threads, say)
        result["bench"] = to_json(measured)
        result |= common.noise_of([measured])

        phase("training cost")
        result["training"] = training_costs(
            folder,
            {m.name: m.training for m in chosen},
            batch_sizes=BATCH_SIZES,
            length=min(plan.cost_length, config.n_positions - 1),
            n_blocks=plan.cost_blocks,
            budget_sec=plan.cost_sec,
            dtype=options.dtype,
            device=device,
            threads=threads,
            seed=seed,
            log_folder=work,
            say=say,
        )

        phase("robustness")
        distinct = [m for m in chosen if m.name != data.STANDARD]  # exact: what holds for Flash holds for it
        shape: dict[str, Any] = {"seed": seed, "device": device, "say": say}
        few = held.take(plan.n_noise, seed)
        result["noise"] = robust.under_noise(distinct, tuned, few, foreign, form, batch_size=ROWS_EVAL, **shape)
        attacked = held.take(plan.n_attack, seed)
        result["attack"] = robust.under_attack(distinct, tuned, attacked, form, batch_size=ROWS_EVAL, **shape)
        flash = next(m for m in chosen if m.name == data.FLASH)
        result["heads"] = robust.head_shift(distinct, flash, tuned, held, seed=seed, n_documents=plan.n_shift, say=say)
        phase("longer inputs")
        result["length"], result["far"] = robust.beyond_length(
            distinct, tuned, config.n_positions, max_windows=plan.n_windows, **shape
        )
        phase("streaming")
        lengths = [n for n in plan.stream_lengths if quick is False or n <= 4 * config.n_positions]
        result["streaming"] = robust.stream_documents(
            config,
            chosen,
            lengths or [4 * config.n_positions],
            n_repeats=plan.stream_repeats,
            until=clock.now() + plan.stream_sec,
            **shape,
        )
    result["utilization"] = sampler.to_json()
    result["summary"] = page.lead_of(result)
    page.write(out, result)
    return result


MAX_OWN_PAIRS = 148  # with the 52 held-out pieces 200 in all
ROWS = 4  # pairs of an update
ROWS_EVAL = 16  # articles summarised at once


def _options(plan: Plan, n_examples: int, device: str) -> TrainOptions:
    steps = training.step_count(n_examples, plan.epochs, ROWS)
    return TrainOptions(
        learning_rate=5e-4,
        weight_decay=0.01,
        steps=steps,
        warmup_steps=steps // 10,
        batch_size=ROWS,
        dtype=auto_dtype(device, None, None),
        eval_windows=16 if plan is QUICK else 64,
        device=device,
    )


def _pairs(
    plan: Plan, path: Path | None, article_column: str | None, summary_column: str | None, seed: int
) -> tuple[PairSet, PairSet]:
    """Training and held-out pairs: of a file as the published study split its own, or of the project's pieces."""
    if path is None:
        if article_column or summary_column:
            raise UsageError("column names were given without a file of pairs", "Pass --pairs FILE")
        return own_training_pairs(min(plan.n_train, MAX_OWN_PAIRS)), own_pairs("confirm").take(plan.n_heldout)
    found = read_pairs(path, article_column, summary_column)
    train, held = found.split(min(plan.n_heldout, max(1, len(found) // 4)), seed)
    return train.take(plan.n_train, seed), held


def _quality(
    chosen: list[data.Mechanism], tuned: Any, held: PairSet, form: PromptFormat, folder: Path, device: str, say: Say
) -> dict[str, Any]:
    """Rows of the quality table, the verdicts, the scores by seed and the worst examples."""
    written = {}
    for m in chosen:
        say(f"summaries of {len(held)} articles: {m.name}")
        written[m.name] = training.write_summaries(m, tuned[m.weights], held, form, device=device, batch_size=ROWS_EVAL)
    rows = []
    for m in chosen:
        row = training.quality_row(m.name, written[m.name].scores)
        rows.append({**row, "verdict": training.verdict(m.name, written)})
    signature = ""
    for name, made in summaries.baselines(held.pairs, Tokenizer(folder), form).items():
        scores = summaries.score(name, made, held.pairs, by_model=False)
        rows.append({**training.quality_row(name, {0: scores}), "n_seeds": None, "verdict": "no model"})
        signature = scores.signature
    flash = written[data.FLASH].scores
    first = next(iter(flash.values()))
    return {
        "quality": rows,
        "bleu_signature": signature,
        "scores": {n: {str(s): v.to_json() for s, v in w.scores.items()} for n, w in written.items()},
        "worst": first.worst,
    }


def _speed(
    folder: Path,
    config: ModelConfig,
    chosen: list[data.Mechanism],
    plan: Plan,
    seed: int,
    device: str,
    threads: int | None,
    say: Say,
) -> BenchResult:
    """The mechanisms side by side in interleaved blocks, at the published length where the model has it."""
    n_new = min(32, config.n_positions // 4)
    n_in = min(MAX_LEN, config.n_positions - n_new)
    configs = [(m.name, m.recipe()) for m in chosen]
    if device == "cpu":
        runner = data.Mechanism("Dense, native runner", "dense").recipe(runner="native")
        if runner.why_not(device, config) is None:
            configs.append(("Dense, native runner", runner))
    return bench.bench(
        folder,
        configs,
        input_lens=[n_in],
        output_lens=[n_new],
        baseline=data.FLASH,
        **common.BLOCKS,
        min_time_sec=1.0 if plan is QUICK else 3.0,
        budget_sec=plan.bench_sec,
        loading_counts=False,
        seed=seed,
        device=device,
        threads=threads,
        on_progress=say,
    )
