"""Rows on their way from a source to a sink, in columns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class BadReason(StrEnum):
    """Why a row has no vector."""

    NULL = "null"
    UNDECODABLE = "undecodable"
    TOO_LONG = "too_long"
    INVALID = "invalid"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is left out of the output, and told about in the side file.

    Args:
        file: path of the file it stands in.
        row: its place in that file, from 0; lines of text formats are counted from their first one.
        reason: the kind of trouble.
        message: for people.
        id: value of the id column as text, where there is one and it could be read.
    """

    file: str
    row: int
    reason: BadReason
    message: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one input file that follow one another.

    Args:
        file: path of the file.
        rows: (kept,) int64, the place of each kept row in the file, rising.
        texts: (kept,) strings to embed, without nulls.
        carried: (kept,) rows of the columns that go to the output beside the vector, as `Source.schema` says.
        taken: rows of the input it stands for: the kept ones, those that are bad, and those that `--where` leaves out.
        bad: rows that cannot be embedded, as far as reading shows.
    """

    file: str
    rows: NDArray[np.int64]
    texts: pa.StringArray | pa.LargeStringArray
    carried: pa.RecordBatch
    taken: int
    bad: tuple[BadRow, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Memory of its texts and columns."""
        return int(self.texts.nbytes + self.carried.nbytes)

    def kept(self, first: int, end: int) -> Block:
        """The kept rows from one place to another, and nothing of those that are not kept."""
        rows, size = self.rows[first:end], end - first
        return Block(self.file, rows, self.texts.slice(first, size), self.carried.slice(first, size), len(rows))


@dataclass(frozen=True, slots=True)
class Window:
    """What is embedded together: blocks of one part that follow one another."""

    blocks: tuple[Block, ...]

    @property
    def texts(self) -> pa.ChunkedArray:
        """(kept,) all its texts, in order."""
        return pa.chunked_array([block.texts.cast(pa.large_string()) for block in self.blocks], pa.large_string())

    @property
    def n_rows(self) -> int:
        """Rows that are to get a vector."""
        return sum(len(block.rows) for block in self.blocks)
