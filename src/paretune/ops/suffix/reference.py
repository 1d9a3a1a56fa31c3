"""What followed what: counts of continuations of every suffix, in plain Python. The formula that `native` is held to,
and the form that runs where there is no compiler.

A trie of bounded depth over all stretches of the text (SuffixDecoding, Oliaro et al. 2024, arXiv:2411.04975): a node is
a stretch of tokens, its count how often it was read, its best child the most frequent continuation, the later one of
equals.
"""

from __future__ import annotations

from collections.abc import Sequence


class Cursor:
    """Where a text stands in an index: the nodes of its last 1, 2, ... tokens, -1 where a stretch is not in it."""

    def __init__(self, depth: int) -> None:
        self.at = [-1] * depth


class SuffixIndex:
    """Counts of what followed every stretch of up to `depth - 1` tokens.

    Args:
        depth: tokens of a stretch and its continuation together.
        max_nodes: after which nothing new is added (known stretches are still counted).
    """

    def __init__(self, depth: int = 32, max_nodes: int = 1 << 22) -> None:
        self.depth, self.max_nodes = depth, max_nodes
        # By node; node 0 is the empty stretch.
        self._count, self._followed, self._best, self._token = [0], [0], [-1], [-1]
        self._children: dict[tuple[int, int], int] = {}

    @property
    def n_nodes(self) -> int:
        return len(self._count)

    def cursor(self) -> Cursor:
        """Of a new text."""
        return Cursor(self.depth)

    def push(self, cursor: Cursor, tokens: Sequence[int], grows: bool = True) -> None:
        """Reads on in a text.

        Args:
            grows: its stretches are added to the index and counted; False: only the cursor moves.
        """
        for token in tokens:
            before = [0, *cursor.at[:-1]]
            cursor.at = [self._step(node, token, grows) for node in before]

    def _step(self, node: int, token: int, grows: bool) -> int:
        if node < 0:
            return -1
        child = self._children.get((node, token), -1)
        if not grows:
            return child
        if child < 0:
            if self.n_nodes >= self.max_nodes:
                return -1
            child = self._children[node, token] = self.n_nodes
            for values, value in ((self._count, 0), (self._followed, 0), (self._best, -1), (self._token, token)):
                values.append(value)
        self._count[child] += 1
        self._followed[node] += 1
        best = self._best[node]
        if best < 0 or self._count[child] >= self._count[best]:
            self._best[node] = child
        return child

    def draft(self, cursor: Cursor, max_match: int, max_tokens: int, floor: float) -> tuple[list[int], int]:
        """What most often followed the longest stretch at the end of the text that was followed by anything.

        Args:
            max_match: tokens of the stretch at most, below `depth`.
            floor: the draft ends where the product of the shares of its tokens falls below.

        Returns:
            tokens, at most `max_tokens` and at most twice the stretch and one, and the length of the stretch; of no
            tokens 0.
        """
        for match in range(min(max_match, self.depth - 1), 0, -1):
            node = cursor.at[match - 1]
            if node < 0 or self._best[node] < 0:
                continue
            tokens: list[int] = []
            share = 1.0
            while len(tokens) < min(max_tokens, 2 * match + 1):
                child = self._best[node]
                if child < 0:
                    break
                share *= self._count[child] / self._followed[node]
                if share < floor:
                    break
                tokens.append(self._token[child])
                node = child
            if tokens:
                return tokens, match
        return [], 0
