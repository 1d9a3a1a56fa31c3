"""What a family of models declares about itself, so that nobody has to ask for its name."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    from paretune.model.base import LanguageModel
    from paretune.model.config import ModelConfig
    from paretune.model.families.fold import Fold
    from paretune.model.families.gguf import GgufForm

# What a module is for. A family has those that it names in `Family.modules`.
Role = Literal[
    "embedding", "positions", "norm", "head",  # around the blocks
    "norm_1", "qkv", "q", "k", "v", "o", "norm_2", "gate", "up", "down",  # of a block; `qkv` or `q`, `k` and `v`
]  # fmt: skip


class Boundary(NamedTuple):
    """Where parts of a profile begin and end (`measure.profile_parts`).

    Args:
        module: the end of a module's name.
        begins: the part that begins when it is called.
        ends: the part that begins when it returns. What lies between two modules (a reshape, a residual) belongs to it.
    """

    module: str
    begins: str
    ends: str


class Family(ABC):
    """All that is particular to a family. A new one is a subclass and a line in `registry.FAMILIES`.

    What has no value here has to be declared:
        name: `model_type` in `config.json`, and the name in the registry.
        architecture: the entry of `architectures` there.
        n_positions_key: the entry that holds the longest sequence.
        model: the class that is built.
        positions: what tells a token's place.
        norm: the kind of normalisation.
        modules: paths of modules by what they are for; `{i}` is the number of the block.
        stack: path of the list of blocks.
        attention: path in a block of the module that holds the attention function.
        operators: of an eager step with fused attention that do something, a block and around the blocks.

    What may be declared:
        is_gated: the MLP has a gate.
        stored_prefix: what stored names begin with, the head's aside.
        stored_transposed: ends of names that are stored `[in, out]`.
        stored_ignored: ends of names that carry no information.
        boundaries: of the parts of a profile; none: a profile does not take the step apart.
        titles: of parts that do more here than their name says.
        gguf: how llama.cpp expresses it; None: it cannot.
        sizes: entries of `config.json` of published models by their names.
    """

    must_declare: ClassVar[tuple[str, ...]] = (
        "name",
        "architecture",
        "n_positions_key",
        "model",
        "positions",
        "norm",
        "modules",
        "stack",
        "attention",
        "operators",
    )
    name: ClassVar[str]
    architecture: ClassVar[str]
    n_positions_key: ClassVar[str]
    model: ClassVar[type[LanguageModel]]
    positions: ClassVar[Literal["learned", "rotary", "none"]]
    norm: ClassVar[Literal["layer", "rms"]]
    modules: ClassVar[Mapping[Role, str]]
    stack: ClassVar[str]
    attention: ClassVar[str]
    operators: ClassVar[tuple[int, int]]

    is_gated: ClassVar[bool] = False
    stored_prefix: ClassVar[str] = ""
    stored_transposed: ClassVar[tuple[str, ...]] = ()
    stored_ignored: ClassVar[tuple[str, ...]] = ()
    boundaries: ClassVar[tuple[Boundary, ...]] = ()
    titles: ClassVar[Mapping[str, str]] = {}
    gguf: ClassVar[GgufForm | None] = None
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self) -> None:
        missing = [name for name in Family.__annotations__ if not hasattr(self, name)]
        assert not missing, f"{type(self).__name__} does not declare {', '.join(missing)}"

    @abstractmethod
    def read(self, hf: Mapping[str, Any], where: str) -> ModelConfig:
        """Narrows a `config.json` (`model.entries` reads and checks its entries).

        Args:
            where: what the file is called in messages.

        Raises:
            CheckpointError: an option that is not known here.
            KeyError, TypeError, ValueError: an entry that is missing or wrong; the caller says which file it is in.
        """

    @abstractmethod
    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The entries of a fresh `config.json` beside those that all families share (`ModelConfig.to_hf`)."""

    def check(self, config: ModelConfig, where: str) -> None:  # noqa: B027 - most have nothing to add
        """Whether its shapes go together, beyond what holds for every family.

        Raises:
            CheckpointError: they do not.
        """

    def expresses(self, config: ModelConfig) -> bool:
        """Whether its entries of `config.json` say the shapes of a model whose layers are alike."""
        return True

    def folds(self, config: ModelConfig, block: str) -> list[Fold]:
        """Which inputs of a block's layers can be scaled for nothing (`transforms.folding`).

        Args:
            block: its name in the tree.
        """
        return []

    @property
    def has_native_form(self) -> bool:
        """Whether its forward step can be written as native operations."""
        from paretune.model.base import LanguageModel

        return self.model.lower is not LanguageModel.lower

    def role_of(self, name: str) -> Role | None:
        """What the module of a tensor is for: `h.3.ln_1.weight` -> `norm_1`; None for a module without a role."""
        path = re.sub(r"\.\d+\.", ".{i}.", name.rpartition(".")[0])
        return next((role for role, module in self.modules.items() if module == path), None)
