"""Submission: jobs whose results others take, sent until Redis has confirmed every one."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from embedstream.shared.connections import backoff_s, pause
from embedstream.shared.errors import Unavailable
from embedstream.shared.keys import Keys

from .admission import Admission
from .enqueue import Writer
from .fleet import Fleet
from .pending import PendingRequest
from .sessions import start

GIVE_UP_S = 5.0
"""What Redis has not confirmed by then is left to the caller, who may submit it again under its id."""
CHECK_S = 0.1


class Submission:
    """A writer of jobs whose results are not for this process.

    Args:
        redis: client for short commands.
        keys: of the model.
        admission: the terms requests are admitted by.
        reply_stream: where results go; "" when consumers put them under the request's id alone.
    """

    def __init__(self, redis: Redis, keys: Keys, admission: Admission, reply_stream: str) -> None:
        self._writer = Writer(redis, keys, reply_stream, admission, asyncio.Event())
        self._writer.open()
        self._over = asyncio.Event()
        self.users = 0
        """Requests that are being stored."""

    def end(self) -> None:
        """Let `run` end."""
        self._over.set()
        self._writer.wake()

    async def run(self) -> None:
        """Send what is submitted, until `end` is called."""
        await self._writer.run(self._over)

    async def store(self, request: PendingRequest, stopping: asyncio.Event) -> None:
        """Send all jobs of a request; it returns when each is on its lane.

        A call whose outcome is unknown is made once more: a job that is stored twice gives the same result twice.

        Raises:
            Overloaded: refused by the first call; nothing was stored.
            Unavailable: not confirmed, and perhaps stored in part.
        """
        loop = asyncio.get_running_loop()
        pauses = backoff_s()
        self._writer.send(request, request.jobs)
        while request.error is None:
            unconfirmed = [sent for sent in request.jobs if sent.entry_id is None]
            if not unconfirmed:
                return
            if stopping.is_set():
                request.fail(Unavailable("The producer was closed."))
            elif loop.time() - request.started_s >= GIVE_UP_S:
                request.fail(
                    Unavailable(
                        "Redis does not confirm the jobs; submit them again under the same id.", retry_after_s=2.0
                    )
                )
            elif any(sent.queued for sent in unconfirmed):
                await request.wait_for_news(CHECK_S)
            else:
                # It may have been accepted already: asking again could refuse what is on its lane.
                await pause(next(pauses), stopping)
                self._writer.send(request, unconfirmed, ask=False)
        raise request.error


class Submissions:
    """The submissions of one producer: one for each place that results go to.

    Those of inboxes last as long as somebody forwards to them: there may be one for each of a million users.

    Args:
        redis: client for short commands.
        fleet: knows by what terms requests are admitted.
        stopping: ends their loops.
    """

    def __init__(self, redis: Redis, fleet: Fleet, stopping: asyncio.Event) -> None:
        self._redis = redis
        self._fleet = fleet
        self._stopping = stopping
        self._submissions: dict[tuple[Keys, str], Submission] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def store(self, request: PendingRequest, keys: Keys, reply_stream: str = "") -> None:
        """Send all jobs of a request, as `Submission.store` does.

        Args:
            request: whose results others take.
            keys: of the model.
            reply_stream: where they go; "" when they are kept under the request's id alone.

        Raises:
            Overloaded, Unavailable: as there; also when the producer was closed.
        """
        if self._stopping.is_set():
            raise Unavailable("The producer was closed.")
        submission = self._submissions.get((keys, reply_stream))
        if submission is None:
            submission = Submission(self._redis, keys, self._fleet.admission(keys), reply_stream)
            self._submissions[keys, reply_stream] = submission
            task = start(submission.run(), "submit")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        submission.users += 1
        try:
            await submission.store(request, self._stopping)
        finally:
            submission.users -= 1
            if reply_stream and not submission.users:
                del self._submissions[keys, reply_stream]
                submission.end()

    def wake(self) -> list[asyncio.Task[None]]:
        """Let the loops end. Returns the loops."""
        for submission in self._submissions.values():
            submission.end()
        return list(self._tasks)
