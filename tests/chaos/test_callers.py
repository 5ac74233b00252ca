"""API processes that die, and clients that hang up."""

from __future__ import annotations

import asyncio
import time

import pytest

from .deployment import KEYS, Deployment, Device, Sites
from .http import Client
from .ledger import Ledger, Outcome
from .load import ask, ask_all
from .requests import Asked
from .trial import Round, Trial, check

pytestmark = pytest.mark.chaos

REPLY_TTL_S = 5


async def test_14_an_api_is_killed(site: Sites, trial: Trial) -> None:
    """One of two API processes is killed; its own clients are not counted."""
    async with site(apis=2, settings={"REPLY_TTL_S": REPLY_TTL_S}) as here:
        with trial.on(here):
            for api in here.api:  # each makes its reply stream with the first request
                check_all = Ledger()
                await ask_all(api.port, [here.mixture.one()], check_all, here.timeout_s)
                check(check_all)
            keys_before = len(await here.keys())

            async def once() -> Round:
                victim, other = here.api
                async with (
                    here.load(ports=[victim.port], clients=4).running() as of_victim,
                    here.load(ports=[other.port], clients=4).running() as ledger,
                ):
                    await asyncio.sleep(0.7)
                    streams = {key for key in await here.keys() if key.startswith(KEYS.reply(""))}
                    killed_s = time.monotonic()
                    bit = bool(of_victim.under_way(killed_s))
                    victim.process.end()
                    seconds = await _until_streams(here, len(streams) - 1, REPLY_TTL_S + 2.0) - killed_s
                    here.api.remove(victim)
                    here.start_api(victim.port)
                    await here.ready()
                    await asyncio.sleep(0.7)
                assert not of_victim.of(Outcome.WRONG, Outcome.HUNG), "the clients of the dead process"
                assert len(await here.keys()) == keys_before, await here.keys()
                return Round(ledger, bit, seconds)

            await trial.repeat(once)


async def _until_streams(here: Deployment, count: int, within_s: float) -> float:
    """When there are only so many reply streams left, on the monotonic clock."""
    deadline_s = time.monotonic() + within_s
    while len([key for key in await here.keys() if key.startswith(KEYS.reply(""))]) > count:
        assert time.monotonic() < deadline_s, f"the reply stream of a dead process is there after {within_s:g} s"
        await asyncio.sleep(0.1)
    return time.monotonic()


async def test_15_clients_hang_up(site: Sites, trial: Trial) -> None:
    """Half of 240 waiting clients hang up."""
    async with site(consumers=1, device=Device(base_ms=100, budget=128)) as here:
        with trial.on(here):
            first = Ledger()
            await ask_all(here.api[0].port, [here.mixture.one()], first, here.timeout_s)
            keys_before = await here.keys()

            async def once() -> Round:
                ledger, port = Ledger(), here.api[0].port
                many = [here.mixture.one(1) for _ in range(240)]
                asking = [asyncio.create_task(_ask(port, ledger, asked, here.timeout_s)) for asked in many]
                await asyncio.sleep(1)
                left = {asked.number for asked in many[::2]}
                for task in asking[::2]:
                    task.cancel()
                left_s = time.time()
                gone = [line for line in ledger.lines if line.asked.number in left and line.outcome is None]
                for line in gone:
                    ledger.end(line, Outcome.LEFT)
                await asyncio.gather(*asking, return_exceptions=True)
                numbers = {line.asked.number for line in gone}
                run_in_vain = [run for run in here.journal.runs() if run.number in numbers and run.at_s > left_s + 0.5]
                assert len(run_in_vain) <= 0.2 * len(gone), f"{len(run_in_vain)} of {len(gone)} ran for nobody"
                await _nothing_left(here, keys_before)
                return Round(ledger, len(gone) > 60)

            await trial.repeat(once)


async def _ask(port: int, ledger: Ledger, asked: Asked, timeout_s: float) -> None:
    client = Client(port)
    try:
        await ask(client, asked, ledger, timeout_s)
    finally:
        client.close()


async def _nothing_left(here: Deployment, keys_before: set[str]) -> None:
    deadline_s = time.monotonic() + 5
    while await here.queued():
        assert time.monotonic() < deadline_s, f"{await here.queued()} entries are left on the lanes"
        await asyncio.sleep(0.1)
    more = await here.keys() - keys_before - {KEYS.notices}
    assert not more, f"keys that were not there before: {more}"
    client = Client(here.api[0].port)
    shown = (await client.get("/metrics")).body.decode()
    client.close()
    (undelivered,) = [line for line in shown.splitlines() if line.startswith("embedstream_undelivered_bytes")]
    assert float(undelivered.split()[-1]) == 0, undelivered
