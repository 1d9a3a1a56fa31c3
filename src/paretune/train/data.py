"""Text files to one stream of token ids, and batches out of it.

A document is a file. Documents are joined, each followed by the tokenizer's end-of-text token. A stream is
kept in a cache as plain little-endian integers, under a hash of the texts and of the tokenizer as its name: a
changed text or tokenizer can never meet an old stream.

Also here: the files of a checkpoint, found and proven whole before anything of them is used.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import CheckpointError, ParetuneError, UsageError
from paretune.files import ensure_folder, write_error, write_json
from paretune.model.tokenizer import Tokenizer

SCHEMA_VERSION = 1
END_OF_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
)  # looked for when the tokenizer's settings name none
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
# The tokenizer keeps about 200 bytes a token of what it returns: long texts go through it in pieces.
_PIECE_CHARACTERS = 4_000_000
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


@dataclass(frozen=True)
class Document:
    """One text file. `name` is its path below the folder that was given, with forward slashes."""

    name: str
    path: Path


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The token ids of some documents.

    Attributes:
        tokens: `[n]`, uint16 or uint32, memory-mapped.
        n_bytes: length of the texts in UTF-8; the end-of-text tokens stand for no bytes.
        documents: their names, in the order of the stream.
        key: hash of the texts and the tokenizer, 32 hex digits.
    """

    tokens: np.ndarray
    n_bytes: int
    documents: tuple[str, ...]
    key: str


def find_documents(paths: Sequence[Path]) -> list[Document]:
    """The text files of files and folders (`*.txt`, at any depth), sorted by name within a folder.

    Raises:
        UsageError: a path is not there, a folder holds no text file, or two documents have one name.
    """
    found: list[Document] = []
    for path in paths:
        if path.is_file():
            found.append(Document(path.name, path))
        elif path.is_dir():
            inside = [Document(p.relative_to(path).as_posix(), p) for p in path.rglob("*.txt") if p.is_file()]
            if not inside:
                raise UsageError(f"{path} holds no *.txt file", "Pass --text a text file or a folder of them")
            found += sorted(inside, key=lambda d: d.name)
        else:
            raise UsageError(f"there is no file or folder {path}", "Pass --text a text file or a folder")
    names = [d.name for d in found]
    twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise UsageError(f"two texts are called {twice[0]}", "Rename one: texts are held out by name")
    return found


def split_heldout(
    documents: Sequence[Document], fraction: float = 0.05, explicit: Sequence[str] = ()
) -> tuple[list[Document], list[Document]]:
    """(training documents, held-out documents).

    The choice depends on the names alone: the same documents stay held out when others come or go. With two
    or more documents and a fraction over 0, at least one is on each side.

    Args:
        fraction: about this part of the documents is held out; 0 for none.
        explicit: names to hold out instead.

    Raises:
        UsageError: the fraction is not in [0, 1), a name is unknown, or nothing is left to train on.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"a held-out fraction of {fraction}", "Give 0 (none) or more, and less than 1")
    names = [d.name for d in documents]
    for name in explicit:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Names are paths below the folder of --text"
            raise UsageError(f"there is no text called {name!r} to hold out", hint)
    chosen = set(explicit)
    if not explicit and fraction > 0 and len(names) > 1:
        ranked = sorted(names, key=_rank)
        n = sum(_rank(name) < fraction for name in names)
        chosen = set(ranked[: min(max(n, 1), len(names) - 1)])
    if names and len(chosen) == len(names):
        raise UsageError("all texts are held out, which leaves none to train on", "Hold out fewer, or add texts")
    return [d for d in documents if d.name not in chosen], [d for d in documents if d.name in chosen]


def _rank(name: str) -> float:
    """A number in [0, 1) that depends on the name alone (Python's own `hash` changes with every process)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document.

    Raises:
        UsageError: the tokenizer has none.
    """
    named: Any = tokenizer.settings.get("eos_token")
    if isinstance(named, dict):
        named = named.get("content")
    for token in (named, *END_OF_TEXT):
        found = tokenizer.token_id(token) if token else None
        if found is not None:
            return found
    raise UsageError(
        "the tokenizer has no end-of-text token to put between documents",
        'Name one of its tokens as "eos_token" in tokenizer_config.json',
    )


def load_stream(documents: Sequence[Document], tokenizer_folder: Path, cache_dir: Path) -> TokenStream:
    """The token stream of `documents`, from the cache or made and put there.

    Args:
        tokenizer_folder: holds the tokenizer's files.
        cache_dir: made if it is not there; `<key>.bin` and `<key>.json` are written.

    Raises:
        ParetuneError: a text is empty or not UTF-8, cannot be read, or the cache cannot be written.
        CheckpointError: no tokenizer in the folder, or a damaged one.
    """
    assert documents, "no documents"
    digest = hashlib.sha256(f"paretune tokens {SCHEMA_VERSION} {tokenizer_hash(tokenizer_folder)}".encode())
    n_bytes = 0
    for document in documents:  # texts are read again to be encoded: all of them at once may not fit in memory
        raw = _read(document)
        n_bytes += len(raw)
        digest.update(hashlib.sha256(raw).digest())
    key = digest.hexdigest()[:32]
    path, about = cache_dir / f"{key}.bin", cache_dir / f"{key}.json"
    names = tuple(d.name for d in documents)
    tokens = _cached(path, about)
    if tokens is None:
        tokenizer = Tokenizer(tokenizer_folder)
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        n_tokens = _write_tokens(path, documents, tokenizer, dtype)
        write_json(about, {"schema_version": SCHEMA_VERSION, "dtype": dtype.str, "n_tokens": n_tokens})
        tokens = np.memmap(path, dtype=dtype, mode="r", shape=(n_tokens,))
    return TokenStream(tokens, n_bytes, names, key)


def tokenizer_hash(folder: Path) -> str:
    """A hash of the files that decide how text becomes tokens."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def _read(document: Document) -> bytes:
    """The text's bytes without a byte order mark, proven to be UTF-8."""
    try:
        raw = document.path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ParetuneError(
            f"cannot read {document.path}: {error.strerror}", "Check the file and its permissions"
        ) from None
    if not raw.strip():
        raise ParetuneError(f"{document.path} is empty", "Remove it, or pass other texts with --text")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ParetuneError(
            f"{document.path} is not UTF-8 text (byte {error.start} is 0x{raw[error.start]:02x})",
            f"Convert it, for example: iconv -f latin1 -t utf-8 {document.path.name}",
        ) from None
    return raw


def _cached(path: Path, about: Path) -> np.ndarray | None:
    """The stream in the cache, or None when it is not there or not whole."""
    try:
        meta = json.loads(about.read_text("utf-8"))
        dtype, n_tokens = np.dtype(meta["dtype"]), int(meta["n_tokens"])
        if path.stat().st_size != n_tokens * dtype.itemsize:
            return None
        return np.memmap(path, dtype=dtype, mode="r", shape=(n_tokens,))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_tokens(path: Path, documents: Sequence[Document], tokenizer: Tokenizer, dtype: np.dtype) -> int:
    """Encodes document by document into `path`, which is whole or absent. Returns the number of tokens."""
    ensure_folder(path.parent)
    end = end_of_text_id(tokenizer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    n_tokens = 0
    try:
        with open(temporary, "wb") as f:
            for document in documents:
                text = _read(document).decode("utf-8")
                for piece in pieces(text):
                    ids = np.array(tokenizer.encode(piece, special_tokens=False), dtype=dtype)
                    n_tokens += ids.size
                    f.write(ids.tobytes())
                f.write(np.array([end], dtype=dtype).tobytes())
                n_tokens += 1
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return n_tokens


def pieces(text: str, n_characters: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Cuts a long text after line ends that stand between two visible characters.

    There byte-level BPE (GPT-2's and Llama 3's pattern) never joins the two sides, so the tokens are the same
    as of the whole text.
    """
    begin = 0
    while len(text) - begin > n_characters:
        cut = _LINE_END.search(text, begin + n_characters)
        if cut is None:
            break
        yield text[begin : cut.end()]
        begin = cut.end()
    yield text[begin:]


class BatchSampler:
    """Batches of windows in a random order that is a function of the seed and the epoch.

    The stream is cut into windows of `block_size` tokens (a shorter rest is left out); an epoch is a
    permutation of them; a batch may reach from one epoch into the next.

    Args:
        tokens: `[n]`.
        batch_size: windows in a batch.
        block_size: tokens in a window.
        seed: 0 .. 2**64 - 1.

    Raises:
        ParetuneError: the stream is shorter than one window and the token after it.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, block_size: int, seed: int) -> None:
        check_length(tokens, block_size)
        self._tokens, self._batch_size, self._block_size, self._seed = tokens, batch_size, block_size, seed
        self.n_windows = (len(tokens) - 1) // block_size
        self._position = 0  # windows of this epoch that have been given out
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        # RandomState and not default_rng: NumPy never changes its streams, and a resume relies on that.
        random = np.random.RandomState([self._seed & 0xFFFFFFFF, self._seed >> 32, epoch])
        self._order = random.permutation(self.n_windows)

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets (the inputs moved by one token), each int64 `[batch_size, block_size]`."""
        rows: list[np.ndarray] = []
        while len(rows) < self._batch_size:
            if self._position == self.n_windows:
                self._begin(self._epoch + 1)
                self._position = 0
            start = int(self._order[self._position]) * self._block_size
            rows.append(np.asarray(self._tokens[start : start + self._block_size + 1], dtype=np.int64))
            self._position += 1
        windows = torch.from_numpy(np.stack(rows))
        return windows[:, :-1], windows[:, 1:]

    def state(self) -> dict[str, int]:
        """What `restore` needs to go on with the very next batch."""
        return {"epoch": self._epoch, "position": self._position}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes to a state that `state()` gave for the same stream, sizes and seed."""
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= self.n_windows:
            raise ValueError(f"no such sampler state: {dict(state)}")
        self._begin(epoch)
        self._position = position


def heldout_batches(tokens: np.ndarray, block_size: int, batch_size: int, n_windows: int = 0) -> Iterator[Tensor]:
    """Windows with their last target, int64 `[B, block_size + 1]`; a shorter last one comes alone."""
    starts = np.arange(0, len(tokens) - 1, block_size)
    if 0 < n_windows < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, n_windows).round().astype(int)]
    whole = [int(s) for s in starts if s + block_size < len(tokens)]
    batches = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
    for batch in [*batches, *([int(s)] for s in starts if s + block_size >= len(tokens))]:
        rows = [np.asarray(tokens[s : s + block_size + 1], dtype=np.int64) for s in batch]
        yield torch.from_numpy(np.stack(rows))


def check_length(tokens: np.ndarray, block_size: int) -> None:
    """Raises ParetuneError when a stream has not one window of `block_size` and the token after it."""
    if len(tokens) <= block_size:
        raise ParetuneError(
            f"the training text has {len(tokens)} tokens, one block of {block_size} needs {block_size + 1}",
            f"Use a longer text, or --block-size {len(tokens) - 1}" if len(tokens) > 2 else "Use a longer text",
        )


def find_checkpoint(out_dir: Path, resume: bool) -> Path | None:
    """The newest checkpoint of a run that is to go on, or None for a new run in a folder that is free.

    Raises:
        UsageError: nothing to resume, or a new run would overwrite a model or a checkpoint.
    """
    found = sorted((out_dir / "checkpoints").glob("step-*"))
    if resume and found:
        return found[-1]
    whole = (out_dir / "config.json").exists()
    if resume:
        why = "the run is finished" if whole else "it holds no checkpoint"
        raise UsageError(f"nothing to resume in {out_dir}: {why}", "Leave out --resume, in a new folder with -o")
    if found:
        raise UsageError(f"{out_dir} holds an unfinished run", "Go on with --resume, or choose another -o")
    if whole:
        raise UsageError(f"{out_dir} holds a model already", "Choose another folder with -o")
    return None


def has_checkpoint(out_dir: Path) -> bool:
    """Whether an unfinished run lies in the folder."""
    return any((out_dir / "checkpoints").glob("step-*"))


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, after every file has been proven to be as it was written.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        for name, expected in state["sha256"].items():
            if sha256(folder / name) != expected:
                raise damaged(folder, f"{name} differs from what was written")
        version = state["schema_version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder} has schema_version {version}, this program reads {SCHEMA_VERSION}",
            "Resume with the version of paretune that began the run",
        )
    return state


def damaged(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint {folder} is damaged ({why})", "Start again in a new folder with -o")


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
