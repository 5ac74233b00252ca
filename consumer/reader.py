"""Greedy reads from the lanes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared.connections import (
    BLOCK_MS,
    after_failure,
    backoff_s,
    create_group,
    is_missing_group,
)
from embedstream.shared.jobs import MAX_BODY_BYTES
from embedstream.shared.keys import GROUP, Keys
from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.logs import get_logger, told

from .entries import RawEntry

MAX_READ_BYTES = 8 * 1024 * 1024
"""What one read should bring at most: a larger reply on a busy loop runs into the read's timeout."""
MIN_COUNT = MAX_READ_BYTES // MAX_BODY_BYTES // len(LANES)
MAX_COUNT = 512
FIRST_COUNT = 4
"""Entries taken of a lane that was quiet; then at most twice what the last read brought: how large the next are, nobody
knows."""

log = get_logger()


class LaneReader:
    """Reads entries for one consumer; from here each is under its lease.

    Args:
        redis: client of one connection, used by nobody else.
        keys: of the model.
        consumer: name in the group.
    """

    def __init__(self, redis: Redis, keys: Keys, consumer: str) -> None:
        self._redis = redis
        self._keys = keys
        self._consumer = consumer
        self._lane_of = {keys.lane(lane).encode(): lane for lane in LANES}
        self._largest = float(MAX_BODY_BYTES)
        self._caps = dict.fromkeys(LANES, FIRST_COUNT)
        self._pauses = backoff_s()

    async def prepare(self) -> None:
        """Create both lanes and their groups where they are missing."""
        for lane in LANES:
            await create_group(self._redis, self._keys.lane(lane), GROUP)

    @property
    def most(self) -> int:
        """Entries of one lane that one read may bring, from the size of those read lately."""
        return int(min(MAX_COUNT, max(MIN_COUNT, MAX_READ_BYTES / len(LANES) / self._largest)))

    async def wait(self, lanes: Iterable[Lane], count: int, block_ms: int = BLOCK_MS) -> list[RawEntry]:
        """Up to so many entries of each of some lanes as soon as there are any; after a while without, an empty list.

        Args:
            lanes: at least one.
            count: at least 1.
            block_ms: the longest wait.
        """
        try:
            streams: dict[Any, Any] = {self._keys.lane(lane): ">" for lane in lanes}
            most = min(count, self.most, FIRST_COUNT)  # a lane that had to be waited for was quiet
            reply: Any = await self._redis.xreadgroup(GROUP, self._consumer, streams, most, block_ms)
        except (RedisError, OSError) as error:
            await self._recover(error)
            return []
        return self._entries(reply)

    async def take(self, counts: dict[Lane, int]) -> list[RawEntry]:
        """Up to so many entries of each lane, without waiting."""
        wanted = {lane: min(count, self.most, self._caps[lane]) for lane, count in counts.items() if count > 0}
        if not wanted:
            return []
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for lane, count in wanted.items():
                    pipe.xreadgroup(GROUP, self._consumer, {self._keys.lane(lane): ">"}, count)
                replies: list[Any] = await pipe.execute(raise_on_error=False)
        except (RedisError, OSError) as error:
            await self._recover(error)
            return []
        # What one lane gave is under our lease, even when the other lane has lost its group.
        entries = []
        for lane, reply in zip(wanted, replies, strict=True):
            if not isinstance(reply, Exception):
                some = self._entries(reply)
                self._caps[lane] = max(FIRST_COUNT, 2 * len(some))
                entries += some
        failed = next((reply for reply in replies if isinstance(reply, Exception)), None)
        if failed is not None:
            await self._recover(failed, at_once=bool(entries))  # what there is must not lie about meanwhile
        return entries

    async def _recover(self, error: Exception, *, at_once: bool = False) -> None:
        """Log and pause: a failed read reads as nothing, and the loop never ends on it."""
        log.warning("reader.failed", error=told(error))
        await after_failure(self._redis, error)
        if not at_once:
            await asyncio.sleep(next(self._pauses))
        if is_missing_group(error):
            try:
                await self.prepare()
            except (RedisError, OSError) as second:
                log.warning("reader.no_group", error=told(second))

    def _entries(self, reply: Any) -> list[RawEntry]:
        self._pauses = backoff_s()
        entries = [
            RawEntry(self._lane_of[stream], entry_id, fields)
            for stream, items in reply or ()
            for entry_id, fields in items
            if fields is not None
        ]
        self._observe(entries)
        return entries

    def _observe(self, entries: list[RawEntry]) -> None:
        if not entries:
            return
        # Falls slowly and rises at once, so that one large entry makes the next reads careful.
        self._largest = max(self._largest * 0.9, 256.0)
        for entry in entries:
            self._largest = max(self._largest, sum(map(len, entry.fields.values())))
