"""A backfill on a thread of its own, with the event loop it runs on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from embedstream.producer import Producer
from embedstream.producer.backfill.backfill import Outcome, backfill
from embedstream.producer.backfill.options import BackfillOptions
from embedstream.producer.backfill.progress import Progress
from embedstream.shared.settings import Settings


class Work:
    """Starts, stops and ends a backfill from another thread.

    Args:
        settings: with the URL of Redis.
        options: what is asked for.
        progress: counted as it goes.
    """

    def __init__(self, settings: Settings, options: BackfillOptions, progress: Progress) -> None:
        self._settings = settings
        self._options = options
        self._progress = progress
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._task = self._loop.create_task(self._run())
        self._thread = threading.Thread(target=self._turn, name="backfill")

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return not self._thread.is_alive()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the parts under way and begin no other."""
        self._from_outside(self._stopping.set)

    def cancel(self) -> None:
        """End at once; parts under way are lost."""
        self._from_outside(self._task.cancel)

    def wait(self) -> None:
        """Wait for its end, however that is."""
        self._thread.join()

    def outcome(self) -> Outcome | None:
        """Wait for its end; None when it was cancelled.

        Raises:
            EmbedstreamError: what it ended with.
        """
        self._thread.join()
        self._loop.close()
        return None if self._task.cancelled() else self._task.result()

    def _from_outside(self, act: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(act)

    def _turn(self) -> None:
        self._loop.run_until_complete(asyncio.wait([self._task]))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())

    async def _run(self) -> Outcome:
        settings = self._settings
        async with Producer(settings.redis_url, model=settings.chosen_model, settings=settings) as producer:
            return await backfill(producer, self._options, self._progress, self._stopping)
