"""Answers sent while they are made: what the client sees, and what becomes of them when either side gives up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, MutableMapping
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
import structlog
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.types import Message
from tests.api.conftest import DIM, RECIPE, StubProducer, served_model, vectors_of

from embedstream.api import streaming
from embedstream.api.streaming import PiecedResponse
from embedstream.producer import EmbeddedSlice, Prepared
from embedstream.shared import metrics
from embedstream.shared.errors import JobFailed, ResultTimeout, StaleCard, Unavailable

FOUR = ["a", "b c", "d", "e f g"]


class Exchange:
    """One request over ASGI, message by message."""

    def __init__(self, body: dict[str, Any], http_version: str = "1.1", **headers: str) -> None:
        self.hung_up = asyncio.Event()
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        self.complete = False
        self.leaves_when_served = False
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.news = asyncio.Event()
        self._body: bytes | None = orjson.dumps(body)
        given = [(b"content-type", b"application/json")]
        given += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self._scope: MutableMapping[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": "/v1/embeddings",
            "raw_path": b"/v1/embeddings",
            "query_string": b"",
            "headers": given,
            "client": None,
            "server": None,
            "scheme": "http",
            "http_version": http_version,
        }

    @property
    def content(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def promised(self) -> int:
        return int(self.headers["content-length"])

    @property
    def json(self) -> Any:
        return orjson.loads(self.content)

    async def _receive(self) -> Message:
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.may_send.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.pieces.append(message["body"])
            self.complete = not message.get("more_body", False)
            if self.leaves_when_served and len(self.content) == self.promised:
                self.hung_up.set()
        self.news.set()

    async def run(self, app: Starlette) -> Exchange:
        await app(self._scope, self._receive, self._send)
        return self

    async def until_bytes(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.content) < count:
                self.news.clear()
                await self.news.wait()


def packed(inputs: Any = None, form: str = "bytes_only", **fields: Any) -> dict[str, Any]:
    return {"input": FOUR if inputs is None else inputs, "encoding_format": form, **fields}


class Gate:
    """Lets slices pass one at a time: each waits until the test opens it."""

    def __init__(self, producer: StubProducer) -> None:
        self.opened: dict[int, asyncio.Event] = {}
        self.error: dict[int, Exception] = {}
        producer.before_slice = self._wait

    async def _wait(self, first: int) -> None:
        await self.opened.setdefault(first, asyncio.Event()).wait()
        if first in self.error:
            raise self.error[first]

    def open(self, first: int) -> None:
        self.opened.setdefault(first, asyncio.Event()).set()


async def test_the_first_vectors_leave_before_the_others_are_there(app: Starlette, producer: StubProducer) -> None:
    gate, exchange = Gate(producer), Exchange(packed())
    running = asyncio.create_task(exchange.run(app))
    await asyncio.sleep(0.01)
    assert not exchange.headers  # nothing can be told yet
    gate.open(0)
    await exchange.until_bytes(2 * DIM * 4)
    assert (exchange.status, exchange.promised) == (200, 4 * DIM * 4)
    assert exchange.headers["content-type"] == "application/octet-stream"
    assert exchange.headers["x-truncated-inputs"] == "0"
    assert not {"x-queue-time-ms", "x-inference-time-ms", "x-total-time-ms", "x-compute-tokens"} & set(exchange.headers)
    assert not running.done()
    gate.open(2)
    await running
    assert exchange.complete
    assert exchange.content == vectors_of(producer.runs[0]).tobytes()


async def test_when_all_is_there_at_once_the_head_says_where_the_time_went(
    app: Starlette, producer: StubProducer
) -> None:
    producer.slice_inputs = 4
    exchange = await Exchange(packed()).run(app)
    assert exchange.headers["x-queue-time-ms"] == "1.5"
    assert exchange.headers["x-compute-tokens"] == str(producer.runs[0].n_tokens)


@pytest.mark.parametrize("endianness", ["native", "little", "big"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e4m3"])
async def test_slices_join_without_a_seam(app: Starlette, producer: StubProducer, dtype: str, endianness: str) -> None:
    producer.slice_inputs = 3
    exchange = await Exchange(packed(form="bytes", embed_dtype=dtype, endianness=endianness)).run(app)
    vectors = vectors_of(producer.runs[0])
    words = vectors.view(f"u{vectors.itemsize}")
    assert exchange.content == (words.byteswap() if endianness == "big" else words).tobytes()
    meta = json.loads(exchange.headers["metadata"])
    assert [item["start"] for item in meta["data"]] == [index * DIM * vectors.itemsize for index in range(4)]
    assert meta["usage"]["prompt_tokens"] == producer.runs[0].n_tokens


@pytest.mark.parametrize(
    ("error", "status"), [(ResultTimeout("late"), 504), (Unavailable("away"), 503), (JobFailed("no"), 500)]
)
async def test_what_fails_before_the_first_vectors_has_its_own_answer(
    app: Starlette, producer: StubProducer, error: Exception, status: int
) -> None:
    gate = Gate(producer)
    gate.error[0] = error
    gate.open(0)
    with structlog.testing.capture_logs() as logs:
        exchange = await Exchange(packed()).run(app)
    assert (exchange.status, exchange.json["error"]["code"]) == (status, status)
    assert [(entry["status"], entry["error"], entry.get("cut")) for entry in logs] == [
        (status, type(error).__name__, None)
    ]


async def test_what_fails_later_cuts_the_answer_and_is_told(app: Starlette, producer: StubProducer) -> None:
    gate, exchange = Gate(producer), Exchange(packed())
    gate.error[2] = ResultTimeout("late")
    gate.open(0)
    gate.open(2)
    counter = metrics.HTTP_REQUESTS.labels("/v1/embeddings", 504)
    before = counter._value.get()
    with structlog.testing.capture_logs() as logs, pytest.raises(ResultTimeout):  # so that the server cuts it
        await exchange.run(app)
    assert (exchange.status, exchange.complete) == (200, False)
    assert len(exchange.content) == 2 * DIM * 4 < exchange.promised
    (entry,) = logs
    assert (entry["status"], entry["error"], entry["cut"]) == (504, "ResultTimeout", "yes")
    assert counter._value.get() == before + 1


async def test_a_hang_up_before_the_first_vectors_is_a_hang_up(app: Starlette, producer: StubProducer) -> None:
    gate, exchange = Gate(producer), Exchange(packed())
    with structlog.testing.capture_logs() as logs:
        running = asyncio.create_task(exchange.run(app))
        async with asyncio.timeout(20):
            while 0 not in gate.opened:
                await asyncio.sleep(0)
        exchange.hung_up.set()
        await running
    assert [(entry["status"], entry["error"], entry.get("cut")) for entry in logs] == [(499, "ClientDisconnect", None)]


async def test_a_hang_up_amid_the_answer_calls_the_work_off(app: Starlette, producer: StubProducer) -> None:
    gate, exchange = Gate(producer), Exchange(packed())
    gate.open(0)
    with structlog.testing.capture_logs() as logs:
        running = asyncio.create_task(exchange.run(app))
        await exchange.until_bytes(2 * DIM * 4)
        exchange.hung_up.set()
        await running
    assert not exchange.complete
    (entry,) = logs
    assert (entry["status"], entry["error"], entry["cut"]) == (499, "ClientDisconnect", "yes")


async def test_a_reader_that_takes_nothing_is_not_read_for(app: Starlette, producer: StubProducer) -> None:
    """While the connection has no room, no further slice is asked for; when it goes, the rest is called off."""
    exchange = Exchange(packed())
    exchange.may_send.clear()
    asked: list[int] = []

    async def note(first: int) -> None:
        asked.append(first)

    producer.before_slice = note
    running = asyncio.create_task(exchange.run(app))
    await asyncio.sleep(0.01)
    assert asked == [0]
    exchange.hung_up.set()
    await running
    assert (asked, producer.called_off) == ([0], 1)


async def test_a_vector_that_is_not_finite_is_never_sent(app: Starlette, producer: StubProducer) -> None:
    def spoil(vectors: NDArray[Any]) -> NDArray[Any]:
        vectors[bad] = np.nan
        return vectors

    producer.spoil, bad = spoil, 1
    exchange = await Exchange(packed()).run(app)
    assert exchange.status == 500
    assert exchange.json["error"]["message"] == "A vector of the input at index 1 holds NaN or infinity."
    bad = 3
    exchange = Exchange(packed())
    with pytest.raises(JobFailed, match="index 3"):
        await exchange.run(app)
    assert len(exchange.content) == 2 * DIM * 4


async def test_what_overflows_a_narrow_format_is_sent_and_counted(app: Starlette, producer: StubProducer) -> None:
    def spoil(vectors: NDArray[Any]) -> NDArray[Any]:
        vectors[3] = np.inf
        return vectors

    producer.spoil = spoil
    counter = metrics.CAST_OVERFLOWS.labels("float16")
    before = counter._value.get()
    for form in ("bytes_only", "base64"):
        exchange = await Exchange(packed(form=form, embed_dtype="float16")).run(app)
        assert exchange.status == 200
    assert counter._value.get() - before == 2


@pytest.mark.parametrize("recipe", [replace(RECIPE, dimension=4), replace(RECIPE, max_length=3)])
@pytest.mark.parametrize("form", ["bytes", "bytes_only"])
async def test_a_model_replaced_before_the_first_vectors_is_described_as_it_is(
    app: Starlette, producer: StubProducer, form: str, recipe: Any
) -> None:
    producer.moved_to = served_model(recipe)
    before = metrics.TRUNCATED_INPUTS._value.get()
    exchange = await Exchange(packed(form=form, truncate_prompt_tokens=-1)).run(app)
    assert (exchange.status, exchange.complete) == (200, True)
    assert len(exchange.content) == exchange.promised == 4 * recipe.dimension * 4
    cut = 2 if recipe.max_length == 3 else 0
    assert exchange.headers["x-truncated-inputs"] == str(cut)
    assert metrics.TRUNCATED_INPUTS._value.get() - before == cut
    if form == "bytes":
        meta = json.loads(exchange.headers["metadata"])
        assert {tuple(item["shape"]) for item in meta["data"]} == {(recipe.dimension,)}
        assert meta["usage"]["prompt_tokens"] == (3 * 4 if cut else producer.runs[0].n_tokens)


@pytest.mark.parametrize(("form", "cut"), [("bytes", True), ("bytes_only", False)])
async def test_a_model_replaced_amid_the_answer_breaks_no_promise(
    app: Starlette, producer: StubProducer, form: str, *, cut: bool
) -> None:
    """Whether tokens differ matters only where the head has told them."""

    async def in_order(prepared: Prepared) -> AsyncGenerator[EmbeddedSlice, None]:
        vectors, tokens = vectors_of(prepared), prepared.tokens.lengths
        yield EmbeddedSlice(0, vectors[:2], tokens[:2])
        yield EmbeddedSlice(2, vectors[2:], tokens[2:] + np.uint32(1))

    producer.in_order = in_order  # type: ignore[method-assign] # a producer whose model changes amid a result
    exchange = Exchange(packed(form=form))
    if cut:
        with pytest.raises(StaleCard):
            await exchange.run(app)
        assert len(exchange.content) == 2 * DIM * 4 < exchange.promised
    else:
        assert (await exchange.run(app)).complete


async def test_a_stale_card_is_the_clients_matter_only_with_ids(app: Starlette, producer: StubProducer) -> None:
    producer.error = StaleCard("another revision")
    assert (await Exchange(packed([[3, 4]])).run(app)).status == 409
    exchange = await Exchange(packed()).run(app)
    assert (exchange.status, exchange.headers["retry-after"]) == (503, "1")


async def test_large_answers_leave_in_pieces(app: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_PIECE_BYTES", 100)
    plain = await Exchange(packed(form="float")).run(app)
    assert max(map(len, plain.pieces)) == 100
    assert len(plain.content) == plain.promised
    assert [item["index"] for item in plain.json["data"]] == [0, 1, 2, 3]
    exchange = await Exchange(packed()).run(app)
    assert max(map(len, exchange.pieces)) <= 100


async def test_a_hang_up_amid_a_large_answer_is_told(app: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_PIECE_BYTES", 100)
    exchange = Exchange(packed(form="float"))
    with structlog.testing.capture_logs() as logs:
        running = asyncio.create_task(exchange.run(app))
        await exchange.until_bytes(100)
        exchange.may_send.clear()
        await asyncio.sleep(0.01)
        exchange.hung_up.set()
        await running
    assert not exchange.complete
    assert [(entry["status"], entry["error"]) for entry in logs] == [(499, "ClientDisconnect")]


@pytest.mark.parametrize("form", ["bytes_only", "float"])
async def test_a_client_that_leaves_once_it_has_all_is_no_hang_up(
    app: Starlette, producer: StubProducer, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_PIECE_BYTES", 100)
    slices = producer.in_order

    async def in_order(prepared: Prepared) -> AsyncGenerator[EmbeddedSlice, None]:
        async for piece in slices(prepared):
            yield piece
        for _ in range(10):  # a producer that has something to do yet
            await asyncio.sleep(0)

    producer.in_order = in_order  # type: ignore[method-assign] # as it may be
    exchange = Exchange(packed(form=form))
    exchange.leaves_when_served = True
    with structlog.testing.capture_logs() as logs:
        await exchange.run(app)
    assert len(exchange.content) == exchange.promised
    assert [entry["status"] for entry in logs] == [200]


@pytest.mark.parametrize("sizes", [[], [0], [3, 4], [250, 0, 1], [100], [99, 1, 1]])
async def test_pieces_keep_the_bytes(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_PIECE_BYTES", 100)
    pieces = [bytes([65 + index]) * size for index, size in enumerate(sizes)]
    sent: list[bytes] = []

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    response = PiecedResponse(pieces, {}, "text/plain")
    await response({"type": "http"}, receive, send)
    assert b"".join(sent) == b"".join(pieces)
    assert max(map(len, sent)) <= 100
    assert response.headers["content-length"] == str(sum(sizes))
