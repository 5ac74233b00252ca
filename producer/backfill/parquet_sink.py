"""A folder of Parquet parts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .plan import PartId
from .sink import OutputSchema


class ParquetFolder:
    """A folder of Parquet parts."""

    def __init__(self, folder: Path, schema: OutputSchema) -> None:
        self._folder = folder
        self._schema = schema
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, part: PartId) -> ParquetPart:
        """Begin a part."""
        return ParquetPart(self._folder / f"part-{part.name}.parquet", self._schema)

    def finish(self, parts: Sequence[PartId]) -> None:
        """The parts are the output."""

    def close(self) -> None:
        """Nothing is held."""


class ParquetPart:
    """One part."""

    def __init__(self, path: Path, schema: OutputSchema) -> None:
        self._path = path
        self._draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._schema = schema
        names = [schema.vector_column]
        self._writer = pq.ParquetWriter(
            self._draft,
            schema.arrow,
            compression={name: "none" if name in names else "zstd" for name in schema.arrow.names},
            use_dictionary=[name for name in schema.arrow.names if name not in names],
            write_statistics=[name for name in schema.arrow.names if name not in names],
            store_schema=True,
        )

    def write(self, carried: pa.RecordBatch, vectors: NDArray[Any]) -> None:
        """Append rows."""
        self._writer.write_batch(self._schema.batch(carried, vectors))

    def commit(self) -> None:
        """Make it durable and visible."""
        self._writer.close()
        with self._draft.open("rb+") as file:
            os.fsync(file.fileno())
        self._draft.replace(self._path)

    def abort(self) -> None:
        """Leave nothing behind."""
        self._writer.close()
        self._draft.unlink(missing_ok=True)
