"""Where proposed tokens come from. One protocol for all drafts; a draft is one file beside this one, or another
package's (`registry.DRAFTS`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from paretune.engine.cache import KVCache
from paretune.engine.runners.base import Runner
from paretune.model.config import ModelConfig
from paretune.option import Option
from paretune.registry import RUNNERS

# Random prompts, at which a search times its candidates, have no acceptance to speak of.
ON_TEXT = "what it gains depends on the text, and the search times random prompts"


class Text(Protocol):
    """What a draft sees of a request."""

    prompt: list[int]
    tokens: list[int]  # new ones
    is_done: bool


def text_from(request: Text, start: int) -> list[int]:
    """Tokens of a request, prompt and new ones, from position `start` on."""
    n_prompt = len(request.prompt)
    return request.tokens[start - n_prompt :] if start >= n_prompt else request.prompt[start:] + request.tokens


class Proposal(NamedTuple):
    """Tokens that may come next.

    Args:
        match: tokens at the end of the text that it rests on; 0: it rests on no such match.
    """

    tokens: list[int]
    match: int = 0


class Source(NamedTuple):
    """A model that may be loaded.

    Args:
        folder: of its checkpoint.
        load: gives its runner.
    """

    name: str
    config: ModelConfig
    folder: Path
    load: Callable[[], Runner]


@dataclass(frozen=True)
class Target:
    """The model whose tokens are proposed, and how a draft gets at others.

    Args:
        folder: of its checkpoint; None: not known, and drafts that load it again cannot run.
        open: gives the model of a name under a config, on the target's device, before any weight is read.
    """

    runner: Runner
    folder: Path | None = None
    open: Callable[[str, str], Source] | None = None

    @property
    def runner_name(self) -> str:
        """What a model that drafts runs on: what the target does, if that takes rows as they come; else PyTorch."""
        if not self.runner.fixed_batch:
            return self.runner.name
        return next(name for name, kind in RUNNERS.working() if kind.is_reference)


class Draft:
    """Proposes tokens for the rows of one scheduler. What others need to know of a draft it declares here.

    Args:
        shared: what `prepare` gave.
        cache: of the target; a draft looks at it and leaves it as it is.
    """

    must_declare: ClassVar[tuple[str, ...]] = ("name", "propose")
    name: ClassVar[str]
    argument: ClassVar[str] = ""  # what has to stand behind `NAME=`; "" nothing
    choices: ClassVar[tuple[str, ...]] = ()  # what may stand there, where it need not
    is_free: ClassVar[bool] = False  # it costs microseconds: proposals are made even where none is tried

    def __init__(self, shared: Any, cache: KVCache) -> None: ...

    @classmethod
    def options(cls, config: ModelConfig | None, device: str) -> Sequence[Option]:
        """Its settings that are worth trying, each named `speculate(...)`; a search decides them on text, after the
        rest (`ON_TEXT`)."""
        return []

    @classmethod
    def fits(cls, argument: str, config: ModelConfig) -> str | None:
        """Why it cannot propose for a model of this config, or None: known before any weight is read."""
        return None

    @classmethod
    def prepare(cls, argument: str, target: Target) -> Any:
        """What all schedulers share, made once for a target: loads a model, say.

        Raises:
            UsageError: this draft does not go with this target.
        """
        return None

    @classmethod
    def describe(cls, shared: Any) -> dict[str, Any]:
        """What really proposes, for the report."""
        return {}

    def enter(self, row: int, request: Text) -> None:
        """A request has come into a row."""

    def leave(self, row: int, request: Text) -> None:
        """A request has left its row."""

    def propose(self, most: Mapping[int, int]) -> dict[int, Proposal]:
        """Tokens for rows, at most so many each; a row may get fewer, or be left out."""
        raise NotImplementedError

    def settle(self) -> None:
        """A step is over: the requests hold what the target chose, which may not be what was proposed."""
