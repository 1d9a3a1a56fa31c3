"""The perplexity of the real model in every format, in a table: each within a band that has a reason.

The weights lie on the grid of Q4_1, groups of 32 with a minimum: what holds that very grid is lossless by accident, and is
marked. Bands are of the same tokens, so they hold what the format costs, not what the text is like.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from paretune import clock, hardware
from paretune.engine import calibration
from paretune.engine.load import load_recipe
from paretune.evaluate.perplexity import perplexity
from paretune.model import checkpoint
from paretune.recipe import EngineOptions, Recipe, preset
from paretune.registry import TRANSFORMS
from paretune.transforms.base import Context
from paretune.transforms.formats import FORMATS, transforms_of

pytestmark = [pytest.mark.real, pytest.mark.realdata, pytest.mark.timeout(900)]

N_TOKENS, WINDOW = 8192, 512
TEXT = f"wikitext2-raw/test[:{N_TOKENS}]"
RUNS = Path(__file__).resolve().parents[2] / "runs" / "real"


def of_format(name: str, runner: str = "native") -> Recipe:
    """A format of `paretune quantize`, as it is by default."""
    return Recipe((TRANSFORMS.get("attention")(form="sdpa"), *transforms_of(name)), EngineOptions(runner=runner))


@dataclass(frozen=True)
class Row:
    """A format and what it may cost.

    Args:
        low, high: band of the increase of perplexity over fp32, per cent.
        why: the reason for the band.
    """

    name: str
    recipe: Callable[[], Recipe]
    low: float
    high: float
    why: str
    on_grid: bool = False


ROWS: list[Row] = []


@pytest.fixture(scope="module")
def ids(smollm2_tokenizer, data_dir):
    """The rows joined by a blank line, as the hub's data set is scored."""
    raw = (data_dir / "wikitext2" / "wiki.test.raw").read_text("utf-8")
    return smollm2_tokenizer.encode(raw)[:N_TOKENS]
