"""A proxy before the queue that passes every command on and loses some of the replies, with their connection."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Self

_CHUNK_BYTES = 256 * 1024


class Proxy:
    """From a unix socket to a port of this machine.

    Args:
        port: of the server.
        lose_every: the connection is cut instead of passing on every so-manieth piece the server sends; pieces are
            replies, or the beginning of large ones.
    """

    def __init__(self, port: int, lose_every: int) -> None:
        self._port = port
        self._lose_every = lose_every
        self._replies = 0
        self.lost = 0
        self.url = ""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, folder: Path) -> Self:
        """Listen on a socket in a folder."""
        path = folder / "proxy.sock"
        self._server = await asyncio.start_unix_server(self._accept, path, backlog=512)
        self.url = f"unix://{path}"
        return self

    async def close(self) -> None:
        """Cut all connections."""
        if self._server is not None:
            self._server.close()
        await asyncio.sleep(0)  # connections that were just accepted get their task
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # and the sockets are closed

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            await self._serve(reader, writer)
        except OSError:
            return  # the server is not there, or gone
        finally:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        there = asyncio.create_task(self._pass_on(reader, far_writer, lossy=False))
        back = asyncio.create_task(self._pass_on(far_reader, writer, lossy=True))
        try:
            await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
        finally:
            far_writer.transport.abort()
            for one in (there, back):
                one.cancel()
            await asyncio.wait((there, back))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, lossy: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                if lossy:
                    self._replies += 1
                    if self._replies % self._lose_every == 0:
                        self.lost += 1
                        return
                writer.write(data)
                await writer.drain()
