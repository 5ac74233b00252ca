"""The reply reader: one blocking read for all requests of this process.

Consumers write result parts to this process's own stream. Reading resumes after the last entry seen, so a dropped
connection loses nothing; what was read is trimmed with the next read. When the stream is lost, or an older copy of it
takes its place, reading begins anew: ids of the two cannot be compared.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared import metrics, results
from embedstream.shared.connections import BLOCK_MS, Script, after_failure, backoff_s, pause
from embedstream.shared.errors import MalformedResult
from embedstream.shared.keys import FIELD_PARTS, GROUP, Keys
from embedstream.shared.lanes import LANES
from embedstream.shared.logs import get_logger, told

from .pending import PendingRequest

READ_COUNT = 8
"""Entries of one read: at most 1 MiB each, so at most 8 MiB, which arrives well within the read's timeout."""

log = get_logger()
_SCRIPT = Script("embedstream.producer", "reply_stream.lua")


class Replies:
    """Reads the reply stream and hands each part to its request.

    Args:
        redis: client for short commands.
        reader: client of one connection for the blocking reads.
        keys: of the model.
        instance: names the reply stream among those of the model.
        ttl_s: seconds the stream outlives its reader.
        lost_contact: set when a read failed, for the reconciler.
    """

    def __init__(
        self, redis: Redis, reader: Redis, keys: Keys, instance: str, ttl_s: int, lost_contact: asyncio.Event
    ) -> None:
        self._redis = redis
        self._reader = reader
        self._stream = keys.reply(instance)
        self._lanes = [keys.lane(lane) for lane in LANES]
        self._ttl_ms = ttl_s * 1000
        self._last = b"0"
        self._renewals = 0  # how often reading has begun anew
        self._lost_contact = lost_contact
        self.requests: dict[bytes, PendingRequest] = {}

    async def keep_alive(self) -> bool:
        """Renew the stream's expiry; create it, and the lanes, where they are gone.

        Returns:
            Whether the stream had to be created: then the answers that consumers wrote meanwhile are lost.
        """
        seen = self._last
        created, newest = await _SCRIPT.run(self._redis, [self._stream, *self._lanes], [self._ttl_ms, GROUP])
        if created or _order(newest) < _order(seen):
            # Gone, or older than what was read: a replica that lagged has taken over. All that is there is news.
            self._last = b"0"
            self._renewals += 1
        return bool(created)

    async def wake(self) -> None:
        """End the blocking read that is under way, by an entry without parts."""
        with suppress(RedisError, OSError):  # then the read fails too, or ends within its second
            await self._redis.xadd(self._stream, {FIELD_PARTS: b""}, nomkstream=True)

    async def drop(self) -> None:
        """Remove the stream and let the reader's connection go: nobody reads any more."""
        with suppress(RedisError, OSError):  # then it expires by itself
            await self._redis.delete(self._stream)
        await self._reader.aclose()

    async def run(self, stopping: asyncio.Event) -> None:
        """Read until `stopping` is set."""
        pauses = backoff_s()
        while not stopping.is_set():
            try:
                await self._read(BLOCK_MS)
                pauses = backoff_s()
            except (RedisError, OSError) as error:
                log.warning("replies.read_failed", error=told(error))
                self._lost_contact.set()
                await after_failure(self._reader, error)
                await pause(next(pauses), stopping)
            except Exception:  # a defect; it must not deafen the process
                log.exception("replies.failed")
                await pause(next(pauses), stopping)

    async def _read(self, block_ms: int) -> None:
        renewals = self._renewals
        async with self._reader.pipeline(transaction=False) as pipe:
            pipe.xtrim(self._stream, minid=_following(self._last), approximate=False)
            pipe.xread({self._stream: self._last}, READ_COUNT, block_ms)
            _, reply = await pipe.execute()
        self._take(reply, renewals)

    async def drain(self) -> None:
        """Take in everything that is on the stream now, beside the blocking read."""
        while True:
            renewals = self._renewals
            if not self._take(await self._redis.xread({self._stream: self._last}, READ_COUNT), renewals):
                return

    def _take(self, reply: list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]] | Any, renewals: int) -> int:
        """Hand on what a read brought, and tell how many entries.

        Two reads may be under way at one time, and bring the same entries. One that began before the last renewal
        brings entries of either stream: their parts count, but where reading goes on from is not theirs to say.
        """
        count = 0
        for _, entries in reply or ():
            for entry_id, fields in entries:
                current = renewals == self._renewals
                if not current or _order(entry_id) > _order(self._last):
                    self._dispatch(fields.get(FIELD_PARTS, b""))
                if current:
                    self._last = max(self._last, entry_id, key=_order)
                count += 1
        return count

    def _dispatch(self, data: bytes) -> None:
        parts = results.unframe(data)
        while True:
            try:
                part = results.decode(next(parts))
            except StopIteration:
                return
            except MalformedResult as error:  # reconciling asks again for what it was to answer
                log.error("replies.malformed", error=str(error), bytes=len(data))
                continue
            request = self.requests.get(part.request_id)
            if request is None:  # it has ended: a second answer, or its caller has gone
                metrics.DUPLICATES.inc()
            else:
                request.add(part)


def _order(entry_id: bytes) -> tuple[int, int]:
    """A stream id as numbers."""
    milliseconds, _, sequence = entry_id.partition(b"-")
    return int(milliseconds), int(sequence or 0)


def _following(entry_id: bytes) -> str:
    """The smallest stream id after this one."""
    milliseconds, sequence = _order(entry_id)
    return f"{milliseconds}-{sequence + 1}"
