"""Reconcile: find requests that Redis has lost, and send them again.

A consumer writes the reply in the same transaction that deletes the job. So a job that is neither on its lane nor
answered is proof of a loss, whatever caused it: a lost reply to our XADD, FLUSHALL, a failover to a stale replica.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared.connections import Script, after_failure, pause
from embedstream.shared.errors import Unavailable
from embedstream.shared.keys import Keys
from embedstream.shared.logs import get_logger

from .enqueue import Writer
from .pending import PendingRequest, SentJob
from .replies import Replies

PERIOD_S = 1.0
GIVE_UP_S = 2.0
"""A request that was never accepted fails when Redis is away for this long."""
IDS_A_CALL = 1000

log = get_logger()
_SCRIPT = Script("embedstream.producer", "present.lua")


class Reconciler:
    """Looks after the requests of one process.

    Args:
        redis: client for short commands.
        keys: of the model.
        writer: sends lost jobs again.
        replies: holds the requests, and the stream they are answered on.
        after_s: age at which a request is looked for.
        lost_contact: set by the writer and the replies when a command failed: then look at once.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        writer: Writer,
        replies: Replies,
        after_s: float,
        lost_contact: asyncio.Event,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._writer = writer
        self._replies = replies
        self._after_s = after_s
        self._lost_contact = lost_contact
        self._down_since_s: float | None = None

    async def run(self, stopping: asyncio.Event) -> None:
        """Renew the reply stream and look after the requests, every second and at once when contact was lost."""
        while not stopping.is_set():
            await pause(PERIOD_S, self._lost_contact)
            lost_contact = self._lost_contact.is_set()
            self._lost_contact.clear()
            try:
                await self._replies.keep_alive()
                await self._check(at_once=lost_contact)
                self._down_since_s = None
            except (RedisError, OSError) as error:
                await self._redis_is_away(error)

    async def _redis_is_away(self, error: Exception) -> None:
        now = asyncio.get_running_loop().time()
        if self._down_since_s is None:
            self._down_since_s = now
            log.warning("reconcile.redis_away", error=repr(error))
        await after_failure(self._redis, error)
        if now - self._down_since_s >= GIVE_UP_S:
            for request in self._replies.requests.values():
                if not request.accepted:
                    request.fail(Unavailable("Redis cannot be reached.", retry_after_s=2.0))
        # Keep asking at once: contact is still lost, and the pause below keeps this from spinning.
        self._lost_contact.set()
        await asyncio.sleep(0.1)

    async def _check(self, *, at_once: bool) -> None:
        now = asyncio.get_running_loop().time()
        due: list[tuple[PendingRequest, SentJob]] = []
        for request in list(self._replies.requests.values()):
            if request.done or (not at_once and now < max(request.started_s + self._after_s, request.next_check_s)):
                continue
            request.next_check_s = now + self._after_s
            due += [(request, sent) for sent in request.outstanding() if not sent.queued]
        missing = await self._missing(due)
        if not missing:
            return
        # A reply may have come between the two looks; only what is on neither side is lost.
        await self._replies.drain()
        for request, sent in missing:
            remaining_ms = int((request.deadline_s - now) * 1000)
            if sent.done or request.done or remaining_ms <= 0:
                continue
            log.info("reconcile.sent_again", request=request.request_id.hex(), job=sent.job.index)
            sent.job, sent.entry_id = replace(sent.job, ttl_ms=remaining_ms), None
            self._writer.send(request, [sent], ask=not request.accepted)

    async def _missing(self, due: list[tuple[PendingRequest, SentJob]]) -> list[tuple[PendingRequest, SentJob]]:
        missing = [pair for pair in due if pair[1].entry_id is None]
        for lane in {pair[1].job.lane for pair in due}:
            known = [pair for pair in due if pair[1].entry_id is not None and pair[1].job.lane is lane]
            for start in range(0, len(known), IDS_A_CALL):
                some = known[start : start + IDS_A_CALL]
                ids = [pair[1].entry_id or b"" for pair in some]
                present = await _SCRIPT.run(self._redis, [self._keys.lane(lane)], ids)
                missing += [pair for pair, there in zip(some, present, strict=True) if not there]
        return missing
