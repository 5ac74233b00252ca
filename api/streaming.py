"""Answers that leave in small pieces: made ones as fast as the client takes them, others while they are made.

The connection holds a sender back (`send` waits until there is room), and tells when the client has left or was cut
off because it took nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from embedstream.producer import EmbeddedSlice, StaleCard
from embedstream.shared.results import Timing

from .disconnect import unless_hung_up
from .finite import failed_inputs, failure
from .layout import Layout
from .responses import pack

_PIECE_BYTES = 64 * 1024
"""Most bytes given to the connection at once: about as much as it takes in before it holds the sender back."""


class _Body:
    """The sending side of one answer, whose head has been sent.

    Its last bytes wait until all is done that there is to do: a client that has them may leave at once, and that would
    look as if it had hung up.
    """

    def __init__(self, send: Send, n_bytes: int | None) -> None:
        self._send = send
        self._n_left = n_bytes
        self._last = b""

    @classmethod
    async def begun(cls, send: Send, headers: list[tuple[bytes, bytes]], n_bytes: int | None) -> _Body:
        """Send the head of an answer of so many bytes; None when nobody knows yet how many."""
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        return cls(send, n_bytes)

    async def write(self, data: bytes) -> None:
        """Send a piece: wait until the connection has room, and even if it has, give others their turn."""
        for first in range(0, len(data), _PIECE_BYTES):
            part = data[first : first + _PIECE_BYTES]
            if self._n_left is not None:
                self._n_left -= len(part)
                if self._n_left == 0:
                    self._last += part
                    return
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)

    async def end(self, data: bytes = b"") -> None:
        """Send the last bytes. Nothing may be awaited after it."""
        await self._send({"type": "http.response.body", "body": self._last + data, "more_body": False})


class PiecedResponse(Response):
    """An answer that is made already, sent in pieces; its length is told before.

    Args:
        pieces: the body.
        headers: sent along.
        media_type: of the body.
    """

    def __init__(self, pieces: Sequence[bytes], headers: Mapping[str, str], media_type: str) -> None:
        self.status_code = 200
        self.background = None
        self.media_type = media_type
        self._pieces = pieces
        self._n_bytes = sum(map(len, pieces))
        self.init_headers({**headers, "content-length": str(self._n_bytes)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it.

        Raises:
            ClientDisconnect: the client hung up before the end.
        """
        del scope
        if self._n_bytes <= _PIECE_BYTES:  # the connection takes that at once: nothing to wait for
            body = await _Body.begun(send, self.raw_headers, self._n_bytes)
            await body.write(b"".join(self._pieces))
            await body.end()
        else:
            await unless_hung_up(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        body = await _Body.begun(send, self.raw_headers, self._n_bytes)
        for piece in _of_size(self._pieces):
            await body.write(piece)
        await body.end()


@dataclass(frozen=True, slots=True)
class Promise:
    """What the head of a stream says of a body that is not there yet.

    Args:
        layout: of the body.
        known: whether the model's card has told size and tokens; if not, only the vectors will.
        exact: whether the head tells of each single input.
        truncated: how many inputs lost tokens.
    """

    layout: Layout
    known: bool
    exact: bool
    truncated: int

    def keeps(self, piece: EmbeddedSlice) -> bool:
        """Whether a piece of the body is what the head has told."""
        return piece.vectors.shape[1] == self.layout.dim and (not self.exact or self._counts(piece))

    def foresaw(self, piece: EmbeddedSlice) -> bool:
        """Whether the first piece of the body is as expected, and with it the rest: no other model has answered."""
        return self.known and piece.vectors.shape[1] == self.layout.dim and self._counts(piece)

    def _counts(self, piece: EmbeddedSlice) -> bool:
        return np.array_equal(piece.tokens, self.layout.tokens[piece.first : piece.first + len(piece.tokens)])

    def of_size(self, dim: int) -> Promise:
        """The same of vectors with so many components."""
        return replace(self, layout=replace(self.layout, dim=dim))

    def of_all(self, pieces: Sequence[EmbeddedSlice]) -> Promise:
        """What can be told of the whole result."""
        tokens = np.concatenate([piece.tokens for piece in pieces])
        layout = replace(self.layout, dim=pieces[0].vectors.shape[1], tokens=tokens)
        return replace(self, layout=layout, truncated=sum(piece.truncated for piece in pieces))


class Content(Protocol):
    """What the body of a stream is made of."""

    @property
    def media_type(self) -> str:
        """Of the body."""
        ...

    @property
    def opening(self) -> bytes:
        """Before all vectors."""
        ...

    def n_bytes(self, layout: Layout) -> int | None:
        """Of the whole body; None if that cannot be told before it is made."""
        ...

    def pieces(self, piece: EmbeddedSlice, layout: Layout) -> AsyncGenerator[bytes, None]:
        """A slice, some bytes at a time; the first come when all of it is known to be good.

        Raises:
            JobFailed: a vector of it cannot be used.
        """
        ...

    def closing(self) -> bytes:
        """Behind all vectors."""
        ...


class PackedVectors:
    """The vectors in one block, in the order of the inputs, nothing between them."""

    media_type = "application/octet-stream"
    opening = b""

    def n_bytes(self, layout: Layout) -> int:
        """Of the block."""
        return layout.n_bytes

    async def pieces(self, piece: EmbeddedSlice, layout: Layout) -> AsyncGenerator[bytes, None]:
        """The bytes of a slice.

        Raises:
            JobFailed: a vector cannot be used.
        """
        vectors, tokens = piece.vectors, piece.tokens if layout.per_token else None
        for place in await failed_inputs(vectors, layout.dtype, tokens):
            raise failure(piece.first + place)
        step = max(1, _PIECE_BYTES // max(1, layout.vector_bytes))
        for first in range(0, len(vectors), step):
            yield pack(vectors[first : first + step], layout.endianness).tobytes()

    def closing(self) -> bytes:
        """Nothing."""
        return b""


class VectorStream(Response):
    """The vectors in the order of the inputs, sent while others are being computed.

    Its head leaves with the first vectors, so whatever goes wrong before has an answer of its own. What goes wrong
    afterwards can only cut the connection: because the head tells the length, or the body comes in chunks, no client
    takes the rest for the whole.

    Args:
        slices: the result in order.
        promise: what it is expected to be.
        head: makes the headers, from the promise and, if all is computed by then, where the time went.
        content: makes the body.
    """

    def __init__(
        self,
        slices: AsyncGenerator[EmbeddedSlice, None],
        promise: Promise,
        head: Callable[[Promise, Timing | None], Mapping[str, str]],
        content: Content,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.media_type = content.media_type
        self._slices = slices
        self._promise = promise
        self._head = head
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Await the first vectors, send them, and go on until the last.

        Raises:
            ClientDisconnect: the client hung up before the end.
            EmbedstreamError: there is no result, or no more of it.
        """
        del scope
        await unless_hung_up(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        content = self._content
        async with aclosing(self._slices) as slices:
            begun, promise = [await anext(slices)], self._promise
            if not promise.known and not promise.exact:
                promise = promise.of_size(begun[0].vectors.shape[1])
            elif not promise.foresaw(begun[0]):
                begun += [piece async for piece in slices]
                promise = promise.of_all(begun)
            n_bytes = content.n_bytes(promise.layout)
            blocks = content.pieces(begun[0], promise.layout)
            first = await anext(blocks, b"")  # before the head: the slice may hold what is no vector
            body = await _Body.begun(send, self._raw_head(begun, promise, n_bytes), n_bytes)
            await body.write(content.opening + first)
            async for block in blocks:
                await body.write(block)
            for piece in begun[1:]:
                await self._write(body, piece, promise.layout)
            async for piece in slices:
                if not promise.keeps(piece):
                    raise StaleCard("The model was replaced while its vectors were on their way.")
                await self._write(body, piece, promise.layout)
        await body.end(content.closing())

    async def _write(self, body: _Body, piece: EmbeddedSlice, layout: Layout) -> None:
        async for block in self._content.pieces(piece, layout):
            await body.write(block)

    def _raw_head(
        self, begun: Sequence[EmbeddedSlice], promise: Promise, n_bytes: int | None
    ) -> list[tuple[bytes, bytes]]:
        whole = sum(len(piece.tokens) for piece in begun) == promise.layout.n_inputs
        timings = [piece.timing for piece in begun]
        timing = Timing(
            max(each.queue_us for each in timings),
            max(each.inference_us for each in timings),
            sum(each.compute_tokens for each in timings),
        )
        length = {} if n_bytes is None else {"content-length": str(n_bytes)}
        self.init_headers({**self._head(promise, timing if whole else None), **length})
        return self.raw_headers


def _of_size(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of the size that is sent at once."""
    waiting = bytearray()
    for piece in pieces:
        waiting += piece
        while len(waiting) >= _PIECE_BYTES:
            yield bytes(waiting[:_PIECE_BYTES])
            del waiting[:_PIECE_BYTES]
    if waiting:
        yield bytes(waiting)
