"""Backfills that share their work among processes, and the fleet with interactive requests."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from embedstream.producer import Producer
from embedstream.producer.credit import FLOOR_TOKENS, REQUEST_TOKENS
from embedstream.shared import jobs
from embedstream.shared.errors import Overloaded
from embedstream.shared.keys import FIELD_BODY, FIELD_HEADER
from embedstream.shared.lanes import Lane
from embedstream.shared.settings import Settings

from . import corpus, fairness, toy
from .backfills import PER_KILL_ROWS, Backfill
from .deployment import KEYS, Deployment, Device, Sites
from .processes import Process
from .trial import Broken, check
from .trial_of_backfill import BackfillTrial

pytestmark = pytest.mark.chaos

PLAIN = corpus.Kind(repeated=0, bad=0)
"""Each text once: what is computed twice, somebody did twice."""
RATE = 60_000
"""Tokens a second of the device of a busy fleet."""
FEW_TOKENS = FLOOR_TOKENS + REQUEST_TOKENS
"""Of a backfill on the queue beside a fleet that has no time for it; an idle one of `RATE` makes it send more."""
ADAPTED_S = 60.0
"""What was sent before has to be done, at a tenth of the rate."""
ROUNDS = 3
"""The best of them counts: in the others the test may not have had the processor to ask for all the device can do."""
SHARE = 0.095
"""Of the rows, that is of the tokens: a tenth is promised to bulk work, and the last batch is cut off."""


async def test_22_two_processes_and_interactive_load(
    site: Sites, backfill_trial: BackfillTrial, tmp_path: Path, seed: int
) -> None:
    """Two processes share one output file, and interactive requests trickle in: they wait for a slice at most."""
    made = corpus.make(tmp_path / "in", seed, 16_000, PLAIN)
    device = Device(base_ms=10, tokens_per_s=20_000)  # a full batch takes 0.2 s, four slices
    async with site(consumers=1, device=device) as here:
        job = Backfill(here, made, tmp_path / "out.parquet")
        with backfill_trial.on(job):
            idle_s = fairness.p99_s(await fairness.trickle(here))
            both = [job.start(), job.start()]
            await _until_both_work(job)
            begun = len(here.journal.batches())
            ledger = await fairness.trickle(here, lambda: any(process.code is None for process in both))
            batches = here.journal.batches()[begun:]
            await job.until_complete(*both)
            job.check()
            check(ledger)
            grown_s, most_s = fairness.p99_s(ledger) - idle_s, fairness.bound_s(batches, device)
            if grown_s > most_s:
                raise Broken(f"the p99 of interactive requests grew by {grown_s:.3f} s, at most {most_s:.3f} s")
            if again := job.computed_again():
                raise Broken(f"{again} rows were computed by both")
            backfill_trial.done(job)


async def _until_both_work(job: Backfill) -> None:
    """Wait until each process has committed a part."""
    while not all(job.parts_of(process) for process in job.started):
        for process in job.started:
            if process.code is not None:
                raise Broken(f"{process.name} ended with {process.code} before both had begun\n{process.log_tail()}")
        await asyncio.sleep(0.1)


async def test_23_one_of_two_is_killed(site: Sites, backfill_trial: BackfillTrial, tmp_path: Path, seed: int) -> None:
    """Two processes share one output, and one of them is killed (SIGKILL): the other does the rest."""
    made, chosen = corpus.make(tmp_path / "in", seed, 12_000, PLAIN), random.Random(seed)
    async with site(consumers=1, apis=0, device=Device(tokens_per_s=20_000)) as here:
        job = Backfill(here, made, tmp_path / "out")
        with backfill_trial.on(job):
            both = [job.start(), job.start()]
            await _until_both_work(job)
            await asyncio.sleep(chosen.uniform(0, 1))
            victim, heir = chosen.sample(both, 2)
            victim.send(signal.SIGKILL)
            await job.until_complete(heir)
            job.check()
            await job.check_processes()
            again = job.computed_again()
            if again > PER_KILL_ROWS:
                raise Broken(f"{again} rows computed again, at most {PER_KILL_ROWS} were under way at the kill")
            backfill_trial.done(job, kills=1)


async def test_24_a_busy_fleet(site: Sites, backfill_trial: BackfillTrial, tmp_path: Path, seed: int) -> None:
    """Interactive requests take all they can get for a while: what waits of a backfill shrinks, and grows again."""
    made = corpus.make(tmp_path / "in", seed, 4_000, corpus.Kind(repeated=0, bad=0, tokens=(100, 200)))
    device = Device(base_ms=5, tokens_per_s=RATE, budget=2048)
    async with site(consumers=1, apis=0, device=device) as here:
        job = Backfill(here, made, tmp_path / "out")
        with backfill_trial.on(job):
            process = job.start()
            before = await _most_waiting(here, process, until=lambda most: most > FEW_TOKENS)
            async with _interactive_saturated(here):
                for _ in range(ROUNDS):
                    await _until_few_wait(here)
                    begun = len(here.journal.batches())
                    during = await _most_waiting(here, process, for_s=4)
                    batches = here.journal.batches()[begun:]
                    if during <= FEW_TOKENS:
                        break
            await _most_waiting(here, process, until=lambda most: most > FEW_TOKENS)
            await job.until_complete(process)
            job.check()
            tokens = [(run.lane, batch.tokens / len(batch.runs)) for batch in batches for run in batch.runs]
            share = sum(count for lane, count in tokens if lane == Lane.BULK) / sum(count for _, count in tokens)
            if during > FEW_TOKENS:
                raise Broken(f"{during:,} tokens waited beside a busy fleet, and {before:,} before it was")
            if share < SHARE:
                raise Broken(f"the backfill got {share:.1%} of the device")
            backfill_trial.done(job)


async def _most_waiting(
    here: Deployment,
    process: Process,
    *,
    for_s: float = 60.0,
    until: Callable[[int], bool] | None = None,
) -> int:
    """The most tokens of bulk work on the queue, over a time, or until it is as wanted."""
    most, deadline_s = 0, time.monotonic() + for_s
    while time.monotonic() < deadline_s:
        if process.code is not None:
            raise Broken(f"the backfill ended with {process.code} too early; {most:,} tokens waited at most")
        most = max(most, await _waiting(here))
        if until is not None and until(most):
            return most
        await asyncio.sleep(0.1)
    if until is not None:
        raise Broken(f"no more than {most:,} tokens waited within {for_s:g} s")
    return most


async def _until_few_wait(here: Deployment) -> None:
    deadline_s = time.monotonic() + ADAPTED_S
    while (waiting := await _waiting(here)) > FEW_TOKENS:
        if time.monotonic() > deadline_s:
            raise Broken(f"{waiting:,} tokens wait beside a fleet that has been busy for {ADAPTED_S:g} s")
        await asyncio.sleep(0.1)


async def _waiting(here: Deployment) -> int:
    """Tokens of bulk work on the queue."""
    entries = await here.call("XRANGE", KEYS.lane(Lane.BULK), "-", "+")
    return sum(jobs.decode(fields[FIELD_HEADER], fields[FIELD_BODY]).n_tokens for _, fields in entries)


@asynccontextmanager
async def _interactive_saturated(here: Deployment) -> AsyncIterator[None]:
    """More interactive work than the device can do, all the while."""
    stopping = asyncio.Event()

    async def keep_asking(producer: Producer) -> None:
        while not stopping.is_set():
            inputs = here.mixture.one(256).inputs
            with suppress(Overloaded):
                vectors = await producer.embed(list(inputs), timeout_s=60)
                if not np.array_equal(vectors, toy.expected(inputs)):
                    raise Broken("wrong vectors on the interactive lane")

    async with (
        Producer(here.server.url, model=toy.MODEL, settings=Settings()) as producer,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(8):
            group.create_task(keep_asking(producer))
        try:
            yield
        finally:
            stopping.set()
