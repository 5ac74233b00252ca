"""A deployment for clients that mean no good: a real API process and Valkey, and a toy consumer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from tests.chaos import toy
from tests.chaos.processes import Process

from .deployment import Deployment
from .peer import Peer, post

SETTINGS = {
    "HEADER_TIMEOUT_S": 3.0,  # the attackers' process serves the bystanders too, and may be busy for a second
    "READ_TIMEOUT_S": 1.0,
    "WRITE_TIMEOUT_S": 1.0,
    "MAX_CONNECTIONS": 1100,
    "SHUTDOWN_TIMEOUT_S": 5,
    "MAX_WAIT_S": 1000,  # the attacks are to reach the queue, not to be refused by what lies on it
    "REQUEST_TIMEOUT_S": 1000,
}
GROWTH_BYTES = 64 * 2**20
"""What an attack may leave behind, once it has been made before."""
_MOST_ROUNDS = 3
_SETTLED_S = 3.0

Attack = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Site:
    """The API process and where it listens."""

    api: Process
    port: int
    peers: list[Peer] = field(default_factory=list)

    async def dial(self, *, buffer_bytes: int = 0) -> Peer:
        """A new connection."""
        peer = await Peer.dial(self.port, buffer_bytes=buffer_bytes)
        self.peers.append(peer)
        return peer

    @property
    def rss_bytes(self) -> int:
        """Memory of the API process."""
        status = Path(f"/proc/{self.api.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))

    async def metric(self, name: str) -> float:
        """The sum of a metric's samples that begin with `name`."""
        peer = await self.dial()
        lines = (await peer.ask(b"GET /metrics HTTP/1.1\r\nHost: t\r\n\r\n")).body.decode().splitlines()
        peer.hang_up()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    async def works(self) -> None:
        """A usual request is answered, and rightly."""
        ids = [[17, 401, 33], [2000, 18]]
        peer = await self.dial()
        reply = await peer.ask(post(json.dumps({"input": ids}).encode()))
        assert reply.status == 200, reply.body
        vectors = np.array([item["embedding"] for item in json.loads(reply.body)["data"]])
        assert np.array_equal(vectors, toy.expected(ids))
        peer.hang_up()

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[None]:
        """Usual requests, one after the other, for as long as the block lasts: all of them are answered."""
        over = asyncio.Event()

        async def go_on() -> None:
            while not over.is_set():
                await self.works()
                await asyncio.sleep(0.05)

        task = asyncio.create_task(go_on())
        try:
            yield
        finally:
            over.set()
            await task

    async def _bear(self, attack: Attack) -> None:
        try:
            async with self.beside():
                await attack()
            await self.works()
        finally:
            for peer in self.peers:
                peer.hang_up()
            self.peers.clear()

    async def endures(self, attack: Attack) -> None:
        """Bear an attack: others are served meanwhile and afterwards, and its memory comes back.

        The allocator keeps what the first times have cost, a leak grows every time.
        """
        await self._bear(attack)
        grown: list[int] = []
        while not grown or grown[-1] > GROWTH_BYTES >> 20:
            assert len(grown) < _MOST_ROUNDS, f"each round cost MiB that never came back: {grown}"
            before = self.rss_bytes
            await self._bear(attack)
            grown.append(await self._growth_mib(before))
        assert self.api.code is None

    async def _growth_mib(self, before: int) -> int:
        deadline_s = time.monotonic() + _SETTLED_S
        while (growth := self.rss_bytes - before) > GROWTH_BYTES and time.monotonic() < deadline_s:
            await asyncio.sleep(0.1)
        return growth >> 20


@pytest.fixture(scope="session")
def site(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The deployment, one for all attacks."""
    folder = tmp_path_factory.mktemp("hostile")
    toys = ["--name", "c1", "--journal", str(folder / "journal"), "--base-ms", "5", "--tokens-per-s", "1000000"]
    settings = {"REDIS_URL": redis_url, "KEY_PREFIX": "hostile", **SETTINGS}
    with Deployment(folder, settings) as here:
        here.start("consumer", "tests.chaos.stub_consumer", *toys)
        api = here.start_api()
        yield Site(api, here.port)
