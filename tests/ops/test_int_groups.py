"""Integers in groups: llama.cpp's numbers bit for bit, any width, what folders of older versions hold."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from paretune.errors import CheckpointError, ParetuneError
from paretune.model.gguf import blocks
from paretune.ops import grouping
from paretune.ops.weights.int_groups import IntGroups
from paretune.registry import FORMATS

TYPES = {"Q8_0": (8, False), "Q4_0": (4, False), "Q4_1": (4, True)}
WIDTHS = (1, 31, 72, 100, 127, 129, 192, 576, 960, 1600)


def random_matrix(kind, n_out, n_in):
    g = torch.Generator().manual_seed(n_in)
    w = torch.randn(n_out, n_in, generator=g)
    if kind == "one sign":  # the minimum is far from the middle of what fp16 resolves
        w = w.abs() + 3
    if kind == "flat":
        w[1] = 0.37
        w[2] = 0
    return w


@pytest.mark.parametrize("kind", ["normal", "one sign", "flat"])
@pytest.mark.parametrize("type_name", TYPES)
def test_groups_of_32_are_llama_cpps_blocks(type_name, kind):
    """The gguf package rounds and reads the same blocks: equal bytes, equal numbers."""
    bits, minimum = TYPES[type_name]
    w = random_matrix(kind, 9, 320)
    ours = IntGroups.quantize(w, bits, 32, minimum=minimum)
    kind_of_gguf = gguf.GGMLQuantizationType[type_name]
    raw = gguf.quants.quantize(w.numpy(), kind_of_gguf)
    assert torch.equal(ours.dequantize(), torch.from_numpy(gguf.quants.dequantize(raw, kind_of_gguf)))
    encoded = blocks.plan(ours, None, "x")
    assert (encoded.type_name, encoded.how) == (type_name, blocks.EXACT)
    assert np.array_equal(encoded.make().numpy(), raw)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("n_in", [96, 160, 576])
def test_larger_and_shorter_groups_are_blocks_too(n_in, group):
    """As long as the width is whole blocks of 32, whatever is left for the last group."""
    for type_name, (bits, minimum) in TYPES.items():
        ours = IntGroups.quantize(random_matrix("normal", 5, n_in), bits, group, minimum=minimum)
        encoded = blocks.plan(ours, None, "x")
        assert (encoded.type_name, encoded.how) == (type_name, blocks.EXACT)
        read = gguf.quants.dequantize(encoded.make().numpy(), gguf.GGMLQuantizationType[type_name])
        assert torch.equal(torch.from_numpy(read), ours.dequantize())


def test_what_blocks_cannot_hold_is_rounded_again_and_said():
    w = random_matrix("normal", 5, 96)
    eight = IntGroups.quantize(w, 8, 32, minimum=True)
    assert blocks.plan(eight, None, "x").how == "int_groups rounded again to Q8_0"
    older = IntGroups(eight.q, eight.scale, eight.minimum, torch.float32, group=32, lowest=0)
    assert blocks.plan(older, None, "x").how == "int_groups rounded again to Q8_0"


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("n_in", WIDTHS)
@pytest.mark.parametrize("minimum", [False, True])
@pytest.mark.parametrize("bits", [4, 7, 8])
def test_any_width(bits, minimum, n_in, group):
    """Whole groups are rounded as without a rest, the rest as a matrix of its own; fp32 numbers are the formula's."""
    w = random_matrix("normal", 6, n_in)
    weight = IntGroups.quantize(w, bits, group, minimum=minimum)
    whole = n_in // group * group
    alone = [
        IntGroups.quantize(part, bits, group, minimum=minimum) for part in (w[:, :whole], w[:, whole:]) if part.numel()
    ]
    assert torch.equal(weight.dequantize(), torch.cat([a.dequantize() for a in alone], dim=1))
    assert torch.equal(weight.integers(), torch.cat([a.integers() for a in alone], dim=1))
    # Once more from the numbers, in float64, which holds products and sums of fp16 and 8 bits exactly.
    scale, low = (None if t is None else grouping.each(t.double(), group, n_in) for t in (weight.scale, weight.minimum))
    exact = (weight.integers().double() - weight.lowest) * scale + (0 if low is None else low)
    assert torch.equal(weight.dequantize(), exact.float())
    index = torch.tensor([[0, 5], [2, 2]])
    assert torch.equal(weight.rows(index), weight.dequantize()[index])
    again = FORMATS.get("int_groups").from_tensors({k: v.clone() for k, v in weight.to_tensors().items()})
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert (again.in_features, again.group, again.lowest, again.bits) == (n_in, group, weight.lowest, weight.bits)
    # Stored in what it needs: the integers, two bytes a number of a group, the layout.
    n_groups = -(-n_in // group)
    assert weight.stored_bytes == 6 * (-(-n_in * weight.bits // 8) + 2 * n_groups * (1 + minimum)) + 16


def test_folders_of_older_versions_keep_their_numbers():
    """Without a layout: whole groups, and minima that count from the integer 0."""
    g = torch.Generator().manual_seed(0)
    q = torch.randint(0, 256, (5, 48), dtype=torch.uint8, generator=g)
    scale, minimum = (torch.rand(5, 3, generator=g).half() for _ in range(2))
    for bits, dtype in ((16, torch.int16), (8, torch.int8), (7, torch.uint8)):
        stored = {"q": q, "scale": scale, "compute": torch.empty(0), "activations": torch.empty(0, dtype=dtype)}
        numbers = grouping.halves(q, 96).float() - 8
        plain = IntGroups.from_tensors(stored)
        assert (plain.group, plain.activation_bits) == (32, bits)
        assert torch.equal(plain.dequantize(), numbers * grouping.each(scale.float(), 32, 96))
        with_minimum = IntGroups.from_tensors(stored | {"minimum": minimum})
        exact = numbers * grouping.each(scale.float(), 32, 96) + grouping.each(minimum.float(), 32, 96)
        assert torch.equal(with_minimum.dequantize(), exact)
        again = IntGroups.from_tensors(with_minimum.to_tensors())  # once saved it says so itself
        assert torch.equal(again.dequantize(), exact) and again.lowest == 0


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ({"q": None}, "'q' is missing"),
        ({"scale": None}, "'scale' is missing"),
        ({"compute": None}, "'compute' is missing"),
        ({"q": torch.zeros(5, 48)}, "'q' is torch.float32, not int8 or uint8"),
        ({"q": torch.zeros(5, 47, dtype=torch.uint8)}, "do not hold 96 inputs"),
        ({"scale": torch.zeros(5, 2).half()}, r"'scale' has shape \[5, 2\], not shape \[5, 3\]"),
        ({"minimum": torch.zeros(4, 3).half()}, "'minimum' has shape"),
        ({"layout": torch.tensor([96, 32, 0])}, "'layout' is torch.int64"),
        ({"layout": torch.tensor([96, 32, 0], dtype=torch.int32)}, "holds 3 numbers"),
        ({"layout": torch.tensor([96, 0, -8, 16], dtype=torch.int32)}, "groups of 0"),
        ({"layout": torch.tensor([96, 32, -9, 16], dtype=torch.int32)}, "smallest -9"),
        ({"layout": torch.tensor([96, 32, -8, 5], dtype=torch.int32)}, "inputs of 5 bits"),
        ({"layout": torch.tensor([-1, 32, -8, 16], dtype=torch.int32)}, "hold -1 inputs"),
    ],
)
def test_damaged_parts_are_named(damage, match):
    stored = IntGroups.quantize(torch.randn(5, 96), 4, 32, minimum=True).to_tensors() | damage
    with pytest.raises(CheckpointError, match=match):
        IntGroups.from_tensors({name: t for name, t in stored.items() if t is not None})


def test_numbers_too_large_for_fp16_are_refused():
    w = torch.randn(3, 33)
    w[1, 32] = 1e7  # in the short group
    with pytest.raises(ParetuneError, match="too large for fp16"):
        IntGroups.quantize(w, 8, 32)
    w[1, 32] = float("nan")
    with pytest.raises(ParetuneError, match="NaN"):
        IntGroups.quantize(w, 4, 32, minimum=True)
