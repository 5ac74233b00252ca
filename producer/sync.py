"""The producer for code without an event loop: the same calls, blocking."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Iterator
from dataclasses import dataclass, field, fields
from types import AsyncGeneratorType, TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, cast, overload

from numpy.typing import NDArray

from embedstream.shared.settings import Settings

from .arguments import MapOptions
from .batches import Input, Vector
from .client import Producer
from .deliveries import Delivered
from .forks import watch
from .loop_thread import LoopThread
from .mapper import MOST_ITEMS, PATIENCE_S
from .mapping import OnFailure, checked, mapped_beside
from .request import EmbeddedSlice, Inputs

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Running:
    """The producer of one process, and what runs it."""

    thread: LoopThread
    producer: Producer


@dataclass(frozen=True, slots=True)
class SyncDelivery(Delivered):
    """Results as `SyncProducer.deliveries` gives them."""

    _thread: LoopThread = field(repr=False, compare=False)

    def ack(self) -> None:
        """Say that it is done with, as `Delivery.ack` does."""
        self._thread.call(self._acknowledge())


class SyncProducer:
    """A `Producer` on an event loop of its own, in a thread of its own. Any thread may call it.

    In a process that is forked from one that opened it, it opens itself anew at the first call: nothing is shared.

    Arguments, results and errors of every method are those of `Producer`.
    """

    def __init__(self, url: str | None = None, *, model: str | None = None, settings: Settings | None = None) -> None:
        self._arguments = (url, model, settings)
        self._running: _Running | None = None
        self._was_opened = self._reopens = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Start the thread and begin to follow the fleet.

        Raises:
            RuntimeError: it was opened before; make a new one.
        """
        if self._was_opened:
            raise RuntimeError("a producer is opened once; make a new one")
        self._was_opened = True
        self._running = self._run()
        watch(self)

    def close(self) -> None:
        """Close the producer and end the thread. Calls of other threads that still wait end with an error."""
        running, self._running, self._reopens = self._running, None, False
        if running is not None:
            try:
                running.thread.call(running.producer.close())
            finally:
                running.thread.stop()

    def forked(self) -> object:
        """Open anew at the next call: this process is the child of the one that opened it."""
        inherited, self._running = self._running, None
        self._reopens, self._lock = inherited is not None or self._reopens, threading.Lock()
        if inherited is not None:
            inherited.thread.forked()
        return inherited

    def embed(self, inputs: str | Inputs, **options: Any) -> NDArray[Any]:
        """One vector for each input: (inputs, dim) float32."""
        return self._call(lambda producer: producer.embed(inputs, **options))

    def embed_query(self, inputs: str | Inputs, **options: Any) -> NDArray[Any]:
        """One vector for each query of a search: (inputs, dim) float32."""
        return self._call(lambda producer: producer.embed_query(inputs, **options))

    def embed_document(self, inputs: str | Inputs, **options: Any) -> NDArray[Any]:
        """One vector for each text that is to be found: (inputs, dim) float32."""
        return self._call(lambda producer: producer.embed_document(inputs, **options))

    def embed_tokens(self, inputs: str | Inputs, **options: Any) -> list[NDArray[Any]]:
        """One vector for each token: for each input (tokens, dim)."""
        return self._call(lambda producer: producer.embed_tokens(inputs, **options))

    def stream(self, inputs: Inputs, **options: Any) -> Iterator[EmbeddedSlice]:
        """The vectors piece by piece, as they finish."""
        running = self._opened()
        slices = running.producer.stream(inputs, **options)
        try:
            while (piece := running.thread.call(anext(slices, None))) is not None:
                yield piece
        finally:
            running.thread.call_off(_closed(slices))

    @overload
    def map(
        self,
        items: Iterable[T],
        *,
        text: Callable[[T], Input] | None = None,
        on_failure: Literal["raise"] = "raise",
        **options: Unpack[MapOptions],
    ) -> Generator[tuple[T, NDArray[Any]], None, None]: ...

    @overload
    def map(
        self,
        items: Iterable[T],
        *,
        text: Callable[[T], Input] | None = None,
        on_failure: Literal["yield"],
        **options: Unpack[MapOptions],
    ) -> Generator[tuple[T, Vector], None, None]: ...

    def map(
        self,
        items: Iterable[T],
        *,
        text: Callable[[T], Input] | None = None,
        on_failure: OnFailure = "raise",
        **options: Unpack[MapOptions],
    ) -> Generator[tuple[T, Any], None, None]:
        """Each item with its vector, for any number of items, of which only few are in memory at a time.

        The source is read in the thread that takes the results, while it asks for the next one: database cursors, ORM
        objects and open files are touched by no other thread. So a result that is done waits while the source keeps
        that thread waiting for an item; where that matters, use the asynchronous `Producer.map`.

        Several threads may each have maps of their own at one time.
        """
        running = self._opened()
        checked(items, on_failure, options.get("most_items", MOST_ITEMS), options.get("patience_s", PATIENCE_S))
        return mapped_beside(running.thread, lambda: running.producer.mapper(**options), items, text, on_failure)

    def submit(self, inputs: str | Inputs, **options: Any) -> str:
        """Hand work over without waiting for it; the id of the request, once all of it is stored."""
        return self._call(lambda producer: producer.submit(inputs, **options))

    def result(self, request_id: str, *, timeout_s: float | None = None) -> NDArray[Any]:
        """The vectors of a submitted request: (inputs, dim)."""
        return self._call(lambda producer: producer.result(request_id, timeout_s=timeout_s))

    def result_tokens(self, request_id: str, *, timeout_s: float | None = None) -> list[NDArray[Any]]:
        """The vectors of a request submitted with `per_token`: for each input (tokens, dim)."""
        return self._call(lambda producer: producer.result_tokens(request_id, timeout_s=timeout_s))

    def forward(self, inputs: str | Inputs, to: str, **options: Any) -> str:
        """Hand work over whose results other processes receive; the id of the request, once all of it is stored."""
        return self._call(lambda producer: producer.forward(inputs, to, **options))

    def deliveries(self, inbox: str, **options: Any) -> Iterator[SyncDelivery]:
        """The results that were forwarded to an inbox, shared by all who receive from it."""
        running = self._opened()
        deliveries = running.producer.deliveries(inbox, **options)
        try:
            while True:
                delivery = running.thread.call(anext(deliveries))
                same = {told.name: getattr(delivery, told.name) for told in fields(delivery)}
                yield SyncDelivery(**same, _thread=running.thread)
        finally:
            running.thread.call_off(_closed(deliveries))

    def cancel(self, request_id: str) -> None:
        """Give a submitted request up."""
        self._call(lambda producer: producer.cancel(request_id))

    def _call(self, work: Callable[[Producer], Coroutine[Any, Any, T]]) -> T:
        running = self._opened()
        return running.thread.call(work(running.producer))

    def _opened(self) -> _Running:
        running = self._running
        if running is not None:
            return running
        with self._lock:  # several threads of a forked process may call at one time
            if self._running is None:
                if not self._reopens:
                    raise RuntimeError("the producer is not open: use `with SyncProducer(...)`")
                self._running = self._run()
            return self._running

    def _run(self) -> _Running:
        thread = LoopThread()
        try:
            return _Running(thread, thread.call(self._open()))
        except BaseException:
            thread.stop()
            raise

    async def _open(self) -> Producer:
        url, model, settings = self._arguments
        producer = Producer(url, model=model, settings=settings)
        await producer.open()
        return producer


async def _closed(pieces: AsyncGenerator[Any, None]) -> None:
    """Close a generator, once the call that was interrupted in it has ended."""
    while cast("AsyncGeneratorType[Any, None]", pieces).ag_running:  # noqa: ASYNC110 - nothing tells when it ends
        await asyncio.sleep(0.01)
    await pieces.aclose()
