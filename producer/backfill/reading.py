"""What the readers of all formats have in common: rows of one file, as columns, before anything is chosen of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from .blocks import BadReason
from .listing import Place

BLOCK_ROWS = 8192
BLOCK_BYTES = 8 * 1024 * 1024
"""Of one block, but for a single row that is larger."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """A value that cannot be used; it stands as null.

    Args:
        column: where it stands; None for a whole row that cannot be read.
        reason: why.
        message: for people.
    """

    column: str | None
    reason: BadReason
    message: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one file that follow one another.

    Args:
        taken: how many rows of the file they stand for, blank lines included.
        places: (n,) int64, their places in the file, rising.
        columns: (n,) rows of the columns asked for.
        doubts: of some of them, by index into `places`.
    """

    taken: int
    places: NDArray[np.int64]
    columns: pa.RecordBatch
    doubts: Mapping[int, Doubt] = field(default_factory=dict)


class FileReader(Protocol):
    """Reads one file from front to end, by one thread at a time.

    Errors are those of the libraries below: `OSError`, `EOFError`, `ArrowException`, `zlib.error`.
    """

    def skip(self, n_rows: int) -> int:
        """Go past rows; fewer than asked for at the end."""
        ...

    def take(self, n_rows: int) -> Iterator[Rows]:
        """Read rows, fewer at the end."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class FileFormat(Protocol):
    """One format of input files."""

    def look(self, place: Place) -> tuple[pa.Schema, int | None]:
        """All columns of a file, and its number of rows where the file tells without being read whole.

        It may be called by several threads at once.
        """
        ...

    def open(self, place: Place, columns: pa.Schema) -> FileReader:
        """Begin to read some columns of a file; those that it does not have are null."""
        ...


def plain_types(columns: pa.Schema) -> pa.Schema:
    """Columns of Arrow as they are handed on; those without any value are of strings."""
    kinds = [plain_type(field.type) for field in columns]
    kinds = [pa.string() if pa.types.is_null(kind) else kind for kind in kinds]
    return pa.schema([pa.field(field.name, kind) for field, kind in zip(columns, kinds, strict=True)])


def plain_type(column: pa.DataType) -> pa.DataType:
    """The type as which values of a column are handed on: without dictionaries and views."""
    if pa.types.is_dictionary(column) or pa.types.is_run_end_encoded(column):
        return plain_type(column.value_type)
    if pa.types.is_string_view(column):
        return pa.string()
    if pa.types.is_binary_view(column):
        return pa.binary()
    return column


def as_bytes(columns: pa.Schema) -> pa.Schema:
    """Of columns as they are read: strings are bytes until somebody has looked whether they are UTF-8."""
    return pa.schema([field.with_type(_BYTES.get(field.type, field.type)) for field in columns])


def conformed(batch: pa.RecordBatch, columns: pa.Schema) -> pa.RecordBatch:
    """The columns asked for, in their order and types, but for `as_bytes`; null where the batch has none.

    Raises:
        ArrowInvalid: a value does not fit its type.
    """
    schema = as_bytes(columns)
    arrays = []
    for wanted in schema:
        at = batch.schema.get_field_index(wanted.name)
        arrays.append(pa.nulls(batch.num_rows, wanted.type) if at < 0 else _cast(batch.column(at), wanted.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


def _cast(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    if column.type == wanted:
        return column
    if pa.types.is_run_end_encoded(column.type):
        return _cast(pc.run_end_decode(column), wanted)
    return column.cast(wanted)


def slices(batch: pa.RecordBatch, first: int) -> Iterator[Rows]:
    """A batch of Arrow in pieces of bounded size; row 0 of it is row `first` of the file."""
    most = BLOCK_ROWS
    if batch.num_rows and batch.nbytes > BLOCK_BYTES:
        most = max(1, min(most, BLOCK_BYTES * batch.num_rows // batch.nbytes))
    for start in range(0, batch.num_rows, most):
        piece = batch.slice(start, most)
        yield Rows(piece.num_rows, first + start + np.arange(piece.num_rows), piece)
