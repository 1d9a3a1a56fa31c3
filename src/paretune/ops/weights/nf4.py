"""NF4: 4-bit normal floats in blocks of 64 with doubly quantised scales, the values of bitsandbytes bit for bit.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314: codes are quantiles of a normal
distribution; a block's scale is its largest size; 256 scales share one fp32 scale of their own and are kept in 8 bits
(the dynamic map of Dettmers 2015, arXiv:1511.04561) around the mean of all.

bitsandbytes lays all rows in one line and cuts that into blocks; here a block ends with its row, so that rows can be
read alone. The two are the same where 64 divides the width; elsewhere the last block of a row is shorter here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from paretune.errors import CheckpointError, ParetuneError
from paretune.ops import grouping
from paretune.ops.weights.base import GpuForm, NativeForm, Weight, is_finite, part_of

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share one
AT_ONCE = 1 << 22  # numbers that are rounded together
# Table of appendix E, as fp32.
CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@functools.cache
def dynamic_map() -> Tensor:
    """The 256 numbers of a signed 8-bit dynamic float: a decimal exponent of 0 to 6 and as many steps as bits are left.

    fp32 `[256]`, sorted.
    """
    numbers = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        numbers += (10 ** (exponent - 6) * means).tolist()
        numbers += (-(10 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest number of a sorted table, uint8; halves go down."""
    return torch.bucketize(x, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)


@functools.cache
def _nearest_of_16_bits() -> Tensor:
    grid = torch.arange(1 << 16, dtype=torch.float64) / 65535 * 2 - 1
    return nearest(grid.float(), dynamic_map())


def nearest_in_map(x: Tensor) -> Tensor:
    """Index in the dynamic map of `x` in [-1, 1], uint8, by way of its 16-bit rounding.

    So does bitsandbytes (0.50) on a CPU. Its GPU kernels compare with midpoints: one scale in 800 is a step away there.
    """
    return _nearest_of_16_bits().to(x.device)[((x + 1) * 32767.5 + 0.5).floor().long()]


class NF4(Weight):
    """`W[i, k] ~ CODES[q[i, k]] * absmax[i, k // 64]`.

    Args:
        q: uint8 `[out, in / 2]`, rounded up, two codes a byte, the even input in the low half.
        scale: uint8 `[out, in / 64]`, rounded up:
            `absmax = dynamic_map[scale] * scale_of_scales[block of 256] + offset`.
        scale_of_scales: fp32, one for 256 scales in the order of memory, rounded up.
        offset: fp32 `[1]`.
        compute_dtype: of `rows` and `dequantize`.
        in_features: None: as many as `q` holds.
    """

    format = "nf4"
    is_native = True
    rows_matter = False
    bits = 4
    group = BLOCK
    q: Tensor
    scale: Tensor
    scale_of_scales: Tensor
    offset: Tensor
    compute: Tensor

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        scale_of_scales: Tensor,
        offset: Tensor,
        compute_dtype: torch.dtype,
        *,
        in_features: int | None = None,
    ) -> None:
        super().__init__()
        assert q.dtype == scale.dtype == torch.uint8 and scale_of_scales.dtype == offset.dtype == torch.float32
        self.out_features = q.size(0)
        self.in_features = q.size(1) * 2 if in_features is None else in_features
        assert q.size(1) == -(-self.in_features // 2)
        assert scale.shape == (self.out_features, grouping.count(self.in_features, BLOCK))
        assert scale_of_scales.numel() == -(-scale.numel() // SCALE_BLOCK) and offset.shape == (1,)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.register_buffer("scale_of_scales", scale_of_scales)
        self.register_buffer("offset", offset)
        # The width, which the shapes say up to one, for a checkpoint.
        self.register_buffer("layout", torch.tensor([self.in_features], dtype=torch.int32, device=q.device))
        # An empty tensor that carries the compute dtype into a checkpoint and back.
        self.register_buffer("compute", torch.empty(0, dtype=compute_dtype, device=q.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(bfloat16)` changes the compute dtype; the scales stay fp32, on the device of their rows.
        scale_of_scales, offset = self.scale_of_scales, self.offset
        super()._apply(fn, recurse)
        self.scale_of_scales, self.offset = scale_of_scales.to(self.q.device), offset.to(self.q.device)
        return self

    @classmethod
    def quantize(cls, values: Tensor) -> NF4:
        """Rounds to the nearest code, and the scales to theirs.

        Raises:
            ParetuneError: the matrix holds NaN or infinity, or numbers too large for fp16 scales.
        """
        n_in = values.size(1)
        # Rows are independent up to here, and the steps in between take many times the memory.
        parts = [_codes(part) for part in values.detach().split(max(1, AT_ONCE // n_in))]
        q = torch.cat([codes for codes, _ in parts])
        absmax = torch.cat([m for _, m in parts])
        if float(absmax.max()) > torch.finfo(torch.float16).max:
            raise ParetuneError("a weight is too large for fp16 scales", "Use int8 rows, whose scales are fp32")
        flat = absmax.reshape(-1)
        offset = flat.mean()
        padded = F.pad(flat - offset, (0, -flat.numel() % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
        of_scales = padded.abs().amax(dim=1)
        # A matrix of equal blocks has nothing left to scale.
        inverse = torch.where(of_scales > 0, 1.0 / of_scales, torch.zeros_like(of_scales))
        scale = nearest_in_map((padded * inverse[:, None]).clamp_(-1, 1))
        scale = scale.view(-1)[: flat.numel()].view_as(absmax)
        return cls(q, scale, of_scales, offset.reshape(1), values.dtype, in_features=n_in)

    def absmax(self) -> Tensor:
        """The scales as they are applied, fp32 `[out, in / 64]`, rounded up."""
        numbers = dynamic_map().to(self.q.device)[self.scale.int()].view(-1)
        each = self.scale_of_scales.repeat_interleave(SCALE_BLOCK)[: numbers.numel()]
        return (numbers * each + self.offset).view_as(self.scale)

    def integers(self) -> Tensor:
        """The codes, uint8 `[out, in]`."""
        return grouping.halves(self.q, self.in_features)

    def _numbers(self, q: Tensor, absmax: Tensor) -> Tensor:
        values = torch.tensor(CODES, device=q.device)[grouping.halves(q, self.in_features).int()]
        return grouping.scaled(values, absmax, None, BLOCK).to(self.compute_dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """The layer is dequantised for every call: exact, and slow. The native runner and GPUs have fast forms."""
        return F.linear(x, self.dequantize().to(x.dtype))

    def rows(self, index: Tensor) -> Tensor:
        width = self.scale.size(1)
        at = index[..., None] * width + torch.arange(width, device=index.device)
        numbers = dynamic_map().to(index.device)[self.scale[index].int()]
        return self._numbers(self.q[index], numbers * self.scale_of_scales[at // SCALE_BLOCK] + self.offset)

    def dequantize(self) -> Tensor:
        return self._numbers(self.q, self.absmax())

    @property
    def gpu_kind(self) -> str:
        return self.format

    def gpu(self) -> GpuForm | None:
        return GpuForm(self.q, self.scale, None, self.scale_of_scales, self.offset)

    def native(self) -> NativeForm | None:
        kept = {"scale": self.scale, "scale_of_scales": self.scale_of_scales, "offset": self.offset}
        return NativeForm("nf4", self.q, self.absmax().half(), group=BLOCK, kept=kept, n_in=self.in_features)

    @classmethod
    def from_native(cls, form: NativeForm, compute_dtype: torch.dtype) -> NF4:
        k = form.kept
        parts = form.data, k["scale"], k["scale_of_scales"], k["offset"]
        return cls(*parts, compute_dtype, in_features=form.n_in)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.compute.dtype

    @property
    def padded_inputs(self) -> int:
        return 2 * self.q.size(1)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> NF4:
        q = part_of(tensors, "q", (torch.uint8,), 2)
        n_in = 2 * q.size(1)  # of folders written before widths could be odd
        if "layout" in tensors:
            n_in = int(part_of(tensors, "layout", (torch.int32,), (1,)))
        if n_in < 1 or q.size(1) != -(-n_in // 2):
            raise CheckpointError(f"codes {list(q.shape)} do not hold {n_in} inputs", "Save the model again")
        scale = part_of(tensors, "scale", (torch.uint8,), (q.size(0), grouping.count(n_in, BLOCK)))
        of_scales = part_of(tensors, "scale_of_scales", (torch.float32,), (-(-scale.numel() // SCALE_BLOCK),))
        offset = part_of(tensors, "offset", (torch.float32,), (1,))
        return cls(q, scale, of_scales, offset, part_of(tensors, "compute").dtype, in_features=n_in)


def _codes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two a byte, uint8 `[out, in / 2]`, and the largest size of each block, fp32 `[out, in / 64]`."""
    w = values.float()
    if not is_finite(w):
        raise ParetuneError("a weight holds NaN or infinity", "Repair the checkpoint before quantising it")
    absmax, scaled = [], []
    for blocks in grouping.split(w, BLOCK):
        absmax.append(blocks.abs().amax(dim=-1))
        scaled.append((blocks * (1.0 / absmax[-1].clamp(min=1e-38))[..., None]).clamp_(-1, 1).flatten(1))
    codes = nearest(torch.cat(scaled, dim=1), torch.tensor(CODES, device=w.device))
    return grouping.pack_halves(codes), torch.cat(absmax, dim=1)
