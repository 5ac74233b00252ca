"""The producer for code without an event loop: the same calls, blocking."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from numpy.typing import NDArray

from embedstream.shared.settings import Settings

from .client import Producer
from .request import EmbeddedSlice, Inputs

T = TypeVar("T")


class SyncProducer:
    """A `Producer` on an event loop of its own, in a thread of its own. Any thread may call it.

    Arguments, results and errors of every method are those of `Producer`.
    """

    def __init__(self, url: str | None = None, *, model: str | None = None, settings: Settings | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="embedstream-producer", daemon=True)
        self._arguments = (url, model, settings)
        self._producer: Producer | None = None

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
        if self._thread.ident is not None:
            raise RuntimeError("a producer is opened once; make a new one")
        self._thread.start()
        try:
            self._producer = self._call(self._open())
        except BaseException:
            self._stop()
            raise

    def close(self) -> None:
        """Close the producer and end the thread. Calls of other threads that still wait end with an error."""
        producer, self._producer = self._producer, None
        if producer is not None:
            self._call(producer.close())
            self._stop()

    def embed(self, inputs: str | Inputs, **options: Any) -> NDArray[Any]:
        """One vector for each input: (inputs, dim) float32."""
        return self._call(self._opened().embed(inputs, **options))

    def embed_query(self, inputs: str | Inputs, **options: Any) -> NDArray[Any]:
        """One vector for each query of a search: (inputs, dim) float32."""
        return self._call(self._opened().embed_query(inputs, **options))

    def embed_document(self, inputs: str | Inputs, **options: Any) -> NDArray[Any]:
        """One vector for each text that is to be found: (inputs, dim) float32."""
        return self._call(self._opened().embed_document(inputs, **options))

    def embed_tokens(self, inputs: str | Inputs, **options: Any) -> list[NDArray[Any]]:
        """One vector for each token: for each input (tokens, dim)."""
        return self._call(self._opened().embed_tokens(inputs, **options))

    def stream(self, inputs: Inputs, **options: Any) -> Iterator[EmbeddedSlice]:
        """The vectors piece by piece, as they finish."""
        slices = self._opened().stream(inputs, **options)
        try:
            while (piece := self._call(anext(slices, None))) is not None:
                yield piece
        finally:
            self._call(slices.aclose())

    def submit(self, inputs: str | Inputs, **options: Any) -> str:
        """Hand work over without waiting for it; the id of the request, once all of it is stored."""
        return self._call(self._opened().submit(inputs, **options))

    def result(self, request_id: str, *, timeout_s: float | None = None) -> NDArray[Any]:
        """The vectors of a submitted request: (inputs, dim)."""
        return self._call(self._opened().result(request_id, timeout_s=timeout_s))

    def result_tokens(self, request_id: str, *, timeout_s: float | None = None) -> list[NDArray[Any]]:
        """The vectors of a request submitted with `per_token`: for each input (tokens, dim)."""
        return self._call(self._opened().result_tokens(request_id, timeout_s=timeout_s))

    def cancel(self, request_id: str) -> None:
        """Give a submitted request up."""
        self._call(self._opened().cancel(request_id))

    def _opened(self) -> Producer:
        if self._producer is None:
            raise RuntimeError("the producer is not open: use `with SyncProducer(...)`")
        return self._producer

    async def _open(self) -> Producer:
        url, model, settings = self._arguments
        producer = Producer(url, model=model, settings=settings)
        await producer.open()
        return producer

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._call(_end_all_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _end_all_tasks() -> None:
    """Whoever waits for a task of this loop would wait for ever once it stops."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=1)
