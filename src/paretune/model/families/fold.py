"""A tensor in a model that can be scaled for nothing; what is done with it: `transforms.folding`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Fold:
    """A tensor that one module makes and some linear layers read.

    Args:
        source: of a norm, or of a linear layer, by name.
        readers: names of all that read it.
        rows: of a linear source that make it, first and one past the last.
        shared: `(n_kv_head, sharers, head_dim)` where heads of the inputs are copies of one of the source.
    """

    source: str
    readers: tuple[str, ...]
    rows: tuple[int, int] | None = None
    shared: tuple[int, int, int] | None = None

    def of_source(self, x: Tensor) -> Tensor:
        """Mean over the inputs that are the same row of the source: `[in] -> [rows]`."""
        if self.shared is None:
            return x
        n_kv_head, sharers, head_dim = self.shared
        return x.view(n_kv_head, sharers, head_dim).mean(1).flatten()

    def of_readers(self, x: Tensor) -> Tensor:
        """A number for each row of the source -> for each input of the readers."""
        if self.shared is None:
            return x
        n_kv_head, sharers, head_dim = self.shared
        return x.view(n_kv_head, 1, head_dim).expand(-1, sharers, -1).flatten()
