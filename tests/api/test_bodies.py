from __future__ import annotations

import asyncio
import gzip
import json
import os
import sys
import zlib
from collections.abc import AsyncIterator, Callable

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.types import Message
from tests.api.conftest import StubProducer

from embedstream.api import create_app
from embedstream.shared import metrics
from embedstream.shared.settings import Settings

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

URL = "/v1/embeddings"
Connect = Callable[[Starlette], httpx2.AsyncClient]
Compress = Callable[[bytes], bytes]

CODINGS: dict[str, Compress] = {"gzip": gzip.compress, "zstd": zstd.compress, "deflate": zlib.compress}
EVERY = pytest.mark.parametrize("coding", CODINGS)


async def test_a_body_that_announces_too_much_is_refused_unread(producer: StubProducer, connect_to: Connect) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    async with connect_to(create_app(Settings(payload_limit=1024), producer)) as client:
        response = await client.post(URL, content=body(), headers={"content-length": "1025"})
    assert response.status_code == 413
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("PayloadTooLargeError", 413)
    assert "1025 bytes; at most 1024 are allowed (--payload-limit)" in error["message"]


async def test_a_body_is_counted_as_it_comes(producer: StubProducer) -> None:
    app = create_app(Settings(payload_limit=1024), producer)
    reads = 0
    sent: list[Message] = []

    async def receive() -> Message:
        nonlocal reads
        reads += 1
        return {"type": "http.request", "body": b" " * 100, "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    await app({"type": "http", "method": "POST", "path": URL, "headers": headers}, receive, send)
    assert sent[0]["status"] == 413
    assert reads == 11


async def test_a_body_of_exactly_the_limit_is_taken(producer: StubProducer, connect_to: Connect) -> None:
    content = b'{"input": "a"}'.ljust(1024)
    headers = {"content-type": "application/json"}
    async with connect_to(create_app(Settings(payload_limit=1024), producer)) as client:
        assert (await client.post(URL, content=content, headers=headers)).status_code == 200
        assert (await client.post(URL, content=content + b" ", headers=headers)).status_code == 413


class Slow:
    """Requests whose bodies have come in part, and wait for the rest until they are let go."""

    def __init__(self, app: Starlette) -> None:
        self._app = app
        self._go = asyncio.Event()
        self._tasks: list[asyncio.Task[int]] = []

    async def send(self, part: bytes, coding: str = "identity") -> None:
        """Send a request as far as this part of its body, which is read when this returns."""
        read, calls = asyncio.Event(), 0

        async def receive() -> Message:
            nonlocal calls
            calls += 1
            if calls == 1:
                return {"type": "http.request", "body": part, "more_body": True}
            read.set()
            await self._go.wait()
            if calls > 2:  # the client stays on
                await asyncio.Event().wait()
            return {"type": "http.request", "body": b"", "more_body": False}

        async def request() -> int:
            statuses: list[int] = []

            async def send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])
                    read.set()

            headers = [(b"content-type", b"application/json"), (b"content-encoding", coding.encode())]
            scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": URL, "headers": headers}
            await self._app(scope, receive, send)
            return statuses[0]

        self._tasks.append(asyncio.create_task(request()))
        await read.wait()

    async def statuses(self) -> list[int]:
        """Let all bodies end; the statuses of their answers."""
        self._go.set()
        return await asyncio.gather(*self._tasks)


@pytest.mark.parametrize("coding", ["identity", *CODINGS])
async def test_all_bodies_together_are_bounded_and_one_alone_is_not(producer: StubProducer, coding: str) -> None:
    body = json.dumps({"input": "a"}).encode().ljust(700_000)
    content = CODINGS.get(coding, bytes)(body)
    settings = Settings(bodies_limit_bytes=1024 * 1024, payload_limit=2 * 1024 * 1024)
    app, before = create_app(settings, producer), metrics.BODY_BYTES._value.get()
    slow = Slow(app)
    await slow.send(content, coding)
    assert metrics.BODY_BYTES._value.get() == before + 700_000
    await slow.send(content, coding)
    assert await slow.statuses() == [200, 503]
    assert metrics.BODY_BYTES._value.get() == before
    alone = Slow(app)
    await alone.send(CODINGS.get(coding, bytes)(body.ljust(1_500_000)), coding)
    assert await alone.statuses() == [200]


async def test_the_503_says_when_to_come_again(producer: StubProducer, connect_to: Connect) -> None:
    app = create_app(Settings(bodies_limit_bytes=1024 * 1024), producer)
    slow = Slow(app)
    await slow.send(b'{"input": "a"}'.ljust(1024 * 1024))
    async with connect_to(app) as client:
        response = await client.post(URL, json={"input": "a"})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "2"
        error = response.json()["error"]
        assert error["type"] == "ServiceUnavailableError"
        assert "have 1048576 bytes here; with this one there would be more than 1048576" in error["message"]
        assert await slow.statuses() == [200]
        assert (await client.post(URL, json={"input": "a"})).status_code == 200


# Compressed bodies


def packed(coding: str, body: object) -> tuple[bytes, dict[str, str]]:
    content = CODINGS[coding](json.dumps(body).encode())
    return content, {"content-type": "application/json", "content-encoding": coding}


@EVERY
async def test_a_compressed_body_is_the_same_request(client: httpx2.AsyncClient, coding: str) -> None:
    body = {"input": ["a b", "c d e"]}
    plain = (await client.post(URL, json=body)).json()
    content, headers = packed(coding, body)
    response = await client.post(URL, content=content, headers=headers)
    assert response.status_code == 200
    assert response.json()["data"] == plain["data"]


@pytest.mark.parametrize("name", ["GZIP", " gzip ", "x-gzip", "identity, gzip", "gzip,"])
async def test_the_names_of_gzip(client: httpx2.AsyncClient, name: str) -> None:
    content, headers = packed("gzip", {"input": "a"})
    response = await client.post(URL, content=content, headers=headers | {"content-encoding": name})
    assert response.status_code == 200


@pytest.mark.parametrize("name", ["identity", "", "Identity"])
async def test_an_uncompressed_body_may_say_so(client: httpx2.AsyncClient, name: str) -> None:
    assert (await client.post(URL, json={"input": "a"}, headers={"content-encoding": name})).status_code == 200


@pytest.mark.parametrize("name", ["br", "compress", "gzip, gzip", "zstd, gzip", "*", "aws-chunked"])
async def test_any_other_coding_is_a_415_that_names_those_taken(
    client: httpx2.AsyncClient, producer: StubProducer, name: str
) -> None:
    content, headers = packed("gzip", {"input": "a"})
    response = await client.post(URL, content=content, headers=headers | {"content-encoding": name})
    assert response.status_code == 415
    assert response.headers["accept-encoding"] == "gzip, zstd, deflate, identity"
    assert response.headers["x-should-retry"] == "false"
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("UnsupportedMediaTypeError", None, 415)
    assert "`gzip`, `zstd`, `deflate`, `identity`" in error["message"]
    assert producer.tokenised == []


async def test_two_lines_of_codings_are_one_list(client: httpx2.AsyncClient) -> None:
    content, _ = packed("gzip", {"input": "a"})
    headers = [("content-type", "application/json"), ("content-encoding", "gzip"), ("content-encoding", "gzip")]
    assert (await client.post(URL, content=content, headers=headers)).status_code == 415


@EVERY
async def test_a_body_that_inflates_to_more_than_the_limit_is_refused(
    producer: StubProducer, connect_to: Connect, coding: str
) -> None:
    async with connect_to(create_app(Settings(payload_limit=4096), producer)) as client:
        fits = json.dumps({"input": "a"}).encode().ljust(4096)
        for body, status in ((fits, 200), (fits + b" ", 413)):
            headers = {"content-type": "application/json", "content-encoding": coding}
            response = await client.post(URL, content=CODINGS[coding](body), headers=headers)
            assert response.status_code == status
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("PayloadTooLargeError", 413)
    assert "inflates to more than 4096 bytes, which is the limit (--payload-limit)" in error["message"]


@EVERY
async def test_the_compressed_body_is_bounded_too(producer: StubProducer, connect_to: Connect, coding: str) -> None:
    content, headers = packed(coding, {"input": os.urandom(1024).hex()})
    assert len(content) > 1024
    async with connect_to(create_app(Settings(payload_limit=1024), producer)) as client:
        response = await client.post(URL, content=content, headers=headers)
    assert "announces" in response.json()["error"]["message"]
    assert response.status_code == 413


@EVERY
async def test_what_is_cut_off_is_refused(client: httpx2.AsyncClient, coding: str) -> None:
    content, headers = packed(coding, {"input": "a" * 100})
    for cut in (content[:1], content[:-1], content[: len(content) // 2]):
        response = await client.post(URL, content=cut, headers=headers)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["type"], error["param"]) == ("Bad Request", None)
        assert f"ends in the midst of its {coding} stream" in error["message"]


@EVERY
async def test_what_follows_the_end_is_refused(client: httpx2.AsyncClient, coding: str) -> None:
    content, headers = packed(coding, {"input": "a"})
    for rest in (b"confidential text", bytes(40)):
        response = await client.post(URL, content=content + rest, headers=headers)
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert message.startswith(f"What follows the end of the {coding} stream is not valid {coding}")
        assert "confidential" not in message


@EVERY
async def test_what_is_something_else_is_refused(client: httpx2.AsyncClient, coding: str) -> None:
    _, headers = packed(coding, None)
    response = await client.post(URL, content=b'{"input": "confidential"}', headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(f"The body is not valid {coding}: ")
    assert "confidential" not in response.text
