"""A Valkey of the scenario's own, which can be killed, stopped and brought back at the same address."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

from embedstream.deploy.embedded import find_server
from embedstream.shared.connections import connect_sync

from .processes import Process

_PORTS = range(20_000, 30_000)
"""Below the ports that the kernel gives out: a client of a server that is away could otherwise meet itself."""


def free_port() -> int:
    """A port nobody listens on now."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Server:
    """Valkey with an append-only file, as a queue of production has it.

    Args:
        folder: for its files.
        maxmemory_bytes: where it begins to refuse.
    """

    def __init__(self, folder: Path, *, maxmemory_bytes: int = 256 * 1024 * 1024) -> None:
        self._folder = folder
        self._maxmemory_bytes = maxmemory_bytes
        self.port = free_port()
        self.process: Process | None = None

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"redis://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start it, on the data it left, and wait until it answers."""
        data = self._folder / "redis"
        data.mkdir(exist_ok=True)
        options = {
            "bind": "127.0.0.1",
            "port": self.port,
            "dir": data,
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory": self._maxmemory_bytes,
            "maxmemory-policy": "noeviction",
            "loglevel": "notice",
        }
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        self.process = Process("redis", [str(find_server().path), *flags], {}, self._folder / "redis.log")
        deadline_s = time.monotonic() + 20
        while not await asyncio.to_thread(self.answers):
            if self.process.code is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"Valkey did not start:\n{self.process.log_tail()}")
            await asyncio.sleep(0.02)

    def answers(self) -> bool:
        """Whether it takes commands now."""
        client = connect_sync(self.url)
        try:
            return bool(client.ping())
        except Exception:  # noqa: BLE001 - whatever it is, it does not answer
            return False
        finally:
            client.close()

    def kill(self) -> None:
        """SIGKILL, at once."""
        self._running.end()

    def stall(self) -> None:
        """SIGSTOP: connections stay, nothing is answered."""
        self._running.send(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._running.send(signal.SIGCONT)

    def call(self, *command: Any) -> Any:
        """One command on a connection of its own."""
        client = connect_sync(self.url)
        try:
            return client.execute_command(*command)  # type: ignore[no-untyped-call] # redis-py has none here
        finally:
            client.close()

    @property
    def _running(self) -> Process:
        if self.process is None:
            raise RuntimeError("the server was not started")
        return self.process
