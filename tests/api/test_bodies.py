from __future__ import annotations

import asyncio
import gzip
import json
import os
import sys
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.types import Message, Receive
from tests.api.conftest import StubProducer

from embedstream.api import create_app
from embedstream.api.bodies import BodyLimit, Inflated
from embedstream.api.context import Context, attach
from embedstream.api.errors import PayloadTooLargeError, SchemaError
from embedstream.shared.settings import Settings

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

URL = "/v1/embeddings"
MIB = 1024 * 1024
Connect = Callable[[Starlette], httpx2.AsyncClient]
Compress = Callable[[bytes], bytes]

CODINGS: dict[str, Compress] = {"gzip": gzip.compress, "zstd": zstd.compress, "deflate": zlib.compress}
EVERY = pytest.mark.parametrize("coding", CODINGS)
WITH_MEMBERS = pytest.mark.parametrize("coding", ["gzip", "zstd"])


def received(data: bytes, *, piece: int = 65_536) -> Receive:
    """A body as it comes in pieces, then the end of the connection."""
    pieces = [data[at : at + piece] for at in range(0, len(data), piece)] or [b""]
    messages: Iterator[Message] = iter(
        [
            *({"type": "http.request", "body": each, "more_body": True} for each in pieces[:-1]),
            {"type": "http.request", "body": pieces[-1], "more_body": False},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> Message:
        return next(messages)

    return receive


async def inflated(data: bytes, coding: str, *, limit: int = 64 * MIB, piece: int = 65_536) -> bytes:
    body, whole = Inflated(received(data, piece=piece), coding, limit), bytearray()
    while True:
        message = await body.receive()
        whole += message["body"]
        if not message["more_body"]:
            assert (await body.receive())["type"] == "http.disconnect"
            return bytes(whole)


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
@pytest.mark.parametrize("piece", [1, 7, 4096, 4097, 65_536])
async def test_a_body_comes_back_whole_whatever_pieces_it_comes_in(coding: str, piece: int) -> None:
    size = 300_000 if piece > 7 else 3000
    plain = os.urandom(size) + b"compressible " * size
    assert await inflated(CODINGS[coding](plain), coding, piece=piece) == plain


@given(plain=st.binary(max_size=300), cuts=st.integers(1, 50), coding=st.sampled_from(list(CODINGS)))
async def test_any_bytes_in_any_pieces(plain: bytes, cuts: int, coding: str) -> None:
    assert await inflated(CODINGS[coding](plain), coding, piece=cuts) == plain


@given(data=st.binary(max_size=200), coding=st.sampled_from(list(CODINGS)), keep=st.integers(0, 40))
async def test_any_other_bytes_are_refused_as_a_bad_request(data: bytes, coding: str, keep: int) -> None:
    spoilt = CODINGS[coding](b"some text " * 20)[:keep] + data
    with suppress(SchemaError):
        await inflated(spoilt, coding)


@EVERY
async def test_no_body_at_all_needs_no_wrapping(coding: str) -> None:
    assert await inflated(b"", coding) == b""


@WITH_MEMBERS
@pytest.mark.parametrize("piece", [1, 13, 65_536])
async def test_members_one_behind_the_other_are_one_body(coding: str, piece: int) -> None:
    compress = CODINGS[coding]
    data = compress(b"first, ") + compress(b"") * 200 + compress(b"last")
    assert await inflated(data, coding, piece=piece) == b"first, last"


async def test_empty_members_take_few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body has room for millions of them."""
    hops, hop = 0, asyncio.to_thread

    async def counted(*arguments: Any) -> Any:
        nonlocal hops
        hops += 1
        return await hop(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    assert await inflated(gzip.compress(b"") * 20_000 + gzip.compress(b"last"), "gzip") == b"last"
    assert 0 < hops < 500


async def test_two_deflate_streams_are_no_body() -> None:
    with pytest.raises(SchemaError, match="What follows the end of the deflate stream"):
        await inflated(zlib.compress(b"a") + zlib.compress(b"b"), "deflate")


async def test_all_that_can_come_out_does_before_more_is_awaited() -> None:
    size = 64 * 1024 + 100  # a full piece, and the rest of a repetition that needs no more input
    data = gzip.compress(bytes(size))
    body, seen = Inflated(received(data, piece=len(data) - 8), "gzip", MIB), 0
    while (message := await body.receive())["more_body"]:
        seen += len(message["body"])
        if seen == size:
            assert not body._last_came
    assert seen == size


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


async def test_a_damaged_byte_is_noticed() -> None:
    content = bytearray(gzip.compress(b"some text " * 100))
    content[-5] ^= 1  # of the checksum
    with pytest.raises(SchemaError, match="not valid gzip"):
        await inflated(bytes(content), "gzip")


@EVERY
async def test_a_bomb_costs_no_more_memory_than_the_limit(coding: str) -> None:
    bomb = CODINGS[coding](bytes(256 * MIB))
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLargeError):
            await inflated(bomb, coding, limit=4 * MIB)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


async def test_a_bomb_in_small_pieces_gives_others_their_turn() -> None:
    bomb, turns = zstd.compress(bytes(16 * MIB)), 0
    assert len(bomb) < 4096

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(others())
    body, pieces = Inflated(received(bomb), "zstd", 64 * MIB), []
    while (message := await body.receive())["more_body"]:
        pieces.append(len(message["body"]))
    task.cancel()
    assert max(pieces) <= 64 * 1024
    assert sum(pieces) == 16 * MIB
    assert turns >= len(pieces) - 1


async def test_a_frame_that_asks_for_more_window_than_http_allows_is_refused() -> None:
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.compression_level: 3}
    data = zstd.compress(os.urandom(1024), options=options)  # of known size: it needs no more than that
    assert len(await inflated(data, "zstd")) == 1024
    writer = zstd.ZstdCompressor(options=options)
    with pytest.raises(SchemaError, match="too much memory"):
        await inflated(writer.compress(b"x") + writer.flush(), "zstd")


async def test_a_hang_up_in_the_midst_is_passed_on() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    assert (await Inflated(receive, "gzip", 1024).receive())["type"] == "http.disconnect"


async def test_after_the_body_the_connection_is_heard_again() -> None:
    """What watches for a hang-up reads on after the body."""
    seen: list[str] = []

    async def app(scope: object, receive: Receive, send: object) -> None:
        del scope, send
        for _ in range(3):
            seen.append((await receive())["type"])

    scope = {"type": "http", "path": "/", "headers": [(b"content-encoding", b"gzip")]}
    attach(scope, Context("id"))

    async def send(message: Message) -> None:
        raise AssertionError(message)

    await BodyLimit(app, 1024)(scope, received(gzip.compress(b"x")), send)
    assert seen == ["http.request", "http.request", "http.disconnect"]
