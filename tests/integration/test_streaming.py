"""Streamed answers over real connections: a real server and Valkey, and a consumer that takes 50 ms for a job."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import Any

import aiohttp
import httpx2
import numpy as np
import openai
import pytest
import requests
import structlog
import uvicorn
from tests.producer.conftest import RECIPE, StubConsumer, stub_consumers

from embedstream.api import create_app
from embedstream.api.server import bound_to
from embedstream.producer import Producer
from embedstream.shared import metrics, results
from embedstream.shared.cards import ModelCard
from embedstream.shared.jobs import MAX_INPUTS, Job
from embedstream.shared.keys import Keys
from embedstream.shared.results import ResultPart, Status
from embedstream.shared.settings import Settings

pytestmark = pytest.mark.integration

DIM = 1024
JOB_S = 0.05
JOBS = 32
INPUTS = JOBS * MAX_INPUTS
JOB_BYTES = MAX_INPUTS * DIM * 4
PATIENCE_S = 60
FAILING = 999
"""A token id whose job fails."""


class SlowConsumer:
    """Counts the jobs that a stub has answered, each after as long as a device would compute."""

    def __init__(self, stub: StubConsumer) -> None:
        self.done = 0
        self.halts_after = 0
        """Jobs after which it waits for `may_go_on`; 0 for none."""
        self.may_go_on = asyncio.Event()
        self._serve = stub.serve
        stub.serve = self.serve  # type: ignore[method-assign] # a stub that takes its time
        stub.on_job = self.answer

    async def serve(self, lane: bytes, entry_id: bytes, fields: dict[bytes, bytes]) -> None:
        await asyncio.sleep(JOB_S)
        await self._serve(lane, entry_id, fields)
        self.done += 1
        if self.done == self.halts_after:
            async with asyncio.timeout(PATIENCE_S):
                await self.may_go_on.wait()

    def answer(self, job: Job, parts: list[ResultPart]) -> list[ResultPart]:
        (part,) = parts
        if job.ids is not None and FAILING in job.ids:
            rows = job.index, job.count, job.first_input, job.n_inputs
            return [results.failed(job.request_id, part.fingerprint, *rows, Status.FAILED, "It cannot be embedded.")]
        return [replace(part, vectors=np.repeat(part.vectors, DIM // part.vectors.shape[1], axis=1))]


@dataclass
class Site:
    """A running server.

    Args:
        port: on 127.0.0.1.
        producer: what the server sends through.
        start: starts a stub consumer.
    """

    port: int
    producer: Producer
    start: Callable[[], Awaitable[StubConsumer]]

    async def begin(self) -> None:
        """Have a consumer."""
        self.consumer = SlowConsumer(await self.start())

    def path(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    @property
    def url(self) -> str:
        return self.path("/v1/embeddings")

    async def nothing_under_way(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while list(self.producer._sessions.requests()):
                await asyncio.sleep(0.01)


Open = Callable[..., Any]


@pytest.fixture
def site(redis_url: str, prefix: str, wordpiece_json: str) -> Open:
    """`async with site(**settings) as here`."""

    @asynccontextmanager
    async def opened(**limits: Any) -> AsyncIterator[Site]:
        settings = Settings(redis_url=redis_url, key_prefix=prefix, **limits)
        card = ModelCard("m", replace(RECIPE, dimension=DIM), wordpiece_json, "r")
        producer = Producer(redis_url, model="m", settings=settings)
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(settings, producer),
            http=bound_to(settings),
            access_log=False,
            log_config=None,
            ws="none",
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        async with stub_consumers(redis_url, Keys(prefix, "m")) as start:
            here = Site(listener.getsockname()[1], producer, lambda: start(card))
            if "scale_from_zero_s" not in limits:
                await here.begin()
            serving = asyncio.create_task(server._serve([listener]))  # `serve` would take the test's signals
            try:
                async with asyncio.timeout(PATIENCE_S), httpx2.AsyncClient() as probe:
                    while not server.started:
                        await asyncio.sleep(0.01)
                    while (
                        "scale_from_zero_s" not in limits and (await probe.get(here.path("/health"))).status_code != 200
                    ):
                        await asyncio.sleep(0.05)
                yield here
            finally:
                server.should_exit = True
                await serving

    return opened


def body_of(n_inputs: int = INPUTS, form: str = "bytes_only", *, fails_at: int | None = None) -> dict[str, Any]:
    ids = [[7 + index % 900] for index in range(n_inputs)]
    if fails_at is not None:
        ids[fails_at] = [FAILING]
    return {"input": ids, "encoding_format": form}


def vectors_of(body: dict[str, Any]) -> bytes:
    sums = np.array([ids[0] for ids in body["input"]], np.float32)
    rows = (np.arange(1, 5)[None] * (1 + sums % 977)[:, None]).astype(np.float32)
    return np.repeat(rows, DIM // 4, axis=1).tobytes()


def request_of(body: dict[str, Any], version: str = "1.1") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/embeddings HTTP/{version}\r\nHost: t\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


async def test_the_first_vectors_come_long_before_the_last(site: Open) -> None:
    """And of the others hardly any is held."""
    held: list[float] = []

    async def watch() -> None:
        while True:
            held.append(metrics.HELD_RESULT_BYTES._value.get())
            await asyncio.sleep(0.005)

    body = body_of()
    async with site() as here, httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        here.consumer.halts_after = 2
        before = metrics.HELD_RESULT_BYTES._value.get()
        watching = asyncio.create_task(watch())
        async with client.stream("POST", here.url, json=body) as response:
            assert response.status_code == 200
            assert int(response.headers["content-length"]) == INPUTS * DIM * 4
            pieces = response.aiter_raw()
            first = await anext(pieces)
            assert here.consumer.done <= 2
            here.consumer.may_go_on.set()
            content = first + b"".join([piece async for piece in pieces])
        watching.cancel()
        assert content == vectors_of(body)
        assert here.consumer.done == JOBS
        assert max(held) - before <= 8 * JOB_BYTES
        assert metrics.HELD_RESULT_BYTES._value.get() == before


async def dial(port: int, *, buffer_bytes: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection with a window so small that what its client does not read stays with the server."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=made, limit=2**16)


async def lines(logs: Sequence[Any], count: int) -> list[Any]:
    """The access log's lines for embeddings, as soon as there are so many."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = [entry for entry in logs if entry.get("path") == "/v1/embeddings"]
            if len(found) >= count:
                return found
            await asyncio.sleep(0.01)


async def test_a_slow_reader_delays_nobody(site: Open) -> None:
    body = body_of()
    async with site() as here, httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        before = metrics.HELD_RESULT_BYTES._value.get()
        reader, writer = await dial(here.port, buffer_bytes=4096)
        writer.write(request_of(body))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        small = body_of(2)
        for _ in range(20):  # while all jobs of the other are done, and nobody takes them
            response = await client.post(here.url, json=small)
            assert response.content == vectors_of(small)
        async with asyncio.timeout(PATIENCE_S):
            while here.consumer.done < JOBS + 20:
                await asyncio.sleep(0.01)
            assert metrics.HELD_RESULT_BYTES._value.get() - before > JOB_BYTES  # it waits in parts, where it is counted
            assert await reader.readexactly(len(vectors_of(body))) == vectors_of(body)  # it lost nothing
        writer.close()
        await writer.wait_closed()
        await here.nothing_under_way()


async def test_a_reader_that_takes_nothing_is_cut_and_its_work_called_off(site: Open) -> None:
    async with site(write_timeout_s=0.5) as here:
        with structlog.testing.capture_logs() as logs:
            reader, writer = await dial(here.port, buffer_bytes=4096)
            writer.write(request_of(body_of()))
            await reader.readuntil(b"\r\n\r\n")
            (entry,) = await lines(logs, 1)
        await here.nothing_under_way()
        assert (entry["status"], entry["error"], entry["cut"]) == (499, "ClientDisconnect", "yes")
        try:
            rest = await reader.read()
        except ConnectionResetError:
            rest = b""
        assert len(rest) < INPUTS * DIM * 4
        writer.close()


async def test_a_client_that_leaves_amid_its_answer_calls_the_rest_off(site: Open) -> None:
    async with site() as here, httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        here.consumer.halts_after = 1
        with structlog.testing.capture_logs() as logs:
            async with client.stream("POST", here.url, json=body_of()) as response:
                await anext(response.aiter_raw())
            (entry,) = await lines(logs, 1)
        await here.nothing_under_way()
        assert here.consumer.done == 1
        here.consumer.may_go_on.set()
        assert (entry["status"], entry["cut"]) == (499, "yes")


def with_httpx(url: str, body: dict[str, Any]) -> bytes:
    return httpx2.post(url, json=body, timeout=PATIENCE_S).content


def with_requests(url: str, body: dict[str, Any]) -> bytes:
    return requests.post(url, json=body, timeout=PATIENCE_S).content


def with_urllib(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:  # noqa: S310
        content: bytes = response.read()
    return content


def with_openai(url: str, body: dict[str, Any]) -> bytes:
    base = url.removesuffix("/embeddings")
    with openai.OpenAI(base_url=base, api_key="unused", max_retries=0, timeout=PATIENCE_S) as client:
        answer = client.embeddings.with_raw_response.create(
            model="m", input=body["input"], extra_body={"encoding_format": body["encoding_format"]}
        )
        return answer.content


def with_aiohttp(url: str, body: dict[str, Any]) -> bytes:
    async def post() -> bytes:
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
            return await response.read()

    return asyncio.run(post())


CLIENTS: list[tuple[Callable[[str, dict[str, Any]], bytes], type[Exception]]] = [
    (with_httpx, httpx2.RemoteProtocolError),
    (with_requests, requests.exceptions.RequestException),
    (with_urllib, HTTPException),
    (with_openai, openai.APIConnectionError),
    (with_aiohttp, aiohttp.ClientPayloadError),
]


@pytest.mark.parametrize(("call", "error"), CLIENTS, ids=lambda value: getattr(value, "__name__", None))
async def test_no_client_takes_a_cut_answer_for_a_whole_one(
    site: Open, call: Callable[[str, dict[str, Any]], bytes], error: type[Exception]
) -> None:
    counter = metrics.HTTP_REQUESTS.labels("/v1/embeddings", 500)
    good, bad, before = body_of(8 * MAX_INPUTS), body_of(8 * MAX_INPUTS, fails_at=5 * MAX_INPUTS), counter._value.get()
    async with site() as here:
        with structlog.testing.capture_logs() as logs:
            assert await asyncio.to_thread(call, here.url, good) == vectors_of(good)
            with pytest.raises(error):
                await asyncio.to_thread(call, here.url, bad)
            assert await asyncio.to_thread(call, here.url, good) == vectors_of(good)  # the server is none the worse
            entries = await lines(logs, 3)
    assert [entry["status"] for entry in entries] == [200, 500, 200]
    assert (entries[1]["error"], entries[1]["cut"]) == ("JobFailed", "yes")
    assert counter._value.get() == before + 1


async def test_http_1_0_is_told_the_length_too(site: Open) -> None:
    """There the end of the connection is the end of a body without a length: a cut one would look whole."""
    async with site() as here:
        for fails_at in (None, 5 * MAX_INPUTS):
            reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
            body = body_of(8 * MAX_INPUTS, fails_at=fails_at)
            writer.write(request_of(body, "1.0"))
            async with asyncio.timeout(PATIENCE_S):
                answer = await reader.read()
            head, _, content = answer.partition(b"\r\n\r\n")
            assert b"content-length: %d\r\n" % (8 * JOB_BYTES) in head.lower() + b"\r\n"
            assert b"transfer-encoding" not in head.lower()
            assert len(content) == (8 * JOB_BYTES if fails_at is None else 5 * JOB_BYTES)
            writer.close()
            await writer.wait_closed()


async def test_what_fails_at_once_has_a_status(site: Open) -> None:
    async with site() as here, httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        response = await client.post(here.url, json=body_of(fails_at=3))
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "It cannot be embedded."
        await here.nothing_under_way()


@pytest.mark.parametrize("form", ["bytes", "bytes_only"])
async def test_a_model_that_nobody_has_told_of_yet_tells_by_its_vectors(site: Open, form: str) -> None:
    texts = ["the queue", *("abc" * (1 + index % 3) for index in range(99))]
    body = {"input": texts, "encoding_format": form}
    async with (
        site(scale_from_zero_s=PATIENCE_S, served_model_name=("m",)) as here,
        httpx2.AsyncClient(timeout=PATIENCE_S) as client,
    ):
        asking = asyncio.create_task(client.send(client.build_request("POST", here.url, json=body), stream=True))
        async with asyncio.timeout(PATIENCE_S):
            while not list(here.producer._sessions.requests()):
                await asyncio.sleep(0.01)
        await here.begin()
        if form == "bytes_only":  # the first vectors tell enough
            here.consumer.halts_after = 1
        response = await asking
        assert response.status_code == 200
        here.consumer.may_go_on.set()
        await response.aread()
        assert int(response.headers["content-length"]) == len(response.content) == 100 * DIM * 4
        async with asyncio.timeout(PATIENCE_S):
            while (await client.get(here.path("/health"))).status_code != 200:
                await asyncio.sleep(0.05)
        again = await client.post(here.url, json=body)  # tokenised here, by the card
    assert again.content == response.content
    if form == "bytes":
        first, second = (json.loads(each.headers["metadata"]) for each in (response, again))
        assert (first["data"], first["usage"]) == (second["data"], second["usage"])
