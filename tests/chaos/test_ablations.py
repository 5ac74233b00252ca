"""Each guard taken out by itself: the oracle must then report a failure, and none in the same trial with the guard."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from embedstream.consumer.leases import ASTRAY_MS
from embedstream.shared.connections import READER_TIMEOUT_S
from embedstream.shared.lanes import Lane

from . import raw_caller, toy
from .deployment import KEYS, Deployment, Device, Sites
from .ledger import Ledger, Outcome
from .load import ask_all
from .requests import Mixture
from .trial import Broken, Trial, check

pytestmark = pytest.mark.chaos

SHORT_S = 8.0
"""Deadline of requests here: well above every promised time, and what is lost shows soon."""
MOST_ROUNDS = 6
LATE_S = READER_TIMEOUT_S + ASTRAY_MS / 1000 + 1.5
"""When a read comes, its reader has given up and has looked once for what it may have brought."""


async def _is_red(trial: Trial, once: Callable[[], Awaitable[Ledger]], rounds: int = MOST_ROUNDS) -> None:
    """Repeat a round until the oracle reports a failure."""
    for _ in range(rounds):
        ledger = await once()
        try:
            check(ledger)
        except Broken as error:
            trial.row.red_as_meant = str(error).partition(":")[0]
            trial.finish()
            return
    pytest.fail(f"the guard is out, and {rounds} rounds showed no failure")


async def _is_green(once: Callable[[], Awaitable[Ledger]], rounds: int = 2) -> None:
    for _ in range(rounds):
        check(await once())


async def test_a1_no_reconcile(site: Sites, trial: Trial) -> None:
    """The API's reconciling; FLUSHALL."""

    async def flushed(here: Deployment) -> Ledger:
        async with here.load(clients=10).running() as ledger:
            await asyncio.sleep(0.5)
            await here.until_queued()
            await here.call("FLUSHALL")
            await asyncio.sleep(1)
        return ledger

    async with site(timeout_s=SHORT_S) as here:
        await _is_green(lambda: flushed(here))
    async with site(timeout_s=SHORT_S, no_reconcile=True) as here:
        await _is_red(trial, lambda: flushed(here))


async def test_a2_no_own_pending_sweep(site: Sites, trial: Trial) -> None:
    """The sweep of one's own pending entries; lost replies."""

    async def lossy(here: Deployment) -> Ledger:
        async with here.load(clients=10).running() as ledger:
            await asyncio.sleep(6)
        return ledger

    async with site(timeout_s=3 * SHORT_S, lose_every=10) as here:
        await _is_green(lambda: lossy(here))
    async with site(timeout_s=3 * SHORT_S, lose_every=10, device=Device(ablate="no_own_pending_sweep")) as here:
        await _is_red(trial, lambda: lossy(here))


async def test_a3_one_shot_sweep(site: Sites, trial: Trial) -> None:
    """The repetition of that sweep: one look after a failed read; a read reaches Redis after its reader gave up."""

    async def late(here: Deployment) -> Ledger:
        assert here.proxy is not None
        before = here.proxy.held
        async with here.load(clients=40, think_s=0.02).running() as ledger:
            await asyncio.sleep(1)
            here.proxy.hold_read(KEYS.lane(Lane.INTERACTIVE), LATE_S)
            await asyncio.sleep(LATE_S + 1)
        assert here.proxy.held > before, "no read was held"
        return ledger

    def short_of_devices(ablate: str) -> Deployment:
        # Work waits on the lane all the time, so that a read that comes late finds some.
        here = site(timeout_s=2 * SHORT_S, device=Device(base_ms=150, budget=200, ablate=ablate), proxied=True)
        here.mixture = Mixture(here.seed, largest=8)
        return here

    async with short_of_devices("") as here:
        await _is_green(lambda: late(here), rounds=1)
    async with short_of_devices("one_shot_sweep") as here:
        await _is_red(trial, lambda: late(here))


async def test_a4_dead_letters_by_delivery_count(site: Sites, trial: Trial) -> None:
    """Running suspects apart: entries are given up by their delivery count instead; two killing inputs among 64."""

    async def poisoned(here: Deployment) -> Ledger:
        ledger = Ledger()
        many = [here.mixture.one(1, (toy.KILL,) if place in {20, 40} else ()) for place in range(64)]
        async with here.restarting():
            await ask_all(here.api[0].port, many, ledger, here.timeout_s)
        assert len(ledger.of(Outcome.FAILED)) >= 2
        return ledger

    options = {"consumers": 1, "timeout_s": 90}
    async with site(**options, device=Device(base_ms=150)) as here:
        await _is_green(lambda: poisoned(here), rounds=1)
    async with site(**options, device=Device(base_ms=150, ablate="dead_letter_on_delivery_count")) as here:
        await _is_red(trial, lambda: poisoned(here), rounds=2)


async def test_a5_pipeline_instead_of_multi(site: Sites, trial: Trial) -> None:
    """MULTI around reply, acknowledgement and deletion; Redis is full and the consumer is killed."""

    async def lost(here: Deployment) -> int:
        sent = await raw_caller.send(here, [here.mixture.one(1) for _ in range(20)])
        await asyncio.sleep(0.1)
        await here.call("CONFIG", "SET", "maxmemory", 1024 * 1024)
        await asyncio.sleep(2)  # the batch ends, and the publisher begins to try
        for victim in list(here.fleet):
            victim.end()
            here.fleet.remove(victim)
        await here.call("CONFIG", "SET", "maxmemory", 256 * 1024 * 1024)
        here.start_consumer()
        deadline_s = time.monotonic() + 15
        while missing := len(sent) - len(await raw_caller.answered(here, sent)):
            if time.monotonic() > deadline_s:
                break
            await asyncio.sleep(0.2)
        return missing

    async with site(consumers=1, device=Device(base_ms=600)) as here:
        assert await lost(here) == 0
    async with site(consumers=1, device=Device(base_ms=600, ablate="pipeline_instead_of_multi")) as here:
        missing = await lost(here)
        assert missing, "nothing was lost although reply and deletion were not one transaction"
        trial.row.red_as_meant = f"{missing} of 20 jobs neither on their lane nor answered"
        trial.finish()
