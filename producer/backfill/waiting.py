"""Waiting for a fleet that is away: said while it lasts, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import NoReturn

from embedstream.producer.fleet import Fleet, ServedModel
from embedstream.shared.errors import Unavailable

from .progress import Progress

_LOOK_S = 0.5


async def first_model(fleet: Fleet, progress: Progress, patience_s: float) -> ServedModel:
    """The model, once a consumer serves it.

    Args:
        fleet: followed already.
        progress: told what is waited for.
        patience_s: how long to wait.

    Raises:
        Unavailable: nobody served it for so long.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + patience_s
    while True:
        try:
            served = await fleet.live()
        except Unavailable as error:
            if loop.time() > deadline_s:
                raise
            progress.state = f"waiting: {error}"
            await asyncio.sleep(_LOOK_S)
        else:
            progress.state, progress.model = "", served.card.model
            return served


async def patiently(work: Coroutine[None, None, None], fleet: Fleet, progress: Progress, patience_s: float) -> None:
    """Do something that needs the fleet, and give up when the fleet is away for too long.

    Accepted jobs outlive their consumers, so nobody else would notice: they simply wait.

    Args:
        work: to be awaited.
        fleet: followed already.
        progress: told of the trouble while there is any.
        patience_s: longest trouble that is waited out.

    Raises:
        Unavailable: the trouble lasted longer; `work` was cancelled.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_watch(fleet, progress, patience_s))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        await (working if working.done() else watching)
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait({working, watching})


async def _watch(fleet: Fleet, progress: Progress, patience_s: float) -> NoReturn:
    loop = asyncio.get_running_loop()
    since_s, said = loop.time(), ""
    while True:
        trouble = fleet.trouble
        if trouble is None:
            since_s = loop.time()
            if said and progress.state == said:
                progress.state = ""
            said = ""
        else:
            said = progress.state = f"waiting: {trouble}"
            if loop.time() - since_s > patience_s:
                raise Unavailable(trouble)
        await asyncio.sleep(_LOOK_S)
