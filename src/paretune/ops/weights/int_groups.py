"""int4 and int8 in groups along the inputs, fp16 scales: the numbers of llama.cpp's Q4_0, Q4_1 and Q8_0 blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from paretune.errors import ParetuneError, UsageError
from paretune.ops.weights.base import GpuForm, NativeForm, Weight

GROUPS = (32, 64, 128)
_BITS_OF = {torch.int16: 16, torch.int8: 8, torch.uint8: 7}  # of inputs, as a checkpoint carries them
AT_ONCE = 1 << 22  # numbers that are rounded together


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
    """`W[i, g] ~ q * scale[i, g] (+ minimum[i, g])`; groups of 32 are bit for bit what llama.cpp's blocks hold.

    Args:
        q: int8 `[out, in]` for 8 bits (and 7, whose numbers go to 64); uint8 `[out, in / 2]` for 4 bits, two numbers
            `q + 8` a byte, the even input in the low half.
        scale: fp16 `[out, in / group]`.
        minimum: fp16 as `scale`, or None.
        compute_dtype: of `rows` and `dequantize`.
        activation_bits: what native code rounds inputs to.
    """

    format = "int_groups"
    q: Tensor
    scale: Tensor
    minimum: Tensor | None
    compute: Tensor
    activations: Tensor

    def __init__(
        self, q: Tensor, scale: Tensor, minimum: Tensor | None, compute_dtype: torch.dtype, activation_bits: int = 16
    ) -> None:
        super().__init__()
        self.bits = 8 if q.dtype == torch.int8 else 4
        assert q.dtype in (torch.int8, torch.uint8) and scale.dtype == torch.float16
        self.out_features, self.in_features = q.size(0), q.size(1) * 8 // self.bits
        self.group = self.in_features // scale.size(1)
        assert self.group in GROUPS and self.in_features % self.group == 0
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.register_buffer("minimum", minimum)
        # Empty tensors that carry the compute dtype and the inputs' bits into a checkpoint and back.
        self.register_buffer("compute", torch.empty(0, dtype=compute_dtype, device=q.device))
        bits_dtype = next(dtype for dtype, bits in _BITS_OF.items() if bits == activation_bits)
        self.register_buffer("activations", torch.empty(0, dtype=bits_dtype, device=q.device))

    def _apply(self, fn, recurse=True):
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
            UsageError: the group does not divide the width.
            ParetuneError: the matrix holds NaN or infinity, or a group is too large for fp16 scales.
        """
        n_out, n_in = values.shape
        if n_in % group:
            raise UsageError(f"groups of {group} do not divide a layer of {n_in} inputs", "Choose a smaller --group")
        if values.numel() > AT_ONCE:  # rows are independent, and the steps in between take many times the memory
            parts = [
                cls.quantize(part, bits, group, minimum=minimum, activation_bits=activation_bits)
                for part in values.split(max(1, AT_ONCE // n_in))
            ]
            low = torch.cat([p.minimum for p in parts if p.minimum is not None]) if minimum else None
            q, scale = torch.cat([p.q for p in parts]), torch.cat([p.scale for p in parts])
            return cls(q, scale, low, values.dtype, activation_bits)
        w = values.detach().float()
        if not bool(torch.isfinite(w).all()):
            raise ParetuneError("a weight holds NaN or infinity", "Repair the checkpoint before quantising it")
        w = w.view(n_out, n_in // group, group)
        low = None
        middle = 2 ** (bits - 1)
        if minimum:
            low = w.amin(dim=-1)
            scale = (w.amax(dim=-1) - low) / (2 * middle - 1)
        elif bits >= 7:
            scale = w.abs().amax(dim=-1) / (127 if bits == 8 else 64)
        else:  # the number of largest size becomes -8, with its sign
            at = w.abs().argmax(dim=-1, keepdim=True)
            scale = w.gather(-1, at)[..., 0] / -8
        # Rounded with the fp32 scale, read with the fp16 one, as llama.cpp does.
        inverse = torch.where(scale != 0, 1 / scale, torch.zeros_like(scale))[..., None]
        if minimum:
            assert low is not None
            unsigned = ((w - low[..., None]) * inverse + 0.5).floor().clamp_(0, 2 * middle - 1)
            q = unsigned - middle
            low = low + scale * middle  # q counts from there
        elif bits >= 7:
            x = w * inverse
            q = torch.where(x < 0, -torch.floor(-x + 0.5), torch.floor(x + 0.5))  # roundf: halves away from zero
        else:
            q = (w * inverse + 8.5).floor().clamp_(0, 15) - 8
        half, half_low = scale.half(), None if low is None else low.half()
        if not bool(torch.isfinite(half).all()) or (half_low is not None and not bool(torch.isfinite(half_low).all())):
            raise ParetuneError("a weight is too large for fp16 scales", "Use int8 rows, whose scales are fp32")
        return cls.from_integers(q.reshape(n_out, n_in), bits, half, half_low, values.dtype, activation_bits)

    @classmethod
    def from_integers(
        cls,
        q: Tensor,
        bits: int,
        scale: Tensor,
        minimum: Tensor | None,
        compute_dtype: torch.dtype,
        activation_bits: int = 16,
    ) -> IntGroups:
        """Packs whole numbers `[out, in]` of any dtype, -8 to 7 or -128 to 127; the rest as the class has it."""
        if bits >= 7:
            return cls(q.to(torch.int8), scale, minimum, compute_dtype, activation_bits)
        nibbles = (q + 8).to(torch.uint8)
        return cls(nibbles[:, ::2] | nibbles[:, 1::2] << 4, scale, minimum, compute_dtype, activation_bits)

    def integers(self) -> Tensor:
        """int8 `[out, in]`."""
        if self.bits == 8:
            return self.q
        pairs = torch.stack((self.q & 15, self.q >> 4), dim=-1)
        return pairs.view(self.out_features, self.in_features).to(torch.int8) - 8

    def _numbers(self, q: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
        out = q.float().unflatten(-1, (-1, self.group)) * scale.float()[..., None]
        if minimum is not None:
            out = out + minimum.float()[..., None]
        return out.flatten(-2).to(self.compute_dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """The layer is dequantised for every call: exact, and slow. The native runner and GPUs have fast forms."""
        return F.linear(self.rounded(x), self.dequantize().to(x.dtype))

    def rounded(self, x: Tensor) -> Tensor:
        return x if self.activation_bits == 16 else rounded_inputs(x, self.activation_bits)

    def gpu(self) -> GpuForm | None:
        return GpuForm(self.q, self.scale, self.minimum)

    def rows(self, index: Tensor) -> Tensor:
        q = self.q[index]
        if self.bits == 4:
            q = torch.stack((q & 15, q >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
        return self._numbers(q, self.scale[index], None if self.minimum is None else self.minimum[index])

    def dequantize(self) -> Tensor:
        return self._numbers(self.integers(), self.scale, self.minimum)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.compute.dtype

    @property
    def activation_bits(self) -> int:
        return _BITS_OF[self.activations.dtype]

    def to_tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in super().to_tensors().items() if t is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> IntGroups:
        bits = _BITS_OF[tensors["activations"].dtype]
        return cls(tensors["q"], tensors["scale"], tensors.get("minimum"), tensors["compute"].dtype, bits)

    def native(self) -> NativeForm | None:
        kind = "int8" if self.bits == 8 else "int4"
        return NativeForm(kind, self.q, self.scale, self.minimum, self.group, self.activation_bits)

    @classmethod
    def from_native(cls, form: NativeForm, compute_dtype: torch.dtype) -> IntGroups:
        assert form.scale is not None
        return cls(form.data, form.scale, form.minimum, compute_dtype, form.activation_bits)

    def extra_repr(self) -> str:
        return f"{self.out_features}x{self.in_features}, {self.bits} bits in groups of {self.group}"
