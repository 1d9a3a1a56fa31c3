"""How llama.cpp expresses a family: what its architecture is called, and the entries that hold its shapes.

Names of tensors follow from what modules are for (`Family.modules`, `model.gguf.layout`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from paretune.errors import CheckpointError

if TYPE_CHECKING:
    from paretune.model.config import ModelConfig
    from paretune.model.families.base import Role


@dataclass(frozen=True)
class GgufEntries:
    """The entries of a file under its architecture's name.

    Args:
        shapes: of the file's tensors by their names.
        where: the file, in messages.
    """

    architecture: str
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    where: str

    def get(self, key: str, *default: Any) -> Any:
        """Raises `CheckpointError` where there is no entry and no default."""
        value = self.metadata.get(f"{self.architecture}.{key}", *default)
        if value is None:
            raise CheckpointError(f"{self.where} has no entry {self.architecture}.{key}", "Take another file")
        return value

    def count(self, key: str) -> int:
        """A whole number of 1 or more; raises `CheckpointError` where it is none."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{self.where}: the entry {self.architecture}.{key} is {value!r}, not a whole number",
                "Take another file",
            )
        return value


class GgufForm(ABC):
    """A family in llama.cpp's words.

    Class variables:
        architecture: its `general.architecture`.
        title: what llama.cpp's form of it is called in messages.
        activation: the one that it has.
        is_read: a file of this architecture is read as this family; one family of those that share it.
        interleaved: matrices whose rows stand in another order: llama.cpp rotates dimension 2i with 2i + 1, Hugging
            Face i with i + D/2.
    """

    architecture: ClassVar[str]
    title: ClassVar[str]
    activation: ClassVar[str]
    is_read: ClassVar[bool] = True
    interleaved: ClassVar[tuple[Role, ...]] = ()

    @abstractmethod
    def entries(self, config: ModelConfig) -> dict[str, Any]:
        """The entries beside those of every architecture, without its name before the key."""

    @abstractmethod
    def to_hf(self, file: GgufEntries) -> dict[str, Any]:
        """The entries of `config.json` beside the vocabulary's.

        Raises:
            CheckpointError: an option that is not read here, or an entry that is missing.
        """

    def notes(self, config: ModelConfig) -> list[str]:
        """What the user should know about a file of this model."""
        return []
