"""Closed-loop clients: each asks, waits for the answer, and asks again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from .http import Client, Cut
from .ledger import Ledger, Line, Outcome
from .requests import Asked

PATH = "/v1/embeddings"
HUNG_AFTER_S = 1.0
"""Beyond its deadline a request may take so long to be answered."""
_AFTER_REFUSAL_S = 0.25


@dataclass(frozen=True)
class Load:
    """How many ask, and how often.

    Args:
        ports: of the API processes; clients are spread over them.
        make: the next request.
        timeout_s: the deadline the API gives each request.
        clients: how many ask at a time.
        think_s: pause of a client between two requests.
    """

    ports: Sequence[int]
    make: Callable[[], Asked]
    timeout_s: float
    clients: int = 8
    think_s: float = 0.1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Ledger]:
        """Ask until the block ends, then wait for what is under way."""
        ledger, stopping = Ledger(), asyncio.Event()
        tasks = [
            asyncio.create_task(self._ask_on(self.ports[number % len(self.ports)], ledger, stopping))
            for number in range(self.clients)
        ]
        try:
            yield ledger
            stopping.set()
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_on(self, port: int, ledger: Ledger, stopping: asyncio.Event) -> None:
        client = Client(port)
        try:
            while not stopping.is_set():
                line = await ask(client, self.make(), ledger, self.timeout_s)
                await asyncio.sleep(self.think_s if line.outcome is Outcome.OK else _AFTER_REFUSAL_S)
        finally:
            client.close()


async def ask(client: Client, asked: Asked, ledger: Ledger, timeout_s: float) -> Line:
    """One request, from its line in the ledger to its end, whatever that is."""
    line = ledger.open(asked)
    try:
        async with asyncio.timeout(timeout_s + HUNG_AFTER_S):
            answer = await client.post(PATH, asked.body())
    except TimeoutError:
        ledger.end(line, Outcome.HUNG)
    except Cut as error:
        ledger.end(line, Outcome.FAILED if error.amid_body else Outcome.CUT, str(error))
    else:
        ledger.settle(line, answer)
    return line


async def ask_all(port: int, many: Sequence[Asked], ledger: Ledger, timeout_s: float) -> list[Line]:
    """Several requests at once, each on its own connection."""

    async def one(asked: Asked) -> Line:
        client = Client(port)
        try:
            return await ask(client, asked, ledger, timeout_s)
        finally:
            client.close()

    return list(await asyncio.gather(*map(one, many)))
