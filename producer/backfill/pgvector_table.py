"""The table of a sink: made where it is missing, checked where it is there, and the statements that fill it."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass

import psycopg
from psycopg import sql

from embedstream.shared.errors import Misconfigured

from .pgvector_types import fits, sql_type
from .pgvector_url import PgvectorUrl
from .same_model import require_same_model
from .sink import OutputSchema

_TEMPORARY = sql.Identifier("pg_temp", "embedstream_part")
_MOST_INDEXED = {"vector": 2000, "halfvec": 4000}
"""Dimensions that an index of pgvector takes."""


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    type: str
    oid: int


class PgvectorTable:
    """A table.

    Args:
        url: names it.
        schema: of the rows.

    Raises:
        Misconfigured: rows have no ids, or more dimensions than the index takes.
    """

    def __init__(self, url: PgvectorUrl, schema: OutputSchema) -> None:
        if schema.id_column is None:
            raise Misconfigured(
                "A table needs a column of ids, by which a row is written once: name it with --id-column."
            )
        self._url = url
        self._schema = schema
        self.id = schema.id_column
        self._name = sql.Identifier(*url.table)
        self._vector_type = "halfvec" if schema.dtype == "float16" else "vector"
        most = _MOST_INDEXED[self._vector_type]
        if url.index != "none" and schema.dimension > most:
            raise Misconfigured(
                f"An index on {self._vector_type} takes {most} dimensions, and the vectors have {schema.dimension}: "
                "ask for fewer, for float16, or for no index."
            )
        self.type_oids: tuple[int, ...] = ()

    def require_extension(self, connection: psycopg.Connection) -> None:
        """Make sure of pgvector; it is created where it is installed and nobody has."""
        if connection.execute("SELECT to_regtype('vector')").fetchone() == (None,):
            with connection.transaction():
                self._lock(connection)
                connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        if connection.execute("SELECT to_regtype(%s)", (self._vector_type,)).fetchone() == (None,):
            raise Misconfigured("float16 vectors are `halfvec` there, which pgvector has since 0.7: ask for float32.")

    def prepare(self, connection: psycopg.Connection) -> None:
        """Make the table, or check the one that is there.

        Raises:
            Misconfigured: it does not fit; the message says where.
        """
        with connection.transaction():
            self._lock(connection)
            if self._oid(connection) is None:
                self._create(connection)
            found = {column.name: column for column in self._columns(connection)}
            self._check(connection, found)
        self.type_oids = tuple(found[name].oid for name in self._schema.arrow.names)

    def build_index(self, connection: psycopg.Connection) -> None:
        """Build the index that was asked for, unless it is there."""
        if self._url.index == "none":
            return
        name = sql.Identifier(f"{self._url.table[-1]}_{self._schema.vector_column}_{self._url.distance}")
        with connection.transaction():
            self._lock(connection)
            connection.execute(
                sql.SQL("CREATE INDEX IF NOT EXISTS {} ON {} USING hnsw ({} {})").format(
                    name,
                    self._name,
                    sql.Identifier(self._schema.vector_column),
                    sql.Identifier(f"{self._vector_type}_{self._url.distance}_ops"),
                )
            )

    @property
    def make_temporary(self) -> sql.Composed:
        """A table of the table's types without its constraints; columns by number, since `place` may be a name."""
        numbered = [
            sql.SQL("{} AS {}").format(sql.Identifier(name), sql.Identifier(f"c{number}"))
            for number, name in enumerate(self._schema.arrow.names)
        ]
        return sql.SQL(
            "CREATE TEMPORARY TABLE {} ON COMMIT DROP AS SELECT {}, 0::bigint AS place FROM {} LIMIT 0"
        ).format(sql.Identifier("embedstream_part"), sql.SQL(", ").join(numbered), self._name)

    @property
    def copy_temporary(self) -> sql.Composed:
        """The way into it."""
        return sql.SQL("COPY {} FROM STDIN (FORMAT BINARY)").format(_TEMPORARY)

    @property
    def upsert(self) -> sql.Composed:
        """From there into the table; sorted by id, so that two processes never wait for each other."""
        names = self._schema.arrow.names
        key = sql.Identifier(f"c{names.index(self.id)}")
        others = [sql.Identifier(name) for name in names if name != self.id]
        return sql.SQL(
            "INSERT INTO {table} ({names}) SELECT DISTINCT ON ({key}) {columns} FROM {part} ORDER BY {key}, place DESC "
            "ON CONFLICT ({id}) DO UPDATE SET {sets}"
        ).format(
            table=self._name,
            names=sql.SQL(", ").join(map(sql.Identifier, names)),
            key=key,
            columns=sql.SQL(", ").join(sql.Identifier(f"c{number}") for number in range(len(names))),
            part=_TEMPORARY,
            id=sql.Identifier(self.id),
            sets=sql.SQL(", ").join(sql.SQL("{} = EXCLUDED.{}").format(name, name) for name in others),
        )

    def _lock(self, connection: psycopg.Connection) -> None:
        """Let one backfill at a time make things, until its transaction ends: `IF NOT EXISTS` alone is a race."""
        key = zlib.crc32(f"embedstream {'.'.join(self._url.table)}".encode())
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (key,))

    def _oid(self, connection: psycopg.Connection) -> int | None:
        found = connection.execute("SELECT to_regclass(%s)::oid", (self._name.as_string(connection),)).fetchone()
        return None if found is None else found[0]

    def _create(self, connection: psycopg.Connection) -> None:
        columns = [
            sql.SQL("{} {}{}").format(
                sql.Identifier(field.name),
                sql.SQL(sql_type(field.type)),
                sql.SQL(" PRIMARY KEY" if field.name == self.id else ""),
            )
            for field in self._schema.carried
        ]
        vector = sql.SQL("{} {} NOT NULL").format(
            sql.Identifier(self._schema.vector_column),
            sql.SQL(f"{self._vector_type}({self._schema.dimension})"),
        )
        connection.execute(sql.SQL("CREATE TABLE {} ({})").format(self._name, sql.SQL(", ").join([*columns, vector])))
        about = json.dumps(dict(self._schema.metadata))
        connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(self._name, sql.Literal(about)))

    def _columns(self, connection: psycopg.Connection) -> list[_Column]:
        found = connection.execute(
            "SELECT attname, format_type(atttypid, atttypmod), atttypid FROM pg_attribute "
            "WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped",
            (self._oid(connection),),
        )
        return [_Column(name, kind, oid) for name, kind, oid in found]

    def _check(self, connection: psycopg.Connection, found: dict[str, _Column]) -> None:
        table = f"The table {'.'.join(self._url.table)}"
        wanted = {field.name: sql_type(field.type) for field in self._schema.carried}
        vector = f"{self._vector_type}({self._schema.dimension})"
        for name, kind in {**wanted, self._schema.vector_column: vector}.items():
            if name not in found:
                raise Misconfigured(f"{table} has no column `{name}`, of type {kind}: add it, or name another table.")
            there = found[name].type.rpartition(".")[2]
            if (
                there not in {vector, self._vector_type}
                if name == self._schema.vector_column
                else not fits(kind, there)
            ):
                raise Misconfigured(
                    f"{table} has `{name}` as {there}, and {kind} is to be written: name another table."
                )
        if not self._is_key(connection):
            raise Misconfigured(
                f"{table} has no primary key or unique index on `{self.id}` alone, by which a row is written once."
            )
        self._check_model(connection, table)

    def _is_key(self, connection: psycopg.Connection) -> bool:
        found = connection.execute(
            "SELECT 1 FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0] "
            "WHERE indrelid = %s AND attname = %s AND indisunique AND indisvalid AND indnkeyatts = 1 "
            "AND indpred IS NULL",
            (self._oid(connection), self.id),
        )
        return found.fetchone() is not None

    def _check_model(self, connection: psycopg.Connection, table: str) -> None:
        """A table that says which model it is of takes no vectors of another."""
        (said,) = connection.execute("SELECT obj_description(%s, 'pg_class')", (self._oid(connection),)).fetchone() or (
            "",
        )
        try:
            about = json.loads(said or "")
        except ValueError:
            return  # a comment of somebody else's
        if isinstance(about, dict):
            require_same_model(table, about, self._schema.metadata)
