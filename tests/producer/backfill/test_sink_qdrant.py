"""The sink of Qdrant: against the client's own local mode, and a server that only says no."""

from __future__ import annotations

import datetime as dt
import gc
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from qdrant_client import QdrantClient, models

from embedstream.producer.backfill import qdrant_sink, retries
from embedstream.producer.backfill.options import OutputOptions
from embedstream.producer.backfill.plan import PartId
from embedstream.producer.backfill.qdrant_sink import point_ids
from embedstream.producer.backfill.sink import OutputSchema, Sink
from embedstream.producer.backfill.sinks import open_sink
from embedstream.shared.errors import InvalidInput, Misconfigured, Unavailable

DIM = 3
SCHEMA = OutputSchema(
    pa.schema([("id", pa.string()), ("title", pa.string())]),
    "embedding",
    DIM,
    "float32",
    {"embedstream.model": "m", "embedstream.fingerprint": "f0"},
    "id",
)
PART = PartId(0, 0)

Opener = Callable[..., Sink]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "qdrant"


@pytest.fixture
def open_collection(folder: Path, tmp_path: Path) -> Opener:
    def opener(schema: OutputSchema = SCHEMA, more: str = "?distance=dot") -> Sink:
        return open_sink(OutputOptions(f"qdrant+file://{folder}/docs{more}"), schema, tmp_path / "staging")

    return opener


def carried(*ids: str | None, title: str = "é\n") -> pa.RecordBatch:
    return pa.record_batch([pa.array(ids, pa.string()), pa.array([title] * len(ids))], names=["id", "title"])


def vectors(n_rows: int, value: float = 0.1, dtype: str = "float32") -> Any:
    return (np.arange(1, n_rows * DIM + 1).reshape(n_rows, DIM) * value).astype(dtype)


def write(sink: Sink, *blocks: tuple[pa.RecordBatch, Any]) -> None:
    writer = sink.begin(PART)
    for columns, some in blocks:
        writer.write(columns, some)
    writer.commit()


def read(folder: Path) -> dict[str, Any]:
    """Points by the ids of their rows."""
    with closing(QdrantClient(path=str(folder))) as client:
        points, _ = client.scroll("docs", limit=1000, with_vectors=True)
    return {point.payload["id"]: point for point in points if point.payload is not None}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_come_back_as_they_went(open_collection: Opener, folder: Path, dtype: str) -> None:
    name = str(uuid.uuid4())
    with closing(open_collection(replace(SCHEMA, dtype=dtype))) as sink:
        write(sink, (carried("a", name), vectors(2, 0.1, dtype)), (carried("b"), vectors(1, 3.0, dtype)))
        sink.finish([PART])
    found = read(folder)
    assert set(found) == {"a", "b", name}
    assert found[name].id == name
    assert found["a"].payload == {"id": "a", "title": "é\n"}
    expected = {"a": vectors(2, 0.1, dtype)[0], name: vectors(2, 0.1, dtype)[1], "b": vectors(1, 3.0, dtype)[0]}
    for key, vector in expected.items():
        np.testing.assert_array_equal(np.array(found[key].vector, dtype), vector)
    with closing(QdrantClient(path=str(folder))) as client:
        config = client.get_collection("docs").config
    assert config.metadata is not None
    assert config.metadata["embedstream.model"] == "m"
    params = config.params.vectors
    assert isinstance(params, models.VectorParams)
    assert (params.size, params.distance) == (DIM, models.Distance.DOT)
    assert params.datatype == (models.Datatype.FLOAT16 if dtype == "float16" else models.Datatype.FLOAT32)


def test_a_part_written_twice_is_there_once_and_as_written_last(open_collection: Opener, folder: Path) -> None:
    with closing(open_collection()) as sink:
        write(sink, (carried("a", "b"), vectors(2)))
    with closing(open_collection()) as sink:
        write(sink, (carried("b", "c", title="new"), vectors(2)))
    assert {key: point.payload["title"] for key, point in read(folder).items()} == {"a": "é\n", "b": "new", "c": "new"}


def test_a_part_given_up_leaves_nothing(open_collection: Opener, folder: Path, tmp_path: Path) -> None:
    with closing(open_collection()) as sink:
        writer = sink.begin(PART)
        writer.write(carried("a"), vectors(1))
        writer.abort()
    assert read(folder) == {}
    assert [path.name for path in (tmp_path / "staging").iterdir()] == []


def test_requests_are_bounded(open_collection: Opener, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant_sink, "BATCH_BYTES", 500)
    sizes = []
    upsert = QdrantClient.upsert

    def counted(self: QdrantClient, name: str, points: models.Batch, **more: Any) -> Any:
        sizes.append(len(points.ids))
        return upsert(self, name, points, **more)

    monkeypatch.setattr(QdrantClient, "upsert", counted)
    with closing(open_collection()) as sink:
        write(sink, (carried(*map(str, range(12))), vectors(12)), (carried("long", title="x" * 1000), vectors(1)))
    assert len(read(folder)) == 13
    assert sum(sizes) == 13
    assert 1 < max(sizes) <= 6


def test_ids_that_qdrant_takes_stay_and_others_become_uuids_of_their_own() -> None:
    assert point_ids(pa.array([0, 2**64 - 1], pa.uint64())) == [0, 2**64 - 1]
    known = str(uuid.uuid4())
    ids = [known, known.upper(), known.replace("-", ""), "a", "12"]
    named = point_ids(pa.array(ids))
    assert named[0] == known
    negative = point_ids(pa.array([-1, -2]))
    assert [str(uuid.UUID(str(name))) for name in negative] == negative
    assert len({*named, *negative, *point_ids(pa.array([1.5]))}) == 8
    assert named == point_ids(pa.array(ids))
    assert point_ids(pa.array([dt.date(2026, 1, 2)])) == point_ids(pa.array(["2026-01-02"]))


def test_payloads_hold_every_type(open_collection: Opener, folder: Path) -> None:
    batch = pa.record_batch(
        {"id": ["a"], "day": [dt.date(2026, 1, 2)], "bytes": [b"\0\xff"], "tags": [["u", "v"]], "none": pa.nulls(1)}
    )
    with closing(open_collection(replace(SCHEMA, carried=batch.schema))) as sink:
        write(sink, (batch, vectors(1)))
    expected = {"id": "a", "day": "2026-01-02", "bytes": "AP8=", "tags": ["u", "v"], "none": None}
    assert read(folder)["a"].payload == expected


def test_a_collection_of_ones_own_is_filled(open_collection: Opener, folder: Path) -> None:
    params = models.VectorParams(size=DIM, distance=models.Distance.EUCLID)
    with closing(QdrantClient(path=str(folder))) as client:
        client.create_collection("docs", vectors_config={"embedding": params, "other": params})
    with closing(open_collection(more="")) as sink:
        write(sink, (carried("a"), vectors(1)))
    assert set(read(folder)["a"].vector) == {"embedding"}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (models.VectorParams(size=4, distance=models.Distance.DOT), "of 4 components, and these have 3"),
        (models.VectorParams(size=DIM, distance=models.Distance.COSINE), "compares by cosine, and dot is asked for"),
        ({"x": models.VectorParams(size=DIM, distance=models.Distance.DOT)}, "named x, and none named `embedding`"),
    ],
)
def test_a_collection_that_does_not_fit_is_refused(made: Any, said: str, open_collection: Opener, folder: Path) -> None:
    with closing(QdrantClient(path=str(folder))) as client:
        client.create_collection("docs", vectors_config=made)
    with pytest.raises(Misconfigured, match=said):
        open_collection()


def test_vectors_of_two_models_are_kept_apart(open_collection: Opener) -> None:
    open_collection().close()
    other = {**SCHEMA.metadata, "embedstream.fingerprint": "f1"}
    with pytest.raises(Misconfigured, match="`f0`; these are of m with `f1`, and cannot be compared"):
        open_collection(replace(SCHEMA, metadata=other))


def test_what_cannot_be_is_one_line(open_collection: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PAUSES_S", ())
    with closing(open_collection()) as sink:
        writer = sink.begin(PART)
        writer.write(carried("a", None), vectors(2))
        with pytest.raises(InvalidInput, match="no value in the id column `id`"):
            writer.commit()
        writer.abort()
    with pytest.raises(Misconfigured, match=r"needs a column of ids.*--id-column"):
        open_collection(replace(SCHEMA, id_column=None))
    for url, said in {
        "qdrant+file:///x/c?distance=far": "distance=far",
        "qdrant+file:///x/c?api_key=secret": "`api_key`, which is not known",
        "qdrant+http://me:secret@host/c": "QDRANT_API_KEY",
        "qdrant+http:///c": "names no host",
        "qdrant+file://x/c": "three slashes",
        "qdrant+http://host:6333": "names no collection",
        "qdrant://host/c": "Qdrant is reached as",
    }.items():
        with pytest.raises(Misconfigured, match=said) as caught:
            open_sink(OutputOptions(url), SCHEMA, tmp_path / "staging")
        assert "secret" not in str(caught.value)
    with pytest.raises(Unavailable, match=r"the collection c of qdrant\+http://127\.0\.0\.1:1/c does not answer"):
        open_sink(OutputOptions("qdrant+http://127.0.0.1:1/c"), SCHEMA, tmp_path / "staging")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the client leaves its file open
def test_a_folder_in_use_is_said_in_one_line(open_collection: Opener) -> None:
    with closing(open_collection()), pytest.raises(Misconfigured, match="used by another process"):
        open_collection()
    gc.collect()


@pytest.fixture
def refusing() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A server that answers 503 once, then 403."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["api-key"]))
            body = json.dumps({"status": {"error": "no"}}).encode()
            self.send_response(503 if len(asked) == 1 else 403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"qdrant+http://127.0.0.1:{server.server_port}/below/docs", asked
        server.shutdown()
        thread.join()


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
def test_a_server_is_asked_again_while_it_has_trouble_and_not_when_it_refuses(
    refusing: tuple[str, list[tuple[str, str | None]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = refusing
    monkeypatch.setattr(retries, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setenv("QDRANT_API_KEY", "k")
    with pytest.raises(Misconfigured, match="refuses what is asked of it: 403"):
        open_sink(OutputOptions(url), SCHEMA, tmp_path / "staging")
    assert asked == [("/below/collections/docs/exists", "k")] * 2


@pytest.fixture
def accepting() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A server with a collection, as Qdrant's REST interface describes it, that keeps what it is sent."""
    sent: list[tuple[str, Any]] = []
    vectors = {"size": DIM, "distance": "Cosine"}
    params = {"vectors": vectors, "shard_number": 1, "replication_factor": 1, "write_consistency_factor": 1}
    hnsw = {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000}
    optimizers = {"deleted_threshold": 0.2, "vacuum_min_vector_number": 1000, "default_segment_number": 0}
    config = {"params": params, "hnsw_config": hnsw, "optimizer_config": {**optimizers, "flush_interval_sec": 5}}
    about = {"status": "green", "optimizer_status": "ok", "segments_count": 1, "config": config, "payload_schema": {}}
    answers = {"/collections/docs/exists": {"exists": True}, "/collections/docs": about}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(answers[self.path])

        def do_PUT(self) -> None:
            sent.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.answer({"operation_id": 0, "status": "completed"})

        def answer(self, result: Any) -> None:
            body = json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"qdrant+http://127.0.0.1:{server.server_port}/docs", sent
        server.shutdown()
        thread.join()


def test_a_server_gets_points_and_is_waited_for(accepting: tuple[str, list[tuple[str, Any]]], tmp_path: Path) -> None:
    url, sent = accepting
    name = str(uuid.uuid4())
    with closing(open_sink(OutputOptions(url), SCHEMA, tmp_path / "staging")) as sink:
        write(sink, (carried(name), vectors(1)))
    ((path, body),) = sent
    assert path == "/collections/docs/points?wait=true"
    assert body["batch"]["ids"] == [name]
    assert body["batch"]["payloads"] == [{"id": name, "title": "é\n"}]
    np.testing.assert_array_equal(np.array(body["batch"]["vectors"], np.float32), vectors(1))
