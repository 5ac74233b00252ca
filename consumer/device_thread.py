"""The one thread that owns the device: it takes a micro-batch, runs it, takes the next.

A batch is put together at the moment the device is free for it, so everything that came meanwhile goes along, and what
nobody waits for any more does not. The event loop keeps rows waiting; it is told when some were taken or dropped and
when a batch is done.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from embedstream.shared import metrics
from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.logs import get_logger

from . import isolation
from .batching import MicroBatch, in_batches, row_by_row
from .entries import Entry
from .isolation import Piece
from .notices import Cancelled
from .outcome import Embedded, Embeds
from .pace import Pace
from .row_queue import Dropped, RowQueue
from .watchdog import Watchdog

MOST_UNDELIVERED = 4
"""Batches that may be done and not yet handed to the publisher. A Redis that takes no answers so stops the device."""
GOOD_BATCHES = 100
"""After so many batches that fitted, a lowered budget rises by a quarter."""
_PAUSE_S = 0.05
"""A longer time between two batches was no part of the work."""

log = get_logger()
T = TypeVar("T")


class Trial(Protocol):
    """Jobs that are suspected of killing consumers, to be run apart from all others."""

    @property
    def alone(self) -> bool:
        """Whether it is one job, to be run row by row."""

    @property
    def suspected_row(self) -> int | None:
        """Of a job alone: the row that was on the device when the last consumer died."""

    def begin(self) -> Coroutine[Any, Any, list[Entry]]:
        """Book the attempt in Redis. Returns the jobs that are still ours; with none of them nothing is run."""

    def mark(self, row: int) -> Coroutine[Any, Any, None]:
        """Note in Redis which row of a job alone runs next."""


@dataclass(frozen=True, slots=True)
class Done:
    """A micro-batch that was run.

    Args:
        pieces: they hold each of its rows once.
        started_ms: when it was begun, on Redis's clock.
    """

    pieces: list[Piece]
    started_ms: float


class Listener(Protocol):
    """The event loop's side. All calls come on the event loop, in the order in which things happened."""

    def taken(self) -> None:
        """Rows were taken: there is room for others."""

    def dropped(self, dropped: list[tuple[Entry, Dropped]]) -> None:
        """Rows of these jobs were not computed, for nobody waits for them."""

    def done(self, done: Done) -> None:
        """A batch is done; `delivered` is to follow."""

    def trial_ended(self, trial: Trial) -> None:
        """A trial is over, run or not."""


class DeviceThread:
    """Runs micro-batches from the rows that wait.

    Args:
        rows: touched by nobody else.
        embedder: called on this thread alone.
        pace: taught by the batches.
        watchdog: told of each batch.
        now_ms: the time on Redis's clock.
        cancelled: abandoned requests; the event loop adds to them. What is added here must have been looked up there.
        listener: told what happens.
    """

    def __init__(
        self,
        rows: RowQueue,
        embedder: Embeds,
        pace: Pace,
        watchdog: Watchdog,
        now_ms: Callable[[], float],
        cancelled: Cancelled,
        listener: Listener,
    ) -> None:
        self._rows = rows
        self._embedder = embedder
        self._pace = pace
        self._watchdog = watchdog
        self._now_ms = now_ms
        self._cancelled = cancelled
        self._listener = listener
        self._full_budget = rows.budget
        self._good_batches = 0  # since one did not fit
        self._loop = asyncio.get_running_loop()
        # The rows belong to the device's thread. What comes waits beside them: the event loop shall wait for no lock.
        self._coming: deque[tuple[Lane, Sequence[Entry]]] = deque()
        self._added = dict.fromkeys(LANES, 0)  # tokens; the event loop alone writes here
        self._gone = dict.fromkeys(LANES, 0)  # tokens; the device's thread alone writes here
        self._rows_lock = threading.Lock()  # the event loop takes it only to take rows back
        self._wake = threading.Event()
        self._places = threading.Semaphore(MOST_UNDELIVERED)
        self._trials: deque[Trial] = deque()
        self._finishing = False
        self._abandoned = False
        self._ended_s = 0.0  # of the batch before
        self._fitted = True  # whether the batch under way has fitted into memory so far
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the thread has ended; with its error, should it ever end by one."""
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Begin to take rows."""
        self._thread.start()

    def add(self, lane: Lane, entries: Sequence[Entry]) -> None:
        """Let the rows of some jobs wait. Called on the event loop, where none of them is known to be cancelled."""
        self._added[lane] += sum(int(entry.tokens.lengths[entry.waiting_rows()].sum()) for entry in entries)
        self._coming.append((lane, entries))
        self._wake.set()

    def try_apart(self, trial: Trial) -> None:
        """Run a trial as the next thing."""
        self._trials.append(trial)
        self._wake.set()

    def tokens(self, lane: Lane) -> int:
        """Tokens that wait on a lane."""
        return self._added[lane] - self._gone[lane]

    def delivered(self) -> None:
        """A batch that was done has been handed on."""
        self._places.release()

    def release(self) -> tuple[list[Entry], list[Trial]]:
        """Take back the jobs of which no row has gone to the device, and the trials that were not begun."""
        with self._rows_lock:
            self._take_up()
            before = {lane: self._rows.tokens(lane) for lane in LANES}
            released = self._rows.release()
            for lane in LANES:
                self._added[lane] -= before[lane] - self._rows.tokens(lane)
            trials = []
            while self._trials:
                trials.append(self._trials.popleft())
            return released, trials

    def finish(self) -> None:
        """No more rows will come: end when those that wait are done."""
        self._finishing = True
        self._wake.set()

    def abandon(self) -> None:
        """Nobody waits for results any more: begin no further batch."""
        self._abandoned = True
        self._wake.set()
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
            self._await_place()
            turn = self._next()
            if turn is None:
                return
            if isinstance(turn, MicroBatch):
                self._tell(self._listener.taken)
                self._run_batch(turn)
            else:
                self._run_trial(turn)

    def _await_place(self) -> None:
        began_s = time.monotonic()
        self._places.acquire()
        metrics.DEVICE_SECONDS.labels("undelivered").inc(time.monotonic() - began_s)

    def _next(self) -> MicroBatch | Trial | None:
        """A trial first, then the rows that wait; None when there will be nothing more."""
        began_s = time.monotonic()
        try:
            while not self._abandoned:
                self._wake.clear()  # before looking: what comes from now on is seen at the next look
                finishing = self._finishing
                with self._rows_lock:
                    if self._trials:
                        return self._trials.popleft()
                    batch = self._next_batch()
                if batch is not None or finishing:
                    return batch
                self._wake.wait()
            return None
        finally:
            metrics.DEVICE_SECONDS.labels("no_work").inc(time.monotonic() - began_s)

    def _next_batch(self) -> MicroBatch | None:
        self._take_up()
        now_ms, before = self._now_ms(), {lane: self._rows.tokens(lane) for lane in LANES}
        dropped = self._rows.drop(now_ms, self._cancelled, self._cancelled.changes)
        batch = self._rows.take(now_ms)
        for lane in LANES:
            self._gone[lane] += before[lane] - self._rows.tokens(lane)
        if dropped:
            self._tell(self._listener.dropped, dropped)
        return batch

    def _take_up(self) -> None:
        """Let what has come wait among the rows."""
        while self._coming:
            self._rows.add(*self._coming.popleft())

    def _run_trial(self, trial: Trial) -> None:
        """Run suspects: booked in Redis first, so that the attempt counts even if it is our last."""
        began_s = time.monotonic()
        entries = self._ask(trial.begin(), [])
        metrics.DEVICE_SECONDS.labels("apart").inc(time.monotonic() - began_s)
        by_rows = trial.alone and len(entries) == 1 and len(entries[0].rows) > 1
        batches = row_by_row(entries[0], trial.suspected_row) if by_rows else in_batches(entries, self._rows.budget)
        if not batches:
            self._places.release()
        for place, batch in enumerate(batches):
            if place:
                self._await_place()
            if self._abandoned:
                return
            if by_rows:
                self._ask(trial.mark(int(batch.row[0])), None)
            self._run_batch(batch)
        self._tell(self._listener.trial_ended, trial)

    def _run_batch(self, batch: MicroBatch) -> None:
        started_ms, began_s = self._now_ms(), time.monotonic()
        for entry in batch.entries:
            entry.begun = True
        self._fitted = True
        pieces: list[Piece] = []
        try:
            pieces.extend(isolation.run(batch, self._embed, self._too_large))
        finally:  # when the device is lost, what it computed before is still good
            if pieces:
                self._tell(self._listener.done, Done(pieces, started_ms))
        self._raise_budget()
        now_s = time.monotonic()
        metrics.DEVICE_SECONDS.labels("busy").inc(now_s - began_s)
        deep = sum(map(self.tokens, LANES)) >= self._rows.budget // 2
        since_s = self._ended_s if began_s - self._ended_s < _PAUSE_S else began_s
        self._pace.observe_turn(batch.n_tokens, now_s - since_s, now_s, more_waits=deep)
        self._ended_s = now_s

    def _embed(self, batch: MicroBatch) -> Embedded:
        self._watchdog.begin(self._pace.predict_s(batch.cost))
        try:
            embedded = self._embedder.embed(batch)
        finally:
            self._watchdog.end()
        self._pace.observe(batch.cost, batch.n_tokens, embedded.duration_s)
        metrics.BATCH_SECONDS.observe(embedded.duration_s)
        metrics.BATCH_ROWS.observe(batch.n_rows)
        for lane in LANES:
            if tokens := batch.tokens_of(lane):
                metrics.TOKENS.labels(lane.value).inc(tokens)
        return embedded

    def _too_large(self, batch: MicroBatch) -> None:
        """Not enough memory for a batch: free what can be, and keep below its size.

        Its parts that fail too say no more than it did: the memory may have gone elsewhere for a moment.
        """
        self._embedder.free()
        lowered = max(1, min(self._rows.budget, batch.cost) * 3 // 4)
        if self._fitted and batch.n_rows > 1 and lowered < self._rows.budget:
            log.warning("batch.budget_lowered", tokens=lowered, before=self._rows.budget)
            self._rows.budget = lowered
        self._fitted = False

    def _raise_budget(self) -> None:
        """Try larger batches again after many that fitted."""
        self._good_batches = self._good_batches + 1 if self._fitted else 0
        if self._good_batches >= GOOD_BATCHES and self._rows.budget < self._full_budget:
            self._good_batches = 0
            self._rows.budget = min(self._full_budget, self._rows.budget * 5 // 4 + 1)
            log.info("batch.budget_raised", tokens=self._rows.budget, full=self._full_budget)

    def _ask(self, question: Coroutine[Any, Any, T], otherwise: T) -> T:
        """Have something done on the event loop and wait for it; `otherwise` when that loop has ended.

        There is no timeout: what is asked ends soon, or waits for a Redis that takes no answers, as the device must.
        """
        try:
            answer = asyncio.run_coroutine_threadsafe(question, self._loop)
        except RuntimeError:
            question.close()
            return otherwise
        try:
            return answer.result()
        except CancelledError:
            return otherwise

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call something on the event loop, if that still runs."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)
