"""Arrow IPC, as files and as streams; also what Hugging Face's `datasets` save to disk."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from pyarrow import ipc

from .listing import Place
from .reading import Rows, conformed, plain_types, slices

_MAGIC = b"ARROW1"


class ArrowFormat:
    """Arrow IPC; a file tells by its first bytes which of both forms it has."""

    def look(self, place: Place) -> tuple[pa.Schema, int | None]:
        """The rows are counted over the heads of the batches, which in a local file costs no reading."""
        with _Batches(place, None) as batches:
            known = sum(batch.num_rows for batch in batches) if batches.mapped else None
            return plain_types(batches.schema), known

    def open(self, place: Place, columns: pa.Schema) -> ArrowReader:
        """Begin to read."""
        return ArrowReader(place, columns)


class ArrowReader:
    """Reads one Arrow file or stream."""

    def __init__(self, place: Place, columns: pa.Schema) -> None:
        self._source = _Batches(place, columns.names)
        self._batches = iter(self._source)
        self._columns = columns
        self._row = 0
        self._left: pa.RecordBatch | None = None

    def skip(self, n_rows: int) -> int:
        """Drop batches; in a local file that is not compressed nothing of them is read."""
        return sum(len(batch) for batch in self._next(n_rows))

    def take(self, n_rows: int) -> Iterator[Rows]:
        """Read on, across batches."""
        for batch in self._next(n_rows):
            yield from slices(conformed(batch, self._columns), self._row - len(batch))

    def close(self) -> None:
        """Close the file."""
        self._left = None
        self._source.close()

    def _next(self, n_rows: int) -> Iterator[pa.RecordBatch]:
        while n_rows:
            batch = self._left if self._left is not None else next(self._batches, None)
            if batch is None:
                return
            some = batch.slice(0, n_rows)
            self._left = batch.slice(n_rows) if len(batch) > n_rows else None
            self._row += len(some)
            n_rows -= len(some)
            yield some


class _Batches:
    """The record batches of a file, of one column or of those named."""

    def __init__(self, place: Place, names: list[str] | None) -> None:
        self._file = place.storage.arrow(place.key, mapped=True)
        self.mapped = isinstance(self._file, pa.MemoryMappedFile)
        try:
            self._is_file = self._file.read(len(_MAGIC)) == _MAGIC
            self._file.seek(0)
            self.schema = self._open(None).schema
            self._file.seek(0)
            if names is None:
                wanted = [0] if len(self.schema) else []
            else:
                wanted = [at for at, name in enumerate(self.schema.names) if name in names]
            self._reader = self._open(wanted)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> _Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        if self._is_file:
            return (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))
        return iter(self._reader)

    def close(self) -> None:
        self._file.close()

    def _open(self, fields: list[int] | None) -> ipc.RecordBatchFileReader | ipc.RecordBatchStreamReader:
        # Only what is asked for is read, or decompressed. An empty list would ask for all of it.
        options = ipc.IpcReadOptions(included_fields=fields or [], use_threads=False)
        return (ipc.open_file if self._is_file else ipc.open_stream)(self._file, options=options)
