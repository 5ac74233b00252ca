"""Consumers that die, stop, come back, and are replaced."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import replace

import pytest

from .deployment import Sites
from .ledger import Ledger, Outcome
from .load import ask_all
from .requests import Form
from .trial import Round, Trial

pytestmark = pytest.mark.chaos

TAKE_OVER_S = 5.0
"""Promised: the heartbeat's time to live, one look for the dead, and some."""
BATCH_S = 0.5
"""The longest a batch takes here, with what this machine may be late by."""


async def test_01_a_consumer_is_killed(site: Sites, trial: Trial) -> None:
    """A consumer is killed (SIGKILL) with work in hand."""
    async with site(consumers=3) as here:
        with trial.on(here):

            async def once() -> Round:
                async with here.load().running() as ledger:
                    await asyncio.sleep(0.5)
                    bit = await here.kill_holding(here.random.choice(here.fleet))
                    killed_s = time.monotonic()
                    here.start_consumer()
                    await asyncio.sleep(TAKE_OVER_S)
                    seconds = ledger.settled_after_s(killed_s)
                trial.recovered(seconds, TAKE_OVER_S + BATCH_S, "until all that waited at the kill were answered")
                return Round(ledger, bit, seconds)

            await trial.repeat(once)
            assert await here.dead_letters() == []
            deaths = max(run.deaths for run in here.journal.runs())
            assert deaths <= 1, "a job that one kill has hit counts as if more had"


async def test_02_all_consumers_are_killed(site: Sites, trial: Trial) -> None:
    """All consumers are killed, and new ones come 10 s later."""
    async with site(consumers=2) as here:
        with trial.on(here):

            async def once() -> Round:
                async with here.load().running() as ledger:
                    await asyncio.sleep(0.5)
                    bits = [await here.kill_holding(victim) for victim in list(here.fleet)]
                    killed_s = time.monotonic()
                    await asyncio.sleep(5)
                    (late,) = await ask_all(here.api[0].port, [here.mixture.one()], ledger, here.timeout_s)
                    assert late.status == 503, f"nobody lives, and still: {late}"
                    await asyncio.sleep(5)
                    for _ in range(2):
                        here.start_consumer()
                    await here.ready()
                    back_s = time.monotonic()
                    await asyncio.sleep(1)
                    seconds = max(0.0, ledger.settled_after_s(killed_s) - (back_s - killed_s))
                trial.recovered(seconds, TAKE_OVER_S + BATCH_S, "until all that waited at the kill were answered")
                return Round(ledger, any(bits), seconds)

            await trial.repeat(once)
            assert await here.dead_letters() == []


async def test_09_a_consumer_stands_still(site: Sites, trial: Trial) -> None:
    """A consumer stands still (SIGSTOP) for 10 s with work in hand, then goes on."""
    async with site(consumers=2) as here:
        with trial.on(here):

            async def once() -> Round:
                async with here.load().running() as ledger:
                    await asyncio.sleep(0.5)
                    victim = here.random.choice(here.fleet)
                    bit = await here.stop_holding(victim)
                    stopped_s = time.monotonic()
                    await asyncio.sleep(10)
                    seconds = ledger.settled_after_s(stopped_s)
                    victim.send(signal.SIGCONT)
                    await asyncio.sleep(2)
                trial.recovered(seconds, TAKE_OVER_S + BATCH_S, "until all that waited at the stop were answered")
                return Round(ledger, bit, seconds)

            await trial.repeat(once)
            assert await here.dead_letters() == []


async def test_13_consumers_are_replaced(site: Sites, trial: Trial) -> None:
    """Rolling restart: every consumer is replaced and ended (SIGTERM) under load."""
    async with site(consumers=2) as here:
        with trial.on(here):

            async def once() -> Round:
                bits = []
                slowest_s = 0.0
                async with here.load().running() as ledger:
                    for old in list(here.fleet):
                        new = here.start_consumer()
                        while new.name not in await here.live():
                            await asyncio.sleep(0.1)
                        bits.append(await here.stop_holding(old))
                        here.fleet.remove(old)
                        told_s = time.monotonic()
                        old.send(signal.SIGTERM)
                        old.send(signal.SIGCONT)
                        code = await asyncio.to_thread(old.wait, 20)
                        slowest_s = max(slowest_s, time.monotonic() - told_s)
                        assert code == 0, f"{old.name} ended with {code}"
                    await asyncio.sleep(0.5)
                bad = [line for line in ledger.lines if line.outcome is not Outcome.OK]
                assert not bad, f"{len(bad)} requests were not answered: {bad[0]}"
                return Round(ledger, any(bits), slowest_s)

            await trial.repeat(once)
            again, rows = here.journal.duplicates()
            assert again == 0, f"{again} of {rows} rows ran twice"


async def test_18_the_first_consumer_comes_late(site: Sites, trial: Trial) -> None:
    """No consumer has ever been there (--scale-from-zero-s 60); the first comes 10 s after the request."""

    async def once() -> Round:
        settings = {"SCALE_FROM_ZERO_S": 60, "SERVED_MODEL_NAME": "toy"}
        async with site(consumers=0, timeout_s=60, settings=settings) as here:
            with trial.on(here):
                ledger = Ledger()
                await here.listening()
                asked = replace(here.mixture.one(n_inputs=3), form=Form.TEXTS_AND_BYTES)
                waiting = asyncio.create_task(ask_all(here.api[0].port, [asked], ledger, here.timeout_s))
                await asyncio.sleep(10)
                bit = ledger.lines[0].outcome is None and await here.queued() == 1
                here.start_consumer()
                await here.ready()
                back_s = time.monotonic()
                (line,) = await waiting
                assert line.outcome is Outcome.OK, str(line)
                return Round(ledger, bit, max(0.0, line.sent_s + line.wait_s - back_s))

    await trial.repeat(once)
