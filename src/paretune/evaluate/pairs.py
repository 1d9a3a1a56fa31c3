"""Articles with their summaries: from a JSONL or CSV file, or those that come with the project.

What cannot be used is skipped and counted, by reason; what looks like a wrong file is an error.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paretune.errors import ParetuneError, UsageError
from paretune.evaluate import texts

ARTICLE_COLUMNS = ("article", "document", "text", "dialogue")
SUMMARY_COLUMNS = ("summary", "highlights", "abstract")
OWN_PAIRS = "paretune-pieces"
_PART_WORDS = 120  # a shorter part of a piece is not worth a summary


@dataclass(frozen=True)
class Pair:
    """One article and its reference summary."""

    id: str
    article: str
    summary: str


@dataclass(frozen=True)
class PairSet:
    """Pairs, where they come from and what was left out.

    Attributes:
        skipped: reason -> number of rows that were left out.
    """

    name: str
    pairs: tuple[Pair, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def said(self) -> str:
        """One line: how many there are and what was skipped."""
        left = ", ".join(f"{n} {reason}" for reason, n in self.skipped.items())
        return f"{self.name}: {len(self.pairs)} pairs" + (f"; skipped: {left}" if left else "")

    @property
    def key(self) -> str:
        """A hash of the pairs, 32 hex digits."""
        digest = hashlib.sha256()
        for p in self.pairs:
            digest.update(json.dumps([p.id, p.article, p.summary]).encode())
        return digest.hexdigest()[:32]

    def split(self, n_heldout: int, seed: int = 0) -> tuple[PairSet, PairSet]:
        """(training pairs, held-out pairs), drawn by a hash of the seed and each pair's article.

        Raises:
            UsageError: nothing is left to train on.
        """
        if not 0 <= n_heldout < len(self.pairs):
            raise UsageError(
                f"{n_heldout} of {len(self.pairs)} pairs are to be held out, which leaves none to train on",
                "Hold out fewer, or pass more pairs",
            )
        order = sorted(self.pairs, key=lambda p: hashlib.sha256(f"{seed}\0{p.article}".encode()).digest())
        held = {id(p) for p in order[:n_heldout]}
        parts = ([p for p in self.pairs if id(p) not in held], [p for p in self.pairs if id(p) in held])
        train, heldout = (PairSet(self.name, tuple(part)) for part in parts)
        return PairSet(self.name, train.pairs, self.skipped), heldout

    def take(self, n: int, seed: int = 0) -> PairSet:
        """At most `n` pairs, drawn at random, in the order of the file."""
        if n >= len(self.pairs):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self.pairs)), n))
        return PairSet(f"{self.name}[{n}]", tuple(self.pairs[i] for i in chosen), self.skipped)


def read_pairs(path: str | Path, article_column: str | None = None, summary_column: str | None = None) -> PairSet:
    """The pairs of a `.jsonl` or `.csv` file, UTF-8.

    Rows without article or summary, with half a character (a lone surrogate: an emoji cut in the middle), and repeated
    articles are skipped and counted.

    Args:
        article_column, summary_column: their names; default the first known one that the file has.

    Raises:
        UsageError: no such file, no UTF-8, unknown columns, a damaged row, or no usable pair at all.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".jsonl", ".csv"):
        raise UsageError(
            f"{path} is not a file of pairs", "Pass a .jsonl or .csv file with an article and a summary a row"
        )
    text = texts.read_text(path).removeprefix("\ufeff")
    rows = _json_rows(text, path) if path.suffix == ".jsonl" else _csv_rows(text, path)
    article = summary = ""
    skipped: Counter[str] = Counter()
    pairs: list[Pair] = []
    seen: set[str] = set()
    for number, row in rows:
        if not article:
            article = _column(article_column, ARTICLE_COLUMNS, row, path, "--article-column")
            summary = _column(summary_column, SUMMARY_COLUMNS, row, path, "--summary-column")
        parts = [_text(row.get(column), column, number, path) for column in (article, summary)]
        name = str(row.get("id", number))
        if not parts[0]:
            skipped["without article"] += 1
        elif not parts[1]:
            skipped["without summary"] += 1
        elif not all(map(_is_whole, (name, *parts))):
            skipped["with half a character"] += 1
        elif parts[0] in seen:
            skipped["repeated article"] += 1
        else:
            seen.add(parts[0])
            pairs.append(Pair(name, *parts))
    if not pairs:
        why = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "it has no rows"
        raise UsageError(f"{path} has no usable pair: {why}", "Check the file, or name other columns")
    return PairSet(path.stem, tuple(pairs), dict(skipped))


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Not `splitlines`: it cuts at U+2028, U+2029 and U+0085 too, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number} is not valid JSON ({error})", "Correct the line") from None
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number} is not a JSON object", "Write one object a line")
        yield number, row


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    limit = csv.field_size_limit(1 << 30)  # the default of 128 KiB is less than some articles
    try:
        reader = csv.DictReader(io.StringIO(text), strict=True)
        yield from enumerate(reader, 1)
    except csv.Error as error:
        raise UsageError(f"{path} is not valid CSV ({error})", "Correct the file") from None
    finally:
        csv.field_size_limit(limit)


def _column(wanted: str | None, known: Sequence[str], row: Mapping[str, Any], path: Path, flag: str) -> str:
    columns = [c for c in row if isinstance(c, str)]
    if wanted is not None:
        if wanted not in columns:
            near = difflib.get_close_matches(wanted, columns, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"{path} has no column {wanted!r}", f"{hint}It has: {', '.join(columns)}")
        return wanted
    found = next((c for c in known if c in columns), None)
    if found is None:
        raise UsageError(f"{path} has none of the columns {', '.join(known)}", f"Pass {flag}: {', '.join(columns)}")
    return found


def _text(value: Any, column: str, number: int, path: Path) -> str:
    if isinstance(value, list) and all(isinstance(v, str) for v in value):  # highlights as a list of sentences
        value = "\n".join(value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(
            f"{path}, row {number}: {column} is {type(value).__name__}, not text", "Name another column, or correct it"
        )
    return value.strip()


def _is_whole(text: str) -> bool:
    """Whether it can be written: JSON's escapes can say one half of a surrogate pair, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def own_pairs(split: texts.Split) -> PairSet:
    """The pieces that come with the project, each with its summary: 52 a split."""
    pairs = tuple(Pair(p.id, f"{p.title}\n\n{p.text}", p.summary) for p in texts.pieces(split))
    return PairSet(f"{OWN_PAIRS}/{split}", pairs)


def own_training_pairs(n: int) -> PairSet:
    """`n` training pairs of the `search` split: its pieces, then their openings and their endings.

    A summary of a piece says what its first and its last two thirds are about, too; with 52 pieces that is the only
    way to more pairs.

    Raises:
        ParetuneError: there are not that many.
    """
    whole = own_pairs("search").pairs
    parts: list[Pair] = []
    for name in ("opening", "ending"):
        for p in whole:
            words = p.article.split(" ")
            cut = 2 * len(words) // 3
            chosen = words[:cut] if name == "opening" else words[-cut:]
            if cut >= _PART_WORDS:
                parts.append(Pair(f"{p.id}-{name}", " ".join(chosen), p.summary))
    found = (*whole, *parts)
    if len(found) < n:
        raise ParetuneError(f"{n} training pairs asked for, {len(found)} are there", "Ask for fewer")
    return PairSet(f"{OWN_PAIRS}/search", found[:n])
