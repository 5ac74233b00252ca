"""A client that says exactly what it is told to, byte by byte."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from typing import Any, Self

PATIENCE_S = 20.0


@dataclass(frozen=True)
class Reply:
    """An answer with a known length."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error of the body, which has the shape that all errors have."""
        content = json.loads(self.body)
        assert set(content) == {"error"}
        assert set(content["error"]) == {"message", "type", "param", "code"}
        assert content["error"]["code"] == self.status
        assert self.headers["content-type"] == "application/json"
        assert self.headers["x-request-id"]
        error: dict[str, Any] = content["error"]
        return error


@dataclass
class Peer:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def dial(cls, port: int, *, buffer_bytes: int = 0) -> Self:
        """Connect; with a receive buffer so small that what is not read soon stays with the server."""
        made = socket.socket()
        if buffer_bytes:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        made.setblocking(False)
        await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=made, limit=2**16))

    async def say(self, data: bytes) -> None:
        """Send."""
        self.writer.write(data)
        await self.writer.drain()

    async def hear(self, patience_s: float = PATIENCE_S) -> Reply:
        """The next answer."""
        async with asyncio.timeout(patience_s):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
            body = await self.reader.readexactly(int(headers["content-length"]))
        return Reply(int(head[0].split()[1]), headers, body)

    async def ask(self, data: bytes) -> Reply:
        """Send, and hear the answer."""
        await self.say(data)
        return await self.hear()

    async def ask_while_sending(self, data: bytes) -> Reply:
        """Hear the answer, even if it comes before all is sent, and whether or not the rest is taken."""
        self.writer.write(data)
        return await self.hear()

    async def rest(self) -> bytes:
        """What comes until the connection ends; b"" when it ends without a word, or is reset."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""

    def hang_up(self) -> None:
        """Cut the connection."""
        self.writer.transport.abort()


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/embeddings") -> bytes:
    """A request with a JSON body."""
    return post_head(len(body), *headers, path=path) + body


def post_head(size: int, *headers: bytes, path: bytes = b"/v1/embeddings") -> bytes:
    """The head of a request that announces so many bytes."""
    lines = [b"POST %b HTTP/1.1" % path, b"Host: t", b"Content-Type: application/json", b"Content-Length: %d" % size]
    return b"\r\n".join((*lines, *headers, b"", b""))
