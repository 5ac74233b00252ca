"""Two lanes that want more than there is, and a flood."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from embedstream.producer import EmbedstreamError, Producer
from embedstream.shared.lanes import Lane
from embedstream.shared.settings import Settings

from . import fairness, toy
from .deployment import Deployment, Device, Sites
from .ledger import Ledger, Line, Outcome
from .load import ask_all
from .trial import Round, Trial

pytestmark = pytest.mark.chaos


@asynccontextmanager
async def bulk_saturated(here: Deployment) -> AsyncIterator[list[bool]]:
    """More bulk work than the device can do, all the while; yields whether each finished call got its vectors."""
    right: list[bool] = []
    stopping = asyncio.Event()

    async def keep_asking(producer: Producer) -> None:
        while not stopping.is_set():
            inputs = here.mixture.one(256).inputs
            try:
                vectors = await producer.embed(list(inputs), lane=Lane.BULK, timeout_s=120)
            except EmbedstreamError:
                await asyncio.sleep(0.5)  # refused: there is enough on the lane
            else:
                right.append(np.array_equal(vectors, toy.expected(inputs)))

    async with Producer(here.server.url, model=toy.MODEL, settings=Settings(reconcile_after_s=30)) as producer:
        tasks = [asyncio.create_task(keep_asking(producer)) for _ in range(6)]
        await asyncio.sleep(1.5)
        try:
            yield right
        finally:
            stopping.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_16_bulk_does_not_delay_interactive(site: Sites, trial: Trial) -> None:
    """The bulk lane is never empty, and interactive requests trickle in; recovery is what their p99 grew by."""
    device = Device(base_ms=10, tokens_per_s=20_000)  # a full batch takes 0.2 s, four slices
    async with site(consumers=1, device=device) as here:
        with trial.on(here):

            async def once() -> Round:
                idle_s = fairness.p99_s(await fairness.trickle(here))
                async with bulk_saturated(here) as right:
                    begun = len(here.journal.batches())
                    ledger = await fairness.trickle(here)
                    batches = here.journal.batches()[begun:]
                assert all(right), "wrong vectors on the bulk lane"
                grown_s = fairness.p99_s(ledger) - idle_s
                most_s = fairness.bound_s(batches, device)
                trial.recovered(grown_s, most_s, "what the p99 of interactive requests grew by")
                return Round(ledger, sum(batch.has(Lane.BULK) for batch in batches) > 20, grown_s)

            await trial.repeat(once)


async def test_16b_bulk_gets_its_share(site: Sites, trial: Trial) -> None:
    """Both lanes are never empty: bulk gets at least 10 % of the tokens."""
    device = Device(base_ms=5, tokens_per_s=20_000, budget=1024)
    async with site(consumers=1, device=device) as here:
        with trial.on(here):

            async def once() -> Round:
                async with (
                    bulk_saturated(here) as right,
                    here.load(make=lambda: here.mixture.one(24), clients=16, think_s=0.0).running() as ledger,
                ):
                    await asyncio.sleep(1)
                    begun = len(here.journal.batches())
                    await asyncio.sleep(4)
                    batches = here.journal.batches()[begun:]
                    bit = await here.queued() > 0
                rows = [run.lane for batch in batches for run in batch.runs]
                share = rows.count(Lane.BULK) / len(rows)  # of rows, that is of tokens: both lanes have like rows
                assert all(right), "wrong vectors on the bulk lane"
                assert share >= 0.095, f"bulk got {share:.1%}"
                return Round(ledger, bit)

            await trial.repeat(once)


async def test_17_a_flood(site: Sites, trial: Trial) -> None:
    """A flood at five times the capacity; Retry-After is within 50 % of the wait that others have then."""
    rate = 12_000.0
    device = Device(base_ms=2, tokens_per_s=rate, budget=2048)
    async with site(consumers=1, device=device) as here:
        with trial.on(here):
            await _warm(here)

            async def once() -> Round:
                ledger = await _flood(here, 5 * rate, for_s=13)
                peak, limit = await _memory(here)
                assert peak < 0.7 * limit, f"{peak:,} of {limit:,} bytes were used"
                _check_retry_after(ledger)
                return Round(ledger, ledger.count(Outcome.REFUSED) > 50)

            await trial.repeat(once)


async def _warm(here: Deployment) -> None:
    """Let the fleet learn how fast it is, and the API hear of it."""
    async with here.load(clients=16, think_s=0.0).running():
        await asyncio.sleep(4)


async def _flood(here: Deployment, tokens_per_s: float, for_s: float) -> Ledger:
    """Requests at a rate of tokens, whatever becomes of them, each on its own connection; all ends are awaited."""
    ledger, asking = Ledger(), []
    started_s, sent = time.monotonic(), 0
    while (passed_s := time.monotonic() - started_s) < for_s:
        while sent < tokens_per_s * passed_s:
            asked = here.mixture.one(64)
            sent += asked.tokens
            asking.append(asyncio.create_task(ask_all(here.api[0].port, [asked], ledger, here.timeout_s)))
        await asyncio.sleep(0.01)
    await asyncio.gather(*asking)
    return ledger


def _check_retry_after(ledger: Ledger) -> None:
    """A refused client is told about the wait that those who were accepted at that time had."""
    accepted = ledger.of(Outcome.OK)
    worst: tuple[float, Line, float] | None = None
    for line in ledger.of(Outcome.REFUSED):
        near = sorted(accepted, key=lambda other: abs(other.sent_s - line.sent_s))[:5]
        true_s = float(np.median([other.wait_s for other in near]))
        error = abs(line.retry_after_s - true_s) / true_s
        if worst is None or error > worst[0]:
            worst = (error, line, true_s)
    assert worst is not None
    assert worst[0] <= 0.5, f"Retry-After was {worst[1].retry_after_s:g} s, the wait {worst[2]:.1f} s: {worst[1]}"


async def _memory(here: Deployment) -> tuple[int, int]:
    """Most bytes Redis has used, and its limit."""
    memory = await here.call("INFO", "memory")
    return int(memory["used_memory_peak"]), int(memory["maxmemory"])
