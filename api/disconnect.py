"""Clients that hang up while they wait: their work is given up at once, so that it costs no device time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")


async def unless_hung_up(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work while the client waits for it.

    Args:
        receive: of the request, whose body has been read whole; all that is left to come is the hang-up.
        work: is cancelled when it comes, so it must await nothing that a cancellation would harm.

    Raises:
        ClientDisconnect: the client hung up first.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_hang_up(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            watch.result()  # whatever else ended the watching is told
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.wait({task, watch})
        if not watch.cancelled():
            watch.exception()  # nobody asks any more


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
