"""Inputs that kill consumers, inputs that fail, and batches too large for the device's memory."""

from __future__ import annotations

import asyncio
import time

import pytest

from . import toy
from .deployment import Deployment, Device, Sites
from .ledger import Ledger, Outcome
from .load import ask_all
from .requests import Mixture
from .trial import Broken, Round, Trial

pytestmark = pytest.mark.chaos

MOST_DEATHS = 4
MOST_TOKENS = 500


async def test_10_an_input_kills_consumers(site: Sites, trial: Trial) -> None:
    """One of 128 requests kills every consumer that runs it, in a batch with the others."""
    async with site(consumers=1, device=Device(base_ms=150), timeout_s=60) as here:
        with trial.on(here):
            await trial.repeat(lambda: _poisoned_batch(here, poisoned={64}))


async def _poisoned_batch(here: Deployment, poisoned: set[int]) -> Round:
    """128 requests of one input at once; consumers that die are replaced at once."""
    ledger = Ledger()
    before = len(await here.dead_letters())
    many = [here.mixture.one(1, (toy.KILL,) if place in poisoned else ()) for place in range(128)]
    numbers = {asked.number for asked in many if asked.poisoned}
    started_s = time.monotonic()
    async with here.restarting() as dead:
        lines = await ask_all(here.api[0].port, many, ledger, here.timeout_s)
        await here.ready()
    for line in lines:
        wanted = Outcome.FAILED if line.asked.poisoned else Outcome.OK
        if line.outcome is not wanted:
            raise Broken(f"{'the culprit' if line.asked.poisoned else 'a neighbour'}: {line}")
    letters = await here.dead_letters()
    assert len(letters) - before == len(poisoned), [letter[b"why"] for letter in letters[before:]]
    assert len(dead) <= MOST_DEATHS, f"{len(dead)} consumers died"
    crowds = [run.batch_rows for run in here.journal.runs() if run.number in numbers]
    return Round(ledger, max(crowds) > 32, time.monotonic() - started_s)


async def test_11_some_inputs_fail(site: Sites, trial: Trial) -> None:
    """One input in a hundred makes the pass raise."""
    async with site() as here:
        here.mixture = Mixture(here.seed, will=toy.FAIL, share=0.01)
        with trial.on(here):

            async def once() -> Round:
                async with here.load(clients=10, think_s=0.02).running() as ledger:
                    await asyncio.sleep(3)
                bad = [line for line in ledger.lines if (line.outcome is Outcome.FAILED) != line.asked.poisoned]
                if bad:
                    raise Broken(f"{len(bad)} requests ended as they should not, first: {bad[0]}")
                culprits = {line.asked.number for line in ledger.lines if line.asked.poisoned}
                crowds = [run.batch_rows for run in here.journal.runs() if run.number in culprits]
                return Round(ledger, max(crowds, default=0) > 1)

            await trial.repeat(once)


async def test_12_the_device_runs_out_of_memory(site: Sites, trial: Trial) -> None:
    """Batches of more than 500 tokens find too little memory on the device."""

    async def once() -> Round:
        async with site(device=Device(most_tokens=MOST_TOKENS)) as here:  # consumers that have not learned it yet
            with trial.on(here):
                async with here.load(clients=16, think_s=0.02).running() as ledger:
                    await asyncio.sleep(2)
                sizes = [batch.tokens for batch in here.journal.batches()]
                return Round(ledger, max(sizes) > MOST_TOKENS)

    await trial.repeat(once)
