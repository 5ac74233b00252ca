"""Parquet files: read by row groups, so that committed parts cost nothing to skip."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .blocks import BadReason, BadRow, Block
from .options import InputOptions
from .plan import InputFile, Shard

BATCH_ROWS = 8192


class ParquetSource:
    """Local Parquet files."""

    def __init__(self, options: InputOptions) -> None:
        path = Path(options.path)
        paths = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        self.files = tuple(_look_at(path.absolute()) for path in paths)
        self._options = options
        whole = pq.read_schema(self.files[0].path)
        if options.id_column is None:
            self.schema = pa.schema([pa.field("row", pa.int64())])
        else:
            self.schema = pa.schema([whole.field(options.id_column)])

    @contextmanager
    def open(self, shard: Shard) -> Iterator[ParquetReader]:
        """Begin to read a shard."""
        yield ParquetReader(shard.files, self._options, self.schema)


class ParquetReader:
    """Reads one shard."""

    def __init__(self, files: Sequence[InputFile], options: InputOptions, schema: pa.Schema) -> None:
        self._files = list(files)
        self._options = options
        self._schema = schema
        self._at = 0
        self._row = 0

    def skip(self, n_rows: int) -> int:
        """Go past rows."""
        skipped = 0
        while self._at < len(self._files) and skipped < n_rows:
            left = (self._files[self._at].n_rows or 0) - self._row
            step = min(left, n_rows - skipped)
            skipped += step
            self._row += step
            if step == left:
                self._at, self._row = self._at + 1, 0
        return skipped

    def take(self, n_rows: int) -> Iterator[Block]:
        """Read rows."""
        left = n_rows
        while left and self._at < len(self._files):
            file = self._files[self._at]
            with pq.ParquetFile(file.path) as parquet:
                first = 0
                groups = []
                skip = self._row
                for group in range(parquet.num_row_groups):
                    size = parquet.metadata.row_group(group).num_rows
                    if first + size <= self._row:
                        skip -= size
                    elif first < self._row + left:
                        groups.append(group)
                    first += size
                columns = [*self._options.text_columns, *([self._options.id_column] if self._options.id_column else [])]
                for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns):
                    if skip >= batch.num_rows:
                        skip -= batch.num_rows
                        continue
                    some = batch.slice(skip, left)
                    skip = 0
                    if some.num_rows:
                        yield self._block(file, some)
                        self._row += some.num_rows
                        left -= some.num_rows
                    if not left:
                        break
            if self._row == file.n_rows:
                self._at, self._row = self._at + 1, 0

    def _block(self, file: InputFile, batch: pa.RecordBatch) -> Block:
        texts = batch.column(self._options.text_columns[0])
        rows = np.arange(self._row, self._row + batch.num_rows)
        name = self._options.id_column
        carried = pa.RecordBatch.from_arrays(
            [pa.array(rows) if name is None else batch.column(name)], schema=self._schema
        )
        bad: tuple[BadRow, ...] = ()
        if texts.null_count:
            keep = pc.is_valid(texts)
            bad = tuple(
                BadRow(file.path, int(row), BadReason.NULL, "The text is null.") for row in rows[~np.asarray(keep)]
            )
            texts, carried, rows = texts.filter(keep), carried.filter(keep), rows[np.asarray(keep)]
        return Block(file.path, rows, texts, carried, batch.num_rows, bad)


def _look_at(path: Path) -> InputFile:
    about = path.stat()
    with path.open("rb") as file:
        head = file.read(65536)
        file.seek(max(0, about.st_size - 65536))
        digest = hashlib.sha256(head + file.read()).hexdigest()
    rows = pq.read_metadata(path).num_rows
    return InputFile(str(path), about.st_size, str(about.st_mtime_ns), digest, rows)
