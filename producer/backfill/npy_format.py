"""NumPy files: the vectors alone, memory-mappable, and the other columns beside them in the same order."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .parquet_format import ParquetPart
from .sink import OutputSchema


class NpyFormat:
    """`x.npy`, (rows, dimension) in C order, and `x.ids.parquet` with the carried columns."""

    extensions = (".ids.parquet", ".npy")

    @property
    def staged(self) -> NpyFormat:
        """Itself."""
        return self

    def open(self, paths: Sequence[Path], schema: OutputSchema) -> NpyPart:
        """Begin to write."""
        return NpyPart(paths[0], paths[1], schema)

    def join(self, parts: Sequence[Sequence[Path]], paths: Sequence[Path], schema: OutputSchema) -> None:
        """Write a header of all rows, then the bytes of each part."""
        ids = ParquetPart(paths[0], _columns(schema), schema)
        rows = [np.load(vectors, mmap_mode="r").shape[0] for _, vectors in parts]
        header = _header(sum(rows), schema)
        try:
            with paths[1].open("wb") as joined:
                joined.write(header)
                for part_ids, part_vectors in parts:
                    with pq.ParquetFile(part_ids) as table:
                        for batch in table.iter_batches():
                            ids.append(batch.replace_schema_metadata(_columns(schema).metadata))
                    with part_vectors.open("rb") as part:
                        part.seek(len(header))
                        shutil.copyfileobj(part, joined, 1024 * 1024)
        finally:
            ids.close()


class NpyPart:
    """The two files of a part while they are written."""

    def __init__(self, ids: Path, vectors: Path, schema: OutputSchema) -> None:
        self._schema = schema
        self._rows = 0
        self._ids = ParquetPart(ids, _columns(schema), schema)
        self._vectors = vectors.open("wb")
        self._vectors.write(_header(0, schema))

    def write(self, carried: pa.RecordBatch, vectors: NDArray[Any]) -> None:
        """Append rows."""
        self._ids.append(pa.RecordBatch.from_arrays(carried.columns, schema=_columns(self._schema)))
        self._vectors.write(np.ascontiguousarray(vectors, _dtype(self._schema)).data)
        self._rows += len(vectors)

    def close(self) -> None:
        """Write how many rows there are into the header."""
        if self._vectors.closed:
            return
        try:
            self._ids.close()
            self._vectors.seek(0)
            self._vectors.write(_header(self._rows, self._schema))
        finally:
            self._vectors.close()


def _columns(schema: OutputSchema) -> pa.Schema:
    return pa.schema(list(schema.carried), schema.arrow.metadata)


def _dtype(schema: OutputSchema) -> np.dtype[Any]:
    return np.dtype(schema.dtype).newbyteorder("<")


def _header(rows: int, schema: OutputSchema) -> bytes:
    """Of `rows` rows; it is as long for any number of them, since numpy leaves room for the first axis to grow."""
    header = BytesIO()
    described = {"descr": _dtype(schema).str, "fortran_order": False, "shape": (rows, schema.dimension)}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()
