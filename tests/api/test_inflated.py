"""Compressed bodies by themselves: what comes out of which bytes, in which pieces, at what cost."""

from __future__ import annotations

import asyncio
import gzip
import os
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive

from embedstream.api.bodies import BodyLimit, Inflated
from embedstream.api.context import Context, attach
from embedstream.api.errors import PayloadTooLargeError, SchemaError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1024 * 1024
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
    assert 0 < hops < 1000


@WITH_MEMBERS
@pytest.mark.parametrize(("limit", "most"), [(1024, 1024), (MIB, 1024), (2 * MIB, 2048)])
async def test_members_are_bounded_by_the_limit_of_the_body(coding: str, limit: int, most: int) -> None:
    """A million empty ones fit into a body, and each costs as much as a kilobyte of text."""
    empty = CODINGS[coding](b"")
    assert await inflated(empty * most, coding, limit=limit) == b""
    with pytest.raises(PayloadTooLargeError, match=f"more than {most} {coding} members"):
        await inflated(empty * (most + 1), coding, limit=limit)


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

    await BodyLimit(app, 1024, MIB)(scope, received(gzip.compress(b"x")), send)
    assert seen == ["http.request", "http.request", "http.disconnect"]
