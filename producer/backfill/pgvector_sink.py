"""A table of PostgreSQL with pgvector.

A part is one transaction: binary COPY into a temporary table, and from there an upsert by id, so a part that is written
twice is there once. Ids must be unique over the whole input: of rows with the same id the last one of a part stays, and
of several parts the one that was written last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import psycopg
import pyarrow as pa
from numpy.typing import NDArray
from pgvector import HalfVector
from pgvector.psycopg import register_vector
from psycopg.types.json import set_json_dumps

from embedstream.shared.errors import InvalidInput, Misconfigured
from embedstream.shared.urls import without_secrets

from .arrow_format import ArrowFormat, arrow_batches
from .outputs import Output
from .pgvector_table import PgvectorTable
from .pgvector_types import print_json, sql_values
from .pgvector_url import pgvector_url_of
from .plan import PartId
from .retries import patiently
from .sink import OutputSchema
from .staging import StagedPart, Staging

T = TypeVar("T")


class PgvectorSink:
    """A table.

    Args:
        output: names the database and the table.
        schema: of the rows.
        staging: of this backfill: a part is written there first, and travels when it is whole.

    Raises:
        Misconfigured: there is no id column, the table is there and does not fit, or the database refuses what is
            asked of it.
        Unavailable: it does not answer.
    """

    def __init__(self, output: Output, schema: OutputSchema, staging: Staging) -> None:
        url = pgvector_url_of(output.location)
        self._conninfo = url.conninfo
        self._where = f"the table {'.'.join(url.table)} of {output.shown.partition('?')[0]}"
        self._schema = schema
        self._staging = staging
        self._table = PgvectorTable(url, schema)
        self._connection: psycopg.Connection | None = None
        try:
            self._patiently(self._table.prepare)
        except BaseException:
            self.close()
            raise

    def begin(self, part: PartId) -> StagedPart:
        """Begin a part."""
        form = ArrowFormat()
        drafts = self._staging.drafts([f"part-{part.name}{form.extensions[0]}"])
        return StagedPart(form, self._schema, drafts, partial(self._deliver, drafts[0]), self._where)

    def finish(self, parts: Sequence[PartId]) -> None:
        """Build the index that was asked for."""
        self._patiently(self._table.build_index)

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _deliver(self, draft: Path) -> None:
        self._patiently(partial(self._upsert, draft))
        draft.unlink()

    def _upsert(self, draft: Path, connection: psycopg.Connection) -> None:
        table, ids = self._table, self._schema.carried.names.index(self._table.id)
        with connection.transaction(), connection.cursor() as cursor:
            cursor.execute(table.make_temporary)
            place = 0
            with cursor.copy(table.copy_temporary) as copy:
                copy.set_types([*table.type_oids, "int8"])
                for batch in arrow_batches(draft):
                    if batch.column(ids).null_count:
                        raise InvalidInput(
                            f"A row has no value in the id column `{table.id}`, and {self._where} needs "
                            "one in each: leave those rows out by a condition on the input."
                        )
                    vectors = self._vectors(batch.columns[-1])
                    columns = [sql_values(column) for column in batch.columns[:-1]]
                    for row in zip(*columns, vectors, strict=True):
                        copy.write_row((*row, place))
                        place += 1
            cursor.execute(table.upsert)

    def _vectors(self, column: pa.FixedSizeListArray) -> Iterable[NDArray[np.float32] | HalfVector]:
        matrix = column.flatten().to_numpy().reshape(-1, self._schema.dimension)
        return map(HalfVector, matrix) if self._schema.dtype == "float16" else matrix

    def _patiently(self, action: Callable[[psycopg.Connection], T]) -> T:
        """Do something in the database, again where the connection broke over it."""

        def act() -> T:
            try:
                return action(self._connected())
            except psycopg.OperationalError:
                self.close()  # it may be of no use any more, and not know it yet
                raise

        try:
            return patiently(act, (psycopg.OperationalError,), self._where, _told)
        except psycopg.Error as error:
            raise Misconfigured(f"{self._where} refuses what is asked of it: {_told(error)}") from error

    def _connected(self) -> psycopg.Connection:
        if self._connection is None:
            self._connection = psycopg.connect(self._conninfo, autocommit=True, connect_timeout=10)
            set_json_dumps(print_json, self._connection)
            self._table.require_extension(self._connection)
            register_vector(self._connection)
        return self._connection


def _told(error: Exception) -> str:
    """The first line of what a server says, which holds no rows; the lines below may."""
    lines = without_secrets(str(error)).splitlines()
    return lines[0] if lines else type(error).__name__
