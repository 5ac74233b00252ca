"""Bodies of requests: how large they may be, and what they may be compressed with.

The limit holds for a body as it travels and for what it inflates to, and it is kept while reading: a body that would
inflate to gigabytes is refused at the first byte too many, and has cost no more memory than one of the limit's size.
All bodies together are bounded too: compressed, a thousand of them are sent as quickly as one.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import Callable
from functools import partial
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedstream.shared import metrics
from embedstream.shared.errors import Unavailable

from .errors import CONTENT_CODINGS, PayloadTooLargeError, SchemaError, UnsupportedMediaTypeError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_WINDOW_LOG = 23
"""Of zstd: 8 MiB, what RFC 9659 asks of HTTP. Without a bound a header of some bytes reserves 128 MiB."""
_SMALL_BYTES = 4096
"""Up to here a piece is inflated on the spot: the way to a thread and back costs more."""
_SMALL_PIECE_BYTES = 64 * 1024
_PIECE_BYTES = 1024 * 1024
_TURN_MEMBERS = 32
"""Members opened in one turn: each costs up to 15 us, and empty ones give nothing that would end the turn."""
_MEMBER_BYTES = 1024
"""A body may have one member for so many bytes of the limit. Millions of empty ones fit into it, and took minutes."""
_FEW_MEMBERS = 1024
_RETRY_S = 2.0


class BodyLimit:
    """Refuses bodies above a size, by their announced length at once, else at the first byte too many; inflates others.

    Args:
        app: what reads the body, as if it had never been compressed.
        limit: bytes of one body.
        together: bytes of the bodies of all requests under way. One alone may have its limit's size all the same.
    """

    def __init__(self, app: ASGIApp, limit: int, together: int) -> None:
        self.app = app
        self._limit = limit
        self._together = together
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a body that is counted as it is read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        coding = _coding_of(headers)
        self._check(int(headers.get("content-length", 0)), "announces")
        seen = held = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            self._check(seen, "has at least")
            return message

        body = counted if coding is None else Inflated(counted, coding, self._limit).receive

        async def kept() -> Message:
            nonlocal held
            message = await body()
            size = len(message.get("body", b""))
            if size:
                held += size
                self._hold(size, held)
            return message

        try:
            await self.app(scope, kept, send)
        finally:
            self._hold(-held, 0)

    def _hold(self, size: int, own: int) -> None:
        self._held += size
        metrics.BODY_BYTES.inc(size)
        others = self._held - own
        if own and others and self._held > self._together:
            raise Unavailable(
                f"The bodies of other requests have {others} bytes here; with this one there would be more than "
                f"{self._together} (--bodies-limit-bytes).",
                retry_after_s=_RETRY_S,
            )

    def _check(self, size: int, how: str) -> None:
        if size > self._limit:
            raise PayloadTooLargeError(
                f"The body {how} {size} bytes; at most {self._limit} are allowed (--payload-limit)."
            )


def _coding_of(headers: Headers) -> str | None:
    """What the body is compressed with; None for nothing.

    Raises:
        UnsupportedMediaTypeError: with something else, or several times: each further layer would multiply what a small
            body can grow to.
    """
    named = [coding.strip().lower() for coding in ",".join(headers.getlist("content-encoding")).split(",")]
    codings = ["gzip" if coding == "x-gzip" else coding for coding in named if coding not in {"", "identity"}]
    if not codings:
        return None
    if len(codings) > 1 or codings[0] not in _DECOMPRESSORS:
        raise UnsupportedMediaTypeError(
            f"A body may have one `Content-Encoding` of {', '.join(f'`{each}`' for each in CONTENT_CODINGS)}."
        )
    return codings[0]


class Inflated:
    """A compressed body as an application reads an ordinary one, in pieces.

    Args:
        receive: where the compressed body comes from.
        coding: one of `CONTENT_CODINGS`, not `identity`.
        limit: bytes that may come out.
    """

    def __init__(self, receive: Receive, coding: str, limit: int) -> None:
        self._receive = receive
        self._coding = coding
        self._limit = limit
        self._most_members = max(_FEW_MEMBERS, limit // _MEMBER_BYTES)
        self._stream = _Stream(coding)
        self._size = 0
        self._last_came = self._ended = False

    async def receive(self) -> Message:
        """The next piece; after the last one what else the connection tells.

        Raises:
            PayloadTooLargeError: it inflates to more than the limit.
            SchemaError: it is not what it is said to be, or ends too early.
        """
        while not self._ended:
            if not self._stream.is_hungry:
                if piece := await self._piece():
                    return {"type": "http.request", "body": piece, "more_body": True}
                continue
            if self._last_came:
                if not self._stream.is_whole:
                    raise SchemaError(f"The body ends in the midst of its {self._coding} stream.")
                self._ended = True
                return {"type": "http.request", "body": b"", "more_body": False}
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._last_came = not message.get("more_body", False)
            self._stream.feed(message.get("body", b""))
        return await self._receive()

    async def _piece(self) -> bytes:
        if self._stream.fed_bytes <= _SMALL_BYTES:
            piece = self._stream.inflate(_SMALL_PIECE_BYTES)
            await asyncio.sleep(0)  # others' turn: a few bytes may become millions
        else:
            piece = await asyncio.to_thread(self._stream.inflate, _PIECE_BYTES)
        self._size += len(piece)
        if self._stream.members > self._most_members:
            raise PayloadTooLargeError(
                f"The body has more than {self._most_members} {self._coding} members: at most one for each "
                f"{_MEMBER_BYTES} bytes of the limit, {self._limit} (--payload-limit)."
            )
        if self._size > self._limit:
            raise PayloadTooLargeError(
                f"The body inflates to more than {self._limit} bytes, which is the limit (--payload-limit)."
            )
        return piece


class _Decompressor(Protocol):
    """One member. The form is that of `zstd.ZstdDecompressor`, without its optional arguments."""

    @property
    def needs_input(self) -> bool: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Deflate:
    """zlib's decompressor in the form of the others.

    Args:
        wbits: which wrapping, as in `zlib.decompressobj`.
    """

    def __init__(self, wbits: int) -> None:
        self._inner = zlib.decompressobj(wbits)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        # A full piece may have more behind it although all input was taken: the rest of a repetition.
        self.needs_input = not self._inner.unconsumed_tail and len(out) < max_length
        return out


_DECOMPRESSORS: dict[str, Callable[[], _Decompressor]] = {
    "gzip": partial(_Deflate, 16 + zlib.MAX_WBITS),
    "deflate": partial(_Deflate, zlib.MAX_WBITS),
    "zstd": partial(zstd.ZstdDecompressor, options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}),
}


class _Stream:
    """Members one behind the other, as gzip and zstd allow; all is taken out before more is put in."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._member: _Decompressor | None = None
        self._input = b""
        self.members = 0
        """How many came to their end."""
        self.fed_bytes = 0
        """How much was put in last."""

    @property
    def is_hungry(self) -> bool:
        """Whether nothing more comes out before something is put in."""
        return not self._input and (self._member is None or self._member.needs_input)

    @property
    def is_whole(self) -> bool:
        """Whether it may end here."""
        return self._member is None and not self._input

    def feed(self, data: bytes) -> None:
        """Put in what comes next. Only when it is hungry."""
        self._input = data
        self.fed_bytes = len(data)

    def inflate(self, most: int) -> bytes:
        """At most so many bytes. None do not mean that none are left: ask `is_hungry`.

        Raises:
            SchemaError: what was put in is not what it is said to be.
        """
        for _ in range(_TURN_MEMBERS):
            try:
                out = self._step(most)
            except (zlib.error, zstd.ZstdError) as error:
                what = f"What follows the end of the {self._coding} stream" if self.members else "The body"
                raise SchemaError(f"{what} is not valid {self._coding}: {error}") from None
            if out or self.is_hungry:
                return out
        return b""

    def _step(self, most: int) -> bytes:
        member = self._member or self._next_member()
        data, self._input = self._input, b""
        out = member.decompress(data, most)
        self._member = member
        if member.eof:
            self._member, self._input = None, member.unused_data
            self.members += 1
        return out

    def _next_member(self) -> _Decompressor:
        if self.members and self._coding == "deflate":
            raise zlib.error("it has one part, and something follows it")
        return _DECOMPRESSORS[self._coding]()
