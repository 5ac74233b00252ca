"""Sessions: for each model a reply stream, and the loops that send its jobs, read its answers and look for the lost."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from embedstream.shared.connections import connect_reader
from embedstream.shared.errors import Unavailable
from embedstream.shared.keys import Keys
from embedstream.shared.logs import get_logger, told

from .enqueue import Writer
from .fleet import Fleet
from .pending import PendingRequest
from .reconcile import Reconciler
from .replies import Replies

log = get_logger()


@dataclass(frozen=True, slots=True)
class Session:
    """What one reply stream needs: made when the model, and with it the keys, is known."""

    writer: Writer
    replies: Replies
    lost_contact: asyncio.Event
    tasks: tuple[asyncio.Task[None], ...]


class Sessions:
    """The sessions of one producer: more than one only after the model on the queue was replaced.

    Args:
        redis: client for short commands.
        url: of Redis, for a connection of each session's own.
        instance: names the reply streams.
        fleet: knows by what terms requests are admitted.
        reply_ttl_s: seconds a reply stream outlives its reader.
        reconcile_after_s: age at which a request is looked for.
        stopping: ends all loops.
    """

    def __init__(
        self,
        redis: Redis,
        url: str,
        instance: str,
        fleet: Fleet,
        reply_ttl_s: int,
        reconcile_after_s: float,
        stopping: asyncio.Event,
    ) -> None:
        self._redis = redis
        self._url = url
        self._instance = instance
        self._fleet = fleet
        self._reply_ttl_s = reply_ttl_s
        self._reconcile_after_s = reconcile_after_s
        self._stopping = stopping
        self._sessions: dict[Keys, Session] = {}

    def of(self, keys: Keys) -> Session:
        """The session of a model; opened on its first request.

        Nothing is awaited: the reconciler makes the reply stream and then opens the writer, and should Redis be away,
        the requests are told in the same way as later.

        Raises:
            Unavailable: the producer was closed.
        """
        if self._stopping.is_set():
            raise Unavailable("The producer was closed.")
        if keys not in self._sessions:
            self._sessions[keys] = self._open(keys)
        return self._sessions[keys]

    def requests(self) -> Iterator[PendingRequest]:
        """All requests under way."""
        for session in self._sessions.values():
            yield from session.replies.requests.values()

    async def wake(self) -> list[asyncio.Task[None]]:
        """End all requests, and let the loops see that they are to stop. Returns the loops."""
        for request in self.requests():
            request.fail(Unavailable("The producer was closed."))
        for session in self._sessions.values():
            session.lost_contact.set()
            session.writer.wake()
            await session.replies.wake()
        return [task for session in self._sessions.values() for task in session.tasks]

    async def drop(self) -> None:
        """Leave nothing behind in Redis; call it when the loops have ended."""
        for session in self._sessions.values():
            await session.replies.drop()
        self._sessions.clear()

    def _open(self, keys: Keys) -> Session:
        lost_contact = asyncio.Event()
        admission = self._fleet.admission(keys, lost_contact)
        reader = connect_reader(self._url)
        replies = Replies(self._redis, reader, keys, self._instance, self._reply_ttl_s, lost_contact)
        writer = Writer(self._redis, keys, keys.reply(self._instance), admission, lost_contact)
        reconciler = Reconciler(self._redis, keys, writer, replies, admission, self._reconcile_after_s, lost_contact)
        tasks = (
            start(replies.run(self._stopping), "replies"),
            start(writer.run(self._stopping), "enqueue"),
            start(reconciler.run(self._stopping), "reconcile"),
            start(reconciler.watch(self._stopping), "watch"),
        )
        return Session(writer, replies, lost_contact, tasks)


def start(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """Start a loop; should it end by an error, say why, for its requests would hang."""
    # With no context: what it logs is not about the request that happened to be the first.
    task = asyncio.create_task(work, name=f"producer-{name}", context=Context())

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.critical("producer.loop_ended", loop=name, error=told(task.exception()))

    task.add_done_callback(ended)
    return task
