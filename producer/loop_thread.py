"""An event loop in a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_AGAIN_S = 0.5
"""What was cancelled and goes on is cancelled again after so long."""


class LoopThread:
    """Runs what other threads ask for, until it is stopped."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="embedstream-producer", daemon=True)
        self._inherited = self._stopped = False
        # So that nothing is begun after what is under way was ended. The garbage collector may close a generator, and
        # come back here, in the midst of it.
        self._lock = threading.RLock()
        self._last: asyncio.Task[Any] | None = None
        self._thread.start()

    def forked(self) -> None:
        """Take note that this is a copy in a child process, where no thread runs it."""
        self._inherited = True

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the loop, and wait for it.

        Raises:
            RuntimeError: the loop was stopped, or belongs to the process that this one was forked from.
        """
        running = self._begin(work)
        if running is None:
            raise RuntimeError(
                "It was begun before this process was forked, and goes on in the other one: begin it anew here."
                if self._inherited
                else "The producer was closed."
            )
        try:
            return running.result()
        except BaseException:
            running.cancel()  # of a caller that was interrupted nobody waits for it; else this does nothing
            raise

    def call_off(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run the end of something, if the loop still runs; from any thread, as the garbage collector does."""
        if threading.current_thread() is self._thread:
            self._last = self._loop.create_task(work)
        elif (running := self._begin(work)) is not None:
            running.result()

    def stop(self) -> None:
        """End what is under way, the loop and the thread."""
        with self._lock:
            self._stopped = True
            ending = asyncio.run_coroutine_threadsafe(_end_all_tasks(), self._loop)
        ending.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _begin(self, work: Coroutine[Any, Any, T]) -> Future[T] | None:
        """Begin something; None when it is too late for that."""
        if not self._inherited:  # if it is, another thread may have held the lock for ever
            with self._lock:
                if not self._stopped:
                    return asyncio.run_coroutine_threadsafe(_cancellable(work), self._loop)
        work.close()
        return None


async def _cancellable(work: Coroutine[Any, Any, T]) -> T:
    """Something that ends when it is cancelled, though it may swallow that.

    `asyncio.wait_for`, by which redis-py sends, does so in Python 3.11 when what it waits for is done at that moment.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=_AGAIN_S)
        raise
    return task.result()


async def _end_all_tasks() -> None:
    """Whoever waits for a task of this loop would wait for ever once it stops."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=1)
