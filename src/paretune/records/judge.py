"""The one rule of verdicts: what `bench`, `tune`, peers, regimes and studies call faster, slower or the same."""

from __future__ import annotations

import math

from paretune import stats
from paretune.stats import Interval, Verdict

TOO_NOISY = 0.25  # an A/A half width above it: the machine cannot tell
MIN_BYTES_GAIN = 1.02


def judge(ratio: Interval, resolution: float) -> Verdict:
    """The word for a ratio of speeds.

    Args:
        ratio: of `stats.speed_ratio`; more than 1 is faster.
        resolution: the A/A half width, what this machine resolves now; infinite where it is not known.
    """
    word = stats.verdict(ratio, resolution=resolution)
    # What goes beyond the noise does on any machine. But on one that cannot tell, all the rest would be
    # "indistinguishable", and that would be no finding.
    return "undecided" if word == "indistinguishable" and resolution > TOO_NOISY else word


def judge_bytes(ratio: float) -> Verdict:
    """The word for bytes of the baseline / bytes of a candidate. Bytes are counted, so there is no noise."""
    return "faster" if ratio >= MIN_BYTES_GAIN else "slower" if ratio < 1 else "indistinguishable"


def is_noisy(half_width: float | None) -> bool:
    """Whether an A/A half width is known and above what a verdict can bear."""
    return half_width is not None and TOO_NOISY < half_width < math.inf
