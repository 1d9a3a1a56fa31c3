"""Why a step takes the time it takes, in sentences that carry the figures they rest on, and what to try next.

Rules over the numbers of a profile (or of a trial: a rule whose figures are absent stays silent). Each names a cause,
the share of the step that it explains, and the gain that its cure can bring at most. A gain is a prediction: the share
of the step that the cure takes away, by the byte counts and the rates measured on this machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from paretune.measure.explain_base import Result
from paretune.measure.explain_bounds import BOUNDS
from paretune.measure.explain_mistakes import MISTAKES
from paretune.records.explanation import Explanation

CAUSES = (
    "busy machine",
    "threads",
    "graph break",
    "emulated dtype",
    "dequantisation on every call",
    "masked dense weights",
    "weight bandwidth",
    "slow products",
    "cache bandwidth",
    "arithmetic",
    "unsteady machine",
    "dispatch overhead",
    "Python",
    "launch overhead",
    "memory allocation",
    "no single cause",
)


def explain(result: Result) -> list[Explanation]:
    """All causes that the figures show, what is simply wrong first, then by share of the step.

    On a busy machine no gain is predicted: the times that it would rest on are those of the other programs too. Nor is
    one where a ceiling was surpassed, which the shares rest on.
    """
    found = [e for rule in MISTAKES for e in rule(result)]
    found += sorted((e for rule in BOUNDS for e in rule(result)), key=lambda e: -e.share)
    if any(e.cause in ("busy machine", "unsteady machine") for e in found):
        found = [replace(e, gain=None) for e in found]
    return found or list(_nothing(result))


def _nothing(result: Result) -> Iterator[Explanation]:
    """Where no rule fires: what the roofline says."""
    sentence = (result.get("whole") or {}).get("bound_by")
    if sentence:
        yield Explanation("no single cause", 0.0, sentence, "paretune tune, which measures the alternatives")
