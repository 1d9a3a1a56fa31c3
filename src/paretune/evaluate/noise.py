"""Texts that are no longer clean: typing errors, lost words, lost casing. Seeded: every model meets the same."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable

from paretune.errors import UsageError

_WORD = re.compile(r"\S+")


def _random(text: str, kind: str, seed: int) -> random.Random:
    """A generator of the text's own: adding a document to a set changes no other."""
    return random.Random(hashlib.sha256(f"{kind}\0{seed}\0{text}".encode()).digest())


def swap_characters(text: str, rate: float = 0.1, seed: int = 0) -> str:
    """Two neighbouring inner letters change places in a share `rate` of the words of four letters or more."""
    draw = _random(text, "swap", seed)

    def change(match: re.Match[str]) -> str:
        word = match.group()
        if len(word) < 4 or draw.random() >= rate:
            return word
        i = draw.randrange(1, len(word) - 2)
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]

    return _WORD.sub(change, text)


def drop_words(text: str, rate: float = 0.1, seed: int = 0) -> str:
    """A share `rate` of the words is missing; what stands between them stays."""
    draw = _random(text, "drop", seed)
    parts = re.split(r"(\s+)", text)
    kept = [part for i, part in enumerate(parts) if i % 2 or not part or draw.random() >= rate]
    return re.sub(r"[ \t]{2,}", " ", "".join(kept)).strip() or text


def change_case(text: str, rate: float = 1.0, seed: int = 0) -> str:
    """A share `rate` of the words in small letters: text as it is typed in haste."""
    draw = _random(text, "case", seed)
    return _WORD.sub(lambda m: m.group().lower() if draw.random() < rate else m.group(), text)


Noise = Callable[[str, int], str]

# The kinds of a study: name -> text and seed to text.
KINDS: dict[str, Noise] = {
    "character swaps (10 % of words)": lambda text, seed: swap_characters(text, 0.1, seed),
    "word drops (10 %)": lambda text, seed: drop_words(text, 0.1, seed),
    "all in small letters": lambda text, seed: change_case(text, 1.0, seed),
}


def noisy(text: str, kind: str, seed: int = 0) -> str:
    """
    Raises:
        UsageError: there is no such kind.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown noise {kind!r}", f"Known: {', '.join(KINDS)}")
    return KINDS[kind](text, seed)
