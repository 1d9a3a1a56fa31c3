"""Whether ways to run a model give the same text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from paretune.records.header import Header
from paretune.records.record import Record

LosslessVerdict = Literal["identical", "numerics", "other numbers", "bug"]


@dataclass(frozen=True)
class Divergence(Record):
    """The first token at which two texts of a prompt differ.

    Args:
        prompt: its number, from 0.
        position: of the token in the new text, from 0.
        expected, got: token ids; None: that text had ended.
        margin: of the reference's logits, of `expected` over `got`; None where the text was sampled or had ended.
    """

    prompt: int
    position: int
    expected: int | None
    got: int | None
    margin: float | None


@dataclass(frozen=True)
class Way(Record):
    """One way to run, held against plain decoding of the reference, one prompt at a time.

    Args:
        sampling: `greedy`, or temperature and seed.
        verdict: `identical`; `numerics`: sums in another order, and near ties; `other numbers`: the config changes
            them; `bug`: a difference that nothing explains.
        notes: what really ran, such as what was proposed.
    """

    name: str
    sampling: str
    n_prompts: int
    n_identical: int
    n_tokens: int
    verdict: LosslessVerdict
    divergences: list[Divergence]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class LosslessResult(Header):
    """The result of `eval --task lossless`."""

    SCHEMA: ClassVar[int] = 1

    model: dict[str, str]
    task: str
    config: str
    reference: str
    text: str
    max_new_tokens: int
    batch_size: int
    ways: list[Way]
