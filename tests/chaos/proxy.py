"""A proxy before the queue: it loses some of the replies, with their connection, and can bring reads late."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Self

_CHUNK_BYTES = 256 * 1024
_TIME_TO_ACT_S = 1.0


class Proxy:
    """From a unix socket to a port of this machine.

    Args:
        port: of the server.
        lose_every: the connection is cut instead of passing on every so-manieth piece the server sends; pieces are
            replies, or the beginning of large ones. 0 to lose none.
    """

    def __init__(self, port: int, lose_every: int) -> None:
        self._port = port
        self._lose_every = lose_every
        self._replies = 0
        self._to_hold = b""
        self._hold_s = 0.0
        self.lost = 0
        self.held = 0
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

    def hold_read(self, lane: str, hold_s: float) -> None:
        """Keep the next read of a lane for some time before the server gets it, also if its reader gives up."""
        self._to_hold, self._hold_s = lane.encode(), hold_s

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.CancelledError):
            return  # the server is not there, or gone; or it is `close` (asyncio reports a cancelled one as a failure)
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
                if lossy and self._lose_every:
                    self._replies += 1
                    if self._replies % self._lose_every == 0:
                        self.lost += 1
                        return
                if hold := not lossy and self._to_hold and b"XREADGROUP" in data and self._to_hold in data:
                    self._to_hold = b""
                    self.held += 1
                    await asyncio.sleep(self._hold_s)
                writer.write(data)
                await writer.drain()
                if hold:
                    await asyncio.sleep(_TIME_TO_ACT_S)  # the reader's end may be here already
