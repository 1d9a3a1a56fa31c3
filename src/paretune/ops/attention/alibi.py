"""ALiBi: scores fall in proportion to the distance, in place of positions (Press et al. 2022, arXiv:2108.12409)."""

from __future__ import annotations

import math


def slopes(n_head: int) -> tuple[float, ...]:
    """The fixed slope of each head: `2^(-8 i / n)` for i = 1..n where n is a power of two.

    Otherwise those of the power of two below, and after them every other one of twice that power, as the authors do.
    """
    assert n_head >= 1
    power = 2 ** int(math.log2(n_head))
    out = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    out += [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * (n_head - power), 2)]
    return tuple(out)
