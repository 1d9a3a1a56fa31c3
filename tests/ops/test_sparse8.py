"""int8 without zeros: the same numbers, and in native code the bits of the dense form."""

from __future__ import annotations

import pytest
import torch

from paretune import native_build
from paretune.errors import CheckpointError, UsageError
from paretune.ops.native import packed
from paretune.ops.weights.int8_rows import Int8Rows
from paretune.ops.weights.sparse8 import Sparse8

SHAPES = [
    (48, 48, 0.5),
    (37, 130, 0.3),
    (160, 515, 0.5),
    (64, 256, 0.1),
    (16, 4, 0.5),
    (100, 1030, 0.85),
    (16, 128, 0.0),
]


def pair(n_out, n_in, keep, seed=0):
    """The same pruned matrix as int8 rows and without its zeros."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n_out, n_in, generator=generator) * (torch.rand(n_out, n_in, generator=generator) < keep)
    dense = Int8Rows.quantize(w)
    return dense, Sparse8.of(dense.q, dense.scale, torch.float32)


@pytest.mark.parametrize(("n_out", "n_in", "keep"), SHAPES)
def test_the_numbers_are_those_of_int8_rows(n_out, n_in, keep):
    dense, sparse = pair(n_out, n_in, keep)
    assert torch.equal(sparse.dequantize(), dense.dequantize())
    again = Sparse8.from_tensors(sparse.to_tensors())
    assert torch.equal(again.integers(), dense.q)
    assert sparse.stored_bytes == sparse.mask.nbytes + len(sparse.values) + 4 * n_out + 4
    assert sparse.to(torch.bfloat16).compute_dtype == torch.bfloat16 and sparse.scale.dtype == torch.float32


@pytest.mark.parametrize("isa", ["", "avx2", "portable"])
@pytest.mark.parametrize(("n_out", "n_in", "keep"), SHAPES)
def test_native_products_have_the_bits_of_the_dense_form(monkeypatch, isa, n_out, n_in, keep):
    if reason := native_build.unavailable_reason():
        pytest.skip(reason)
    monkeypatch.setenv("PARETUNE_ISA", isa)
    dense, sparse = (next(packed.pack([w])) for w in pair(n_out, n_in, keep))
    assert torch.equal(sparse.original().mask, pair(n_out, n_in, keep)[1].mask)
    assert torch.equal(sparse.original().values, pair(n_out, n_in, keep)[1].values)
    assert torch.equal(sparse.rows(torch.arange(n_out)), dense.rows(torch.arange(n_out)))
    x = torch.randn(200, n_in, generator=torch.Generator().manual_seed(1))
    whole = dense.matmul(x)
    for rows in (1, 2, 5, 6, 7, 40, 200):  # alone, a few, tiles: always the same bits
        assert torch.equal(sparse.matmul(x[:rows]), whole[:rows])


def test_bytes_are_mask_and_values():
    sparse = pair(768, 768, 0.5)[1]
    n = sparse.n_stored + 768 * 768 / 8
    assert next(packed.pack([sparse])).stored_bytes < 1.05 * n
    assert sparse.stored_bytes < 1.05 * n


def test_bad_input():
    with pytest.raises(UsageError, match=r"0\.\d% of its weights are zero"):
        Sparse8.quantize(torch.rand(64, 64) + 1)
    tensors = pair(16, 24, 0.5)[1].to_tensors()
    with pytest.raises(CheckpointError, match="191 are stored"):
        Sparse8.from_tensors({**tensors, "values": tensors["values"][:-1]})
    with pytest.raises(CheckpointError, match="for 99 inputs"):
        Sparse8.from_tensors({**tensors, "layout": torch.tensor([99], dtype=torch.int32)})
