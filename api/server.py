"""One HTTP connection: uvicorn's protocol over httptools, with the limits that it lacks.

A client may send a head of any size, a body of one byte a minute, a thousand requests before it reads an answer, or
nothing at all; or it may take its answer so slowly that it lies in memory for ever. Each of these has an end here, told
in the body that all our errors have as long as an answer can still be given.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from embedstream.shared import metrics
from embedstream.shared.errors import Unavailable
from embedstream.shared.logs import get_logger
from embedstream.shared.settings import Settings

from .errors import HeadTooLarge, HttpError, RequestTooSlow, error_response
from .framing import Framing, framing_of, reason_of
from .keys import OPEN_PATHS
from .pace import Alarm, BodyPace, ReaderWatch
from .transport import Transport

PROBE_CONNECTIONS = 64
"""Connections beyond the limit that are kept for as long as a probe takes."""
_PROBE_HEAD_S = 5.0
_MOST_PIPELINED = 32
_HEADER_OVERHEAD_BYTES = 32  # as HTTP/2 counts: thousands of tiny headers cost more than their bytes
_SLICE_BYTES = 16 * 1024
_CHUNKED_SLICE_BYTES = 4 * 1024  # in chunks of one byte that is about 1 ms of parsing
_LINGER_S = 5.0
_DISCARD_S = 30.0

log = get_logger()


class _Stage(Enum):
    """What is awaited from the client."""

    NOTHING = auto()
    """Until the first byte of a request: nothing is missing."""
    HEAD = auto()
    BODY = auto()
    CLOSE = auto()
    """We have said our last word, and let it arrive before the connection goes."""


class Connection(HttpToolsProtocol):
    """A connection of a client. `bound_to` makes the class that uvicorn takes.

    Args:
        arguments: uvicorn's.
    """

    settings: Settings

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._stage = _Stage.NOTHING
        self._alarm = Alarm(self.loop, self._end_of_patience)
        self._surplus = False
        self._deaf = False  # what comes is thrown away
        self._muted = False  # what the parser says is for itself
        self._unfed = bytearray()
        self._cycles: deque[RequestResponseCycle] = deque()  # without their whole answer; the first one is running
        self._last_word: Exception | None = None  # for when they have it
        self._failure: tuple[RequestResponseCycle, HttpError] | None = None
        self._began = False
        self._head_bytes = self._head_fed_bytes = self._body_left_bytes = 0
        self._framing = Framing()
        self._pace = BodyPace(self.settings, 0.0)
        self._discarding_since_s: float | None = None

    # From the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Take the connection, or refuse it when there are too many."""
        super().connection_made(cast("asyncio.Transport", Transport(transport, self._close, self._may_read)))
        self._raw = transport
        self._reader = ReaderWatch(self.loop, transport, self.settings)
        metrics.HTTP_CONNECTIONS.inc()
        beyond = len(self.connections) - self.settings.max_connections
        self._surplus = beyond > 0
        if beyond > PROBE_CONNECTIONS:
            self._refuse(self._too_many())
        else:
            self._alarm.set(_PROBE_HEAD_S if self._surplus else self.settings.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every request on it, not only the newest, that its client is gone."""
        metrics.HTTP_CONNECTIONS.dec()
        self._deaf = True
        self._unfed.clear()
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()
        self.pipeline.clear()
        self._alarm.end()
        self._reader.stop()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; much of it in slices, so that no client holds the loop up."""
        if self._deaf:
            return
        self._unset_keepalive_if_required()
        if self._unfed or len(data) > _SLICE_BYTES:
            waiting = bool(self._unfed)
            self._unfed += data
            self._raw.pause_reading()
            if not waiting:
                self._feed_slice()
        else:
            self._feed(data)

    def _feed_slice(self) -> None:
        if not self._unfed:  # refused, or cut
            return
        size = _SLICE_BYTES
        if self._stage is _Stage.BODY:
            size = _CHUNKED_SLICE_BYTES if self._framing.chunked else max(1, self._body_left_bytes)
        piece = bytes(memoryview(self._unfed)[:size])
        del self._unfed[:size]
        self._feed(piece)
        if self._unfed:
            self.loop.call_soon(self._feed_slice)
        elif not self._deaf and not self.flow.read_paused:
            self._raw.resume_reading()

    def _feed(self, data: bytes) -> None:
        in_head, self._began = self._stage is _Stage.HEAD, False
        rest = data
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    rest = rest[upgrade.args[0] :]
                    self._stay_in_http()
        except httptools.HttpParserError as error:
            self._refuse(reason_of(error))
            return
        if self._stage is _Stage.HEAD:
            self._head_fed_bytes += len(data) if in_head and not self._began else 0
            if self._head_fed_bytes > self.settings.header_limit_bytes:
                self._refuse(self._too_large())
                return
        self._set_alarm()

    def _stay_in_http(self) -> None:
        """Go on in HTTP/1.1 with a client that asks for another protocol, as the standard lets us.

        The parser takes what follows the head for that protocol. Java's client asks for HTTP/2 in its first request,
        whose body would be lost: so the parser is given the end of the head once more, without that wish.
        """
        if self._stage is not _Stage.BODY:
            return
        self._muted = True
        self.parser.feed_data(self._framing.head())
        self._muted = False

    def _may_read(self) -> bool:
        """Whether more may come from the client, now that the application wants it."""
        return not self._unfed

    # From the parser

    def on_message_begin(self) -> None:
        """Begin to count and to wait."""
        if self._muted:
            return
        super().on_message_begin()
        self._stage, self._began = _Stage.HEAD, True
        self._head_bytes = self._head_fed_bytes = 0
        self._alarm.clear()  # from its first byte on, the head has its own time

    def on_url(self, url: bytes) -> None:
        """Take a piece of the URL."""
        if self._muted:
            return
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; fields after a body are counted and dropped, for they could pass for headers."""
        if self._muted:
            return
        self._count(len(name) + len(value) + _HEADER_OVERHEAD_BYTES)
        if self._stage is _Stage.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request, unless it is one to refuse."""
        if self._muted:
            return
        self._framing = framing_of(self.parser.get_http_version(), self.headers)
        if self._surplus and self.url.partition(b"?")[0].decode("latin-1") not in OPEN_PATHS:
            raise self._too_many()
        if len(self._cycles) > _MOST_PIPELINED:
            raise Unavailable(f"At most {_MOST_PIPELINED} requests may wait for others on one connection.")
        super().on_headers_complete()
        self._stage = _Stage.BODY
        self._body_left_bytes = self._framing.length
        self._pace = BodyPace(self.settings, self.loop.time())
        self._discarding_since_s = None
        if self._surplus:
            self.cycle.keep_alive = False
        self._cycles.append(self.cycle)
        self._let_fail(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._body_left_bytes -= len(body)
        self._pace.heard(len(body), self.loop.time())
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self._body_is_ahead():
            return
        super().on_message_complete()
        self._stage = _Stage.NOTHING
        self._alarm.clear()
        if not self._cycles and not self.transport.is_closing():  # answered long ago, and the rest thrown away
            keep_s = self.settings.keep_alive_timeout_s
            self.timeout_keep_alive_task = self.loop.call_later(keep_s, self.timeout_keep_alive_handler)

    def _body_is_ahead(self) -> bool:
        """Whether the parser only believes that there is no body: see `_stay_in_http`."""
        return not self._muted and self.parser.should_upgrade() and self._framing.has_body

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.settings.header_limit_bytes:
            raise self._too_large()

    # Refusing

    def _refuse(self, error: Exception) -> None:
        """Read no more, and say why, after what is still to be answered."""
        self._deaf = True
        self._alarm.clear()
        self._unfed.clear()
        if self._stage is not _Stage.BODY:
            self._last_word = error
            if not self._cycles:
                self._say_last_word()
        elif self.cycle.response_complete:
            self.transport.close()
        elif self.cycle.response_started or not isinstance(error, HttpError):
            self._raw.abort()  # it is too late to say so
        else:
            # The application raises it where it reads, and answers like any other error: with its log line and headers.
            self.cycle.keep_alive = False
            self._failure = self.cycle, error
            self.cycle.message_event.set()

    def _let_fail(self, cycle: RequestResponseCycle) -> None:
        receive: Callable[[], Awaitable[Any]] = cycle.receive

        async def receive_or_raise() -> Any:
            message = None if self._failed(cycle) else await receive()
            if self._failure is not None and self._failed(cycle):
                raise self._failure[1]
            return message

        cycle.receive = receive_or_raise  # type: ignore[method-assign]  # uvicorn asks no class of ours to make it

    def _failed(self, cycle: RequestResponseCycle) -> bool:
        return self._failure is not None and self._failure[0] is cycle

    def _say_last_word(self) -> None:
        if self._last_word is None:
            return
        error, self._last_word = self._last_word, None
        request_id = os.urandom(8).hex()
        response = error_response(error, request_id)
        headers = [*self.server_state.default_headers, *response.raw_headers, (b"x-request-id", request_id.encode())]
        lines = [b"%s: %s\r\n" % header for header in [*headers, (b"connection", b"close")]]
        self.transport.write(b"".join((STATUS_LINE[response.status_code], *lines, b"\r\n", response.body)))
        metrics.HTTP_REQUESTS.labels("other", response.status_code).inc()
        reason = type(error).__name__
        log.info("http.refused", request_id=request_id, status=response.status_code, error=reason, detail=str(error))
        self.transport.close()

    def _too_large(self) -> HeadTooLarge:
        return HeadTooLarge(
            f"Request line and headers are above the limit of {self.settings.header_limit_bytes} bytes "
            f"(--header-limit-bytes; each header counts {_HEADER_OVERHEAD_BYTES} bytes more than it has)."
        )

    def _too_many(self) -> Unavailable:
        return Unavailable(
            f"{len(self.connections)} connections are open, more than the limit of {self.settings.max_connections} "
            "(--max-connections)."
        )

    # Closing

    def on_response_complete(self) -> None:
        """Go on with the next request, or say the last word."""
        self._cycles.popleft()
        super().on_response_complete()
        if self._cycles or self.transport.is_closing():
            return
        if self._last_word is not None:
            self._unset_keepalive_if_required()
            self._say_last_word()
        elif self._stage is _Stage.BODY:  # what is left of the body is thrown away, but not for ever
            self._discarding_since_s = self.loop.time()

    def shutdown(self) -> None:
        """Close as soon as nothing is to be answered."""
        if self._cycles:
            super().shutdown()
        else:
            self._raw.close()

    def _close(self) -> None:
        """Close; but who is still sending must first read why, and would see a reset connection instead."""
        if self._raw.is_closing():
            return
        self._unset_keepalive_if_required()
        self._deaf = True
        if self._stage in (_Stage.HEAD, _Stage.BODY) or self._surplus:
            self._stage = _Stage.CLOSE
            self._raw.write_eof()
            self._raw.resume_reading()
            self._alarm.set(_LINGER_S)
        else:
            self._raw.close()
            self._reader.start()

    # Time

    def _set_alarm(self) -> None:
        if self._alarm.is_set:
            return
        if self._stage is _Stage.BODY:
            self._alarm.set(self._pace.tick_s)
        elif self._stage is _Stage.HEAD or not self._cycles:
            self._alarm.set(self.settings.header_timeout_s)

    def _end_of_patience(self) -> None:
        match self._stage:
            case _Stage.NOTHING:
                self._raw.close()
            case _Stage.HEAD:
                limit_s = self.settings.header_timeout_s
                self._refuse(RequestTooSlow(f"The head of the request took over {limit_s:g} s (--header-timeout-s)."))
            case _Stage.BODY:
                self._judge_body(self.loop.time())
            case _Stage.CLOSE:
                self._raw.abort()

    def _judge_body(self, now_s: float) -> None:
        answered = self.cycle.response_complete
        if wrong := self._pace.verdict(now_s, held_up=self.flow.read_paused and not answered):
            self._refuse(RequestTooSlow(wrong))
        elif self._discarding_since_s is not None and now_s - self._discarding_since_s >= _DISCARD_S:
            self.transport.close()
        else:
            self._alarm.set(self._pace.tick_s)

    def pause_writing(self) -> None:
        """The answer comes faster than it is taken: from now on the client is watched."""
        super().pause_writing()
        self._reader.start()

    def resume_writing(self) -> None:
        """The answer is taken."""
        super().resume_writing()
        self._reader.stop()


def bound_to(settings: Settings) -> type[Connection]:
    """The protocol class with an operator's limits."""
    return type("BoundConnection", (Connection,), {"settings": settings})
