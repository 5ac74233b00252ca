"""Reconcile: find requests that Redis has lost, and send them again.

A consumer writes the reply in the same transaction that deletes the job. So a job that is neither on its lane nor
answered is proof of a loss, whatever caused it: a lost reply to our XADD, FLUSHALL, a failover to a stale replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

from redis.asyncio import Redis
from redis.exceptions import RedisError

from embedstream.shared import metrics
from embedstream.shared.connections import Script, after_failure, pause
from embedstream.shared.errors import Unavailable
from embedstream.shared.keys import Keys
from embedstream.shared.lanes import LANES
from embedstream.shared.logs import get_logger, told

from .admission import Admission
from .enqueue import Writer
from .pending import PendingRequest, SentJob
from .replies import Replies

PERIOD_S = 1.0
LEAST_PERIOD_S = 0.1
"""Between two looks while contact is lost, or is lost again and again."""
GIVE_UP_S = 2.1
"""A request that was not accepted within this time fails when Redis is silent."""
SILENT_S = 1.5
"""Redis is silent when the last look or call that it answered began as long ago; a look begins every second."""
WATCH_S = 0.1
IDS_A_CALL = 1000
BYTES_A_CALL = 8 * 1024 * 1024
"""Of the bodies of the jobs looked for in one call: the script must read them to see that they are there."""

log = get_logger()
_SCRIPT = Script("embedstream.producer", "present.lua")

Sent = tuple[PendingRequest, SentJob]


class Reconciler:
    """Looks after the requests of one process.

    Args:
        redis: client for short commands.
        keys: of the model.
        writer: sends lost jobs again; it is opened when the reply stream is there.
        replies: holds the requests, and the stream they are answered on.
        admission: predicts how long a job may well take.
        after_s: least age at which a request is looked for.
        lost_contact: set by whoever saw a command fail: then all requests are looked for at once.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        writer: Writer,
        replies: Replies,
        admission: Admission,
        after_s: float,
        lost_contact: asyncio.Event,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._writer = writer
        self._replies = replies
        self._admission = admission
        self._after_s = after_s
        self._lost_contact = lost_contact
        self._answered_s = float("-inf")
        self._away = False

    async def run(self, stopping: asyncio.Event) -> None:
        """Renew the reply stream and look after the requests, every second and at once when contact was lost."""
        while not stopping.is_set():
            at_once = self._lost_contact.is_set()
            self._lost_contact.clear()
            try:
                await self._look(at_once=at_once)
            except (RedisError, OSError) as error:
                if not self._away:
                    log.warning("reconcile.redis_away", error=told(error))
                self._away = True
                self._lost_contact.set()  # whatever was to be looked for still is
                await after_failure(self._redis, error)
            except Exception:  # a defect; the other requests must not hang for it
                log.exception("reconcile.failed")
            await pause(LEAST_PERIOD_S, stopping)
            await pause(PERIOD_S - LEAST_PERIOD_S, self._lost_contact)

    async def watch(self, stopping: asyncio.Event) -> None:
        """Fail what Redis does not take while it is silent, until `stopping` is set.

        It is a loop of its own because every command of the other one may hang until its timeout.
        """
        loop = asyncio.get_running_loop()
        looked_s = loop.time()
        while not stopping.is_set():
            await pause(WATCH_S, stopping)
            now, before, looked_s = loop.time(), looked_s, loop.time()
            silent_s = now - max(self._answered_s, self._writer.answered_s)
            if silent_s < SILENT_S or now - before > 3 * WATCH_S:
                continue  # Redis answers; or this process stood still, and has not read what it answered
            for request in list(self._replies.requests.values()):
                if not request.accepted and now - request.started_s >= GIVE_UP_S:
                    request.fail(Unavailable("Redis does not take the request.", retry_after_s=2.0))

    async def _look(self, *, at_once: bool) -> None:
        asked_s = asyncio.get_running_loop().time()
        created = await self._replies.keep_alive()
        self._answered_s = asked_s
        self._writer.open()
        if self._away:
            log.info("reconcile.redis_back")
            self._away = False
        await self._check(at_once=at_once or created)

    async def _check(self, *, at_once: bool) -> None:
        missing = await self._missing(self._due(at_once=at_once))
        if not missing:
            return
        # A reply may have come between the two looks; only what is on neither side is lost.
        await self._replies.drain()
        now = asyncio.get_running_loop().time()
        lost = [
            (request, sent)
            for request, sent in missing
            if not (request.done or sent.done or sent.queued) and request.deadline_s - now >= 0.001
        ]
        # The nearest deadline first; the writer packs them into calls of its usual size.
        for request, sent in sorted(lost, key=lambda pair: pair[0].deadline_s):
            remaining_ms = int((request.deadline_s - now) * 1000)
            sent.job, sent.entry_id = replace(sent.job, ttl_ms=remaining_ms), None
            # Without asking for admission: it was accepted, or as good as that, and others must not go before it.
            self._writer.send(request, [sent], ask=False)
            metrics.SENT_AGAIN.labels(sent.job.lane).inc()
        if lost:
            log.warning("reconcile.sent_again", jobs=len(lost), request=lost[0][0].request_id.hex())

    def _due(self, *, at_once: bool) -> list[Sent]:
        """The jobs to look for now."""
        now = asyncio.get_running_loop().time()
        ages_s = {lane: max(self._after_s, 2 * self._admission.wait_s(lane)) for lane in LANES}
        due: list[Sent] = []
        for request in self._replies.requests.values():
            age_s = ages_s[request.jobs[0].job.lane]
            if request.done or (not at_once and now < max(request.started_s + age_s, request.next_check_s)):
                continue
            request.next_check_s = now + age_s
            due += [(request, sent) for sent in request.outstanding() if not sent.queued]
        return due

    async def _missing(self, due: list[Sent]) -> list[Sent]:
        """Those of which nobody knows that they got onto their lane, and those that are not there any more."""
        missing = [pair for pair in due if pair[1].entry_id is None]
        for lane in LANES:
            known = [pair for pair in due if pair[1].entry_id is not None and pair[1].job.lane is lane]
            for some in _calls(known):
                ids = [sent.entry_id or b"" for _, sent in some]
                present = await _SCRIPT.run(self._redis, [self._keys.lane(lane)], ids)
                missing += [pair for pair, there in zip(some, present, strict=True) if not there]
        return missing


def _calls(pairs: list[Sent]) -> Iterator[list[Sent]]:
    """Cut what is looked for into calls that do not hold the server up."""
    some: list[Sent] = []
    call_bytes = 0
    for pair in pairs:
        job = pair[1].job
        job_bytes = int(job.lengths.sum()) if job.ids is None else job.ids.nbytes
        if some and (len(some) == IDS_A_CALL or call_bytes + job_bytes > BYTES_A_CALL):
            yield some
            some, call_bytes = [], 0
        some.append(pair)
        call_bytes += job_bytes
    if some:
        yield some
