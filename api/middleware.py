"""Middleware around every endpoint, in plain ASGI: request id, access log, keys and body size."""

from __future__ import annotations

import hmac
import os
import re
import time
from collections.abc import Sequence
from hashlib import sha256

import structlog
from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedstream.shared import metrics
from embedstream.shared.logs import get_logger

from .context import Context, attach, context_of
from .errors import PayloadTooLargeError, UnauthorizedError

OPEN_PATHS = frozenset({"/health", "/livez", "/ready", "/ping", "/version"})
"""Probes and the version: they need no key, and their calls are logged only at level debug."""
METRICS_PATH = "/metrics"
"""As quiet as the probes; it needs a key unless `--metrics-open` is set."""

_QUIET_PATHS = OPEN_PATHS | {METRICS_PATH}

_SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")  # visible ASCII: safe in a header, in JSON and in a log line
_LOGGED_PATH_CHARS = 200

log = get_logger()


class RequestId:
    """Gives each request an id: the client's `X-Request-Id` when it is sane, else 16 hex digits.

    It stands in the response's `X-Request-Id`, in the body's `id` and in every log line, and in nothing that must be
    unique: clients use theirs again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Attach the context and answer with its id."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else os.urandom(8).hex()
        attach(scope, Context(request_id))

        async def add_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self.app(scope, receive, add_header)


class AccessLog:
    """One line for each request: method, path without its query, status, size, time, and what endpoints noted.

    It counts them too, by the route's template and not by the path: those who try paths must not make new metrics.

    Args:
        app: what answers.
        routes: of the application.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[Route]) -> None:
        self.app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the line once the response is sent, or was given up."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, sent, start = 0, 0, time.perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            # A probe that finds no consumer yet is no news: whoever waits for the model asks twice a second.
            write = log.debug if scope["path"] in _QUIET_PATHS else log.warning if status >= 500 else log.info
            elapsed_s = time.perf_counter() - start
            template = self._template_of(scope["path"])
            metrics.HTTP_REQUESTS.labels(template, status).inc()
            metrics.HTTP_SECONDS.labels(template).observe(elapsed_s)
            write(
                "http.request",
                method=scope["method"],
                path=scope["path"][:_LOGGED_PATH_CHARS],
                status=status,  # 0: no answer was sent
                bytes=sent,
                duration_ms=round(elapsed_s * 1000, 1),
                **context_of(scope).notes,
            )

    def _template_of(self, path: str) -> str:
        """The route a path belongs to, also when the request was refused before it was routed."""
        return next((route.path_format for route in self._routes if route.path_regex.match(path)), "other")


class Keys:
    """Lets a request in that has one of the bearer keys; without any key set, all.

    Args:
        app: what it guards.
        keys: legal keys. Only their SHA-256 is kept in memory.
        metrics_open: whether the metrics need none.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], *, metrics_open: bool = False) -> None:
        self.app = app
        self._open_paths = _QUIET_PATHS if metrics_open else OPEN_PATHS
        self._digests = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or run the application."""
        if scope["type"] == "http" and self._digests and not self._allows(scope):
            raise UnauthorizedError("The API key is missing or wrong: send the header `Authorization: Bearer <key>`.")
        await self.app(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        if scope["path"] in self._open_paths:
            return True
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:  # browsers send no key here
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = sha256(key.strip().encode("latin-1")).digest()  # the bytes of the header, whatever they encode
        # Each key is compared, and each to its end: the time tells nothing of which one was close.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


class BodyLimit:
    """Refuses bodies above a size: by their announced length at once, else at the first byte too many.

    Args:
        app: what reads the body.
        limit: bytes.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a body that is counted as it is read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._check(int(Headers(scope=scope).get("content-length", 0)), "announces")
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            self._check(seen, "has at least")
            return message

        await self.app(scope, counted, send)

    def _check(self, size: int, how: str) -> None:
        if size > self._limit:
            raise PayloadTooLargeError(
                f"The body {how} {size} bytes; at most {self._limit} are allowed (--payload-limit)."
            )
