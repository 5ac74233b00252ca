"""Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .arrow_format import ArrowFormat, arrow_batches
from .sink import OutputSchema

ROW_GROUP_BYTES = 32 * 1024 * 1024
"""Of rows that are written as one row group: what a reader holds at a time, and a writer too."""


class ParquetFormat:
    """Parquet files; the vectors are a FixedSizeList."""

    extensions = (".parquet",)

    @property
    def staged(self) -> ArrowFormat:
        """Arrow: encoding Parquet costs more than the rest of a sink, so it is done once, at the end."""
        return ArrowFormat()

    def open(self, paths: Sequence[Path], schema: OutputSchema) -> ParquetPart:
        """Begin to write."""
        return ParquetPart(paths[0], schema.arrow, schema)

    def join(self, parts: Sequence[Sequence[Path]], paths: Sequence[Path], schema: OutputSchema) -> None:
        """Encode row group by row group."""
        file = self.open(paths, schema)
        try:
            for (part,) in parts:
                for batch in arrow_batches(part):
                    file.append(batch)
        finally:
            file.close()


class ParquetPart:
    """One file while it is written.

    Args:
        path: of the file.
        columns: what it holds.
        schema: of the rows; names the vector's column.
    """

    def __init__(self, path: Path, columns: pa.Schema, schema: OutputSchema) -> None:
        self._columns = columns
        self._schema = schema
        self._held: list[pa.RecordBatch] = []
        self._held_bytes = 0
        self._writer = pq.ParquetWriter(path, columns, **_properties(columns, schema.vector_column))

    def write(self, carried: pa.RecordBatch, vectors: NDArray[Any]) -> None:
        """Append rows."""
        self.append(self._schema.batch(carried, vectors))

    def append(self, batch: pa.RecordBatch) -> None:
        """Append a batch of all columns; small ones are gathered, so that no row group is small but the last."""
        self._held.append(batch)
        self._held_bytes += batch.nbytes
        if self._held_bytes >= ROW_GROUP_BYTES:
            self._write_held()

    def close(self) -> None:
        """Write the last row group and the footer."""
        try:
            if self._held:
                self._write_held()
        finally:
            self._writer.close()

    def _write_held(self) -> None:
        table = pa.Table.from_batches(self._held, self._columns)
        self._held, self._held_bytes = [], 0
        # One batch above the bound is several row groups, each as large as the bound allows.
        groups = max(1, round(table.nbytes / ROW_GROUP_BYTES))
        self._writer.write_table(table, row_group_size=-(-table.num_rows // groups))


def _properties(columns: pa.Schema, vector_column: str) -> dict[str, Any]:
    """How columns are encoded.

    Components of a vector do not repeat: a dictionary and statistics of them only cost time. BYTE_STREAM_SPLIT with
    zstd makes 32,768 random vectors of 384 components a sixth smaller (42.5 for 50.8 MB of float32, 21.3 for 25.6 of
    float16), but not every reader knows it, for float16 in particular; plain pages are read by all.
    """
    empty = pa.BufferOutputStream()
    pq.write_table(columns.empty_table(), empty)
    stored = pq.ParquetFile(pa.BufferReader(empty.getvalue())).schema
    leaves = [stored.column(place).path for place in range(len(stored))]
    others = [leaf for leaf in leaves if leaf.partition(".")[0] != vector_column]
    return {
        "compression": {leaf: "zstd" if leaf in others else "none" for leaf in leaves},
        "use_dictionary": others,
        "write_statistics": others,
    }
