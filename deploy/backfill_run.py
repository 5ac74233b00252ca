"""`embedstream backfill` at work.

The backfill itself runs on an event loop in a thread of its own. The main thread waits for signals and shows how far
it is, so that both also happen while the loop is busy.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from concurrent.futures import CancelledError, Future
from dataclasses import replace

from embedstream.producer import Producer
from embedstream.producer.backfill.backfill import Outcome, backfill
from embedstream.producer.backfill.options import BackfillOptions
from embedstream.producer.backfill.progress import Progress
from embedstream.shared import exits, logs, runfile
from embedstream.shared.settings import LogLevel, Role, Settings

from .backfill_view import Lines
from .signals import Signals

_LOOK_S = 0.25


def run(settings: Settings, options: BackfillOptions, *, as_json: bool = False) -> int:
    """Run a backfill, or go on with one, and return the exit code.

    Raises:
        EmbedstreamError: as `backfill` does.
    """
    connected = runfile.connected(settings)
    # No more than what went wrong, among the lines that say how far it is.
    logs.configure(connected.model_copy(update={"log_level": LogLevel.WARNING}), Role.BACKFILL)
    options = replace(options, vectors=replace(options.vectors, partial=True))
    progress = Progress()
    view = Lines(progress)
    with Signals() as signals:
        work = Work(connected, options, progress)
        work.start()
        said = 0
        while not work.done:
            signals.wait(_LOOK_S)
            if signals.stops > said:
                said = signals.stops
                if signals.urgent:
                    work.cancel()
                else:
                    work.stop()
                    view.say(
                        "Stopping: parts under way are finished first; once more stops at once, and they are lost."
                    )
            view.show()
        outcome = work.outcome()
    if outcome is None or not outcome.complete:
        view.say("Stopped. The same command goes on from here.")
        return 128 + signal.SIGINT
    view.say(
        f"{outcome.rows:,} rows in {options.output.path}, {outcome.bad_rows:,} bad rows, {progress.elapsed_s:.1f} s"
    )
    return os.EX_DATAERR if outcome.bad_rows else exits.OK


class Work:
    """A backfill on a thread of its own.

    Args:
        settings: with the URL of Redis.
        options: what is asked for.
        progress: counted as it goes.
    """

    def __init__(self, settings: Settings, options: BackfillOptions, progress: Progress) -> None:
        self._settings = settings
        self._options = options
        self._progress = progress
        self._stopping = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[Outcome] | None = None
        self._future: Future[Outcome] = Future()
        self._thread = threading.Thread(target=self._run, name="backfill")

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._future.done()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the parts under way and begin no other."""
        self._loop.call_soon_threadsafe(self._stopping.set)

    def cancel(self) -> None:
        """Leave everything as it is."""
        self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())

    def outcome(self) -> Outcome | None:
        """How it ended; None for cancelled.

        Raises:
            EmbedstreamError: what it ended with.
        """
        self._thread.join()
        try:
            return self._future.result()
        except CancelledError:
            return None

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                self._future.set_result(runner.run(self._work()))
        except asyncio.CancelledError:
            self._future.cancel()
        except BaseException as error:  # noqa: BLE001 - raised again where it is awaited
            self._future.set_exception(error)

    async def _work(self) -> Outcome:
        self._task = asyncio.current_task()
        async with Producer(
            self._settings.redis_url, model=self._settings.chosen_model, settings=self._settings
        ) as producer:
            return await backfill(producer, self._options, self._progress, self._stopping)
