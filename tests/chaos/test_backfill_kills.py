"""Backfills whose processes, consumers and Redis are killed: every row comes out once, and right."""

from __future__ import annotations

import asyncio
import random
import signal
from datetime import date
from pathlib import Path

import pytest

from . import corpus
from .backfills import PER_KILL_ROWS, Backfill
from .deployment import Deployment, Device, Sites
from .processes import Process
from .trial import Broken
from .trial_of_backfill import BackfillTrial

pytestmark = pytest.mark.chaos

ROWS = 20_000
SLOW = Device(base_ms=20, tokens_per_s=8_000, budget=2048)
"""A part takes such a device about 0.7 s, so that a kill falls into the middle of something."""
FAST = Device(base_ms=5, tokens_per_s=200_000)
DAILY = ".jsonl*"
"""The job whose moments are others each day; the note of a failure says which."""
KILLS = ["backfill"] * 4 + ["consumer", "redis"] * 2 + ["tokenizer", "backfill and redis"]


class Round:
    """Kills one thing after the other under a backfill, and starts it again.

    Args:
        job: the backfill.
        process: of it, running.
        chosen: of the moments.
    """

    def __init__(self, job: Backfill, process: Process, chosen: random.Random) -> None:
        self._job = job
        self._here: Deployment = job.here
        self.process = process
        self._random = chosen
        self.died = 0

    async def kill(self, what: str) -> None:
        """Wait for some progress and a moment, and kill."""
        await self._job.until_progress(self.process)
        await asyncio.sleep(self._random.uniform(0, 1))
        self._check_that_it_runs()
        for one in what.split(" and "):
            await {
                "backfill": self._backfill,
                "consumer": self._consumer,
                "redis": self._redis,
                "tokenizer": self._tokenizer,
            }[one]()

    def _check_that_it_runs(self) -> None:
        if self.process.code is not None:
            raise Broken(f"the backfill ended with {self.process.code} before all kills were done")

    async def _backfill(self) -> None:
        self.process.send(signal.SIGKILL)  # it alone: what it started must see to its own end
        await asyncio.to_thread(self.process.wait, 10)
        self.died += 1
        self.process = self._job.start()

    async def _consumer(self) -> None:
        victim = self._random.choice(self._here.fleet)
        victim.end()
        self._here.fleet.remove(victim)
        self._here.start_consumer()

    async def _redis(self) -> None:
        self._here.server.kill()
        await asyncio.sleep(self._random.uniform(0, 1))
        await self._here.server.start()

    async def _tokenizer(self) -> None:
        while not self._job.kill_tokenizer(self.process, self._random):
            self._check_that_it_runs()
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("suffix", "out"),
    [
        pytest.param(".parquet", "out", id="parquet-to-folder"),
        pytest.param(".parquet", "out.parquet", id="parquet-to-file"),
        pytest.param(".jsonl", "out", id="jsonl-to-folder"),
        pytest.param(DAILY, "out", id="mixed-to-folder"),
        pytest.param(".jsonl.gz", "out.parquet", id="gzip-to-file"),
    ],
)
async def test_21_kills(
    site: Sites, backfill_trial: BackfillTrial, tmp_path: Path, seed: int, suffix: str, out: str
) -> None:
    """Ten kills at random moments: the backfill itself, a consumer, Redis (AOF everysec), a tokeniser, two at once."""
    if suffix == DAILY:
        seed += date.today().toordinal()
    chosen = random.Random(seed)
    made = corpus.make(tmp_path / "in", seed, ROWS, corpus.Kind(suffix))
    order = chosen.sample(KILLS, len(KILLS))
    async with site(consumers=2, apis=0, device=SLOW) as here:
        job = Backfill(here, made, tmp_path / out)
        with backfill_trial.on(job, f"{date.today()}, {seed}: {order}"):
            rounds = Round(job, job.start(), chosen)
            for what in order:
                await rounds.kill(what)
            here.start_consumer(FAST)
            await job.until_complete(rounds.process)
            job.check()
            await job.check_processes()
            again, most = job.computed_again(), rounds.died * PER_KILL_ROWS
            if again > most:
                raise Broken(f"{again} rows computed again after {rounds.died} kills of the backfill, at most {most}")
            backfill_trial.done(job, kills=len(order))
