"""What every weight format can do. A format is one file beside this one and one line in `registry.py`.

Linear and embedding layers hold a `Weight`; fusion, saving, loading and byte counts use this interface, never a
format's class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn


class Weight(nn.Module):
    """A matrix `[out_features, in_features]` in some stored form.

    It is an `nn.Module` so that its tensors move, save and count with the model they sit in. Tied layers share one
    `Weight`.
    """

    format: ClassVar[str]  # the name in `registry.FORMATS`, written into checkpoints
    kernel: ClassVar[str | None] = None  # operator that a profile of one step must show, where there is one

    out_features: int
    in_features: int

    def matmul(self, x: Tensor) -> Tensor:
        """`x[..., in] @ W.T -> [..., out]`, in the dtype of `x`."""
        raise NotImplementedError

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
        """Builds the weight around stored tensors without copying them."""
        raise NotImplementedError

    def native(self) -> tuple[str, Tensor, Tensor | None] | None:
        """What native code reads: a name in `ops.native.program.FORMATS`, the values `[out, in]`, scales `[out]` or
        None. None where it cannot read this format."""
        return None

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors, each storage counted once."""
        return sum({t.untyped_storage().data_ptr(): t.nbytes for t in self.to_tensors().values()}.values())

    def extra_repr(self) -> str:
        return f"{self.out_features}x{self.in_features}, {self.format}"
