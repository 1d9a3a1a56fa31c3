"""How a task's input becomes a prompt: recorded in `prompt.json` of a fine-tuned folder, read by `generate` and `eval`.

A model answers in the form in which it was trained; a different separator costs more quality than most mechanisms.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from paretune.errors import CheckpointError, UsageError

FILE = "prompt.json"
SCHEMA_VERSION = 1
MAX_LEN = 512  # tokens of prompt and answer together: the limit of the published attention study
EOS_FORMS = ("summary", "sentence")

_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]”]))\s+(?=[\"'(\[“]?[A-Z0-9])")


class Encoder(Protocol):
    """The part of the tokenizer that is needed."""

    def encode(self, text: str, special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class PromptFormat:
    """The prompt of a summary: `prefix`, the article, `suffix`; then the summary and its end token.

    Args:
        max_len: tokens of prompt and summary together; a longer article loses its end.
        eos: where end tokens stand: one after the `summary`, or one after each `sentence` of it and one more at
            its end (as the published attention study has it), so that two in a row end it.
        max_new_tokens: what generation may add; set from the summaries that were trained on.
    """

    prefix: str = ""
    suffix: str = "\n\nTL;DR:"
    max_len: int = MAX_LEN
    eos: str = "summary"
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.eos not in EOS_FORMS:
            raise UsageError(f"--eos is {self.eos!r}", f"Known: {', '.join(EOS_FORMS)}")
        if not self.suffix.strip():
            raise UsageError("the prompt has no separator after the article", "Pass --prompt-suffix, such as TL;DR:")
        if self.max_new_tokens < 1:
            raise UsageError(f"{self.max_new_tokens} new tokens for a summary", "Give 1 or more")
        if self.max_len < 8:
            raise UsageError(f"a limit of {self.max_len} tokens leaves no room for an article", "Give 8 or more")

    @property
    def eos_run(self) -> int:
        """End tokens in a row that end a summary."""
        return 2 if self.eos == "sentence" else 1

    def prompt(self, tokenizer: Encoder, article: str, room: int | None = None) -> tuple[list[int], bool]:
        """Token ids of the prompt, and whether the article was cut.

        Args:
            room: tokens that are kept free for the summary; default `max_new_tokens`.
        """
        before = tokenizer.encode(self.prefix) if self.prefix else []
        after = tokenizer.encode(self.suffix, special_tokens=False)
        body = tokenizer.encode(article.strip(), special_tokens=not self.prefix)
        free = self.max_len - len(before) - len(after) - (self.max_new_tokens if room is None else room)
        if free < 1:
            raise UsageError(
                f"{self.max_len} tokens leave none for the article beside the separators and the summary",
                "Raise --max-len, or ask for fewer new tokens",
            )
        return before + body[:free] + after, len(body) > free

    def answer(self, tokenizer: Encoder, summary: str, end: int) -> list[int]:
        """Token ids of the summary with its end tokens."""
        if self.eos == "summary":
            return [*tokenizer.encode(f" {summary.strip()}", special_tokens=False), end]
        ids: list[int] = []
        for sentence in sentences(summary):
            ids += [*tokenizer.encode(f" {sentence}", special_tokens=False), end]
        return [*ids, end]

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "task": "summarization", **asdict(self)}

    @staticmethod
    def read(folder: Path) -> PromptFormat | None:
        """The format that the folder records; None where it records none.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text("utf-8"))
            version, task = found.pop("schema_version"), found.pop("task")
            if (version, task) != (SCHEMA_VERSION, "summarization"):
                raise ValueError(f"schema_version {version}, task {task!r}")
            return PromptFormat(**found)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, UsageError) as error:
            raise CheckpointError(f"{path} is damaged ({error})", "Train again, or remove the file") from None


def sentences(text: str) -> list[str]:
    """The sentences of a text: cut after . ! ? before a capital, a digit or a quotation mark, and at line ends."""
    found: list[str] = []
    for line in text.splitlines():
        found += [part.strip() for part in _SENTENCE_END.split(line.strip())]
    return [s for s in found if s]
