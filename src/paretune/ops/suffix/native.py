"""The suffix index in C++ (`ops/native/suffix.cpp`); the answers of `reference`, a token in about a microsecond."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from ctypes import POINTER, byref, c_double, c_int32, c_int64, c_void_p

from paretune import native_build
from paretune.ops.suffix import reference


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_build.load("suffix")
    library.suffix_new.argtypes, library.suffix_new.restype = [c_int32, c_int64], c_void_p
    library.suffix_free.argtypes, library.suffix_free.restype = [c_void_p], None
    library.suffix_nodes.argtypes, library.suffix_nodes.restype = [c_void_p], c_int64
    library.suffix_push.argtypes = [c_void_p, POINTER(c_int32), POINTER(c_int64), c_int64, c_int32]
    library.suffix_push.restype = None
    library.suffix_draft.argtypes = [
        c_void_p, POINTER(c_int32), c_int32, c_int32, c_double, POINTER(c_int64), POINTER(c_int32),
    ]  # fmt: skip
    library.suffix_draft.restype = c_int32
    return library


class Cursor:
    """As `reference.Cursor`."""

    def __init__(self, depth: int) -> None:
        self.nodes = (c_int32 * depth)(*[-1] * depth)

    @property
    def at(self) -> list[int]:
        return list(self.nodes)


class SuffixIndex:
    """As `reference.SuffixIndex`.

    Raises:
        NativeUnavailable: no compiler.
    """

    def __init__(self, depth: int = 32, max_nodes: int = 1 << 22) -> None:
        assert depth >= 2 and 1 <= max_nodes < 1 << 31
        self.depth, self.max_nodes = depth, max_nodes
        self._library = _library()
        self._index = c_void_p(self._library.suffix_new(depth, max_nodes))
        weakref.finalize(self, self._library.suffix_free, self._index)
        self._out, self._match = (c_int64 * depth)(), c_int32()

    @property
    def n_nodes(self) -> int:
        return self._library.suffix_nodes(self._index)

    def cursor(self) -> Cursor:
        return Cursor(self.depth)

    def push(self, cursor: Cursor, tokens: Sequence[int], grows: bool = True) -> None:
        n = len(tokens)
        self._library.suffix_push(self._index, cursor.nodes, (c_int64 * n)(*tokens), n, grows)

    def draft(self, cursor: Cursor, max_match: int, max_tokens: int, floor: float) -> tuple[list[int], int]:
        n = self._library.suffix_draft(
            self._index, cursor.nodes, max_match, min(max_tokens, self.depth), floor, self._out, byref(self._match)
        )
        return self._out[:n], self._match.value


def best(depth: int = 32, max_nodes: int = 1 << 22) -> SuffixIndex | reference.SuffixIndex:
    """The native index, or the plain one where there is no compiler."""
    try:
        return SuffixIndex(depth, max_nodes)
    except native_build.NativeUnavailable:
        return reference.SuffixIndex(depth, max_nodes)
