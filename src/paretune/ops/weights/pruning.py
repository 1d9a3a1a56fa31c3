"""Which weights of a matrix can go, and what those that stay become.

Legend: N outputs, C inputs, `keep` the share of weights that stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paretune.errors import UsageError
from paretune.ops.weights.rounding import COLUMNS, FEW_COLUMNS


def kept_of(n: int, keep: float, what: str) -> int:
    """How many of `n` stay.

    Raises:
        UsageError: none would.
    """
    kept = round(n * keep)
    if kept < 1:
        raise UsageError(f"{what}: {keep:.3g} of {n:,} leaves none", f"Keep {1 / n:.2g} or more")
    return kept


def largest(scores: Tensor, keep: float, what: str) -> Tensor:
    """The mask of the largest of all scores, bool of their shape: an exact number of them, whatever is equal."""
    flat = scores.flatten()
    kept = kept_of(flat.numel(), keep, what)
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=scores.device)
    mask[flat.topk(kept, sorted=False).indices] = True
    return mask.view(scores.shape)


def largest_of_rows(scores: Tensor, keep: float, what: str) -> Tensor:
    """The mask of the largest scores of each row, bool `[N, C]`: the same number in each."""
    kept = kept_of(scores.size(1), keep, what)
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, scores.topk(kept, dim=1, sorted=False).indices, True)


def sparsegpt(values: Tensor, factor: Tensor, keep: float, what: str) -> Tensor:
    """SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774): what goes is made up for by the inputs to come.

    For each 128 inputs, those weights go whose loss `w^2 / [H^-1]` is least, chosen over all outputs together; then
    input by input the error of what went is taken on by all inputs behind it.

    Args:
        values: `[N, C]`.
        factor: the upper Cholesky factor of the inverse of the inputs' second moments, `[C, C]`, in their own order.

    Returns:
        the weights, zeros among them, fp32 `[N, C]`.
    """
    # Rows are inputs from here on: one input of all outputs lies in one piece.
    left = values.detach().float().t().contiguous()
    diagonal = factor.diagonal()
    divisors = diagonal.tolist()
    n_kept = 0.0  # so far, as it should be: parts of a weight carry over to the next inputs
    for start in range(0, left.size(0), COLUMNS):
        end = min(start + COLUMNS, left.size(0))
        block = left[start:end]
        before, n_kept = round(n_kept), n_kept + keep * block.numel()
        chosen = (block / diagonal[start:end, None]).square().flatten().topk(round(n_kept) - before, sorted=False)
        mask = torch.zeros(block.numel(), device=left.device)
        mask[chosen.indices] = 1
        mask = mask.view_as(block)
        errors = torch.empty_like(block)
        for few in range(start, end, FEW_COLUMNS):
            stop = min(few + FEW_COLUMNS, end)
            for i in range(few, stop):
                pruned = left[i] * mask[i - start]
                error = torch.sub(left[i], pruned, out=errors[i - start]).div_(divisors[i])
                left[i] = pruned
                left[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            left[stop:end].addmm_(factor[few:stop, stop:end].t(), errors[few - start : stop - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    kept_of(left.numel(), keep, what)
    return left.t().contiguous()
