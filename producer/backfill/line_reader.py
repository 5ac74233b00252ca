"""Reading a file in which every line is a row by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .lines import Lines
from .listing import Place
from .reading import BLOCK_ROWS, Rows

RowsOf = Callable[[Sequence[bytes | None], NDArray[np.int64], pa.Schema], Rows]
"""Makes rows of lines (None for one that is too long to be held), their places in the file, and the columns wanted."""


class LineReader:
    """Reads one file, line by line.

    Args:
        place: of the file.
        columns: wanted.
        rows_of: makes rows of lines.
    """

    def __init__(self, place: Place, columns: pa.Schema, rows_of: RowsOf) -> None:
        self._lines = Lines(place)
        self._columns = columns
        self._rows_of = rows_of
        self._row = 0

    def skip(self, n_rows: int) -> int:
        """Count lines."""
        step = self._lines.skip(n_rows)
        self._row += step
        return step

    def take(self, n_rows: int) -> Iterator[Rows]:
        """Read lines."""
        while n_rows and (lines := self._lines.read(min(n_rows, BLOCK_ROWS))):
            n_rows -= len(lines)
            places = self._row + np.arange(len(lines))
            self._row += len(lines)
            yield self._rows_of(lines, places, self._columns)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
