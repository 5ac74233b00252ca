"""A small HTTP client: it must leave the machine's two cores to what is tested."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes


class Cut(Exception):
    """The connection ended before the whole response had come.

    Args:
        message: why.
        amid_body: whether it ended within a body: so a client is told that what is streamed has failed.
    """

    def __init__(self, message: str, *, amid_body: bool = False) -> None:
        super().__init__(message)
        self.amid_body = amid_body


class Client:
    """One connection to one API process, made again when it was cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes) -> Answer:
        """POST JSON and await the response.

        Raises:
            Cut: no connection, or it ended.
        """
        head = (
            f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return await self._exchange(head.encode() + body)

    async def get(self, path: str) -> Answer:
        """GET.

        Raises:
            Cut: no connection, or it ended.
        """
        return await self._exchange(f"GET {path} HTTP/1.1\r\nHost: t\r\n\r\n".encode())

    async def _exchange(self, request: bytes) -> Answer:
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = self._streams
            writer.write(request)
            await writer.drain()
            return await _response(reader)
        except (OSError, EOFError, ValueError) as error:
            self.close()
            raise Cut(repr(error)) from error
        except BaseException:
            self.close()  # half an answer may still come on it
            raise

    def close(self) -> None:
        """Cut the connection."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def _response(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in head[1:] if line)
    headers = {name.lower(): value.strip() for name, _, value in fields}
    try:
        body = await reader.readexactly(int(headers["content-length"]))
    except EOFError as error:
        raise Cut(repr(error), amid_body=True) from error
    return Answer(int(head[0].split()[1]), headers, body)
