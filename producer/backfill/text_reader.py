"""Plain text: every line is one text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .blocks import BadReason
from .line_reader import LineReader
from .lines import too_long
from .listing import Place
from .reading import Doubt, Rows, conformed

COLUMN = "text"


class TextFormat:
    """Lines of text, in one column, `text`."""

    def look(self, place: Place) -> tuple[pa.Schema, int | None]:
        """The one column."""
        return pa.schema([pa.field(COLUMN, pa.string())]), None

    def open(self, place: Place, columns: pa.Schema) -> LineReader:
        """Begin to read. An empty line is an empty text."""
        return LineReader(place, columns, _rows)


def _rows(lines: Sequence[bytes | None], places: NDArray[np.int64], columns: pa.Schema) -> Rows:
    texts = [None if line is None else line.removesuffix(b"\r") for line in lines]
    doubts = {at: Doubt(COLUMN, BadReason.INVALID, too_long()) for at, line in enumerate(lines) if line is None}
    batch = pa.RecordBatch.from_arrays([pa.array(texts, pa.binary())], [COLUMN])
    return Rows(len(lines), places, conformed(batch, columns), doubts)
