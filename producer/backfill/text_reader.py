"""Plain text: every line is one text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from .blocks import BadReason
from .lines import Lines, too_long
from .listing import Place
from .reading import BLOCK_ROWS, Doubt, Rows, conformed

COLUMN = "text"


class TextFormat:
    """Lines of text, in one column, `text`."""

    def look(self, place: Place) -> tuple[pa.Schema, int | None]:
        """The one column."""
        return pa.schema([pa.field(COLUMN, pa.string())]), None

    def open(self, place: Place, columns: pa.Schema) -> TextReader:
        """Begin to read."""
        return TextReader(place, columns)


class TextReader:
    """Reads one file of text. An empty line is an empty text."""

    def __init__(self, place: Place, columns: pa.Schema) -> None:
        self._lines = Lines(place)
        self._columns = columns
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
            texts = [None if line is None else line.removesuffix(b"\r") for line in lines]
            doubts = {at: Doubt(COLUMN, BadReason.INVALID, too_long()) for at, line in enumerate(lines) if line is None}
            batch = pa.RecordBatch.from_arrays([pa.array(texts, pa.binary())], [COLUMN])
            places = self._row + np.arange(len(lines))
            self._row += len(lines)
            yield Rows(len(lines), places, conformed(batch, self._columns), doubts)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
