"""Parquet files: read by row groups, so that skipping costs nothing, and within them in batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .listing import Place
from .reading import BLOCK_BYTES, BLOCK_ROWS, Rows, conformed, plain_types, slices

_BUFFER_BYTES = 1024 * 1024
_REMOTE_BUFFER_BYTES = 8 * 1024 * 1024
"""Of each column while it is read: without them, whole column chunks of a row group are held. Each is one request."""


class ParquetFormat:
    """Parquet."""

    def look(self, place: Place) -> tuple[pa.Schema, int | None]:
        """From the footer."""
        with place.storage.arrow(place.key) as file, pq.ParquetFile(file) as parquet:
            return plain_types(parquet.schema_arrow), parquet.metadata.num_rows

    def open(self, place: Place, columns: pa.Schema) -> ParquetReader:
        """Begin to read."""
        return ParquetReader(place, columns)


class ParquetReader:
    """Reads one Parquet file."""

    def __init__(self, place: Place, columns: pa.Schema) -> None:
        self._file = place.storage.arrow(place.key)
        local = isinstance(self._file, pa.OSFile)
        self._parquet = pq.ParquetFile(
            self._file, buffer_size=_BUFFER_BYTES if local else _REMOTE_BUFFER_BYTES, pre_buffer=False
        )
        self._columns = columns
        about = self._parquet.metadata
        sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        self._ends = np.cumsum([0, *sizes])[1:]
        self._row = 0
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._batch_at = 0
        self._decoded_to = 0

    def skip(self, n_rows: int) -> int:
        """Only the place is noted: what lies in between is passed over when something is read again."""
        step = min(n_rows, self._n_rows - self._row)
        self._row += step
        return step

    def take(self, n_rows: int) -> Iterator[Rows]:
        """Read on, across row groups."""
        end = min(self._row + n_rows, self._n_rows)
        while self._row < end:
            batch, first = self._batch_of(self._row)
            some = batch.slice(self._row - first, end - self._row)
            for rows in slices(conformed(some, self._columns), self._row):
                self._row += rows.taken
                yield rows

    def close(self) -> None:
        """Close the file."""
        self._batches, self._batch = iter(()), None
        self._parquet.close()
        self._file.close()

    @property
    def _n_rows(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _batch_of(self, row: int) -> tuple[pa.RecordBatch, int]:
        """The batch that holds a row, and the row it begins with; earlier ones of its row group are passed over."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        if group != self._group or row < self._batch_at:
            self._group, self._batch = group, None
            self._decoded_to = int(self._ends[group - 1]) if group else 0
            names = [name for name in self._columns.names if name in self._parquet.schema_arrow.names]
            self._batches = self._parquet.iter_batches(self._batch_rows(group), row_groups=[group], columns=names)
        while self._batch is None or row >= self._decoded_to:
            batch = next(self._batches, None)
            if batch is None:
                raise OSError(f"row group {group} has fewer rows than the footer says")
            self._batch, self._batch_at = batch, self._decoded_to
            self._decoded_to += batch.num_rows
        return self._batch, self._batch_at

    def _batch_rows(self, group: int) -> int:
        about = self._parquet.metadata.row_group(group)
        names = set(self._columns.names)
        chunks = [about.column(number) for number in range(about.num_columns)]
        n_bytes = sum(
            chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in names
        )
        return max(1, min(BLOCK_ROWS, int(BLOCK_BYTES * about.num_rows / max(1, n_bytes))))
