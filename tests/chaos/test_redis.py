"""Redis that dies, stalls, forgets, fills up, or loses connections and replies."""

from __future__ import annotations

import asyncio
import time

import pytest

from .deployment import Deployment, Sites
from .ledger import Ledger, Outcome
from .trial import Broken, Round, Trial

pytestmark = pytest.mark.chaos

RESUME_S = 3.0
"""Promised: from Redis's first answer to the first vectors."""
REFUSED_WITHIN_S = 2.5
"""Promised for each request that is sent while Redis is away."""
STRAY_S = 5.0
"""Promised: entries whose read lost its reply run again within this time."""


async def test_03_redis_is_killed(site: Sites, trial: Trial) -> None:
    """Redis is killed (SIGKILL, AOF everysec) and comes back a second later."""
    async with site() as here:
        with trial.on(here):
            await trial.repeat(lambda: _redis_away(here, trial, 1.0))


async def test_04_redis_is_away(site: Sites, trial: Trial) -> None:
    """Redis is away for 20 s."""
    async with site() as here:
        with trial.on(here):
            await trial.repeat(lambda: _redis_away(here, trial, 20.0))


async def _redis_away(here: Deployment, trial: Trial, away_s: float) -> Round:
    async with here.load(clients=10).running() as ledger:
        await asyncio.sleep(0.7)
        bit = await here.until_queued()
        here.server.kill()
        killed_s = time.monotonic()
        await asyncio.sleep(away_s)
        await here.server.start()
        back_s = time.monotonic()
        await asyncio.sleep(RESUME_S)
        seconds = ledger.first_ok_after_s(back_s)
    trial.recovered(seconds, RESUME_S, "from Redis's first answer to the first vectors")
    _refused_in_time(ledger, killed_s, back_s - REFUSED_WITHIN_S)
    return Round(ledger, bit, seconds)


def _refused_in_time(ledger: Ledger, from_s: float, to_s: float) -> None:
    """Whoever asked while Redis was away for sure, and for long enough, was refused in time."""
    late = [
        line
        for line in ledger.lines
        if from_s < line.sent_s < to_s and (line.outcome is not Outcome.REFUSED or line.wait_s > REFUSED_WITHIN_S)
    ]
    if late:
        raise Broken(f"{len(late)} requests were not refused within {REFUSED_WITHIN_S:g} s, first: {late[0]}")


async def test_05_redis_stands_still(site: Sites, trial: Trial) -> None:
    """Redis stands still (SIGSTOP) for 10 s."""
    stall_s = 10.0
    async with site() as here:
        with trial.on(here):

            async def once() -> Round:
                async with here.load(clients=10).running() as ledger:
                    await asyncio.sleep(0.7)
                    bit = await here.until_queued()
                    here.server.stall()
                    await asyncio.sleep(stall_s)
                    here.server.resume()
                    on_s = time.monotonic()
                    await asyncio.sleep(RESUME_S)
                    seconds = ledger.first_ok_after_s(on_s)
                trial.recovered(seconds, RESUME_S, "from the end of the stall to the first vectors")
                trial.recovered(ledger.worst_s(), stall_s + 3.0, "the longest wait")
                return Round(ledger, bit, seconds)

            await trial.repeat(once)


async def test_06_connections_are_killed(site: Sites, trial: Trial) -> None:
    """All connections to Redis are killed (CLIENT KILL) each second."""
    async with site() as here:
        with trial.on(here):

            async def once() -> Round:
                killed = []
                async with here.load(clients=10).running() as ledger:
                    for _ in range(5):
                        await asyncio.sleep(1)
                        killed.append(await here.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"))
                    last_s = time.monotonic()
                    await asyncio.sleep(0.5)
                trial.recovered(ledger.worst_s(), STRAY_S + 0.5, "the longest wait")
                return Round(ledger, min(killed) > 0, ledger.settled_after_s(last_s))

            await trial.repeat(once)


async def test_07_redis_forgets_all(site: Sites, trial: Trial) -> None:
    """FLUSHALL under load."""
    async with site() as here:
        with trial.on(here):

            async def once() -> Round:
                async with here.load(clients=10).running() as ledger:
                    await asyncio.sleep(0.7)
                    bit = await here.until_queued()
                    await here.call("FLUSHALL")
                    flushed_s = time.monotonic()
                    await asyncio.sleep(4)
                    seconds = max(ledger.settled_after_s(flushed_s), ledger.served_after_s(flushed_s))
                trial.recovered(seconds, RESUME_S, "from FLUSHALL until old requests were answered and new ones taken")
                return Round(ledger, bit, seconds)

            await trial.repeat(once)


async def test_08_replies_are_lost(site: Sites, trial: Trial) -> None:
    """A proxy before Redis loses every 10th reply, and cuts the connection."""
    async with site(lose_every=10) as here:
        with trial.on(here):

            async def once() -> Round:
                assert here.proxy is not None
                before = here.proxy.lost
                async with here.load(clients=10).running() as ledger:
                    await asyncio.sleep(5)
                return Round(ledger, here.proxy.lost - before > 20)

            await trial.repeat(once)
        again, rows = here.journal.duplicates()
        assert again < 0.15 * rows, f"{again} of {rows} rows ran twice"


async def test_20_redis_is_full(site: Sites, trial: Trial) -> None:
    """Redis has no memory left (maxmemory below what is used) for 3 s."""
    async with site() as here:
        with trial.on(here):

            async def once() -> Round:
                async with here.load(clients=10).running() as ledger:
                    await asyncio.sleep(0.7)
                    bit = await here.until_queued()
                    await here.call("CONFIG", "SET", "maxmemory", 1024 * 1024)
                    full_s = time.monotonic()
                    await asyncio.sleep(3)
                    await here.call("CONFIG", "SET", "maxmemory", 256 * 1024 * 1024)
                    relief_s = time.monotonic()
                    await asyncio.sleep(RESUME_S)
                    seconds = ledger.first_ok_after_s(relief_s)
                trial.recovered(seconds, RESUME_S, "from the end to the first vectors")
                answered = [
                    line
                    for line in ledger.lines
                    if full_s < line.sent_s < relief_s - 0.5 and line.outcome is not Outcome.REFUSED
                ]
                assert not answered, f"accepted without memory: {answered[0]}"
                return Round(ledger, bit, seconds)

            await trial.repeat(once)
