"""Cutting the blocks of a part into windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .blocks import Block, Window

FIRST_ROWS = 1024
"""Of the first window; each one after it may have twice as many. The fleet idles until the first window is tokenised,
so that one is small; the later ones are as large as memory allows, for the more rows are sorted together the less is
padded."""


class Windows:
    """Cuts windows, larger ones as a run goes on.

    Args:
        most_bytes: of texts and columns; one row may exceed it.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._most_rows = FIRST_ROWS

    def of(self, blocks: Iterable[Block]) -> Iterator[Window]:
        """Windows of one part: they hold the kept rows of all its blocks, in order."""
        some: list[Block] = []
        rows = n_bytes = 0
        for block in blocks:
            for piece in self._pieces(block):
                if some and (rows + len(piece.rows) > self._most_rows or n_bytes + piece.n_bytes > self._most_bytes):
                    yield self._window(some)
                    some, rows, n_bytes = [], 0, 0
                some.append(piece)
                rows, n_bytes = rows + len(piece.rows), n_bytes + piece.n_bytes
        if some:
            yield self._window(some)

    def _window(self, blocks: list[Block]) -> Window:
        self._most_rows *= 2
        return Window(tuple(blocks))

    def _pieces(self, block: Block) -> Iterator[Block]:
        n_rows = len(block.rows)
        size = min(FIRST_ROWS, self._rows_in(block)) if self._most_rows < n_rows else self._rows_in(block)
        for first in range(0, n_rows, size):
            yield block.kept(first, min(first + size, n_rows))

    def _rows_in(self, block: Block) -> int:
        """Rows of a block that are about as large as a window may be."""
        n_rows = max(1, len(block.rows))
        return max(1, min(n_rows, n_rows * self._most_bytes // max(1, block.n_bytes)))
