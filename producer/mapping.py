"""Maps: a source that is read no faster than it is embedded, and pairs of each item and its vector."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from embedstream.shared.errors import InvalidInput

from .batches import Batch, Input, Vector
from .failures import InputFailure
from .loop_thread import LoopThread
from .mapper import Mapper

ON_LOOP_S = 0.002
"""How long a source that never waits is read before others have their turn."""
SLICE_S = 0.02
"""The same for one that is read beside the event loop: it hands over what it has."""

CANCEL_AGAIN_S = 0.1

OnFailure: TypeAlias = Literal["raise", "yield"]
T = TypeVar("T")


def checked(items: object, on_failure: str, most_items: int, patience_s: float) -> None:
    """Check what a map is told.

    Raises:
        InvalidInput: it cannot be done.
    """
    if isinstance(items, (str, bytes)):
        raise InvalidInput("A map takes texts, one after another; a single one is for embed().", param="items")
    if on_failure not in ("raise", "yield"):
        raise InvalidInput(f"on_failure is {on_failure!r}; choose from raise, yield.", param="on_failure")
    if not (isinstance(most_items, int) and most_items >= 1):
        raise InvalidInput(f"most_items is {most_items}; it must be at least 1.", param="most_items")
    if not patience_s >= 0:
        raise InvalidInput(f"patience_s is {patience_s}; it must be at least 0.", param="patience_s")


async def mapped(
    make: Callable[[], Mapper[T]],
    items: AsyncIterable[T] | Iterable[T],
    text: Callable[[T], Input] | None,
    on_failure: OnFailure,
) -> AsyncGenerator[tuple[T, Any], None]:
    """Read a source on the event loop, and give its items with their vectors.

    Args:
        make: makes the mapper; it is closed in the end.
        items: the source.
        text: what is to be embedded of an item; None for the item itself.
        on_failure: what becomes of an item that has no vector.

    Yields:
        Pairs.

    Raises:
        EmbedstreamError: as `Producer.map` says.
        Exception: what the source or `text` has raised, after all that was read before.
    """
    mapper = make()
    reading = asyncio.create_task(_read(mapper, items, text))
    try:
        while (batch := await mapper.take()) is not None:
            for pair in _pairs(batch, on_failure):
                yield pair
        await reading  # what it has raised
    finally:
        await mapper.close()
        await _end(reading)


@dataclass(frozen=True, slots=True)
class Exchanged(Generic[T]):
    """What came of handing items over.

    Args:
        batch: items that are done, if any.
        room: items that may be read next.
        finished: whether that was all.
    """

    batch: Batch[T] | None
    room: int
    finished: bool


async def exchange(mapper: Mapper[T], items: list[tuple[T, Input]], *, ended: bool) -> Exchanged[T]:
    """Hand items over that were read elsewhere; wait for results only where no more may be read.

    Raises:
        EmbedstreamError: as `Mapper.take`.
    """
    for item, given in items:
        mapper.offer(item, given)
    if ended:
        mapper.end()
    while True:
        batch = mapper.taken()
        if batch is not None or mapper.finished or (mapper.room and not ended):
            return Exchanged(batch, mapper.room, mapper.finished)
        await mapper.wait_for_news()


def mapped_beside(
    thread: LoopThread,
    make: Callable[[], Mapper[T]],
    items: Iterable[T],
    text: Callable[[T], Input] | None,
    on_failure: OnFailure,
) -> Generator[tuple[T, Any], None, None]:
    """Read a source in the caller's thread, and give its items with their vectors, as `mapped` does.

    Args:
        thread: of the event loop.
        make: makes the mapper, there.
        items: the source.
        text: what is to be embedded of an item; None for the item itself.
        on_failure: what becomes of an item that has no vector.
    """
    source, trouble, ended = iter(items), None, False
    mapper: Mapper[T] = thread.call(_on_loop(make))
    room = mapper.room
    try:
        while True:
            read: list[tuple[T, Input]] = []
            if not ended:
                try:
                    ended = _read_some(source, text, room, read)
                except Exception as error:  # noqa: BLE001 - raised when all that was read before is done
                    trouble, ended = error, True
            said: Exchanged[T] = thread.call(exchange(mapper, read, ended=ended))
            room = said.room
            if said.batch is not None:
                yield from _pairs(said.batch, on_failure)
            elif said.finished:
                break
        if trouble is not None:
            raise trouble
    finally:
        thread.call_off(mapper.close())


async def _on_loop(make: Callable[[], T]) -> T:
    return make()


def _read_some(source: Iterator[T], text: Callable[[T], Input] | None, most: int, read: list[tuple[T, Input]]) -> bool:
    """Read as much as there is room for and comes soon. Returns whether the source has ended."""
    until_s = time.monotonic() + SLICE_S
    for _ in range(most):
        try:
            item = next(source)
        except StopIteration:
            return True
        read.append((item, item if text is None else text(item)))  # type: ignore[arg-type] # others fail alone
        if time.monotonic() > until_s:
            break
    return False


async def _read(mapper: Mapper[T], items: AsyncIterable[T] | Iterable[T], text: Callable[[T], Input] | None) -> None:
    loop = asyncio.get_running_loop()
    try:
        turn_s = loop.time()
        async for item in items if isinstance(items, AsyncIterable) else _async(items):
            if mapper.closed:  # the source has swallowed that it was cancelled
                return
            mapper.offer(item, item if text is None else text(item))  # type: ignore[arg-type] # others fail alone
            if not mapper.room:
                await mapper.wait_for_room()
                turn_s = loop.time()
            elif loop.time() - turn_s > ON_LOOP_S:
                await asyncio.sleep(0)
                turn_s = loop.time()
    finally:
        mapper.end()


async def _end(reading: asyncio.Task[None]) -> None:
    """Stop to read, whatever the source makes of it: clients of databases may swallow a cancellation."""
    while not reading.done():
        reading.cancel()
        await asyncio.wait([reading], timeout=CANCEL_AGAIN_S)
    if not reading.cancelled():
        reading.exception()  # the reader has seen it, or has left


async def _async(items: Iterable[T]) -> AsyncGenerator[T, None]:
    for item in items:
        yield item


def _pairs(batch: Batch[T], on_failure: OnFailure) -> Iterator[tuple[T, Vector]]:
    for pair in batch.pairs:
        if on_failure == "raise" and isinstance(pair[1], InputFailure):
            raise pair[1].error()
        yield pair
