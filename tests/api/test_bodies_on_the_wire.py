"""Request bodies over a real socket: `Expect: 100-continue`, chunks, and a connection that goes on after a refusal."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from tests.api.conftest import StubProducer

from embedstream.api import create_app
from embedstream.api.server import bound_to
from embedstream.shared.settings import Settings

BODY = gzip.compress(json.dumps({"input": "a b"}).encode())
PATIENCE_S = 30


class Wire:
    """A client that writes what the test says, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self._writer.write(part)
            await self._writer.drain()

    async def head(self, *headers: str, path: str = "/v1/embeddings", key: str = "right") -> None:
        lines = [f"POST {path} HTTP/1.1", "host: x", f"authorization: Bearer {key}", "content-type: application/json"]
        await self.send("\r\n".join([*lines, *headers, "", ""]).encode())

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer, be it an interim one."""
        async with asyncio.timeout(PATIENCE_S):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in head[1:] if line)
            return (
                int(head[0].split()[1]),
                headers,
                await self._reader.readexactly(int(headers.get("content-length", 0))),
            )

    def close(self) -> None:
        self._writer.transport.abort()


@asynccontextmanager
async def wired(producer: StubProducer, **settings: Any) -> AsyncIterator[Wire]:
    made = Settings(api_key=("right",), **settings)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(made, producer), http=bound_to(made), access_log=False, log_config=None, lifespan="on", ws="none"
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve([listener]))  # `serve` would take the test's signals
    wire = Wire(*await asyncio.open_connection(*listener.getsockname()))
    try:
        yield wire
    finally:
        wire.close()
        server.should_exit = True
        await task


async def test_a_client_that_waits_for_100_is_told_to_go_on(producer: StubProducer) -> None:
    async with wired(producer) as wire:
        await wire.head("expect: 100-continue", "content-encoding: gzip", f"content-length: {len(BODY)}")
        assert (await wire.answer())[0] == 100
        await wire.send(BODY)
        status, _, body = await wire.answer()
        assert status == 200
        assert json.loads(body)["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize(
    ("headers", "key", "status"),
    [
        (["content-length: 10"], "wrong", 401),
        (["content-length: 1025"], "right", 413),
        (["content-length: 10", "content-encoding: br"], "right", 415),
    ],
)
async def test_what_is_refused_by_its_head_is_not_asked_to_go_on(
    producer: StubProducer, headers: list[str], key: str, status: int
) -> None:
    async with wired(producer, payload_limit=1024) as wire:
        await wire.head("expect: 100-continue", *headers, key=key)
        assert (await wire.answer())[0] == status


async def test_a_compressed_body_in_chunks_of_single_bytes(producer: StubProducer) -> None:
    async with wired(producer) as wire:
        await wire.head("transfer-encoding: chunked", "content-encoding: gzip")
        await wire.send(*(b"1\r\n%c\r\n" % byte for byte in BODY), b"0\r\n\r\n")
        assert (await wire.answer())[0] == 200


async def test_a_refused_body_leaves_the_connection_to_the_next_request(producer: StubProducer) -> None:
    async with wired(producer) as wire:
        for body, status in ((BODY + b"rest", 400), (BODY[:-1], 400), (b"{}", 400), (BODY, 200)):
            await wire.head("content-encoding: gzip", f"content-length: {len(body)}")
            await wire.send(body)
            assert (await wire.answer())[0] == status


async def test_a_bomb_is_refused_while_the_rest_of_it_is_still_to_come(producer: StubProducer) -> None:
    bomb = gzip.compress(bytes(1024 * 1024))
    async with wired(producer, payload_limit=4096) as wire:
        await wire.head("content-encoding: gzip", f"content-length: {len(bomb)}")
        await wire.send(bomb[:-10])
        status, _, body = await wire.answer()
        assert status == 413
        assert "inflates to more than 4096 bytes" in json.loads(body)["error"]["message"]
