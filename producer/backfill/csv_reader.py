"""CSV with a header. Every column is text: the format has no types."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import pyarrow as pa

from .blocks import BadReason
from .lines import Lines
from .listing import Place
from .reading import BLOCK_BYTES, BLOCK_ROWS, Doubt, Rows, conformed

MOST_FIELD_CHARACTERS = 64 * 1024 * 1024
"""Of one field. A quote that is never closed swallows so much of the file, and no more."""
_UNHELD = b'"-"-'
"""Stands for a line that is too long to be held: wherever it comes, inside quotes too, it makes its row a bad one."""


class CsvFormat:
    """CSV and TSV.

    Args:
        delimiter: between fields.
    """

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter

    def look(self, place: Place) -> tuple[pa.Schema | None, int | None]:
        """The header; None for an empty file."""
        with closing(self.open(place, pa.schema([]))) as reader:
            header = reader.header
        return None if header is None else pa.schema([pa.field(name, pa.string()) for name in header]), None

    def open(self, place: Place, columns: pa.Schema) -> CsvReader:
        """Begin to read."""
        return CsvReader(place, columns, self._delimiter)


class CsvReader:
    """Reads one CSV file. A record is a row wherever its lines end; blank lines count, but are no rows.

    Attributes:
        header: names of the columns; None for an empty file.
    """

    def __init__(self, place: Place, columns: pa.Schema, delimiter: str) -> None:
        # The limit is one of the whole process, so it is only ever raised.
        csv.field_size_limit(max(csv.field_size_limit(), MOST_FIELD_CHARACTERS))
        self._lines = Lines(place)
        # Strict: a stray quote makes its row a bad one, instead of a text with other fields in it.
        self._parser = csv.reader(_decoded(self._lines), delimiter=delimiter, strict=True)
        self._columns = columns
        self._row = 0
        try:
            self.header = self._read_header()
        except BaseException:
            self._lines.close()
            raise

    def skip(self, n_rows: int) -> int:
        """Parse records, since quotes tell where they end."""
        step = sum(1 for _ in self._records(n_rows))
        self._row += step
        return step

    def take(self, n_rows: int) -> Iterator[Rows]:
        """Parse records."""
        some: list[Sequence[str] | csv.Error] = []
        characters = 0
        for record in self._records(n_rows):
            some.append(record)
            characters += 0 if isinstance(record, csv.Error) else sum(map(len, record))
            if len(some) == BLOCK_ROWS or characters > BLOCK_BYTES:
                yield self._rows(some)
                some, characters = [], 0
        if some:
            yield self._rows(some)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _read_header(self) -> list[str] | None:
        try:
            header = next((record for record in self._parser if record), None)
            for name in header or ():
                name.encode()
        except (csv.Error, UnicodeEncodeError) as error:
            raise OSError("the header cannot be read") from error
        return header

    def _records(self, n_rows: int) -> Iterator[Sequence[str] | csv.Error]:
        for _ in range(n_rows):
            try:
                record = next(self._parser, None)
            except csv.Error as error:  # the parser goes on behind it
                yield error
            else:
                if record is None:
                    return
                yield record

    def _rows(self, records: Sequence[Sequence[str] | csv.Error]) -> Rows:
        header = self.header or []
        nothing = [""] * len(header)
        kept: list[Sequence[str]] = []
        places, doubts = [], {}
        for place, record in enumerate(records, self._row):
            if not isinstance(record, csv.Error) and not record:
                continue
            fault = _fault(record, len(header))
            if fault is not None:
                doubts[len(kept)] = Doubt(None, BadReason.INVALID, fault)
            kept.append(nothing if fault is not None or isinstance(record, csv.Error) else record)
            places.append(place)
        fields = dict(zip(header, zip(*kept, strict=True), strict=True)) if kept else dict.fromkeys(header, ())
        names = [name for name in self._columns.names if name in fields]
        batch = pa.RecordBatch.from_arrays([_strings(fields[name]) for name in names], names)
        self._row += len(records)
        return Rows(len(records), np.array(places, np.int64), conformed(batch, self._columns), doubts)


def _fault(record: Sequence[str] | csv.Error, n_fields: int) -> str | None:
    if isinstance(record, csv.Error):
        return f"The row is no CSV: {record}."
    return None if len(record) == n_fields else f"The row has {len(record)} fields; the header has {n_fields}."


def _decoded(lines: Lines) -> Iterator[str]:
    while some := lines.read(BLOCK_ROWS):
        for line in some:
            yield (_UNHELD if line is None else line).decode("utf-8", "surrogateescape") + "\n"


def _strings(values: Sequence[str]) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:  # bytes that are no UTF-8; whoever looks at the rows finds out which
        return pa.array([value.encode("utf-8", "surrogateescape") for value in values], pa.binary())
