"""What every weight format can do. A format is one file beside this one and one line in `registry.py`.

Linear and embedding layers hold a `Weight`; fusion, saving, loading and byte counts use this interface, never a
format's class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from paretune.errors import CheckpointError
from paretune.ops.quantized_linear import op


@dataclass(frozen=True)
class NativeForm:
    """What native code packs (`ops/native/packed.h`): row-major tensors as PyTorch stores them.

    Args:
        kind: a name in `ops.native.packed.KINDS`.
        data: `[out, in]`; int4 and nf4 `[out, in / 2]`, rounded up, with the even inputs in the low nibbles.
        scale: fp32 `[out]`, or fp16 `[out, in / group]`, rounded up, or None.
        minimum: fp16 `[out, in / group]`, rounded up, or None: `w = (q - lowest) * scale + minimum`.
        group: inputs that share a scale, a shorter group at the end of a row; 0: the whole row does.
        activation_bits: what inputs of integer formats are rounded to, 16, 8 or 7.
        kept: small tensors that native code does not read but the format needs to give itself back bit for bit.
        n_in: inputs; 0: as many as `data` is wide.
        lowest: the integer that the minimum stands for; 0 where there is no minimum.
        n_stored: numbers that are not zero, of formats that store no others.
    """

    kind: str
    data: Tensor
    scale: Tensor | None = None
    minimum: Tensor | None = None
    group: int = 0
    activation_bits: int = 16
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    n_in: int = 0
    lowest: int = 0
    n_stored: int = 0

    def __post_init__(self) -> None:
        if not self.n_in:
            object.__setattr__(self, "n_in", self.data.size(1))


class GpuForm(NamedTuple):
    """What the kernels of `ops/quantized_linear` read: stored tensors as they are.

    `lowest` is the integer that the minima `low` stand for, 0 without them.
    """

    q: Tensor
    scale: Tensor
    low: Tensor | None = None
    of_scales: Tensor | None = None
    offset: Tensor | None = None
    lowest: int = 0


def part_of(
    tensors: Mapping[str, Tensor],
    name: str,
    dtypes: Sequence[torch.dtype] = (),
    shape: int | Sequence[int] | None = None,
) -> Tensor:
    """The stored tensor `name` of a weight.

    Args:
        dtypes: that it may have; none: any.
        shape: that it has to have, or how many dimensions.

    Raises:
        CheckpointError: it is not there, or of another type or shape.
    """
    if name not in tensors:
        raise CheckpointError(f"its part {name!r} is missing", "Save the model again")
    tensor = tensors[name]
    if dtypes and tensor.dtype not in dtypes:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(f"its part {name!r} is {tensor.dtype}, not {known}", "Save the model again")
    fits = shape is None or (tensor.dim() == shape if isinstance(shape, int) else tensor.shape == tuple(shape))
    if not fits:
        wanted = f"{shape} dimensions" if isinstance(shape, int) else f"shape {list(shape or ())}"
        raise CheckpointError(f"its part {name!r} has shape {list(tensor.shape)}, not {wanted}", "Save the model again")
    return tensor


def is_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite. One pass: NaN wins over every number, in both of the two."""
    return values.numel() == 0 or all(math.isfinite(float(end)) for end in torch.aminmax(values.detach()))


class Weight(nn.Module):
    """A matrix `[out_features, in_features]` in some stored form.

    It is an `nn.Module` so that its tensors move, save and count with the model they sit in. Tied layers share one
    `Weight`.
    """

    must_declare: ClassVar[tuple[str, ...]] = (
        "format",
        "matmul",
        "rows",
        "dequantize",
        "compute_dtype",
        "from_tensors",
    )
    format: ClassVar[str]  # the name in `registry.FORMATS`, written into checkpoints
    is_plain: ClassVar[bool] = False  # numbers as they are, nothing rounded but by their dtype
    is_native: ClassVar[bool] = False  # native code has it (`native`)
    kernel: ClassVar[str | None] = None  # operator that a profile of one step must show, where there is one
    # In fp32 on a CPU: whether a row of `linear` depends on how many others there are by more than the order of
    # additions, because another kernel with other rounding runs, or rows share what they are rounded with.
    rows_matter: ClassVar[bool] = True

    out_features: int
    in_features: int
    bits: int  # of one stored number
    group: int = 0  # inputs that share a scale; 0: the whole row does, or there is none

    def matmul(self, x: Tensor) -> Tensor:
        """`x[..., in] @ W.T -> [..., out]`, in the dtype of `x`."""
        raise NotImplementedError

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`matmul`, and the bias `[out]` added: on a GPU in one kernel that dequantises, where the format has one."""
        if op.applies(x) and (form := self.gpu()) is not None:
            return op.quantized_linear(self.rounded(x), *form, bias, self.gpu_kind, self.group)
        y = self.matmul(x)
        return y if bias is None else y + bias

    @property
    def gpu_kind(self) -> str:
        """How GPU kernels know its numbers (`ops.quantized_linear.tiles.FORMATS`)."""
        return f"int{self.bits}"

    def gpu(self) -> GpuForm | None:
        """What GPU kernels read, without copying; None where they know no such format."""
        return None

    def rounded(self, x: Tensor) -> Tensor:
        """The inputs as `matmul` takes them."""
        return x

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the matrix, `index[...] -> [..., in]`: an embedding look-up."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The whole matrix `[out, in]` in the compute dtype."""
        raise NotImplementedError

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of `rows` and `dequantize`."""
        raise NotImplementedError

    def to_tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, as they are."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Weight:
        """Builds the weight around stored tensors without copying them.

        Raises:
            CheckpointError: a tensor is missing, or of another type or shape than the format has.
        """
        raise NotImplementedError

    def native(self) -> NativeForm | None:
        """What native code packs, without copying; None where it has no such format."""
        return None

    @classmethod
    def from_native(cls, form: NativeForm, compute_dtype: torch.dtype) -> Weight:
        """The opposite of `native`."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(iter(self.to_tensors().values())).device

    @property
    def padded_rows(self) -> int:
        """Rows that are stored."""
        return self.out_features

    @property
    def padded_inputs(self) -> int:
        """Inputs that are stored."""
        return self.in_features

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors, each storage counted once."""
        return sum({t.untyped_storage().data_ptr(): t.nbytes for t in self.to_tensors().values()}.values())

    def extra_repr(self) -> str:
        return f"{self.out_features}x{self.in_features}, {self.format}"
