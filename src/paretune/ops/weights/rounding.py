"""Better integers for `IntGroups` than the nearest ones: scales searched for, GPTQ, HQQ.

All give the same stored form, so every kernel serves them.

Legend: N outputs, C inputs, g size of a group, G = C / g groups, rounded up: the last of a row may be shorter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paretune.errors import ParetuneError
from paretune.ops import grouping
from paretune.ops.weights.int_groups import IntGroups

COLUMNS = 128  # that GPTQ rounds before the rest of the matrix is brought up to date
# Columns within them that are brought up to date one after the other. So few that PyTorch works on one thread: with a
# barrier a column, a core that another program takes away now and then stops everything.
FEW_COLUMNS = 16
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 1.05)  # scales that are tried, times the one of plain rounding
AT_ONCE = 1 << 18  # numbers that are rounded together: they and what is made of them stay in the caches


def levels(bits: int) -> tuple[int, int]:
    """The smallest and the largest integer."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def search_scales(w: Tensor, importance: Tensor, bits: int, group: int, minimum: bool) -> tuple[Tensor, Tensor | None]:
    """Scales (and minima) that make `sum importance * (w - rounded)^2` of each group small.

    Args:
        w: fp32 `[N, C]`.
        importance: of each input, `[C]`: the diagonal of the second moments.

    Returns:
        fp16 `[N, G]` each; the minimum stands for the smallest integer.
    """
    weight = grouping.split(importance / importance.mean().clamp(min=1e-30) + 1e-3, group)
    made = []
    for rows in w.split(max(1, AT_ONCE // w.size(1))):
        parts = zip(grouping.split(rows, group), weight, strict=True)
        found = [_search(x, part, bits, minimum) for x, part in parts]
        made.append([torch.cat(each, dim=1) for each in zip(*found, strict=True)])
    scale, low = (torch.cat(each) for each in zip(*made, strict=True))
    return scale, low if minimum else None


def _search(x: Tensor, weight: Tensor, bits: int, minimum: bool) -> tuple[Tensor, Tensor]:
    """fp16 scales and minima `[N, G]` of groups `x[N, G, g]`, inputs weighed by `weight[G, g]`."""
    least, most = levels(bits)
    lowest = least if minimum else 0
    if minimum:
        top, bottom = x.amax(-1), x.amin(-1)
        middle = (top + bottom) / 2
    else:
        # Both signs of the scale: the integers reach one further down than up.
        at = x.abs().argmax(dim=-1, keepdim=True)
        extreme = x.gather(-1, at)[..., 0]
    largest = (torch.maximum(top.abs(), bottom.abs()) if minimum else extreme.abs() / -least).max()
    if not float(largest) * max(SHRINK) < torch.finfo(torch.float16).max:
        raise ParetuneError("a weight is too large for fp16 scales", "Use int8 rows, whose scales are fp32")
    best = torch.full(x.shape[:2], torch.inf, device=x.device)
    scale = torch.zeros_like(best)
    low = torch.zeros_like(best)
    for shrink in SHRINK:
        if minimum:
            s = ((top - bottom) * shrink / (most - least)).half().float()
            b = (middle - (top - bottom) * shrink / 2).half().float()
        else:
            s = (extreme * shrink / least).half().float()
            b = torch.zeros_like(s)
        error = ((x - rounded(x, s[..., None], b[..., None], bits, lowest)).square() * weight).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, s, scale)
        low = torch.where(better, b, low)
    return scale.half(), low.half()


def integers(w: Tensor, scale: Tensor, minimum: Tensor, bits: int, lowest: int) -> Tensor:
    """The nearest integers, as floats, where `lowest` stands for the minimum; it is all of a group without a scale."""
    inverse = torch.where(scale != 0, 1 / scale, torch.zeros_like(scale))
    return ((w - minimum) * inverse).round_().add_(lowest).clamp_(*levels(bits))


def rounded(w: Tensor, scale: Tensor, minimum: Tensor, bits: int, lowest: int) -> Tensor:
    """The numbers that `integers` stand for."""
    return (integers(w, scale, minimum, bits, lowest) - lowest) * scale + minimum


def nearest_weighted(
    values: Tensor, importance: Tensor, bits: int, group: int, minimum: bool, activation_bits: int
) -> IntGroups:
    """Nearest integers under searched scales: what GPTQ begins with, without what it adds."""
    w = values.detach().float()
    scale, low = search_scales(w, importance, bits, group, minimum)
    s, b = _of_inputs(scale, low, group, w.size(1))
    q = integers(w, s, b, bits, levels(bits)[0] if minimum else 0)
    return IntGroups.from_integers(q, bits, scale, low, values.dtype, activation_bits, group=group)


def _of_inputs(scale: Tensor, low: Tensor | None, group: int, n_in: int) -> tuple[Tensor, Tensor]:
    """fp32 scales and minima of each input, `[N, C]`."""
    s = grouping.each(scale.float(), group, n_in)
    return s, torch.zeros_like(s) if low is None else grouping.each(low.float(), group, n_in)


class Solver(NamedTuple):
    """What GPTQ needs of the second moments of a layer's inputs: the same for all layers that read them.

    Args:
        importance: their diagonal, `[C]`.
        order: in which inputs are rounded, int64 `[C]`.
        factor: of `_inverse_factor`, `[C, C]`, in that order.
    """

    importance: Tensor
    order: Tensor
    factor: Tensor


def solver(moments: Tensor, *, act_order: bool = True, damping: float = 0.01) -> Solver:
    """Args:
        moments: `H` of the inputs, fp32 `[C, C]`; overwritten.
        act_order: inputs are rounded in the order of their size.
        damping: of the mean of the diagonal, added to it.

    Raises:
        ParetuneError: `H` cannot be inverted, whatever is added.
    """
    diagonal = moments.diagonal()
    importance = diagonal.clone()
    diagonal[importance == 0] = 1  # never seen: rounded to nearest
    ascending = torch.arange(len(diagonal), device=moments.device)
    order = torch.argsort(diagonal, descending=True) if act_order else ascending
    return Solver(importance, order, _inverse_factor(moments[order][:, order], damping))


def gptq(
    values: Tensor, solver: Solver, bits: int, group: int, *, minimum: bool = False, activation_bits: int = 16
) -> IntGroups:
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323): each rounded column's error is made up for by those to come.

    Scales are fixed before (`search_scales`), so that inputs may be rounded in the order of their size (act-order) and
    still lie in their own groups: nothing is gathered at run time.

    Args:
        values: `[N, C]`.
        solver: of the layer's inputs.
    """
    w, order = values.detach().float(), solver.order
    scale, low = search_scales(w, solver.importance, bits, group, minimum)
    # Rows are inputs from here on: one input of all outputs lies in one piece.
    left = w.t()[order].contiguous()
    scales, lows = (x.t()[order].contiguous() for x in _of_inputs(scale, low, group, w.size(1)))
    lowest = levels(bits)[0] if minimum else 0
    q = _rounded_in_turn(left, solver.factor, scales, lows, bits, lowest)
    found = torch.empty_like(q)
    found[order] = q
    form = found.t().contiguous(), bits, scale, low, values.dtype, activation_bits
    return IntGroups.from_integers(*form, group=group)


def _rounded_in_turn(left: Tensor, factor: Tensor, scales: Tensor, lows: Tensor, bits: int, lowest: int) -> Tensor:
    """GPTQ's loop: the integers, as floats `[C, N]`, in the order in which inputs are rounded.

    Args:
        left: the weights `[C, N]`; overwritten.
        factor: of `_inverse_factor`, `[C, C]`.
        scales, lows: of each weight, `[C, N]`.
        lowest: the integer that stands for the minimum.
    """
    q = torch.empty_like(left)
    least, most = (level - lowest for level in levels(bits))  # counted from the minimum inside the loop
    inverses = torch.where(scales != 0, 1 / scales, torch.zeros_like(scales))
    diagonal = factor.diagonal().tolist()
    has_lows = bool(lows.any())
    for start in range(0, left.size(0), COLUMNS):
        end = min(start + COLUMNS, left.size(0))
        errors = torch.empty_like(left[start:end])
        for few in range(start, end, FEW_COLUMNS):
            stop = min(few + FEW_COLUMNS, end)
            for i in range(few, stop):
                x = left[i] - lows[i] if has_lows else left[i]
                torch.mul(x, inverses[i], out=q[i]).round_().clamp_(least, most)
                error = torch.addcmul(x, q[i], scales[i], value=-1, out=errors[i - start]).div_(diagonal[i])
                left[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            left[stop:end].addmm_(factor[few:stop, stop:end].t(), errors[few - start : stop - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return q.add_(lowest)


def _inverse_factor(h: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of `h` with `damping` times its mean on the diagonal."""
    mean = h.diagonal().mean()
    for times in (1, 10, 100):
        damped = h + torch.eye(h.size(0), device=h.device) * (mean * damping * times)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            return upper
    raise ParetuneError("the second moments of a layer's inputs cannot be inverted", "Give more calibration text")


def hqq(values: Tensor, bits: int, group: int, *, activation_bits: int = 16, n_steps: int = 20) -> IntGroups:
    """HQQ (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"): minima that make the
    errors sparse, without calibration.

    Minimises `|w - rounded|_p`, p = 0.7: an auxiliary error is shrunk towards zero and the minimum moved to the mean of
    what is left, in turns.
    """
    made = []
    for rows in values.detach().split(max(1, AT_ONCE // values.size(1))):
        found = [_hqq(part.float(), bits, n_steps) for part in grouping.split(rows, group)]
        made.append([torch.cat(each, dim=1) for each in zip(*found, strict=True)])
    q, scale, low = (torch.cat(each) for each in zip(*made, strict=True))
    return IntGroups.from_integers(q, bits, scale, low, values.dtype, activation_bits, group=group)


def _hqq(x: Tensor, bits: int, n_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 integers `[N, C]`, fp16 scales and minima `[N, G]` of groups `x[N, G, g]`."""
    least, most = levels(bits)
    if not bool(torch.isfinite(x).all()):
        raise ParetuneError("a weight holds NaN or infinity", "Repair the checkpoint before quantising it")
    top, bottom = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    s = ((top - bottom) / (most - least)).half().float()
    b = bottom.half().float()
    if not bool(torch.isfinite(s).all() and torch.isfinite(b).all()):
        raise ParetuneError("a weight is too large for fp16 scales", "Use int8 rows, whose scales are fp32")
    best, best_error = b, torch.full_like(b, torch.inf)
    # Errors are measured in steps, so that one `beta` fits every layer.
    step = torch.where(s != 0, s, torch.ones_like(s))
    beta, p = 10.0, 0.7
    for _ in range(n_steps):
        counted = integers(x, s, b, bits, least) - least
        error = (x - counted * s - b) / step
        size = error.abs().pow(p).sum(-1, keepdim=True)
        best, best_error = torch.where(size < best_error, b, best), torch.minimum(size, best_error)
        kept = error.sign() * (error.abs() - error.abs().clamp(min=1e-6).pow(p - 1) / beta).clamp(min=0)
        b = (x - kept * step - counted * s).mean(-1, keepdim=True).half().float()
        beta *= 1.01
    return integers(x, s, best, bits, least).flatten(1).to(torch.int8), s[..., 0].half(), best[..., 0].half()
