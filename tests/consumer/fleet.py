"""A model's lanes from the side of a caller, and what makes devices fail, wait or die."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np
from redis.asyncio import Redis

from embedstream.consumer.batching import MicroBatch
from embedstream.consumer.worker import Worker
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.results import ResultPart

from .made import Device, answers, consumer, job_of, parts, pending, send, until, vectors

POISON = 666


class Fleet:
    """One model's lanes, from the side of a caller."""

    def __init__(self, redis: Redis, url: str, keys: Keys, tokenizer: str) -> None:
        self.redis, self.url, self.keys, self.tokenizer = redis, url, keys, tokenizer
        self.asked: dict[int, list[list[int]]] = {}
        self.poisoned = b""

    def consumer(self, device: Device, name: str = "c", **changes: Any) -> AbstractAsyncContextManager[Worker]:
        return consumer(self.url, self.keys, self.tokenizer, device, name, **changes)

    async def ask(
        self, number: int, inputs: Sequence[Sequence[int]], lane: Lane = Lane.INTERACTIVE, **of_job: Any
    ) -> bytes:
        self.asked[number] = [list(ids) for ids in inputs]
        return await send(self.redis, self.keys, job_of(self.tokenizer, inputs, number, **of_job), lane)

    async def answered(self, *but: int) -> dict[int, ResultPart]:
        """Wait for all answers; those that are not named must be right."""
        found = await answers(self.redis, self.keys, len(self.asked))
        for number, inputs in self.asked.items():
            if number not in but:
                np.testing.assert_array_equal(found[number].vectors, vectors(inputs))
        return found

    async def pending(self, lane: Lane = Lane.INTERACTIVE) -> dict[bytes, tuple[str, int]]:
        return await pending(self.redis, self.keys, lane)

    async def in_hand(self, least: int) -> bool:
        return sum([len(await self.pending(lane)) for lane in LANES]) >= least

    async def emptied(self) -> None:
        """Wait until nothing is left on any lane."""

        async def empty() -> bool:
            return not any([await self.redis.xlen(self.keys.lane(lane)) for lane in LANES])

        await until(empty)
        assert not await self.pending()

    async def dead_letters(self) -> list[dict[bytes, bytes]]:
        found: Any = await self.redis.xrange(self.keys.dead_letters)
        return [fields for _, fields in found]


class Hold:
    """Keeps the device's thread in a pass until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.held = threading.Event()

    def __call__(self, _: MicroBatch) -> None:
        self.held.set()
        assert self.go.wait(60)

    async def begun(self) -> None:
        async with asyncio.timeout(30):
            while not self.held.is_set():
                await asyncio.sleep(0.005)


def kills(batch: MicroBatch) -> None:
    """For a consumer, losing its device is to die: the process ends with what was on it."""
    if (batch.ids == POISON).any():
        raise RuntimeError("CUDA error: device-side assert triggered")


def fails(batch: MicroBatch) -> None:
    if (batch.ids == POISON).any():
        raise ValueError("a private text")


async def over(fleet: Fleet, worker: Worker, count: int) -> bool:
    return worker._stop.is_set() or len(await parts(fleet.redis, fleet.keys)) >= count


async def ended(worker: Worker) -> bool:
    return worker._stop.is_set()


async def steady(worker: Worker) -> bool:
    return worker._heartbeat.is_steady()


async def waits(worker: Worker, tokens: int) -> bool:
    """Whether so many tokens wait for the device."""
    return worker._device is not None and sum(worker._device.tokens(lane) for lane in LANES) >= tokens
