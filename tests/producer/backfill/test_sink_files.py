"""What files hold, read by those who open them."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from numpy.typing import NDArray

from embedstream.producer.backfill import parquet_format, retries
from embedstream.producer.backfill.options import OutputOptions
from embedstream.producer.backfill.plan import PartId
from embedstream.producer.backfill.sink import OutputSchema
from embedstream.producer.backfill.sinks import open_sink, refuse_clash
from embedstream.shared.errors import Misconfigured, Unavailable

DIM = 6
DTYPES = ("float32", "float16")
PARTS = {PartId(0, 0): (3, 2), PartId(0, 2): (4,), PartId(1, 0): (1, 1)}
"""Rows of each write of each part; a part between the first two had none."""

Loader = Callable[[Path, Path], tuple[list[int], NDArray[Any]]]


def schema_of(dtype: str = "float32", carried: pa.Schema | None = None) -> OutputSchema:
    if carried is None:
        carried = pa.schema([("id", pa.int64()), ("title", pa.string())])
    return OutputSchema(carried, "embedding", DIM, dtype, {"embedstream.model": "m"}, "id")


def rows(first: int, n_rows: int, dtype: str) -> tuple[pa.RecordBatch, NDArray[Any]]:
    ids = range(first, first + n_rows)
    titles = [None if number % 5 == 4 else f"title {number} é\n" for number in ids]
    carried = pa.record_batch({"id": pa.array(ids, pa.int64()), "title": pa.array(titles, pa.string())})
    return carried, np.random.default_rng(first).standard_normal((n_rows, DIM)).astype(dtype)


def embed(out: str, folder: Path, dtype: str = "float32", parts: Any = PARTS, **more: Any) -> NDArray[Any]:
    """Write all parts, in another order than that of the input, and finish; all vectors come back in order."""
    firsts = itertools.accumulate((sum(sizes) for sizes in parts.values()), initial=0)
    whole = {part: list(_blocks(first, parts[part], dtype)) for part, first in zip(parts, firsts, strict=False)}
    with closing(open_sink(OutputOptions(out, **more), schema_of(dtype), folder)) as sink:
        for part in reversed(list(parts)):
            writer = sink.begin(part)
            for carried, vectors in whole[part]:
                writer.write(carried, vectors)
            try:
                writer.commit()
            finally:
                writer.abort()  # harmless after a commit
        sink.finish(list(parts))
    blocks = [vectors for part in parts for _, vectors in whole[part]]
    return np.concatenate(blocks) if blocks else np.zeros((0, DIM), dtype)


def _blocks(first: int, sizes: Sequence[int], dtype: str) -> Any:
    for size in sizes:
        yield rows(first, size, dtype)
        first += size


def matrix(column: Any) -> NDArray[Any]:
    return np.stack([np.asarray(vector) for vector in column]) if len(column) else np.zeros((0, DIM))


def with_pyarrow(path: Path, _: Path) -> tuple[list[int], NDArray[Any]]:
    table = pq.read_table(path)
    assert table.schema.field("embedding").type.list_size == DIM
    assert table.schema.metadata[b"embedstream.model"] == b"m"
    return table["id"].to_pylist(), table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)


def with_pandas(path: Path, _: Path) -> tuple[list[int], NDArray[Any]]:
    frame = pd.read_parquet(path)
    return frame["id"].tolist(), matrix(frame["embedding"])


def with_polars(path: Path, _: Path) -> tuple[list[int], NDArray[Any]]:
    frame = pl.read_parquet(path)
    assert isinstance(frame.schema["embedding"], pl.Array)
    return frame["id"].to_list(), frame["embedding"].to_numpy().reshape(-1, DIM)


def with_duckdb(path: Path, _: Path) -> tuple[list[int], NDArray[Any]]:
    found = duckdb.read_parquet(str(path / "*.parquet" if path.is_dir() else path)).fetchall()
    return [row[0] for row in found], matrix([row[2] for row in found])


def with_datasets(path: Path, cache: Path) -> tuple[list[int], NDArray[Any]]:
    import datasets

    where = {"data_dir": str(path)} if path.is_dir() else {"data_files": str(path)}
    # Streamed, since it prepares no split of nothing, whatever the file.
    found = list(datasets.load_dataset("parquet", split="train", cache_dir=str(cache), streaming=True, **where))
    if found:
        prepared = datasets.load_dataset("parquet", split="train", cache_dir=str(cache), **where)
        assert prepared.features["embedding"].length == DIM
        assert list(prepared["id"]) == [row["id"] for row in found]
    return [row["id"] for row in found], matrix([row["embedding"] for row in found])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["out", "out.parquet"])
@pytest.mark.parametrize("load", [with_pyarrow, with_pandas, with_polars, with_duckdb, with_datasets])
def test_parquet_is_read_by_everybody(load: Loader, name: str, dtype: str, tmp_path: Path) -> None:
    vectors = embed(str(tmp_path / name), tmp_path / "staging", dtype)
    ids, read = load(tmp_path / name, tmp_path / "cache")
    assert ids == list(range(len(vectors)))
    np.testing.assert_array_equal(read.astype(dtype), vectors)


@pytest.mark.parametrize("name", ["out", "out.parquet"])
@pytest.mark.parametrize("load", [with_pyarrow, with_pandas, with_polars, with_duckdb, with_datasets])
def test_parquet_without_rows_is_read_by_everybody(load: Loader, name: str, tmp_path: Path) -> None:
    embed(str(tmp_path / name), tmp_path / "staging", parts={})
    ids, read = load(tmp_path / name, tmp_path / "cache")
    assert (ids, read.size) == ([], 0)


def test_a_folder_holds_parts_and_nothing_else_while_it_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with closing(open_sink(OutputOptions(str(out)), schema_of(), tmp_path / "staging")) as sink:
        writer = sink.begin(PartId(0, 0))
        writer.write(*rows(0, 3, "float32"))
        assert list(out.iterdir()) == []
        writer.commit()
        sink.begin(PartId(0, 1)).write(*rows(3, 3, "float32"))
        assert [path.name for path in out.iterdir()] == ["part-00000-000000.parquet"]


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_row_groups_are_neither_large_nor_small(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_format, "ROW_GROUP_BYTES", 1000)
    parts = {PartId(0, 0): (1,) * 60, PartId(0, 1): (90,)}
    embed(str(tmp_path / name), tmp_path / "staging", parts=parts)
    files = sorted((tmp_path / name).iterdir()) if name == "out" else [tmp_path / name]
    sizes = [
        metadata.row_group(group).num_rows
        for metadata in map(pq.read_metadata, files)
        for group in range(metadata.num_row_groups)
    ]
    assert sum(sizes) == 150
    assert 5 <= len(sizes) <= 10
    assert max(sizes) <= 40


def test_vectors_are_plain_and_the_other_columns_are_not(tmp_path: Path) -> None:
    embed(str(tmp_path / "out.parquet"), tmp_path / "staging")
    group = pq.read_metadata(tmp_path / "out.parquet").row_group(0)
    by_path = {group.column(place).path_in_schema: group.column(place) for place in range(group.num_columns)}
    vector = by_path["embedding.list.element"]
    assert (vector.compression, vector.is_stats_set) == ("UNCOMPRESSED", False)
    assert not vector.has_dictionary_page
    assert (by_path["id"].compression, by_path["id"].statistics.max) == ("ZSTD", 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["out.arrow", "out.feather", "out"])
def test_arrow_is_mapped(name: str, dtype: str, tmp_path: Path) -> None:
    more = {"format": "arrow"} if name == "out" else {}
    vectors = embed(str(tmp_path / name), tmp_path / "staging", dtype, **more)
    paths = sorted((tmp_path / name).iterdir()) if name == "out" else [tmp_path / name]
    assert [path.suffix for path in paths] == ([".arrow"] * 3 if name == "out" else [Path(name).suffix])
    tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
    table = pa.concat_tables(tables)
    assert table.schema.equals(schema_of(dtype).arrow, check_metadata=True)
    assert table["id"].to_pylist() == list(range(11))
    read = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)
    np.testing.assert_array_equal(read, vectors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [PARTS, {}])
def test_npy_is_mapped_and_its_ids_lie_beside_it(parts: Any, dtype: str, tmp_path: Path) -> None:
    vectors = embed(str(tmp_path / "v.npy"), tmp_path / "staging", dtype, parts)
    read = np.load(tmp_path / "v.npy", mmap_mode="r")
    assert (read.dtype, read.flags["C_CONTIGUOUS"]) == (np.dtype(dtype), True)
    np.testing.assert_array_equal(read, vectors)
    ids = pq.read_table(tmp_path / "v.ids.parquet")
    assert ids.column_names == ["id", "title"]
    assert ids["id"].to_pylist() == list(range(len(vectors)))
    assert ids.schema.metadata[b"embedstream.model"] == b"m"


def test_a_folder_of_npy_has_both_files_of_each_part(tmp_path: Path) -> None:
    vectors = embed(str(tmp_path / "out"), tmp_path / "staging", format="npy")
    stems = [f"part-{part.name}" for part in PARTS]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{stem}{extension}" for stem in stems for extension in (".npy", ".ids.parquet")
    }
    read = np.concatenate([np.load(tmp_path / "out" / f"{stem}.npy") for stem in stems])
    np.testing.assert_array_equal(read, vectors)


def lines_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".gz":
        data = gzip.decompress(path.read_bytes())
    elif path.suffix == ".zst":
        with zstd.open(path) as file:
            data = file.read()
    else:
        data = path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extension", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_lines_of_json_read_back_as_the_same_numbers(
    is_folder: bool, extension: str, dtype: str, tmp_path: Path
) -> None:
    out = tmp_path / ("out" if is_folder else f"out{extension}")
    more = {"format": extension[1:]} if is_folder else {}
    vectors = embed(str(out), tmp_path / "staging", dtype, **more)
    paths = sorted(out.iterdir()) if is_folder else [out]
    lines = [line for path in paths for line in lines_of(path)]
    assert [line["id"] for line in lines] == list(range(len(vectors)))
    assert [line["title"] for line in lines][3:5] == ["title 3 é\n", None]
    assert list(lines[0]) == ["id", "title", "embedding"]
    np.testing.assert_array_equal(np.array([line["embedding"] for line in lines], dtype), vectors)


def test_json_says_every_type_without_loss(tmp_path: Path) -> None:
    moment = pa.array([1_764_187_920_000_000_001], pa.timestamp("ns", "UTC"))
    date = dt.date(2026, 11, 26)
    carried = pa.record_batch(
        {
            "id": ["a"],
            "moment": moment,
            "date": [date],
            "price": [decimal.Decimal("12.30")],
            "took": pa.array([dt.timedelta(seconds=1)], pa.duration("ms")),
            "bytes": [b"\x00\xff"],
            "kind": pa.array(["x"]).dictionary_encode(),
            "nested": [{"days": [date, None], "tags": ["u", "v"]}],
            "nothing": pa.nulls(1),
            "nan": [float("nan")],
            "whole": pa.array([2**64 - 1], pa.uint64()),
        }
    )
    schema = schema_of(carried=carried.schema)
    with closing(open_sink(OutputOptions(str(tmp_path / "o.jsonl")), schema, tmp_path / "staging")) as sink:
        writer = sink.begin(PartId(0, 0))
        writer.write(carried, np.zeros((1, DIM), np.float32))
        writer.commit()
        sink.finish([PartId(0, 0)])
    (line,) = lines_of(tmp_path / "o.jsonl")
    assert line == {
        "id": "a",
        "moment": "2025-11-26 20:12:00.000000001Z",
        "date": "2026-11-26",
        "price": "12.30",
        "took": 1000,
        "bytes": "AP8=",
        "kind": "x",
        "nested": {"days": ["2026-11-26", None], "tags": ["u", "v"]},
        "nothing": None,
        "nan": None,
        "whole": 2**64 - 1,
        "embedding": [0.0] * DIM,
    }


@pytest.mark.parametrize("extension", [".parquet", ".arrow", ".feather"])
def test_dictionaries_that_differ_between_parts_become_plain_columns(extension: str, tmp_path: Path) -> None:
    kind = pa.dictionary(pa.int8(), pa.string())
    schema = schema_of(carried=pa.schema([("id", pa.int64()), ("kind", kind)]))
    out = tmp_path / f"out{extension}"
    with closing(open_sink(OutputOptions(str(out)), schema, tmp_path / "staging")) as sink:
        for number, words in enumerate((["a", "b"], ["c", "a"])):
            writer = sink.begin(PartId(0, number))
            ids, kinds = pa.array([2 * number, 2 * number + 1]), pa.array(words).dictionary_encode().cast(kind)
            writer.write(pa.record_batch([ids, kinds], names=["id", "kind"]), np.zeros((2, DIM), np.float32))
            writer.commit()
        sink.finish([PartId(0, 0), PartId(0, 1)])
    table = pq.read_table(out) if extension == ".parquet" else pa.ipc.open_file(str(out)).read_all()
    assert table["kind"].to_pylist() == ["a", "b", "c", "a"]


@pytest.mark.parametrize("name", ["out", "out.parquet", "out.npy"])
def test_an_object_store_gets_whole_files(name: str, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}/{name}"
    vectors = embed(url, tmp_path / "staging")
    names = sorted(path.rpartition("/")[2] for path in store.find(f"/{tmp_path.name}"))
    if name == "out.npy":
        assert names == ["out.ids.parquet", "out.npy"]
        return
    assert names == ([f"part-{part.name}.parquet" for part in PARTS] if name == "out" else [name])
    with fsspec.open_files(url if name != "out" else f"{url}/*", "rb") as files:
        table = pa.concat_tables([pq.read_table(file) for file in files])
    assert table["id"].to_pylist() == list(range(len(vectors)))


def failing(monkeypatch: pytest.MonkeyPatch, *errors: Exception | None) -> None:
    """Let the store put what it is given, or less, or nothing."""
    monkeypatch.setattr(retries, "PAUSES_S", (0.0,))
    store = type(fsspec.filesystem("memory"))
    put, left = store.put_file, list(errors)

    def put_file(self: Any, path: str, target: str) -> None:
        if left and (error := left.pop(0)) is not None:
            raise error
        if left:
            self.pipe_file(target, b"half")
        else:
            put(self, path, target)

    monkeypatch.setattr(store, "put_file", put_file)


def test_what_a_store_did_not_take_whole_is_put_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = {PartId(0, 0): (3,)}
    failing(monkeypatch, None, None)
    embed(f"memory://{tmp_path.name}/out", tmp_path / "staging", parts=part)
    with fsspec.open(f"memory://{tmp_path.name}/out/part-00000-000000.parquet", "rb") as file:
        assert pq.read_table(file).num_rows == 3


def test_trouble_of_a_store_is_one_line_without_its_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = {PartId(0, 0): (3,)}
    url = f"memory://{tmp_path.name}/out"
    trouble = RuntimeError("GET https://me:secret@store/x?Signature=secret failed")
    failing(monkeypatch, trouble, trouble)
    with pytest.raises(Unavailable, match=r"does not answer: GET https://\*\*\*@store/x\?\*\*\* failed"):
        embed(url, tmp_path / "staging", parts=part)
    failing(monkeypatch, PermissionError("secret"))
    with pytest.raises(Misconfigured, match=r"cannot be written \(Permission denied\)"):
        embed(url, tmp_path / "staging", parts=part)
    assert not list((tmp_path / "staging").glob(".*"))


@pytest.mark.parametrize("name", ["v.parquet", "v.npy", "vectors"])
def test_a_name_alone_is_one_of_the_working_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    embed(name, tmp_path / "staging")
    assert name in {path.name for path in here.iterdir()}


def test_what_others_made_is_never_touched(tmp_path: Path) -> None:
    for name in ("out", "out.parquet", "v.npy"):
        path = tmp_path / name
        if name == "out":
            path.mkdir()
            path = path / "letters.txt"
        (tmp_path / "v.ids.parquet" if name == "v.npy" else path).write_text("mine")
        with pytest.raises(Misconfigured, match=r"exists already, with .* in it, and this backfill has not made it"):
            embed(str(tmp_path / name), tmp_path / f"{name}.staging")
        assert (tmp_path / "v.ids.parquet" if name == "v.npy" else path).read_text() == "mine"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    embed(str(tmp_path / "out"), tmp_path / "staging")


@pytest.mark.parametrize("name", ["v", "v.parquet", "v.jsonl", "v.npy"])
def test_a_column_that_the_format_does_not_have_is_refused(name: str, tmp_path: Path) -> None:
    carried = pa.schema([("id", pa.int64()), ("span", pa.month_day_nano_interval())])
    with pytest.raises(Misconfigured, match="`span`"):
        refuse_clash(OutputOptions(str(tmp_path / name)), carried)
    refuse_clash(OutputOptions(str(tmp_path / "v.arrow")), carried)
    assert list(tmp_path.iterdir()) == []


def test_a_column_of_the_vectors_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="`title` is carried"):
        open_sink(OutputOptions(str(tmp_path / "out"), vector_column="title"), schema_of(), tmp_path / "staging")
