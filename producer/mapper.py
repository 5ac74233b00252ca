"""Maps: items of any number in, each with its vector out, a bounded number of them under way.

Items are packed into requests as they come, several under way at a time. No timer waits for more of them: what is at
hand goes at once while few requests are under way, and the next request fills while those run.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from embedstream.shared.connections import pause
from embedstream.shared.errors import EmbedstreamError, Overloaded, ResultTimeout, Unavailable
from embedstream.shared.logs import get_logger

from .batches import Batch, Input, Vector, Waiting, misfit, renumbered, tokens_about
from .credit import REQUEST_TOKENS, Credit
from .request import Embeddings, Options, Prepared

REQUEST_INPUTS = 256
"""Most of one request: four jobs."""
PARTLY_FILLED = 4
"""Requests under way up to which the next one goes with what is at hand; then it waits until it is full, or one of
them is answered. A source that trickles is served at once, one that flows fills its requests."""
CREDIT_S = 2.0
"""How long an answer is to take: what is under way grows with the speed of the fleet until it takes so long."""
MOST_ITEMS = 16_384
PATIENCE_S = 300.0

log = get_logger()

T = TypeVar("T")


class Mapper(Generic[T]):
    """One map under way. All methods run on the event loop; whoever has one calls `close` in the end.

    Args:
        prepare: checks and tokenises a request.
        run: sends it.
        options: of the requests; they let an input fail alone.
        ordered: whether results come in the order of the items, or as they are done.
        most_items: that are read and not handed back yet.
        most_rows: that may be under way for the room that their vectors take.
        patience_s: how long no request at all may be answered before the map gives up.
        stopping: set when the producer is closed: nothing is tried again then.
    """

    def __init__(
        self,
        prepare: Callable[[Sequence[Any], Options], Awaitable[Prepared]],
        run: Callable[[Prepared], Awaitable[Embeddings]],
        options: Options,
        *,
        ordered: bool,
        most_items: int,
        most_rows: int,
        patience_s: float,
        stopping: asyncio.Event,
    ) -> None:
        self._prepare = prepare
        self._run = run
        self._options = options
        self._ordered = ordered
        self._most_items = most_items
        self._patience_s = patience_s
        self._stopping = stopping
        self._credit = Credit(CREDIT_S, most_rows)
        self._waiting: deque[Waiting[T]] = deque()
        self._waiting_tokens = 0
        self._n_read = self._n_handed_back = self._n_packed = self._n_taken = 0
        self._ended = self.closed = False
        self._done: dict[int, Batch[T]] = {}  # by the place of their first item
        self._work, self._news, self._room = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._sending: set[asyncio.Task[None]] = set()
        self._answered_s = asyncio.get_running_loop().time()
        self._trouble: type[EmbedstreamError] | None = None
        self._packing = asyncio.create_task(self._pack())
        self._packing.add_done_callback(lambda _: self._news.set())

    @property
    def room(self) -> int:
        """Items that may be read now: no further ahead than one request, and not too far before the reader."""
        held = self._n_read - self._n_handed_back
        return 0 if self._is_full else min(REQUEST_INPUTS - len(self._waiting), self._most_items - held)

    @property
    def finished(self) -> bool:
        """Whether the source has ended and all of it was taken."""
        return self._ended and self._n_taken == self._n_read

    def offer(self, item: T, given: Input) -> None:
        """Take in the next item of the source; whether there is room is the caller's to see."""
        entry = Waiting(item, given, tokens_about(given))
        self._waiting.append(entry)
        self._waiting_tokens += entry.tokens
        self._n_read += 1
        self._work.set()

    def end(self) -> None:
        """The source has no more."""
        self._ended = True
        self._work.set()
        self._news.set()

    async def wait_for_room(self) -> None:
        """Wait until another item may be read."""
        while not self.room:
            self._room.clear()
            await self._room.wait()

    async def take(self) -> Batch[T] | None:
        """The next items that are done, once those taken before are done with; None after the last.

        Raises:
            EmbedstreamError: a request has failed as a whole, for good.
        """
        while True:
            batch = self.taken()
            if batch is not None or self.finished:
                return batch
            await self.wait_for_news()

    async def wait_for_news(self) -> None:
        """Wait until items are done, there is room, or the source has ended."""
        self._news.clear()
        await self._news.wait()

    def taken(self) -> Batch[T] | None:
        """As `take`, without waiting: None when nothing is at hand."""
        self._n_handed_back = self._n_taken  # whoever asks for more has done with the last ones
        self._room.set()
        if self._packing.done():
            self._packing.result()  # a defect
        first = self._n_taken if self._ordered else next(iter(self._done), -1)
        batch = self._done.pop(first, None)
        if batch is None:
            return None
        if batch.error is not None:
            raise batch.error
        self._n_taken += len(batch.entries)
        return batch

    async def close(self) -> None:
        """Call off what is under way."""
        self.closed = True
        tasks = [self._packing, *self._sending]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._waiting.clear()
        self._done.clear()

    @property
    def _is_full(self) -> bool:
        """Whether what waits fills a request."""
        return len(self._waiting) >= REQUEST_INPUTS or self._waiting_tokens >= REQUEST_TOKENS

    async def _pack(self) -> None:
        """Send requests, one after another, each as soon as there is credit for it."""
        while True:
            while not (self._waiting and (self._is_full or self._ended or len(self._sending) < PARTLY_FILLED)):
                self._work.clear()
                await self._work.wait()
            batch = self._next()
            task = asyncio.create_task(self._send(batch))
            self._sending.add(task)
            task.add_done_callback(self._sent)
            await batch.begun.wait()

    def _next(self) -> Batch[T]:
        batch: Batch[T] = Batch(self._n_packed, [])
        tokens, kind = 0, None
        while self._waiting and len(batch.entries) < REQUEST_INPUTS:
            entry = self._waiting[0]
            kind = kind or entry.kind
            if batch.entries and (tokens + entry.tokens > REQUEST_TOKENS or entry.kind not in (None, kind)):
                break
            batch.entries.append(self._waiting.popleft())
            tokens += entry.tokens
        self._waiting_tokens -= tokens
        self._n_packed += len(batch.entries)
        self._room.set()
        self._news.set()
        return batch

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._work.set()

    async def _send(self, batch: Batch[T]) -> None:
        try:
            async with self._credit.of(batch.tokens, len(batch.entries)):
                batch.begun.set()
                batch.vectors = await self._vectors(batch)
        except EmbedstreamError as error:
            batch.error = error
        except Exception as error:
            log.exception("map.failed")
            batch.error = Unavailable(f"The request could not be sent: {type(error).__name__}.")
        batch.begun.set()
        self._done[batch.first] = batch
        self._news.set()

    async def _vectors(self, batch: Batch[T]) -> list[Vector]:
        """What became of each item."""
        places = [place for place, entry in enumerate(batch.entries) if entry.tokens]
        vectors: list[Vector] = [misfit(batch.first + place, entry.given) for place, entry in enumerate(batch.entries)]
        if places:
            result = await self._answer([batch.entries[place].given for place in places])
            matrix = result.vectors.copy()  # the buffer of a reply is read-only
            for number, place in enumerate(places):
                failure = result.failures.get(number)
                vectors[place] = matrix[number] if failure is None else renumbered(failure, number, batch.first + place)
        return vectors

    async def _answer(self, inputs: list[Any]) -> Embeddings:
        """Send a request until it is answered, or patience is over."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        while True:
            try:
                # Its time begins when it is sent, and anew when it is sent again.
                result = await self._run(replace(await self._prepare(inputs, self._options), arrived_s=None))
            except (Overloaded, Unavailable, ResultTimeout) as error:
                wait_s = 0.0 if isinstance(error, ResultTimeout) else error.retry_after_s
                patient = loop.time() + wait_s - max(begun_s, self._answered_s) <= self._patience_s
                if not patient or self._stopping.is_set():
                    raise
                if isinstance(error, Overloaded):
                    self._credit.refused()
                if self._trouble is not type(error):
                    self._trouble = type(error)
                    log.warning("map.waits", reason=str(error), patience_s=self._patience_s)
                await pause(wait_s, self._stopping)
            else:
                self._answered_s, self._trouble = loop.time(), None
                return result
