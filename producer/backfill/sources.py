"""The input of a backfill: its files, looked at, checked against what is asked for, and read as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import pyarrow as pa

from embedstream.shared.errors import Misconfigured

from .arrow_reader import ArrowFormat
from .blocks import Block
from .csv_reader import CsvFormat
from .input_formats import InputFormat
from .jsonl_reader import JsonlFormat
from .lines import lines_per_byte
from .listing import Place, list_files, partition_schema
from .options import InputOptions
from .parquet_reader import ParquetFormat
from .plan import InputFile, Shard
from .reading import FileFormat, FileReader, Rows, as_bytes
from .selection import Selection
from .storage import digest
from .text_reader import TextFormat
from .trouble import explained

_LOOKING = 16
"""Threads that look at files: most of it is waiting for a disk or a network."""
_SAMPLED_FILES = 4
_FORMATS: Mapping[InputFormat, FileFormat] = {
    InputFormat.PARQUET: ParquetFormat(),
    InputFormat.JSONL: JsonlFormat(),
    InputFormat.CSV: CsvFormat(","),
    InputFormat.TSV: CsvFormat("\t"),
    InputFormat.TEXT: TextFormat(),
    InputFormat.ARROW: ArrowFormat(),
    InputFormat.DATASET: ArrowFormat(),
}


def open_source(options: InputOptions, leave_out: Sequence[str] = ()) -> FileSource:
    """Look at an input. It blocks: it belongs on a thread.

    Args:
        options: say what it is.
        leave_out: files and folders that are not of it, as `list_files` takes them.

    Raises:
        Misconfigured: there is nothing of that name, or it cannot be read as it is asked for.
        Unavailable: a storage behind a URL has trouble.
    """
    listing = list_files(options.path, options.format, leave_out)
    file_format = _FORMATS[listing.format]
    with ThreadPoolExecutor(_LOOKING, "backfill-look") as pool:
        looked = list(pool.map(lambda place: _look_at(place, file_format), listing.places))
    schemas = [schema for _, schema in looked]
    if isinstance(file_format, JsonlFormat):
        known = [file_format.sample(listing.places)]
    else:
        known = list(dict.fromkeys(schema for schema in schemas if schema is not None))
    return FileSource(options, listing.places, file_format, looked, _joined(known, listing.places, options))


class FileSource:
    """Files of one format.

    Args:
        options: say what is taken of them.
        places: where they are.
        file_format: of all of them.
        looked: each as it is now, with its columns, where it tells them.
        columns: of all of them together.
    """

    def __init__(
        self,
        options: InputOptions,
        places: Sequence[Place],
        file_format: FileFormat,
        looked: Sequence[tuple[InputFile, pa.Schema | None]],
        columns: pa.Schema,
    ) -> None:
        self.files = tuple(file for file, _ in looked)
        self._format = file_format
        self._places = {place.path: place for place in places}
        self._selection = Selection(options, columns, several_files=len(places) > 1)
        for file, schema in looked:
            _check_complete(file.path, schema, self._selection.required - set(self._places[file.path].partition))

    @property
    def schema(self) -> pa.Schema:
        """Of `Block.carried`."""
        return self._selection.schema

    @property
    def n_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)

    def estimated_rows(self) -> int | None:
        """How many rows there are: exact where the files tell it, else by how some of them begin. It blocks.

        None where nothing tells: streams of Arrow behind a URL.

        Raises:
            Misconfigured: a file is gone or damaged.
            Unavailable: a storage behind a URL has trouble.
        """
        known = sum(file.n_rows or 0 for file in self.files)
        others = [file for file in self.files if file.n_rows is None]
        if not others:
            return known
        if isinstance(self._format, ArrowFormat):
            return None
        some = others[:: max(1, len(others) // _SAMPLED_FILES)][:_SAMPLED_FILES]
        rate = lines_per_byte([self._places[file.path] for file in some])
        return known + round(rate * sum(file.size_bytes for file in others))

    @contextmanager
    def open(self, shard: Shard) -> Iterator[FilesReader]:
        """Begin to read a shard."""
        reader = FilesReader([(file, self._places[file.path]) for file in shard.files], self._format, self._selection)
        try:
            yield reader
        finally:
            reader.close()


class FilesReader:
    """Reads files as if they were one."""

    def __init__(self, files: Sequence[tuple[InputFile, Place]], file_format: FileFormat, selection: Selection) -> None:
        self._files = files
        self._format = file_format
        self._selection = selection
        self._at = 0
        self._row = 0
        self._reader: FileReader | None = None

    def skip(self, n_rows: int) -> int:
        """Go past rows; files whose number of rows is known are not even opened for it.

        Raises:
            Misconfigured: a file is gone, damaged or another one by now.
            Unavailable: a storage behind a URL has trouble.
        """
        skipped = 0
        while skipped < n_rows and self._at < len(self._files):
            file, _ = self._files[self._at]
            left = None if file.n_rows is None else file.n_rows - self._row
            if self._reader is None and left is not None and left <= n_rows - skipped:
                skipped += left
                self._next_file()
                continue
            with self._explained():
                step = self._opened().skip(n_rows - skipped)
            skipped += step
            self._row += step
            if skipped < n_rows:
                self._next_file()
        return skipped

    def take(self, n_rows: int) -> Iterator[Block]:
        """Read rows; raises as `skip` does."""
        left = n_rows
        while left and self._at < len(self._files):
            for rows in self._rows(left):
                left -= rows.taken
                self._row += rows.taken
                yield self._block(rows)
            if left:
                self._next_file()

    def close(self) -> None:
        """Close the file that is open."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _rows(self, n_rows: int) -> Iterator[Rows]:
        with self._explained():
            going = self._opened().take(n_rows)
        while True:
            with self._explained():
                rows = next(going, None)
            if rows is None:
                return
            yield rows

    def _opened(self) -> FileReader:
        if self._reader is None:
            file, place = self._files[self._at]
            if place.storage.look(place.key) != (file.size_bytes, file.version):
                raise Misconfigured(f"{file.path} was changed while the backfill ran.")
            columns = [field for field in self._selection.columns if field.name not in place.partition]
            self._reader = self._format.open(place, pa.schema(columns))
        return self._reader

    def _next_file(self) -> None:
        self.close()
        self._at, self._row = self._at + 1, 0

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self._files[self._at][0].path, lambda: self._row)

    def _block(self, rows: Rows) -> Block:
        file, place = self._files[self._at]
        if place.partition:
            rows = _with_partition(rows, place.partition, self._selection.columns)
        return self._selection.block(file.path, rows)


def _with_partition(rows: Rows, partition: Mapping[str, str | None], columns: pa.Schema) -> Rows:
    arrays = []
    for field in as_bytes(columns):
        if field.name in partition:
            arrays.append(pa.repeat(pa.scalar(partition[field.name], pa.string()).cast(field.type), len(rows.places)))
        else:
            arrays.append(rows.columns.column(field.name))
    return Rows(rows.taken, rows.places, pa.RecordBatch.from_arrays(arrays, schema=as_bytes(columns)), rows.doubts)


def _look_at(place: Place, file_format: FileFormat) -> tuple[InputFile, pa.Schema | None]:
    with explained(place.path):
        size_bytes, version = place.storage.look(place.key)
        ends = place.storage.ends(place.key, size_bytes)
        schema, n_rows = file_format.look(place)
    return InputFile(place.path, size_bytes, version, digest(ends), n_rows), schema


def _joined(schemas: Sequence[pa.Schema], places: Sequence[Place], options: InputOptions) -> pa.Schema:
    """The columns of all files: those that folders name win over those inside files."""
    plain = [_unambiguous(schema) for schema in schemas]
    try:
        inside = pa.unify_schemas(plain, promote_options="permissive") if plain else pa.schema([])
    except pa.ArrowException as error:
        raise Misconfigured(f"The files have columns of one name and different types: {error}") from error
    if not len(inside):  # no file holds anything
        names = dict.fromkeys([*options.text_columns, options.id_column, *options.carry])
        inside = pa.schema([pa.field(name, pa.string()) for name in names if name not in (None, "*")])
    folders = partition_schema(places)
    return pa.schema([*(field for field in inside if field.name not in folders.names), *folders])


def _unambiguous(schema: pa.Schema) -> pa.Schema:
    names = schema.names
    return pa.schema([field for field in schema if names.count(field.name) == 1])


def _check_complete(path: str, schema: pa.Schema | None, required: frozenset[str] | set[str]) -> None:
    for name in sorted(required):
        if schema is not None and schema.get_field_index(name) < 0:
            raise Misconfigured(f"{path} has no column `{name}`, or several; it has {', '.join(schema.names)}.")
