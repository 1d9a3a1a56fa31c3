"""The perplexity of the real model in every format, in a table: each within a band that has a reason.

The weights lie on a grid, that of Q4_1: groups of 32 with a minimum. What holds that very grid is lossless by accident
and is marked. All rows are scored on the same tokens, so a band holds what a format costs, not how hard the text is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from paretune import clock
from paretune.engine import calibration
from paretune.engine.load import load_recipe, prove
from paretune.evaluate.perplexity import Perplexity, perplexity
from paretune.evaluate.texts import read_text
from paretune.files import ensure_folder, write_json, write_text
from paretune.model import checkpoint
from paretune.recipe import EngineOptions, Recipe, preset
from paretune.registry import TRANSFORMS
from paretune.transforms.base import Context
from paretune.transforms.formats import FORMATS, transforms_of

pytestmark = [pytest.mark.real, pytest.mark.realdata, pytest.mark.timeout(3600)]

N_TOKENS, WINDOW = 2048, 512  # enough to see a format that is broken; quality is claimed on more
RUNS = Path(__file__).resolve().parents[2] / "runs" / "real"


def of_format(name: str, runner: str = "native") -> Recipe:
    """A format of `paretune quantize` with its own settings."""
    return Recipe((TRANSFORMS.get("attention")(form="sdpa"), *transforms_of(name)), EngineOptions(runner=runner))


@dataclass(frozen=True)
class Row:
    """A form of the model and what it may cost.

    Args:
        recipe: makes it.
        low, high: band of the increase of perplexity over fp32, per cent.
        why: the reason for the band.
        of_file: loads the GGUF file in its own blocks, not the dense folder.
    """

    name: str
    recipe: Callable[[], Recipe]
    low: float
    high: float
    why: str
    of_file: bool = False


def native(*transforms: dict[str, object]) -> Callable[[], Recipe]:
    """A recipe of the native runner."""
    kept = [{"name": "attention", "form": "sdpa"}, *transforms]
    return lambda: Recipe.from_dict({"transforms": kept, "engine": {"runner": "native"}})


def named(name: str) -> Callable[[], Recipe]:
    return lambda: preset(name)


def quantized(name: str, runner: str = "native") -> Callable[[], Recipe]:
    return lambda: of_format(name, runner)


_ROUNDED = "4 bits that count from the middle do not hold the grid"
ROWS = [
    Row("fp32", native(), 0, 0, "the reference"),
    Row("Q4_1 of the file", native(), -0.05, 0.05, "the very grid, lossless by accident: inputs in 16 bits", True),
    Row("bf16", native({"name": "precision", "dtype": "bf16"}), -0.5, 0.5, "8 significant bits"),
    Row("fp16", native({"name": "precision", "dtype": "fp16"}), -0.1, 0.1, "11 significant bits"),
    Row("int8", quantized("int8"), -0.5, 0.5, "8 bits, a scale a row"),
    Row("int8_groups", quantized("int8_groups"), -0.3, 0.3, "8 bits, a scale a group"),
    Row("q8_0", quantized("q8_0"), -0.3, 0.3, "8 bits, a scale for 32"),
    Row("llm_int8", quantized("llm_int8"), -0.5, 0.5, "8 bits, outliers in 16"),
    Row("fp8", quantized("fp8", "eager"), 1, 8, "4 significant bits", False),
    Row("w8a8", named("native_w8a8"), -0.5, 2, "8-bit weights, inputs of 8 bits with a scale for 128"),
    Row("w8a7", named("native_w8a7"), -0.5, 4, "inputs of 7 bits"),
    Row("w7a7", named("native_w7a7"), -0.5, 3, "weights of 7 bits, an int8 cache"),
    Row("int8, int8 cache", named("native_int8_kv8"), -0.5, 0.5, "keys and values of 8 bits"),
    Row("int8, int4 cache", named("native_int8_kv4"), 0, 15, "keys and values of 4 bits"),
    Row("int4", quantized("int4"), 5, 40, _ROUNDED),
    Row("int4, 8-bit inputs", named("native_int4_a8"), 5, 45, _ROUNDED),
    Row("q4_0", quantized("q4_0"), 5, 60, f"{_ROUNDED}, nor does a head of 4 bits"),
    Row("nf4", quantized("nf4"), 1, 30, "16 levels in blocks of 64"),
    Row("hqq", quantized("hqq"), 1, 30, "a minimum for 64: twice the grid's groups"),
    Row("awq", quantized("awq"), 1, 40, _ROUNDED),
    Row("gptq", quantized("gptq"), 1, 30, "rounding that makes up for itself"),
]


@pytest.fixture(scope="module")
def ids(smollm2_tokenizer, data_dir):
    """The first tokens of WikiText-2's raw test text, as it stands in the file."""
    return smollm2_tokenizer.encode(read_text(data_dir / "wikitext2" / "wiki.test.raw"))[:N_TOKENS]


@pytest.fixture(scope="module")
def scored():
    """What was scored, by row; printed and written at the end, however the tests end."""
    found: dict[Row, tuple[Perplexity, float, float]] = {}
    yield found
    lines = ["| format | perplexity | change | band | load and convert | score |", "|---|---|---|---|---|---|"]
    base = found[ROWS[0]][0].perplexity if ROWS[0] in found else float("nan")
    for row, (made, load_sec, score_sec) in found.items():
        change = f"{100 * (made.perplexity / base - 1):+.3f} %"
        band = f"{row.low:+g} to {row.high:+g} %: {row.why}"
        lines.append(
            f"| {row.name} | {made.perplexity:.3f} | {change} | {band} | {load_sec:.1f} s | {score_sec:.1f} s |"
        )
    print("\n" + "\n".join(lines))
    ensure_folder(RUNS)
    write_text(RUNS / "perplexity.md", "\n".join(lines) + "\n")
    rows = [
        {"format": row.name, "recipe": row.recipe().to_dict(), "load_sec": load_sec, "score_sec": score_sec}
        | {"of_file": row.of_file, **made.to_json()}
        for row, (made, load_sec, score_sec) in found.items()
    ]
    write_json(RUNS / "perplexity.json", {"schema_version": 1, "rows": rows})


@pytest.fixture(scope="module")
def score(smollm2, smollm2_gguf, smollm2_tokenizer, ids, data_dir, scored):
    """`score(row) -> perplexity`, each row once."""
    text = read_text(data_dir / "wikitext2" / "wikitext2_train_first1MB.txt")  # another split
    context = Context(calibration=calibration.from_text(smollm2, text))
    n_bytes = len(smollm2_tokenizer.decode(ids).encode("utf-8"))

    def of(row: Row) -> float:
        if row not in scored:
            started = clock.now()
            folder = checkpoint.resolve(str(smollm2_gguf)) if row.of_file else smollm2
            loaded = load_recipe(folder, row.recipe(), ctx=context, check=False)
            prove(loaded)
            ready = clock.now()
            made = perplexity(
                loaded.runner,
                ids,
                context=WINDOW,
                stride=WINDOW,
                n_bytes=n_bytes,
                text_name=f"wikitext2-raw/test[:{N_TOKENS}]",
                batch_size=2,
            )
            scored[row] = made, ready - started, clock.now() - ready
            print(f"{row.name}: perplexity {made.perplexity:.4f}")
        return scored[row][0].perplexity

    return of


def test_fp32_is_what_transformers_says(score, theirs, ids):
    """Its own loss, window by window; 1e-5: sums in another order."""
    windows = torch.tensor(ids).view(-1, WINDOW)
    with torch.inference_mode():
        losses = [float(theirs(w[None], labels=w[None]).loss) for w in windows]
    expected = float(torch.tensor(losses, dtype=torch.float64).mean().exp())
    assert score(ROWS[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_each_format_is_within_its_band(score, row):
    change = 100 * (score(row) / score(ROWS[0]) - 1)
    assert row.low <= change <= row.high, f"{change:+.3f} %, {row.why}"


def test_every_format_of_quantize_has_a_row():
    assert set(FORMATS) <= {row.name for row in ROWS}
