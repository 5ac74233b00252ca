"""The one thread that owns the device: it takes a micro-batch, runs it, takes the next.

A batch is put together at the moment the device is free for it, so everything that came meanwhile goes along, and what
nobody waits for any more does not. The event loop keeps rows waiting; it is told when some were taken or dropped and
when a batch is done.

A device that computes by itself, such as a GPU, is given the next batch while it is busy with one, but only where
enough waits to make it a large one; it never has more than two. Suspects run with nothing beside them.
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
from functools import partial
from typing import Any, Protocol, TypeVar

from embedstream.shared import metrics
from embedstream.shared.lanes import LANES, Lane
from embedstream.shared.logs import get_logger

from . import isolation
from .batching import MicroBatch, in_batches, row_by_row
from .entries import Entry
from .isolation import Piece
from .notices import Cancelled
from .outcome import Embedded, Embeds, EmbedsAhead
from .pace import Pace
from .row_queue import Dropped, RowQueue
from .watchdog import Watchdog

MOST_UNDELIVERED = 4
"""Batches that may be done and not yet handed to the publisher. A Redis that takes no answers so stops the device."""
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


@dataclass(slots=True)
class Flight:
    """A batch that was launched.

    Args:
        batch: all of it.
        ms: when, on Redis's clock.
        s: when, on this process's own.
        vectors: waits for them; None where the launch failed, or once somebody waits.
    """

    batch: MicroBatch
    ms: float
    s: float
    vectors: Callable[[], Embedded] | None = None


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
        self._ahead = embedder if isinstance(embedder, EmbedsAhead) and embedder.overlaps else None
        self._pace = pace
        self._watchdog = watchdog
        self._now_ms = now_ms
        self._cancelled = cancelled
        self._listener = listener
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

    @property
    def wants(self) -> int:
        """Tokens that should wait: a batch; and half of another, where one is launched while one is on the device."""
        budget = self._rows.budget.now
        return budget if self._ahead is None else budget * 3 // 2

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
                self._run_batches(turn)
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

    def _next_batch(self, *, beside: bool = False) -> MicroBatch | None:
        self._take_up()
        now_ms, before = self._now_ms(), {lane: self._rows.tokens(lane) for lane in LANES}
        dropped = self._rows.drop(now_ms, self._cancelled, self._cancelled.changes)
        batch = self._rows.take(now_ms, beside=beside)
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
        costs = self._pace.costs
        batches = (
            row_by_row(entries[0], costs, trial.suspected_row)
            if by_rows
            else in_batches(entries, self._rows.budget.now, costs)
        )
        if not batches:
            self._places.release()
        for place, batch in enumerate(batches):
            if place:
                self._await_place()
            if self._abandoned:
                return
            if by_rows:
                self._ask(trial.mark(int(batch.row[0])), None)
            self._run_batch(batch, apart=True)
        self._tell(self._listener.trial_ended, trial)

    def _run_batches(self, batch: MicroBatch) -> None:
        """Run a batch, and others as long as the device can be given the next one before it is done with one."""
        if self._ahead is None:
            self._run_batch(batch)
            return
        flight: Flight | None = self._launch(self._ahead, batch, 0)
        while flight is not None:
            # After one that could not be launched nothing is: it is run again, and may need all memory there is.
            following = None if flight.vectors is None else self._following()
            next_flight = None if following is None else self._launch(self._ahead, following, flight.batch.cost)
            self._run_batch(flight.batch, flight)
            flight = next_flight

    def _following(self) -> MicroBatch | None:
        """The next batch, if it is worth while: a small one is put together later, for it will be larger then."""
        if self._abandoned or self._trials or not self._much_waits() or not self._places.acquire(blocking=False):
            return None
        with self._rows_lock:
            batch = self._next_batch(beside=True)
        if batch is None:
            self._places.release()
        else:
            self._tell(self._listener.taken)
        return batch

    def _launch(self, embedder: EmbedsAhead, batch: MicroBatch, cost_before: int) -> Flight:
        flight = Flight(batch, self._now_ms(), time.monotonic())
        for entry in batch.entries:
            entry.begun = True
        self._watchdog.begin(self._pace.predict_s(cost_before + batch.cost))
        try:
            flight.vectors = embedder.launch(batch)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the batch is run again, alone on the device
            log.info("batch.not_launched", error=type(error).__name__)
        finally:
            self._watchdog.end()
        return flight

    def _run_batch(self, batch: MicroBatch, flight: Flight | None = None, *, apart: bool = False) -> None:
        """Run a batch and what it falls into, or wait for one that was launched."""
        started_ms, began_s = (self._now_ms(), time.monotonic()) if flight is None else (flight.ms, flight.s)
        for entry in batch.entries:
            entry.begun = True
        self._rows.budget.begin()
        pieces: list[Piece] = []
        embed = self._embed if flight is None else partial(self._land, flight)
        try:
            pieces.extend(isolation.run(batch, embed, self._too_large))
        finally:  # when the device is lost, what it computed before is still good
            if pieces:
                self._tell(self._listener.done, Done(pieces, started_ms))
        self._rows.budget.end()
        now_s = time.monotonic()
        metrics.DEVICE_SECONDS.labels("busy").inc(now_s - max(began_s, self._ended_s))
        since_s = self._ended_s if began_s - self._ended_s < _PAUSE_S else began_s
        # However much waits, batches of suspects are small: they do not tell what the device gets done.
        more_waits = not apart and self._much_waits()
        self._pace.observe_turn(batch.n_tokens, now_s - since_s, now_s, more_waits=more_waits)
        self._ended_s = now_s

    def _much_waits(self) -> bool:
        return sum(map(self.tokens, LANES)) >= self._rows.budget.now // 2

    def _land(self, flight: Flight, batch: MicroBatch) -> Embedded:
        """The vectors of a batch that was launched; once that has failed it is run like any other."""
        vectors, flight.vectors = flight.vectors, None
        return self._embed(batch) if vectors is None else self._watched(batch, vectors)

    def _embed(self, batch: MicroBatch) -> Embedded:
        return self._watched(batch, lambda: self._embedder.embed(batch))

    def _watched(self, batch: MicroBatch, run: Callable[[], Embedded]) -> Embedded:
        self._watchdog.begin(self._pace.predict_s(batch.cost))
        try:
            embedded = run()
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
        """Not enough memory for a batch: free what can be, and make smaller ones."""
        self._embedder.free()
        self._rows.budget.too_large(batch.cost, batch.n_rows)

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
