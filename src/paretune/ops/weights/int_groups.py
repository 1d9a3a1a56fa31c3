"""int4 and int8 in groups along the inputs, fp16 scales: the numbers of llama.cpp's Q4_0, Q4_1 and Q8_0 blocks.

The last group of a row is shorter where groups do not divide its width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from paretune.errors import CheckpointError, ParetuneError
from paretune.ops import grouping
from paretune.ops.weights.base import GpuForm, NativeForm, Weight, is_finite, part_of

GROUPS = (32, 64, 128)
ACTIVATION_BITS = (16, 8, 7)
_OLD_ACTIVATION_BITS = {torch.int16: 16, torch.int8: 8, torch.uint8: 7}  # by the dtype of a tensor of older folders
_LAYOUT = 4  # numbers that `IntGroups.layout` holds
LAYOUT_BYTES = 4 * _LAYOUT
AT_ONCE = 1 << 18  # numbers that are rounded together: they and what is made of them stay in the caches


def rounded_inputs(x: Tensor, bits: int) -> Tensor:
    """Inputs as byte kernels see them, `x[..., in]`, a scale for each 128 neighbours.

    8 bits are 127 steps of the largest on either side of 0; 7 bits are 128 steps from the smallest to the largest, 0
    among them: as fine where most inputs have one sign.
    """
    width = x.size(-1)
    chunks = F.pad(x.float(), (0, -width % 128)).unflatten(-1, (-1, 128))
    if bits == 8:
        low = -chunks.abs().amax(dim=-1, keepdim=True)
        step = -low / 127
    else:
        low = chunks.amin(dim=-1, keepdim=True).clamp(max=0)
        step = (chunks.amax(dim=-1, keepdim=True).clamp(min=0) - low) / 127
    inverse = torch.where(step > 0, 1 / step, torch.zeros_like(step))
    q = torch.round(chunks * inverse)
    least = torch.round(low * inverse)
    q = torch.minimum(torch.maximum(q, least), least + (254 if bits == 8 else 127))
    return (q * step).flatten(-2)[..., :width].to(x.dtype)


class IntGroups(Weight):
    """`W[i, k] ~ q[i, k] * scale[i, k // group]`, or with a minimum `(q - lowest) * scale + minimum`.

    The minimum is what the smallest integer stands for, so that `q - lowest` counts from zero: in groups of 32 both are
    bit for bit what llama.cpp's blocks hold. In fp32 the product is exact and the sum is rounded once, as there.

    Args:
        q: int8 `[out, in]` for 8 bits (and 7, whose numbers go to 64); uint8 `[out, in / 2]`, rounded up, for 4 bits,
            two numbers `q + 8` a byte, the even input in the low half.
        scale: fp16 `[out, in / group]`, rounded up.
        minimum: fp16 as `scale`, or None.
        compute_dtype: of `rows` and `dequantize`.
        activation_bits: what native code rounds inputs to.
        group: inputs that share a scale; the last group of a row may be shorter.
        in_features: None: as many as `q` holds.
        lowest: the integer that the minimum stands for; None: the smallest there is. 0 in folders written before
            minima counted from there.
    """

    format = "int_groups"
    is_native = True
    rows_matter = False
    q: Tensor
    scale: Tensor
    minimum: Tensor | None
    layout: Tensor
    compute: Tensor

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        minimum: Tensor | None,
        compute_dtype: torch.dtype,
        activation_bits: int = 16,
        *,
        group: int,
        in_features: int | None = None,
        lowest: int | None = None,
    ) -> None:
        super().__init__()
        self.bits = 8 if q.dtype == torch.int8 else 4
        assert q.dtype in (torch.int8, torch.uint8) and scale.dtype == torch.float16
        per_byte = 8 // self.bits
        self.out_features = q.size(0)
        self.in_features = q.size(1) * per_byte if in_features is None else in_features
        self.group, self.activation_bits = group, activation_bits
        self.lowest = 0 if minimum is None else -(2 ** (self.bits - 1)) if lowest is None else lowest
        assert group in GROUPS and activation_bits in ACTIVATION_BITS and -128 <= self.lowest <= 0
        assert q.size(1) == -(-self.in_features // per_byte)
        assert scale.shape == (self.out_features, grouping.count(self.in_features, group))
        assert minimum is None or (minimum.dtype == torch.float16 and minimum.shape == scale.shape)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.register_buffer("minimum", minimum)
        # What the shapes of the tensors do not say, for a checkpoint.
        layout = torch.tensor([self.in_features, group, self.lowest, activation_bits], dtype=torch.int32)
        self.register_buffer("layout", layout.to(q.device))
        # An empty tensor that carries the compute dtype into a checkpoint and back.
        self.register_buffer("compute", torch.empty(0, dtype=compute_dtype, device=q.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(bfloat16)` changes the compute dtype; scales stay fp16, on the device of their rows.
        scale, minimum = self.scale, self.minimum
        super()._apply(fn, recurse)
        self.scale = scale.to(self.q.device)
        self.minimum = None if minimum is None else minimum.to(self.q.device)
        return self

    @classmethod
    def quantize(
        cls, values: Tensor, bits: int, group: int, *, minimum: bool = False, activation_bits: int = 16
    ) -> IntGroups:
        """Rounds to nearest as llama.cpp does (`ggml-quants.c`: quantize_row_q8_0, q4_0, q4_1).

        Raises:
            ParetuneError: the matrix holds NaN or infinity, or a group is too large for fp16 scales.
        """
        made = []
        # Rows are independent, and the steps in between take many times the memory.
        for rows in values.detach().split(max(1, AT_ONCE // values.size(1))):
            w = rows.float()
            if not is_finite(w):
                raise ParetuneError("a weight holds NaN or infinity", "Repair the checkpoint before quantising it")
            found = [_nearest(part, bits, minimum) for part in grouping.split(w, group)]
            q, scale, low = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
            scale, low = scale.half(), low.half()
            if not bool(torch.isfinite(scale).all() and torch.isfinite(low).all()):
                raise ParetuneError("a weight is too large for fp16 scales", "Use int8 rows, whose scales are fp32")
            made.append((_stored(q, bits), scale, low))
        q, scale, low = (torch.cat(each) for each in zip(*made, strict=True))
        form = {"group": group, "in_features": values.size(1), "lowest": -(2 ** (bits - 1))}
        return cls(q, scale, low if minimum else None, values.dtype, activation_bits, **form)

    @classmethod
    def from_integers(
        cls,
        q: Tensor,
        bits: int,
        scale: Tensor,
        minimum: Tensor | None,
        compute_dtype: torch.dtype,
        activation_bits: int = 16,
        *,
        group: int,
    ) -> IntGroups:
        """Packs whole numbers `[out, in]` of any dtype, -8 to 7 or -128 to 127; the rest as the class has it.

        The minimum is what the smallest integer of so many bits stands for.
        """
        form = {"group": group, "in_features": q.size(1), "lowest": -(2 ** (bits - 1))}
        return cls(_stored(q, bits), scale, minimum, compute_dtype, activation_bits, **form)

    def integers(self) -> Tensor:
        """int8 `[out, in]`."""
        return self._integers(self.q)

    def _integers(self, q: Tensor) -> Tensor:
        return q if self.bits == 8 else grouping.halves(q, self.in_features).to(torch.int8) - 8

    def _numbers(self, q: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
        counted = self._integers(q).float()
        if self.lowest:
            counted -= self.lowest
        return grouping.scaled(counted, scale, minimum, self.group).to(self.compute_dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """The layer is dequantised for every call: exact, and slow. The native runner and GPUs have fast forms."""
        return F.linear(self.rounded(x), self.dequantize().to(x.dtype))

    def rounded(self, x: Tensor) -> Tensor:
        return x if self.activation_bits == 16 else rounded_inputs(x, self.activation_bits)

    def gpu(self) -> GpuForm | None:
        return GpuForm(self.q, self.scale, self.minimum, lowest=self.lowest)

    def rows(self, index: Tensor) -> Tensor:
        return self._numbers(self.q[index], self.scale[index], None if self.minimum is None else self.minimum[index])

    def dequantize(self) -> Tensor:
        return self._numbers(self.q, self.scale, self.minimum)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.compute.dtype

    @property
    def padded_inputs(self) -> int:
        return self.q.size(1) * 8 // self.bits

    def to_tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in super().to_tensors().items() if t is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> IntGroups:
        q = part_of(tensors, "q", (torch.int8, torch.uint8), 2)
        per_byte = 1 if q.dtype == torch.int8 else 2
        scale = part_of(tensors, "scale", (torch.float16,), 2)
        if "layout" in tensors:
            layout = part_of(tensors, "layout", (torch.int32,), 1)
            if layout.numel() != _LAYOUT:
                raise CheckpointError(f"layout holds {layout.numel()} numbers, not {_LAYOUT}", "Save the model again")
            in_features, group, lowest, activation_bits = layout.tolist()
        else:  # folders written before there were shorter groups: whole ones, minima of the integer 0
            in_features, lowest = q.size(1) * per_byte, 0
            group = in_features // max(1, scale.size(1))
            activation_bits = (
                _OLD_ACTIVATION_BITS.get(tensors["activations"].dtype, 0) if "activations" in tensors else 16
            )
        smallest = -128 if q.dtype == torch.int8 else -8
        known = group in GROUPS and activation_bits in ACTIVATION_BITS and smallest <= lowest <= 0
        if not known or in_features < 1 or q.size(1) != -(-in_features // per_byte):
            raise CheckpointError(
                f"integers {list(q.shape)} do not hold {in_features} inputs in groups of {group} "
                f"(smallest {lowest}, inputs of {activation_bits} bits)",
                "Save the model again",
            )
        shape = (q.size(0), grouping.count(in_features, group))
        scale = part_of(tensors, "scale", (torch.float16,), shape)
        minimum = part_of(tensors, "minimum", (torch.float16,), shape) if "minimum" in tensors else None
        form = {"group": group, "in_features": in_features, "lowest": lowest}
        return cls(q, scale, minimum, part_of(tensors, "compute").dtype, activation_bits, **form)

    def native(self) -> NativeForm | None:
        return NativeForm(
            "int8" if self.bits == 8 else "int4",
            self.q,
            self.scale,
            self.minimum,
            self.group,
            self.activation_bits,
            n_in=self.in_features,
            lowest=self.lowest,
        )

    @classmethod
    def from_native(cls, form: NativeForm, compute_dtype: torch.dtype) -> IntGroups:
        assert form.scale is not None
        layout = {"group": form.group, "in_features": form.n_in, "lowest": form.lowest}
        return cls(form.data, form.scale, form.minimum, compute_dtype, form.activation_bits, **layout)

    def extra_repr(self) -> str:
        return f"{self.out_features}x{self.in_features}, {self.bits} bits in groups of {self.group}"


def _stored(q: Tensor, bits: int) -> Tensor:
    """Whole numbers `[out, in]` as they are kept."""
    return q.to(torch.int8) if bits >= 7 else grouping.pack_halves((q + 8).to(torch.uint8))


def _nearest(w: Tensor, bits: int, minimum: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Integers `[out, in]`, fp32 scales and minima `[out, groups]` (zeros without one) of groups `w[out, groups, g]`.

    Rounded with the fp32 scale, to be read with the fp16 one, as llama.cpp does.
    """
    top = 2 ** (bits - 1)  # one more than the largest integer
    low = w.amin(dim=-1) if minimum else torch.zeros_like(w[..., 0])
    if minimum:
        scale = (w.amax(dim=-1) - low) / (2 * top - 1)
    elif bits >= 7:
        scale = w.abs().amax(dim=-1) / (127 if bits == 8 else 64)
    else:  # the number of largest size becomes -8, with its sign
        at = w.abs().argmax(dim=-1, keepdim=True)
        scale = w.gather(-1, at)[..., 0] / -8
    inverse = torch.where(scale != 0, 1 / scale, torch.zeros_like(scale))[..., None]
    if minimum:
        q = ((w - low[..., None]) * inverse + 0.5).floor().clamp_(0, 2 * top - 1) - top
    elif bits >= 7:
        x = w * inverse
        q = torch.where(x < 0, -torch.floor(-x + 0.5), torch.floor(x + 0.5))  # roundf: halves away from zero
    else:
        q = (w * inverse + 8.5).floor().clamp_(0, 15) - 8
    return q.flatten(1), scale, low
