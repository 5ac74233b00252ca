"""What OUT means, before anything is opened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from embedstream.producer.backfill.options import OutputOptions
from embedstream.producer.backfill.outputs import Kind, Output, output_of
from embedstream.producer.backfill.sink import OutputSchema
from embedstream.producer.backfill.sinks import open_sink
from embedstream.shared.errors import Misconfigured

POSTGRES = "postgresql://me:secret@db.internal/app?sslmode=require&table=mine.docs&index=hnsw"


@pytest.mark.parametrize(
    ("path", "kind", "form", "state"),
    [
        ("vectors", Kind.FOLDER, "parquet", "vectors.backfill"),
        ("/data/vectors/", Kind.FOLDER, "parquet", "/data/vectors.backfill"),
        ("v1.5/", Kind.FOLDER, "parquet", "v1.5.backfill"),
        ("v.parquet", Kind.FILE, "parquet", "v.parquet.backfill"),
        ("v.parquet/", Kind.FOLDER, "parquet", "v.parquet.backfill"),
        ("a/v.feather", Kind.FILE, "arrow", "a/v.feather.backfill"),
        ("v.jsonl.gz", Kind.FILE, "jsonl.gz", "v.jsonl.gz.backfill"),
        ("v.1.jsonl", Kind.FILE, "jsonl", "v.1.jsonl.backfill"),
        ("file:///data/a%20b.npy", Kind.FILE, "npy", "/data/a b.npy.backfill"),
        ("s3://bucket/deep/vectors", Kind.FOLDER, "parquet", "vectors.backfill"),
        ("s3://bucket/v.jsonl.zst", Kind.FILE, "jsonl.zst", "v.jsonl.zst.backfill"),
        (POSTGRES, Kind.PGVECTOR, "", "mine.docs.backfill"),
        ("postgres://h/db?table=a%2Fb", Kind.PGVECTOR, "", "a_b.backfill"),
        ("qdrant+https://host:6333/docs?distance=dot", Kind.QDRANT, "", "docs.backfill"),
        ("qdrant+file:///data/qdrant/docs", Kind.QDRANT, "", "docs.backfill"),
    ],
)
def test_a_name_says_what_the_output_is(path: str, kind: Kind, form: str, state: str) -> None:
    output = output_of(OutputOptions(path))
    assert (output.kind, output.format, output.state_folder) == (kind, form, Path(state))


def test_a_folder_has_the_format_asked_for() -> None:
    assert output_of(OutputOptions("out", "jsonl.zst")) == Output(Kind.FOLDER, "out", "jsonl.zst", "out", is_local=True)
    assert output_of(OutputOptions("v1.5", "npy")).kind is Kind.FOLDER
    assert output_of(OutputOptions("v.npy", "npy")).kind is Kind.FILE


@pytest.mark.parametrize(
    ("path", "form", "said"),
    [
        ("v.csv", None, r"`\.csv` is no output format: a file ends in \.parquet, .*, a folder of parts in `/`"),
        ("v.npy", "parquet", "OUT is `v.npy`, and the output format asked for is `parquet`"),
        ("out", "csv", "`csv` is no output format; there are parquet, arrow"),
        (POSTGRES, "parquet", "one of files, and OUT is a database"),
        ("postgresql://h/db", None, "names no table"),
        ("/", None, "names no folder and no file"),
        ("..", None, "names no folder and no file"),
        ("", None, "names no folder and no file"),
    ],
)
def test_what_is_no_output_is_refused(path: str, form: str | None, said: str) -> None:
    with pytest.raises(Misconfigured, match=said):
        output_of(OutputOptions(path, form))


def test_nothing_that_is_shown_lets_anybody_in() -> None:
    assert "secret" not in output_of(OutputOptions(POSTGRES)).shown
    assert "secret" not in output_of(OutputOptions("https://h/out?X-Amz-Signature=secret")).shown


@pytest.mark.parametrize(
    ("path", "driver", "extra"),
    [
        (POSTGRES, "psycopg", "pgvector"),
        (POSTGRES, "pgvector", "pgvector"),
        ("qdrant+http://h/c", "qdrant_client", "qdrant"),
    ],
)
def test_a_driver_that_is_not_installed_is_named_with_its_extra(
    path: str, driver: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        name
        for name in sys.modules
        if name.startswith(("embedstream.producer.backfill.pgvector_", "embedstream.producer.backfill.qdrant_"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, driver, None)
    schema = OutputSchema(pa.schema([("id", pa.int64())]), "embedding", 3, "float32", {}, "id")
    with pytest.raises(Misconfigured, match=rf"pip install '\.\[{extra}\]'"):
        open_sink(OutputOptions(path), schema, tmp_path)


def test_drivers_are_imported_only_when_their_sink_is_opened() -> None:
    program = (
        "import sys, embedstream.producer.backfill.sinks\n"
        "sys.exit(' '.join({'psycopg', 'pgvector', 'qdrant_client', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
