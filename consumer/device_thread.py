"""The one thread that owns the device: it takes a micro-batch, runs it, takes the next.

A batch is put together at the moment the device is free for it, so everything that came meanwhile goes along. The event
loop keeps rows waiting; it is told when some were taken and when a batch is done.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from embedstream.shared.lanes import Lane

from .batching import MicroBatch, RowQueue
from .entries import Entry
from .outcome import Embedded

MOST_UNDELIVERED = 4
"""Batches that may be done and not yet handed to the publisher. A Redis that takes no answers so stops the device."""

Outcome = tuple[float, Embedded | BaseException]
"""When the batch was begun, on Redis's clock in milliseconds, and what became of it."""


class DeviceThread:
    """Runs micro-batches from the rows that wait.

    Args:
        rows: touched by nobody else.
        embed: runs a batch; called on this thread alone.
        now_ms: the time on Redis's clock.
        taken: called on the event loop after rows were taken.
        done: called on the event loop for each batch; `delivered` is to follow.
    """

    def __init__(
        self,
        rows: RowQueue,
        embed: Callable[[MicroBatch], Embedded],
        now_ms: Callable[[], float],
        taken: Callable[[], None],
        done: Callable[[MicroBatch, Outcome], None],
    ) -> None:
        self._rows = rows
        self._embed = embed
        self._now_ms = now_ms
        self._taken = taken
        self._done = done
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._places = threading.Semaphore(MOST_UNDELIVERED)
        self._finishing = False
        self._abandoned = False
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the thread has ended; with its error, should it ever end by one."""
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Begin to take rows."""
        self._thread.start()

    def add(self, lane: Lane, entries: Sequence[Entry]) -> None:
        """Let the rows of some jobs wait."""
        with self._changed:
            self._rows.add(lane, entries)
            self._changed.notify()

    def tokens(self, lane: Lane) -> int:
        """Tokens that wait on a lane."""
        with self._changed:
            return self._rows.tokens(lane)

    def delivered(self) -> None:
        """A batch that was done has been handed on."""
        self._places.release()

    def finish(self) -> None:
        """No more rows will come: end when those that wait are done."""
        with self._changed:
            self._finishing = True
            self._changed.notify()

    def abandon(self) -> None:
        """Nobody waits for results any more: begin no further batch."""
        with self._changed:
            self._abandoned = True
            self._changed.notify()
        self._places.release()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._take_turns()
        except BaseException as caught:  # noqa: BLE001 - without this thread nothing is answered: the worker must hear
            error = caught
        self._tell(self._end, error)

    def _end(self, error: BaseException | None) -> None:
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

    def _take_turns(self) -> None:
        while True:
            self._places.acquire()
            batch = self._next()
            if batch is None:
                return
            self._tell(self._taken)
            started_ms = self._now_ms()
            outcome: Embedded | BaseException
            try:
                outcome = self._embed(batch)
            except BaseException as error:  # noqa: BLE001 - whatever a model raises, its callers must hear of it
                outcome = error
            self._tell(self._done, batch, (started_ms, outcome))

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call something on the event loop, if that still runs."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _next(self) -> MicroBatch | None:
        with self._changed:
            while not self._abandoned:
                batch = self._rows.take()
                if batch is not None or self._finishing:
                    return batch
                self._changed.wait()
            return None
