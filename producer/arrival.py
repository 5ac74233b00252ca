"""Scale from zero: requests wait for the first consumer, but not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from embedstream.shared.connections import pause
from embedstream.shared.errors import Unavailable

from .fleet import Fleet
from .pending import PendingRequest

PERIOD_S = 0.2


async def end_the_forlorn(
    fleet: Fleet, requests: Callable[[], Iterable[PendingRequest]], patience_s: float, stopping: asyncio.Event
) -> None:
    """End requests for which no consumer has come in time, until `stopping` is set.

    A request during which a consumer was alive is left to its deadline, whatever became of that consumer.

    Args:
        fleet: knows who is alive.
        requests: gives those under way.
        patience_s: how long a request waits for the first consumer.
        stopping: ends the loop.
    """
    loop = asyncio.get_running_loop()
    alive_s = float("-inf")
    while not stopping.is_set():
        await pause(PERIOD_S, stopping)
        now = loop.time()
        if fleet.consumers:
            alive_s = now
            continue
        for request in list(requests()):
            if request.started_s > alive_s and now - request.started_s >= patience_s:
                request.fail(
                    Unavailable(
                        f"No consumer has come within {patience_s:g} s (--scale-from-zero-s).",
                        retry_after_s=max(1.0, patience_s),
                    )
                )
